"""Questions to the nodes of a Ray cluster: one that answers and one that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.launch.environment import prepare_ray
from lockstep.launch.preflight.probe import Questions
from lockstep.launch.recipe.file import find_recipe

pytestmark = [pytest.mark.ray]
DEMO = find_recipe("demo").parent / "demo" / "model"


def test_a_node_that_does_not_answer_is_a_finding_and_the_others_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_ray()
    from lockstep.launch.cluster.ray_session import Node, RaySession
    from lockstep.launch.preflight import ray_nodes as check_ray

    monkeypatch.setattr(check_ray, "START_SECONDS", 10.0)
    session = RaySession(tmp_path, address=None, num_cpus=1)
    try:
        ghost = Node("ab" * 28, "ghost", "198.51.100.9", 1.0, 0)
        nodes = check_ray.RayNodes([session.here, ghost])
        [finding] = nodes.silent
        assert (finding.level, finding.where) == ("error", "ghost (198.51.100.9)")
        assert "its probe to start" in finding.text
        [facts] = nodes.facts(Questions(str(DEMO), seconds=60.0))
        assert (str(facts), facts.failed) == (str(session.here), {})
        [clock] = nodes.clocks()
        assert abs(clock.ahead) <= 0.1 + clock.doubt
        assert nodes.links() == []
        assert len(nodes.silent) == 1
    finally:
        session.close()
