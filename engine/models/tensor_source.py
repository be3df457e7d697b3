"""The source of a model's tensors: a checkpoint, or a generator of random ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from .checkpoint import StoredTensor
from .decoder import Model


class TensorSource(Protocol):
    """Names are those that the model's config makes; tensors are whole, whatever part of them the
    model holds.
    """

    def tensors(self, model: Model) -> dict[str, StoredTensor]:
        """The tensors there are, an expert's matrix each. Before matrices of ``model`` are
        widened.
        """
        ...

    def check(self, model: Model, found: Mapping[str, StoredTensor]) -> None:
        """Raises ValueError naming the tensor unless ``found`` is all that ``model`` needs."""
        ...

    def read(self, wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        """The values of ``wanted`` by name, one after another in any order."""
        ...
