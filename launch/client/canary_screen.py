"""Comparisons of answers on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ..capacity.screen import table_of
from .answers import AnsweredToken
from .comparison import Comparison, Fork, Outcome

_STYLE = {Outcome.SAME: "green", Outcome.NEAR_TIE: "yellow"}


def show_comparisons(compared: Sequence[Comparison], tolerance: float, console: Console) -> None:
    """Prints a table, a line per fork, and a count of outcomes."""
    table = table_of(
        "answers, log-probabilities by absolute difference",
        "prompt",
        "outcome",
        "equal tokens",
        "largest",
        "mean",
    )
    for each in compared:
        style = _STYLE.get(each.outcome, "bold red")
        table.add_row(
            escape(each.name),
            f"[{style}]{each.outcome}[/]",
            f"{each.num_equal} of {each.num_tokens}",
            f"{each.largest:.2g}",
            f"{each.mean:.2g}",
        )
    console.print(table)
    for each in compared:
        if each.fork is not None:
            console.print(escape(f"{each.name}: {fork_text(each.fork)}"))
    counts = [(outcome, sum(each.outcome == outcome for each in compared)) for outcome in Outcome]
    total = ", ".join(f"{count} {outcome}" for outcome, count in counts if count)
    console.print(f"{len(compared)} prompts: {total} (--tolerance {tolerance:g})")


def fork_text(fork: Fork) -> str:
    """A fork in words; the first token of an answer is token 1."""
    before = _rated(fork.before, fork.gap_before, fork.now)
    now = _rated(fork.now, fork.gap_now, fork.before)
    return f"differs first at token {fork.position + 1}: stored {before}; now {now}"


def _rated(chosen: AnsweredToken | None, gap: float | None, other: AnsweredToken | None) -> str:
    if chosen is None:
        return "the answer had ended"
    text = f"{chosen.token!r} (id {chosen.id}) at {chosen.logprob:.4f}"
    if other is None:
        return text
    rated = f"not among its {len(chosen.alternatives)} likeliest"
    return f"{text}, {other.token!r} {rated if gap is None else f'at {chosen.logprob - gap:.4f}'}"
