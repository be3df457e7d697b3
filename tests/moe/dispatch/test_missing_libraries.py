"""Exchanges by libraries that are not installed: a rank says which package it lacks."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.distributed import HashStore

from lockstep.engine.rank.dispatch import build_dispatcher
from lockstep.moe.balance.placement import contiguous
from lockstep.moe.config import MoEConfig
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.mesh import Mesh
from lockstep.parallel.microbatches import Turns
from support.engine.rank.mock_controller import bare_spec


@pytest.mark.parametrize(
    ("dispatch", "module", "package"),
    [
        ("flashinfer", "flashinfer.moe_ep", "flashinfer-python"),
        ("deepep", "deep_ep", "sgl-deep-ep"),
        ("nccl_ep", "nccl.core", "nccl-extensions"),
    ],
)
def test_a_library_that_is_not_there_is_named(
    dispatch: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    spec = bare_spec(device="cuda:0", dispatch=dispatch, mesh=Mesh(data=2))
    experts = Collectives("experts", 0, 2, HashStore(), 1.0, torch.device("cpu"))
    moe = MoEConfig(hidden=8, expert_width=8, num_experts=4, top_k=2)
    with pytest.raises(ValueError, match=rf"experts\.dispatch = {dispatch}: .*install {package}"):
        build_dispatcher(spec, moe, torch.bfloat16, contiguous(1, 4, 2), experts, Turns())
