"""Writes the last state of training as a Hugging Face checkpoint: ``python -m
lockstep.recipes.demo.training.export [DIRECTORY]``.

For comparison with bf16, ``--fp8-block ROWS COLUMNS`` writes matrices in FP8 with a scale per
block, as in DeepSeek-V3; ``--four-bit FORMAT`` writes the kept checkpoint again with its routed
experts in int4, mxfp4 or nvfp4.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ....kernels.formats.four_bit_format import FourBitFormat
from ....kernels.reference.fp8 import quantise_blocks
from ..files import MODEL, STATE, write_json
from .four_bit import FORMATS, in_four_bits, quantisation_of
from .network import Network
from .shape import CONFIG

SHARDS = 2


def last_network() -> Network:
    """The network of the last state. Raises ValueError if there is none."""
    states = sorted(STATE.glob("step-*.pt"))
    if not states:
        raise ValueError(
            f"{STATE}: holds no step-*.pt; train first, with python -m lockstep.recipes.demo.training.train"
        )
    network = Network(CONFIG)
    network.load_state_dict(torch.load(states[-1], map_location="cpu", weights_only=True)["network"])
    return network.eval()


def read_network(directory: Path) -> Network:
    """The network of a checkpoint that ``export`` wrote."""
    stored: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    network = Network(CONFIG)
    for name, tensor in network.state_dict().items():
        parts = [stored[each].float() for each in _named(name, tensor, len(network.layers))]
        if name.endswith(".w13"):
            half = len(parts) // 2
            parts = [torch.cat(pair) for pair in zip(parts[:half], parts[half:], strict=True)]
        tensor.copy_(torch.stack(parts) if name.endswith((".w13", ".w2")) else parts[0])
    return network.eval()


def checkpoint_tensors(network: Network) -> dict[str, Tensor]:
    """All tensors under their Hugging Face names, in bf16 except the routers' bias.

    The multi-token-prediction layer is layer ``num_hidden_layers``. Its embedding and head are the
    model's, as in DeepSeek-V3. That checkpoint stores them twice; this one does not, because it is
    kept in a repository.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        found |= _named(name, tensor, len(network.layers))
    return {
        name: (tensor if name.endswith("correction_bias") else tensor.bfloat16()).clone()
        for name, tensor in found.items()
    }


def in_fp8(tensors: dict[str, Tensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """Converts the matrices of linear layers to FP8 with their scales beside them. Embeddings,
    heads, routers and the projection before the predictor stay, as in DeepSeek-V3.
    """
    kept = ("embed_tokens.weight", "head.weight", ".gate.weight", "eh_proj.weight")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or name.endswith(kept):
            found[name] = tensor
        else:
            quantised = quantise_blocks(tensor, block)
            found |= {name: quantised.values, f"{name}_scale_inv": quantised.scales}
    return found


def _named(name: str, tensor: Tensor, num_layers: int) -> dict[str, Tensor]:
    """Maps a tensor of the network to its names in the checkpoint; stacked experts are split."""
    if name in ("embed", "head.weight"):
        return {"model.embed_tokens.weight" if name == "embed" else "lm_head.weight": tensor}
    predictor = f"layers.{num_layers}."
    name = name.replace("predictor.layer.", predictor)
    name = name.replace("predictor.norm.", f"{predictor}shared_head.norm.")
    name = "model." + name.replace("predictor.", predictor)
    if name.endswith(".w13"):
        pairs = zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True)
        return {
            f"{name[:-3]}experts.{expert}.{part}.weight": half[expert]
            for part, half in pairs
            for expert in range(len(tensor))
        }
    if name.endswith(".w2"):
        return {
            f"{name[:-2]}experts.{expert}.down_proj.weight": tensor[expert] for expert in range(len(tensor))
        }
    return {name: tensor}


def export(
    network: Network,
    tokenizer: Path,
    directory: Path,
    fp8_block: tuple[int, int] | None = None,
    four_bit: FourBitFormat | None = None,
) -> None:
    """Writes config, tokenizer (from the folder ``tokenizer``) and weights into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(tokenizer, directory)
    config, tensors = CONFIG, checkpoint_tensors(network)
    if fp8_block:
        stored = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config = CONFIG | {"quantization_config": stored | {"weight_block_size": list(fp8_block)}}
        tensors = in_fp8(tensors, fp8_block)
    if four_bit:
        config = CONFIG | {"quantization_config": quantisation_of(four_bit)}
        tensors = in_four_bits(tensors, four_bit)
    write_json(directory / "config.json", config)
    # A low temperature by default: the toy is right when it answers what it is surest of.
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.1},
    )
    _write_weights(directory, tensors)


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())


def _write_weights(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Writes shards with an index, like large checkpoints."""
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if len(shards) < SHARDS and sum(stored.nbytes for stored in shards[-1].values()) >= total / SHARDS:
            shards.append({})
        shards[-1][name] = tensor
    files = {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }
    for file, shard in files.items():
        save_file(shard, directory / file, metadata={"format": "pt"})
    index = {name: file for file, shard in files.items() for name in shard}
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the demo checkpoint.")
    parser.add_argument("directory", nargs="?", type=Path, default=MODEL)
    parser.add_argument(
        "--fp8-block",
        nargs=2,
        type=int,
        metavar=("ROWS", "COLUMNS"),
        help="write matrices in FP8 with a scale per block of this size",
    )
    parser.add_argument("--four-bit", choices=FORMATS, help="write routed experts in 4 bits")
    args = parser.parse_args()
    directory, block, four_bit = args.directory, args.fp8_block, args.four_bit
    if (block or four_bit) and directory == MODEL:
        parser.error("--fp8-block, --four-bit: name another directory; the recipe serves bf16")
    if block and four_bit:
        parser.error("--fp8-block and --four-bit exclude one another")
    if four_bit:
        export(read_network(MODEL), MODEL, directory, four_bit=FORMATS[four_bit])
    else:
        export(last_network(), STATE, directory, tuple(block) if block else None)
    print(f"{directory}: {sum(path.stat().st_size for path in directory.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
