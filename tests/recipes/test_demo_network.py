"""The training code against plain torch, and the exported checkpoint against transformers and our
own reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from lockstep.engine.models.checkpoint import read_checkpoint
from lockstep.engine.models.config import load_config
from lockstep.kernels.reference.four_bit import dequantise
from lockstep.launch.recipe.file import find_recipe
from lockstep.recipes.demo.training import routing
from lockstep.recipes.demo.training.batches import Packer
from lockstep.recipes.demo.training.compiled import Compiled, build, supported
from lockstep.recipes.demo.training.export import checkpoint_tensors, export, read_network
from lockstep.recipes.demo.training.four_bit import FORMATS
from lockstep.recipes.demo.training.network import Network, Packed
from lockstep.recipes.demo.training.operations import Operations, rotate
from lockstep.recipes.demo.training.optimiser import Optimiser, orthogonal
from lockstep.recipes.demo.training.shape import CONFIG
from support.engine.models.local_model import load_local

MODEL = find_recipe("demo").parent / "demo" / "model"


def rough(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_()


def apart(found: Tensor, expected: Tensor) -> float:
    return float(((found.float() - expected.float()).norm() / expected.float().norm()).detach())


def check_gradients(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients agree within bf16 precision."""
    assert apart(found, expected) < 0.01
    grad = torch.randn(found.shape)
    got = torch.autograd.grad(found, leaves, grad.to(found.dtype), retain_graph=True)
    want = torch.autograd.grad(expected, leaves, grad.to(expected.dtype))
    assert max(apart(a, b) for a, b in zip(got, want, strict=True)) < 0.02


@pytest.fixture(scope="module", params=["plain", "compiled"])
def operations(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Operations:
    if request.param == "plain":
        return Operations()
    if not supported():
        pytest.skip("needs g++ and a CPU with AVX512-BF16")
    return Compiled(build(tmp_path_factory.mktemp("library")))


def test_attention_stays_inside_documents(operations: Operations) -> None:
    torch.manual_seed(0)
    lengths = [5, 130, 500, 1, 64]
    num = sum(lengths)
    q, kv, wide = rough(num, 2, 64), rough(num, 2, 96), rough(num, 48)
    turns = torch.rand(num, 16) * 6
    angles = turns.cos(), turns.sin()
    rope = wide[:, 16:]
    queries = torch.cat([q[..., :32], rotate(q[..., 32:], angles)], -1)
    keys = torch.cat([kv[..., :32], rotate(rope[:, None], angles).expand(-1, 2, -1)], -1)
    parts = zip(*(x.float().split(lengths) for x in (queries, keys, kv[..., 32:])), strict=True)
    expected = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in part), is_causal=True, scale=0.25
        ).transpose(0, 1)
        for part in parts
    ]
    check_gradients(operations.attend(q, kv, rope, angles, lengths, 0.25), torch.cat(expected), [q, kv, wide])


def test_pairs_are_rotated() -> None:
    x, turn = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]), torch.tensor([[torch.pi / 2, torch.pi]])
    assert rotate(x, (turn.cos(), turn.sin())).flatten().tolist() == pytest.approx(
        [0.0, 0.0, 1.0, -2.0], abs=1e-6
    )


def test_swiglu(operations: Operations) -> None:
    torch.manual_seed(0)
    both = rough(50, 96)
    check_gradients(operations.swiglu(both), F.silu(both.float()[:, :48]) * both.float()[:, 48:], [both])


def test_experts_sum_with_weights(operations: Operations) -> None:
    torch.manual_seed(0)
    num, hidden, experts, width, top_k = 300, 32, 8, 16, 3
    x, w13, w2 = rough(num, hidden), rough(experts, 2 * width, hidden), rough(experts, hidden, width)
    ids = torch.rand(num, experts - 1).topk(top_k).indices  # the last expert gets no rows
    weights = torch.rand(num, top_k).requires_grad_()
    expected = torch.zeros(num, hidden)
    for choice in range(top_k):
        up = torch.einsum("td,tfd->tf", x.float(), w13.float()[ids[:, choice]])
        act = F.silu(up[:, :width]) * up[:, width:]
        expected = expected + weights[:, choice : choice + 1] * torch.einsum(
            "tf,tdf->td", act, w2.float()[ids[:, choice]]
        )
    check_gradients(operations.run_experts(x, ids, weights, w13, w2), expected, [x, weights, w13, w2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(operations: Operations, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 32).to(dtype).requires_grad_(), torch.rand(32, requires_grad=True)
    check_gradients(operations.normalise(x, weight), F.rms_norm(x.float(), (32,), weight, 1e-6), [x, weight])


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (3, 16, 48)])
def test_muon_makes_singular_values_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(1)
    small: dict[str, Any] = CONFIG | {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
    }
    made = Network(small)
    for gate in made.gates():
        gate.e_score_correction_bias.normal_(std=0.1)
    torch.nn.init.normal_(made.head.weight, std=0.1)
    return made.eval()


def test_a_few_steps_learn_a_batch(network: Network) -> None:
    made = Network(network.shape).train()
    optimiser = Optimiser(made, 1)
    batch = Packed(torch.randint(64, (96,)), torch.ones(96), [40, 56])
    losses = []
    for step in range(12):
        loss, ahead = made.losses(batch, True)
        (loss + ahead).backward()
        for name, parameter in made.named_parameters():
            assert parameter.grad is not None, name
            optimiser.update(name, parameter, parameter.grad / 96, (0.02, 0.01), step + 1)
            parameter.grad = None
        losses.append((loss.item() / 96, ahead.item() / 96))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.6 * losses[0][1]


