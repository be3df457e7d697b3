"""Ranks that compute layers in parts, and stages that hand on what they computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.table import ops_of
from lockstep.parallel.collectives import Collectives
from lockstep.parallel.dense import split_as_attention
from lockstep.parallel.linear import Backend, SwiGLU
from lockstep.parallel.pipeline import PipelineLinks
from lockstep.parallel.stages import split_layers
from lockstep.parallel.tensor import TensorGroup, TensorSplit
from lockstep.parallel.vocabulary import Embedding, OutputHead

from .gloo_ranks import meet

SIZE = 2
VOCAB, HIDDEN, WIDTH = 9, 6, 8
CPU = torch.device("cpu")


def halves(collectives: Collectives) -> dict[str, tuple[Any, Any]]:
    """Results of each layer by its parts, beside those of the whole layer."""
    split = TensorGroup(collectives)
    draw = torch.Generator().manual_seed(1)
    table, head = (torch.randn(VOCAB, HIDDEN, generator=draw) for _ in range(2))
    gate_up, down = (
        torch.randn(2 * WIDTH, HIDDEN, generator=draw),
        torch.randn(HIDDEN, WIDTH, generator=draw),
    )
    tokens = torch.tensor([0, 4, 5, 8, 3])
    x_TD = torch.randn(len(tokens), HIDDEN, generator=draw)
    found: dict[str, tuple[Any, Any]] = {}

    backend = Backend(torch.float32, CPU, ops_of("reference"), split_as_attention(split))
    embedding, output = Embedding(VOCAB, HIDDEN, backend), OutputHead(HIDDEN, VOCAB, backend)
    _fill(embedding, table)
    _fill(output, head)
    found["embedding"] = _lists(embedding.embed(tokens), table[tokens])
    found["tied head"] = _lists(embedding.head(x_TD), x_TD @ table.T)
    found["head"] = _lists(output.head(x_TD), x_TD @ head.T)

    block = SwiGLU(HIDDEN, WIDTH, backend, member=split)
    gate, up = gate_up.chunk(2)
    own = slice(split.index * WIDTH // SIZE, (split.index + 1) * WIDTH // SIZE)
    block.gate_up_proj.weight.copy_(torch.cat([gate[own], up[own]]))
    block.down_proj.weight.copy_(down[:, own])
    whole = (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
    found["SwiGLU"] = _lists(split.total(block.swiglu(x_TD)), whole)

    for num_tokens in (0, 1, 2, 5):
        found[f"{num_tokens} tokens there and back"] = _there_and_back(split, x_TD[:num_tokens])
    return found


def most(collectives: Collectives) -> tuple[list[int], list[int]]:
    """Ids of the largest values, where ranks have equal ones, NaN, or none but -inf; then those of
    no row.
    """
    split, nan, inf = TensorGroup(collectives), float("nan"), float("inf")
    values = [[1.0, 2.0, 5.0, nan, 1.0, nan, -inf, -0.0], [2.0, 1.0, 5.0, 1.0, nan, nan, -inf, 0.0]]
    ids = torch.arange(8) + 100_000 * split.index
    found = split.most(torch.tensor(values[split.index]), ids)
    return found.tolist(), split.most(torch.zeros(0), ids[:0]).tolist()


def relay(collectives: Collectives) -> list[Any]:
    """Two steps: one stage sends hidden states and gets tokens, the other does the reverse."""
    stages = split_layers((1, 1, 1, 1), (1, 2, 3), SIZE)
    tokens = meet("tokens", collectives.index, SIZE, collectives)
    links = PipelineLinks(collectives, tokens, stages[collectives.index], CPU)
    if links.stage.first:
        links.send(7, torch.arange(3.0).repeat(2, 1))
        links.send(8, torch.arange(5.0, 8.0)[None])
        pending = [links.expect_tokens(7, 2), links.expect_tokens(8, 1)]
        found = [links.take_tokens(each).tolist() for each in reversed(pending)][::-1]
        collectives.wait(collectives.all_gather(torch.zeros(1), "the end"))
        return found
    expected = [links.expect(step, count, 3, torch.float32) for step, count in ((7, 2), (8, 1))]
    found = [links.wait(each).tolist() for each in expected]
    links.send_tokens(7, torch.tensor([10, 11]))
    links.send_tokens(8, torch.tensor([20]))
    # A sender that ends takes its messages along.
    collectives.wait(collectives.all_gather(torch.zeros(1), "the end"))
    return found


def _fill(layer: Embedding | OutputHead, whole: Tensor) -> None:
    start, end = layer.shards()["weight"].bounds(len(layer.weight))
    layer.weight[: end - start] = whole[start:end]


def _there_and_back(split: TensorSplit, x_TD: Tensor) -> tuple[Any, Any]:
    """Every rank's run of the sum of updates, joined again; each rank's update is a half."""
    own = split.scatter((x_TD, x_TD / SIZE))
    x, update = split.gather(own, len(x_TD))
    return _lists(x if update is None else x + update, 2 * x_TD)


def _lists(here: Tensor, whole: Tensor) -> tuple[Any, Any]:
    return here.tolist(), whole.tolist()
