"""The description of a model: its Hugging Face ``config.json``, checked and frozen. No torch here.

Each file in ``families/`` reads the fields of one kind of model; this module reads those that all
share.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

from ...kernels.formats.fp8_format import KERNEL_BLOCK
from ...kernels.formats.kv_format import KvFormat, head_entry, index_entry, latent_entry
from ...moe.config import MoEConfig
from .config_fields import Fields
from .description import read_description
from .quantisation import StoredFourBit, StoredFp8, check_modules, check_sizes, read_four_bit, read_fp8

_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): ``factor`` stretches ``original_length``; cos and sin are multiplied
    by ``magnitude``.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    magnitude: float


@dataclass(frozen=True)
class QueryGrowth:
    """Queries at position p are multiplied by 1 + ``beta`` * log(1 + floor(p / ``length``)), so
    that attention stays sharp over long contexts (Llama 4, Mistral).
    """

    beta: float
    length: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the first ``dim`` values of a head: pairs are (i, i + dim/2), or (2i, 2i
    + 1) when ``interleaved``. ``growth``: queries depend on their position in another way too.
    """

    dim: int
    theta: float
    interleaved: bool
    yarn: YarnConfig | None
    growth: QueryGrowth | None = None


@dataclass(frozen=True)
class GqaConfig:
    """Grouped-query attention. ``qkv_bias``: the projections to queries, keys and values have a
    bias; ``out_bias``: the output projection has one. ``qk_norm``: each head's queries and keys
    pass an RMS norm before rotation; with ``wide_norm`` those of all heads pass one together.
    ``sinks``: the softmax of each head has a learned logit without a value.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    wide_norm: bool = False
    sinks: bool = False

    def split(self, size: int) -> GqaConfig:
        """The heads of one of ``size`` equal parts. Where there are fewer key heads than parts,
        several parts hold the same. Raises ValueError when the heads cannot be split so.
        """
        heads, keys = self.num_heads, self.num_kv_heads
        if self.wide_norm and size > 1:
            raise ValueError(f"a norm over all heads cannot be split into {size} parts")
        if heads % size or (keys % size and size % keys):
            raise ValueError(f"{heads} query heads and {keys} key heads cannot be split into {size} parts")
        return replace(self, num_heads=heads // size, num_kv_heads=max(1, keys // size))


@dataclass(frozen=True)
class IndexerConfig:
    """The indexer of DeepSeek's sparse attention (arXiv 2512.02556, section 2.1): ``num_heads``
    heads of ``head_dim`` values score one key per token; attention sees the ``top_k`` best
    positions. ``interleaved``: its rotation takes neighbours for pairs, as GLM-5's does, instead of
    halves. ``followers``: layers without an indexer, which look at what the last one before them
    chose (arXiv 2603.12201); never the first.
    """

    num_heads: int
    head_dim: int
    top_k: int
    interleaved: bool = False
    followers: tuple[int, ...] = ()


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (arXiv 2405.04434 section 2.1). ``q_latent`` None: queries are
    projected directly.

    ``scale`` multiplies the scores and includes YaRN's correction. ``bias``: the projections from
    and to the hidden state have one. ``indexer``: chooses the positions that attention sees; None:
    it sees all. Each part of split heads holds all of it.
    """

    num_heads: int
    q_latent: int | None
    kv_latent: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    bias: bool
    indexer: IndexerConfig | None = None

    def split(self, size: int) -> MlaConfig:
        """The heads of one of ``size`` equal parts; each holds the whole latent. Raises ValueError
        when the heads cannot be split so.
        """
        if self.num_heads % size:
            raise ValueError(f"{self.num_heads} heads cannot be split into {size} parts")
        return replace(self, num_heads=self.num_heads // size)


@dataclass(frozen=True)
class CheckpointNames:
    """The names of a checkpoint that differ from ours, which are those of Qwen3-MoE and
    DeepSeek-V3.

    ``renamed``: (our prefix, theirs) of names within a layer; the first that matches is replaced.
    ``projections``: the names of an expert's gate, up and down matrices. ``transposed_experts``:
    where a tensor holds all experts of a layer, their matrices are [in, out]. ``gate_up_turns``:
    there, rows of gate and up take turns; in 4 bits they always do.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    transposed_experts: bool = False
    gate_up_turns: bool = False

    def of(self, name: str) -> str:
        """The checkpoint's name for our ``name`` within a layer."""
        for ours, theirs in self.renamed:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


@dataclass(frozen=True)
class Blocks:
    """The part of a description that the family's file reads. ``moe_layers`` (ascending) hold
    experts, the others a dense MLP. A checkpoint may hold ``num_predict_layers`` more, which
    predict further tokens (DeepSeek-V3, section 2.2); they are not loaded. ``windows``, if any
    layer has one: the last positions that each layer's attention sees, 0 for all.
    """

    attention: GqaConfig | MlaConfig
    rope: RopeConfig
    moe: MoEConfig
    moe_layers: tuple[int, ...]
    names: CheckpointNames = CheckpointNames()
    num_predict_layers: int = 0
    windows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """A kind of model: FAMILY of one file in ``families/``. ``architectures`` and ``model_types``
    are its values in config.json; ``norm_eps`` is its default for rms_norm_eps.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read: Callable[[Fields], Blocks]
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of ``num_layers`` layers, of which ``moe_layers`` (ascending) hold experts and the
    others a dense MLP.

    ``dtype`` is the checkpoint's. ``fp8``: how its matrices are stored, if in FP8; ``four_bit``:
    how its routed experts are, if in 4 bits.
    ``max_position`` bounds the length of a sequence. ``eos_ids`` end a sequence.
    ``num_predict_layers`` of the checkpoint follow the last layer. ``windows``: as in ``Blocks``.
    """

    family: str
    vocab_size: int
    hidden: int
    num_layers: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool
    dense_width: int
    eos_ids: tuple[int, ...]
    dtype: str
    fp8: StoredFp8 | None
    four_bit: StoredFourBit | None
    moe_layers: tuple[int, ...]
    moe: MoEConfig
    attention: GqaConfig | MlaConfig
    rope: RopeConfig
    names: CheckpointNames
    num_predict_layers: int
    windows: tuple[int, ...] = ()

    @property
    def kernel_fp8(self) -> bool:
        """Whether matrices are in FP8 with the block size of the kernels, so that experts may stay
        in FP8.
        """
        return self.fp8 is not None and self.fp8.block == KERNEL_BLOCK

    def window(self, layer: int) -> int:
        """The last positions that the attention of ``layer`` sees; 0: all."""
        return self.windows[layer] if self.windows else 0

    def attention_of(self, layer: int) -> GqaConfig | MlaConfig:
        """The attention of ``layer``, which may have no indexer of its own."""
        whole = self.attention
        if isinstance(whole, MlaConfig) and whole.indexer is not None and layer in whole.indexer.followers:
            return replace(whole, indexer=None)
        return whole

    def kv_shapes(self, kv_format: KvFormat, layer: int) -> tuple[tuple[int, ...], ...]:
        """The cache tensors of a layer: the shape of one token's entry in each. GQA: keys and
        values. MLA: the latent, and the index key where the layer has an indexer.
        """
        return kv_shapes(self.attention_of(layer), kv_format)


def kv_shapes(attention: GqaConfig | MlaConfig, kv_format: KvFormat) -> tuple[tuple[int, ...], ...]:
    """As ``ModelConfig.kv_shapes``. Raises ValueError for sizes that the format cannot hold."""
    if isinstance(attention, MlaConfig):
        latent = latent_entry(kv_format, attention.kv_latent, attention.rope_dim)
        if attention.indexer is None:
            return (latent,)
        return latent, index_entry(kv_format, attention.indexer.head_dim)
    entry = head_entry(kv_format, attention.num_kv_heads, attention.head_dim)
    return (entry, entry)


def load_config(path: Path) -> ModelConfig:
    """The description of the model in directory ``path``. Raises ValueError naming the file and the
    field at fault, also for a model that is not supported.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: not a directory; a model directory holds config.json and *.safetensors")
    return read_config(read_description(path), path / "generation_config.json")


def read_config(fields: Fields, generation: Path) -> ModelConfig:
    """The description in the ``fields`` of a config.json and in the file ``generation``, which may
    be missing.
    """
    family = _family(fields)
    fields.expect("hidden_act", "silu")
    blocks = family.read(fields)
    if not blocks.moe_layers:
        raise ValueError(f"{fields.source}: no layer holds experts; a Mixture-of-Experts model is required")
    vocab_size = fields.integer("vocab_size")
    eos_ids = _eos_ids(fields, generation)
    if any(token >= vocab_size for token in eos_ids):
        raise ValueError(
            f"{fields.source}: eos_token_id is {list(eos_ids)}; expected ids below vocab_size ({vocab_size})"
        )
    dtype = _dtype(fields)
    config = ModelConfig(
        family=family.name,
        vocab_size=vocab_size,
        hidden=blocks.moe.hidden,
        num_layers=fields.integer("num_hidden_layers"),
        max_position=_max_position(fields, blocks.rope),
        norm_eps=fields.number("rms_norm_eps", family.norm_eps),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dense_width=fields.integer("intermediate_size", blocks.moe.expert_width),
        eos_ids=eos_ids,
        dtype=dtype,
        fp8=read_fp8(fields),
        four_bit=read_four_bit(fields, dtype),
        moe_layers=blocks.moe_layers,
        moe=blocks.moe,
        attention=blocks.attention,
        rope=blocks.rope,
        names=blocks.names,
        num_predict_layers=blocks.num_predict_layers,
        windows=blocks.windows,
    )
    if config.fp8 is not None and config.moe.expert_bias:
        raise fields.refuse("quantization_config", "supported: biased experts in 4, 16 or 32 bits")
    _check_four_bit(fields, config)
    return config


@cache
def families() -> tuple[Family, ...]:
    """The families of the folder ``families``, by name."""
    folder = import_module(".families", __package__)
    return tuple(
        import_module(f".{module.name}", folder.__name__).FAMILY
        for module in pkgutil.iter_modules(folder.__path__)
    )


def _family(fields: Fields) -> Family:
    """Finds the family by the one architecture in config.json, or by model_type if there is
    none.
    """
    names = fields.raw("architectures") or []
    known = {name: family for family in families() for name in family.architectures}
    if isinstance(names, list) and len(names) == 1 and names[0] in known:
        return known[names[0]]
    by_type = {name: family for family in families() for name in family.model_types}
    if not names and fields.raw("model_type") in by_type:
        return by_type[fields.raw("model_type")]
    field = "architectures" if names else "model_type"
    raise fields.refuse(field, "supported architectures: " + ", ".join(known))


def _eos_ids(fields: Fields, generation: Path) -> tuple[int, ...]:
    """Ids that end a sequence: those of config.json, then any more in generation_config.json."""
    ids = fields.integers("eos_token_id")
    if generation.is_file():
        ids += Fields.read(generation).integers("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.has("dtype") else "torch_dtype"
    fields.expect(name, *_DTYPES)
    return str(fields.raw(name) or "bfloat16")


def _check_four_bit(fields: Fields, config: ModelConfig) -> None:
    """Raises ValueError unless 4 bits hold every routed expert and no other linear layer."""
    stored, names = config.four_bit, config.names
    if stored is None:
        return
    experts = list[str]()
    others = list[str]() if config.tie_embeddings else ["lm_head"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        others.append(prefix + names.of("self_attn.o_proj"))
        if layer not in config.moe_layers:
            others.append(prefix + names.of("mlp.up_proj"))
            continue
        experts += [f"{prefix}{names.of('mlp.experts')}.0.{name}" for name in names.projections]
        if config.moe.shared_width:
            others.append(prefix + names.of("mlp.shared_experts.up_proj"))
    check_modules(fields, stored, experts, others)
    check_sizes(fields, stored, {"hidden_size": config.hidden, "expert width": config.moe.expert_width})


def _max_position(fields: Fields, rope: RopeConfig) -> int:
    """The length that the position encoding is meant for. With YaRN it is the stretched length,
    which config.json may omit.
    """
    length = fields.integer("max_position_embeddings")
    return max(length, int(rope.yarn.factor * rope.yarn.original_length)) if rope.yarn else length
