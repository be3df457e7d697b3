"""The capacity plan on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .plan import CapacityPlan, Phase, size_text


def show_plan(plan: CapacityPlan, title: str, console: Console) -> None:
    """Prints tables of memory, capacity and floors, then the misfits."""
    setup = plan.setup
    mesh, shape = setup.mesh, setup.shape
    ranks = "1 rank" if mesh.world == 1 else f"{mesh.world} ranks"
    experts = "" if setup.weights == setup.expert_weights else f", experts {setup.expert_weights}"
    console.print(
        f"[bold]{escape(title)}[/bold]: {shape.total_params / 1e9:.1f} G parameters of {shape.family} "
        f"on {ranks} ({mesh.sizes}); weights {setup.weights}{experts}, KV {setup.kv_dtype}, "
        f"dispatch {setup.dispatch}{' in fp8' if setup.wire == 'fp8' else ''}"
    )
    console.print(f"verified: {escape(plan.verified or 'the recipe does not say')}\n")
    console.print(_memory_table(plan))
    console.print(_capacity_table(plan))
    console.print(_floor_table(plan))
    for line in plan.unsupported:
        console.print(f"[yellow]this version refuses to launch it:[/yellow] {escape(line)}")
    for line in plan.misfits:
        console.print(f"[red]does not fit:[/red] {escape(line)}")
    if plan.fits:
        console.print("[green]fits[/green]")


def table_of(title: str, *columns: str) -> Table:
    """An empty table: the first column for text, the others for figures."""
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _memory_table(plan: CapacityPlan) -> Table:
    spans = [(rank.first_rank, rank.last_rank) for rank in plan.ranks]
    names = [f"ranks {first}-{last}" if first < last else f"rank {first}" for first, last in spans]
    table = table_of(f"memory of a rank ({size_text(plan.setup.rank_memory)})", "", *names)
    held = [rank.memory for rank in plan.ranks]
    rows = [
        ("attention", [memory.weights.attention for memory in held]),
        ("dense layers, shared experts", [memory.weights.dense for memory in held]),
        ("gates", [memory.weights.gates for memory in held]),
        (f"experts ({plan.setup.num_slots} slots a layer)", [memory.weights.experts for memory in held]),
        ("redundant slots", [memory.weights.redundant for memory in held]),
        ("empty slots", [memory.weights.empty_slots for memory in held]),
        ("embeddings, output head", [memory.weights.embeddings for memory in held]),
        ("KV pool", [memory.kv_pool for memory in held]),
        ("activations (estimate)", [memory.activations for memory in held]),
        (f"dispatch buffers at {plan.setup.capacity} tokens", [memory.dispatch for memory in held]),
        ("captured steps (estimate)", [memory.captured for memory in held]),
        ("experts on the move", [memory.moves for memory in held]),
        ("libraries", [memory.reserve for memory in held]),
        ("headroom", [memory.headroom for memory in held]),
    ]
    for name, sizes in rows:
        if any(sizes):
            table.add_row(name, *(size_text(size) for size in sizes))
    return table


def _capacity_table(plan: CapacityPlan) -> Table:
    table = table_of("capacity", "", "per rank", "total")
    table.add_row("KV tokens", f"{plan.kv_tokens_per_rank:,}", f"{plan.kv_tokens:,}")
    table.add_row(
        f"requests of {plan.context:,} tokens at once",
        f"{plan.largest_batch_per_rank:,}",
        f"{plan.largest_batch:,}",
    )
    table.add_row("longest context", f"{plan.longest_context:,}", "")
    if plan.setup.mesh.data > 1:
        table.add_row("data indices whose loss the others survive", "", str(plan.setup.spare_data))
    return table


def _floor_table(plan: CapacityPlan) -> Table:
    table = table_of(
        f"floors at data-sheet rates, context {plan.context:,}; a real engine is slower",
        "",
        "decode",
        "prefill",
    )
    phases = (plan.decode, plan.prefill)

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    row("tokens of a step per rank", [f"{phase.tokens:,}" for phase in phases])
    row(
        "dispatch per layer",
        [_exchange(phase.traffic.dispatch_bytes, phase.traffic.dispatch_seconds) for phase in phases],
    )
    row(
        "combine per layer",
        [_exchange(phase.traffic.combine_bytes, phase.traffic.combine_seconds) for phase in phases],
    )
    for part in ("compute", "memory", "network"):
        row(part, [time_text(getattr(phase.floor, part)) for phase in phases])
    row("binds", [phase.floor.binds for phase in phases])
    row("step, fully overlapped", [time_text(phase.floor.seconds) for phase in phases])
    row("step, nothing overlapped", [time_text(phase.floor.serial) for phase in phases])
    row(
        "output token | 1k prompt tokens",
        [time_text(plan.seconds_per_token), time_text(plan.seconds_per_1k_prompt)],
    )
    row("tokens/s of all ranks", [f"{_rate(plan, phase):,.0f}" for phase in phases])
    return table


def _rate(plan: CapacityPlan, phase: Phase) -> float:
    return phase.tokens * plan.setup.mesh.data / phase.floor.seconds


def _exchange(num_bytes: int, seconds: float) -> str:
    return f"{size_text(num_bytes)}, {1e6 * seconds:,.1f} us" if num_bytes else "-"


def time_text(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms" if seconds < 10 else f"{seconds:,.1f} s"