def test_transformers_gives_the_same_logits(network: Network, tmp_path: Path) -> None:
    tokens = torch.randint(64, (1, 50))
    export(network, MODEL, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(network.shape))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens).logits[0]
        states, _ = network.states(Packed(tokens[0], torch.ones(50), [50]))
        assert apart(network.head(states), expected) < 0.03  # ours computes in bf16


def test_a_checkpoint_reads_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    made = Network(CONFIG)
    export(made, MODEL, tmp_path)
    again = read_network(tmp_path).state_dict()
    assert all(
        torch.equal(again[name], tensor.bfloat16().float()) for name, tensor in made.state_dict().items()
    )


def test_matrices_may_be_exported_in_fp8(tmp_path: Path) -> None:
    """Blocks of 32 x 32: several per matrix, and a partial last one for the width of an expert."""
    made = Network(CONFIG)
    export(made, MODEL, tmp_path, (32, 32))
    plain = checkpoint_tensors(made)
    model = load_local(tmp_path, torch.float32)
    assert model.config.fp8 is not None and model.config.fp8.block == (32, 32)
    stored = read_checkpoint(tmp_path)
    eight = {name for name, each in stored.items() if each.dtype == "F8_E4M3"}
    assert {name.split(".")[-2] for name in set(plain) - eight if plain[name].dim() == 2} == {
        "embed_tokens", "lm_head", "gate", "eh_proj",
    }  # fmt: skip
    for name, tensor in model.checkpoint_tensors().items():
        expected = plain[name].float()
        # Half a step of e4m3 is at most 1/28 of the largest value.
        tolerance = 0.04 * expected.abs().max() if name in eight else 0.0
        assert (tensor - expected).abs().max() <= tolerance, name
        assert name not in eight or not torch.equal(tensor, expected), name


@pytest.mark.parametrize("name", FORMATS)
def test_routed_experts_may_be_exported_in_4_bits(name: str, tmp_path: Path) -> None:
    """An expert's width of 48 leaves the last group of a row half full."""
    export(read_network(MODEL), MODEL, tmp_path, four_bit=FORMATS[name])
    model, plain = load_local(tmp_path, torch.float32, "reference"), load_local(MODEL, torch.float32)
    assert model.config.four_bit is not None and model.config.four_bit.format.name == name
    for key, tensor in plain.checkpoint_tensors().items():
        assert torch.equal(model.checkpoint_tensors()[key], tensor), key
    for layer, exact in zip(model.expert_layers(), plain.expert_layers(), strict=True):
        assert layer.four_bit is not None
        for w, wide in zip(layer.four_bit, (exact.w13_SFD, exact.w2_SDF), strict=True):
            error = (dequantise(w) - wide).norm() / wide.norm()
            assert 0.05 < error < 0.15, "of random values 4 bits lose about a tenth"


def test_the_predictor_is_the_layer_past_the_last(network: Network) -> None:
    names = checkpoint_tensors(network)
    last = {name.removeprefix("model.layers.2.") for name in names if name.startswith("model.layers.2.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < last
    assert {
        "self_attn.kv_b_proj.weight",
        "mlp.experts.7.down_proj.weight",
        "mlp.gate.e_score_correction_bias",
    } < last


def test_the_committed_checkpoint_is_of_this_shape() -> None:
    config = load_config(MODEL)
    assert (config.family, config.max_position, config.eos_ids, config.moe.num_experts, config.moe.top_k) == (
        "deepseek_v3",
        4096,
        (1,),
        32,
        4,
    )
    found = {name: stored.shape for name, stored in read_checkpoint(MODEL).items()}
    assert found == {
        name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(Network(CONFIG)).items()
    }


def test_the_folder_is_small_enough_for_a_repository() -> None:
    """Code, phrases, figures and checkpoint. The routing trace may take another 2 MB."""
    folder = MODEL.parent
    kept = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not {"state", "__pycache__"} & set(path.relative_to(folder).parts)
    ]
    assert sum(path.stat().st_size for path in kept if path.suffix != ".npz") < 14e6
    assert sum(path.stat().st_size for path in kept if path.suffix == ".npz") < 2e6


def test_the_trace_counts_every_token_in_every_layer(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "POOL", 8)
    monkeypatch.setattr(routing, "PHASE", 40)
    torch.manual_seed(2)
    wide = Network(network.shape | {"vocab_size": CONFIG["vocab_size"]}).eval()
    counts_SLE, tokens_SF = routing.trace(wide, Packer(MODEL), 80)
    assert counts_SLE.shape == (80, 1, 8)
    assert (counts_SLE.sum(2) == 4 * tokens_SF.sum(1)[:, None]).all()
    assert tokens_SF.sum(1).max() <= routing.PROMPT_TOKENS + routing.SLOTS
    assert tokens_SF[:40, 0].sum() > 2 * tokens_SF[40:, 0].sum()  # arithmetic comes first
    assert len(routing.report(counts_SLE, tokens_SF).splitlines()) == 3  # a head, the layer, a legend
