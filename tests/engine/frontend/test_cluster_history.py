"""Changes of the cluster as a frontend hears of them, with their times."""

from __future__ import annotations

from typing import Any

import msgspec

from lockstep.engine.frontend.cluster_history import MOST_EVENTS, ClusterHistory
from lockstep.engine.protocol.cluster_state import ClusterState, RankState
from support.engine.frontend.scripted_controller import STATE


def rank(number: int, state: str = "serving", pid: int = 0) -> RankState:
    return RankState(number, "host-a", pid or 100 + number, state, 0, 0, 0, 8, 0.01, 0.001)


class Heard:
    """A history with a clock of the test's own, and the last state."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.history = ClusterHistory(lambda: self.now)
        self.state: ClusterState = msgspec.structs.replace(STATE, ranks=(rank(0), rank(1)))
        self.history.heard(self.state)

    def after(self, seconds: float, **changes: Any) -> dict[str, Any]:
        self.now += seconds
        self.state = msgspec.structs.replace(self.state, **changes)
        self.history.heard(self.state)
        return self.history.describe()


def texts(told: dict[str, Any], since: float = 0.0) -> list[str]:
    return [event["text"] for event in told["events"] if event["time"] > since]


def test_the_first_state_is_what_the_frontend_found() -> None:
    told = Heard().history.describe()
    assert texts(told) == ["this frontend starts in epoch 1", "serving"]
    assert (told["since"], told["heard"], told["rank_since"]) == (1000.0, 1000.0, [1000.0, 1000.0])


def test_states_without_a_change_leave_no_event_and_no_new_since() -> None:
    heard = Heard()
    told = heard.after(5, num_running=3, step=99)
    assert len(told["events"]) == 2 and told["heard"] == told["time"] == 1005.0
    assert (told["since"], told["rank_since"]) == (1000.0, [1000.0, 1000.0])


def test_a_death_and_its_replacement_are_told_with_their_times() -> None:
    heard = Heard()
    reason = "rank 1 is lost: killed by SIGKILL"
    lost = heard.after(7, phase="recovering", reason=reason, epoch=2, ranks=(rank(0), rank(1, "lost")))
    assert (lost["since"], lost["rank_since"]) == (1007.0, [1000.0, 1007.0])
    assert texts(lost, 1000) == ["epoch 2 begins", f"recovering: {reason}", "rank 1 on host-a: lost"]
    back = heard.after(2, phase="serving", reason="", ranks=(rank(0), rank(1, pid=77)))
    assert (back["since"], back["rank_since"]) == (1009.0, [1000.0, 1009.0])
    assert texts(back, 1008) == ["serving", "rank 1 on host-a: serving as process 77"]


def test_a_rank_that_was_replaced_between_two_states_is_told_of() -> None:
    told = Heard().after(1, epoch=2, ranks=(rank(0, pid=55), rank(1)))
    assert texts(told, 1000) == ["epoch 2 begins", "rank 0 on host-a: serving as process 55"]
    assert told["rank_since"] == [1001.0, 1000.0]


def test_degradation_and_preemptions_are_told() -> None:
    heard = Heard()
    assert texts(heard.after(1, degraded="frontend-1 is away", preemptions=1), 1000) == [
        "degraded: frontend-1 is away",
        "1 running request gave way: KV full",
    ]
    assert texts(heard.after(1, degraded="", preemptions=4), 1001) == [
        "no longer degraded: frontend-1 is away",
        "3 running requests gave way: KV full",
    ]


def test_only_the_last_events_are_kept() -> None:
    heard = Heard()
    for epoch in range(2, MOST_EVENTS + 50):
        told = heard.after(1, epoch=epoch)
    assert len(told["events"]) == MOST_EVENTS
    assert told["events"][-1]["text"] == f"epoch {MOST_EVENTS + 49} begins"
