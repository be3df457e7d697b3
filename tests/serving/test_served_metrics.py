"""The metrics of the contract on a live server, compared with the requests it was sent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.serving.served import Served

CONTRACT = Path(__file__).parent / "metrics_contract.txt"
LINE = re.compile(r"^([a-zA-Z0-9_:]+)(?:\{(.*)\})? (\S+)$")


def promised() -> list[tuple[str, list[str]]]:
    """(name with prefix, buckets or labels)."""
    found = []
    for line in CONTRACT.read_text().splitlines():
        if not line.startswith("#"):
            whose, name, *rest = line.split()
            found += [
                (f"{prefix}:{name}", rest)
                for prefix in (("vllm", "lockstep") if whose == "both" else ("lockstep",))
            ]
    return found


def scrape(served: Served) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by name: labels and value."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in served.http.get("/metrics").text.splitlines():
        match = LINE.match(line)
        if match:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            samples.setdefault(match[1], []).append((labels, float(match[3])))
    return samples


@pytest.fixture(scope="module")
def samples(demo: Served) -> dict[str, list[tuple[dict[str, str], float]]]:
    demo.ask(prompt=list(range(10, 60)), max_tokens=200, ignore_eos=True)
    demo.counted("prompt_tokens")  # waits for the controller's next word
    return scrape(demo)


@pytest.mark.parametrize(
    ("name", "rest"), promised(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_contract_is_kept(
    name: str, rest: list[str], samples: dict[str, list[tuple[dict[str, str], float]]]
) -> None:
    if rest and rest[0][-1].isdigit():
        bounds = [labels["le"] for labels, _ in samples[f"{name}_bucket"]]
        assert bounds == [*(str(float(bound)) for bound in rest), "+Inf"]
        assert f"{name}_sum" in samples and f"{name}_count" in samples
    else:
        assert samples[name]
        for labels, _ in samples[name]:
            assert set(rest) <= set(labels)
            assert not {"pid", "process", "frontend", "worker"} & set(labels)


def test_experts_and_phases_were_counted_on_the_ranks(
    samples: dict[str, list[tuple[dict[str, str], float]]],
) -> None:
    """200 steps are three reports of 64, in each of which every token meets top_k experts of every
    layer.
    """
    loads = {
        (labels["layer"], labels["rank"]): value for labels, value in samples["lockstep:expert_load_total"]
    }
    by_layer: dict[str, float] = {}
    for (layer, _), value in loads.items():
        by_layer[layer] = by_layer.get(layer, 0) + value
    assert len(set(by_layer.values())) == 1 and min(by_layer.values()) > 0, by_layer
    for phase in ("dispatch", "expert", "combine"):
        seconds = [value for _, value in samples[f"lockstep:{phase}_seconds_total"]]
        assert len(seconds) == 2 and min(seconds) > 0
    busy = {labels["rank"]: value for labels, value in samples["lockstep:rank_busy_seconds_total"]}
    assert min(busy.values()) > 0
    [(_, tokens)] = samples["lockstep:step_tokens_total"]
    assert tokens == sum(value for _, value in samples["lockstep:rank_tokens_total"])
    assert tokens == samples["lockstep:iteration_tokens_total_sum"][0][1] >= 249
