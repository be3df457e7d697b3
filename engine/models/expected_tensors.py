"""Names and shapes of the tensors that a model is loaded from."""

from __future__ import annotations

from ...parallel.linear import WHOLE
from .decoder import Model


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that a checkpoint of this model must hold, including those of
    experts without a slot here, but for experts in 4 bits. Split tensors count as wholes.
    """
    shards = model.checkpoint_shards()
    shapes = {
        name: shards.get(name, WHOLE).whole(tuple(tensor.shape))
        for name, tensor in model.checkpoint_tensors().items()
    }
    matrices = expert_shapes(model)
    if model.config.four_bit is None:
        shapes |= {f"{name}.weight": shape for name, shape in matrices.items()}
    if model.config.moe.expert_bias:
        shapes |= {f"{name}.bias": (rows,) for name, (rows, _) in matrices.items()}
    return shapes


def expert_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Rows and columns of every matrix of routed experts, by its name without the last part."""
    moe, shapes = model.config.moe, dict[str, tuple[int, int]]()
    up, down = (moe.expert_width, moe.hidden), (moe.hidden, moe.expert_width)
    for layer in model.expert_layers():
        for expert in range(moe.num_experts):
            for projection, shape in zip(layer.projections, (up, up, down), strict=True):
                shapes[f"{layer.name}.{expert}.{projection}"] = shape
    return shapes
