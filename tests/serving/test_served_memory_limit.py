"""A checkpoint whose weights exceed the memory that a process may have: one rank says so, two serve
it, whether they split layers or stage them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.engine.models.checkpoints import qwen3_moe_config, random_tensors, save_tensors
from support.serving.random_checkpoint import write_json, write_tokenizer
from support.serving.served import serve

VOCAB, HIDDEN = 131_072, 1024
TABLE = VOCAB * HIDDEN * 4  # bytes in float32: of the embedding, and of the head
# A rank has 390 to 450 MiB without weights. One has two tables, or one and the half of one that is
# mapped while it is read: the file is in bfloat16.
LIMIT = 420 * 2**20 + TABLE + 3 * TABLE // 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding and head have files of their own. Most tokens are zeros, which are written fast."""
    path = tmp_path_factory.mktemp("large") / "model"
    path.mkdir()
    config = qwen3_moe_config(hidden_size=HIDDEN, num_hidden_layers=2, vocab_size=1024)
    tensors = random_tensors(config, 3, torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        few, large = tensors[name], torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)
        large[:512], large[-512:] = few.chunk(2)
        tensors[name] = large
    names = [name for name in tensors if name not in ("model.embed_tokens.weight", "lm_head.weight")]
    ordered = ["model.embed_tokens.weight", names[0], "lm_head.weight", *names[1:]]
    save_tensors(path, {name: tensors[name] for name in ordered}, 3)
    write_json(path / "config.json", config | {"vocab_size": VOCAB, "torch_dtype": "bfloat16"})
    write_tokenizer(path)
    return path


def overrides_of(model: Path) -> tuple[str, ...]:
    return (
        f"model.path={model}",
        "model.dtype=fp32",
        "model.max_len=128",
        "cluster.threads=1",
        "scheduler.max_running=4",
        "scheduler.max_batch_tokens=64",
        "kv_cache.memory=4MiB",
    )


def test_one_rank_says_what_it_lacks_and_two_serve(model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="launch left with 1") as caught,
        serve(tmp_path / "one", *overrides_of(model), "cluster.ranks_per_node=1", data_limit=LIMIT) as served,
    ):
        served.cluster()
    assert "rank 0" in str(caught.value) and "no room for all weights" in str(caught.value)
    assert "parallel.tensor, parallel.pipeline" in str(caught.value)
    found = []
    for split in ("parallel.tensor=2", "parallel.pipeline=2"):
        overrides = *overrides_of(model), "cluster.ranks_per_node=2", split
        with serve(tmp_path / split, *overrides, data_limit=LIMIT) as served:
            answer = served.ask(
                prompt=[5, 6, VOCAB - 7, 8],
                max_tokens=8,
                temperature=0,
                ignore_eos=True,
                return_token_ids=True,
            )
            found.append(answer.tokens)
    assert found[0] == found[1] and len(found[0]) == 8
    assert all(token < 512 or token >= VOCAB - 512 for token in found[0])
