"""Muon for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), Adam for the rest,
shared among workers.

Weights and the optimiser's averages are in memory that all workers share. Each worker updates the
weights that it owns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ITERATION = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic that drives singular values to one
_MUON_MOMENTUM = 0.95
_MUON_DECAY = 0.01
_ADAM_BETAS = (0.9, 0.95)


class Optimiser:
    """Optimises the parameters of ``network``; ``averages`` holds its state by parameter name."""

    def __init__(self, network: nn.Module, workers: int) -> None:
        self.names = [name for name, _ in network.named_parameters()]
        self.averages: dict[str, list[Tensor]] = {}
        self.owners: dict[str, int] = {}
        loads = [0.0] * workers
        for name, parameter in sorted(network.named_parameters(), key=lambda item: -item[1].numel()):
            count = 1 if by_muon(name, parameter) else 2
            self.averages[name] = [
                torch.zeros_like(parameter, requires_grad=False).share_memory_() for _ in range(count)
            ]
            self.owners[name] = loads.index(min(loads))
            loads[self.owners[name]] += parameter.numel()

    @torch.no_grad()
    def update(
        self, name: str, parameter: nn.Parameter, gradient: Tensor, rates: tuple[float, float], step: int
    ) -> None:
        """One step of one parameter. ``rates`` are those of Muon and Adam; ``step`` counts from
        1.
        """
        if by_muon(name, parameter):
            [average] = self.averages[name]
            average.lerp_(gradient, 1 - _MUON_MOMENTUM)
            change = orthogonal(gradient.lerp(average, _MUON_MOMENTUM))
            scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - rates[0] * _MUON_DECAY).add_(change, alpha=-rates[0] * scale)
            return
        mean, square = self.averages[name]
        mean.lerp_(gradient, 1 - _ADAM_BETAS[0])
        square.lerp_(gradient.square(), 1 - _ADAM_BETAS[1])
        corrected = (square / (1 - _ADAM_BETAS[1] ** step)).sqrt_().add_(1e-10)
        parameter.addcdiv_(mean, corrected, value=-rates[1] / (1 - _ADAM_BETAS[0] ** step))


def by_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon optimises this parameter: every weight matrix except embedding, head and
    routers.
    """
    return parameter.ndim >= 2 and name not in ("embed", "head.weight") and "gate.weight" not in name


def orthogonal(gradient: Tensor, iterations: int = 5) -> Tensor:
    """The approximately nearest matrix with singular values of one, by Newton-Schulz iterations in
    bf16. Three dimensions are a stack of matrices.
    """
    x: Tensor = gradient.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _ITERATION
    for _ in range(iterations):
        square: Tensor = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(gradient.dtype)
