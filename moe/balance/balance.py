"""Balances expert load by moving few experts: a pure function of loads and placement.

DeepSeek's algorithm places all experts anew and moves most of them. This one starts from the
current placement and takes single steps, each the best of its layer (``steps``), until every layer
is near its target or the bytes are spent; where room is scarce, all ranks first exchange experts at
once (``exchange``). The result depends on the arguments alone: no clock, no random numbers.

Suffixes: L MoE layers, W ranks, S slots per rank, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .exchange import Exchanges
from .layers import Floats, Ints, Layers, once
from .placement import EMPTY, Placement
from .steps import Search, SlotSteps, nearness, scarcity

NOWHERE = -1

_LEAST = 3e-5  # least gain of a step, as a share of a rank's mean load; less is not worth an expert's bytes
# Looking for replicas costs as much as for swaps, and finds most of them among the first steps.
_REPLICAS_FIRST, _REPLICAS_EVERY = 6, 6
# Ranks exchange experts all at once where they are many and the load above the target is more than
# this of the room below it in half of the layers: elsewhere steps with replicas need no more. Hot
# ranks get replicas in as many looks before. Experts rarely fit to less than this multiple of the
# least maximum, and a rank further above the target afterwards needs room that the exchange has
# taken.
_MANY_RANKS, _SCARCE, _BEFORE, _EXCHANGE_TARGET, _NEAR = 16, 0.65, 8, 1.0015, 0.1
_AT_ONCE = 1024  # moves


@dataclass(frozen=True)
class Limits:
    """Bounds of a balance. node_W: the node of every rank, None for one node. ``dead`` ranks hold
    nothing and receive nothing. ``max_received``: experts that all ranks receive together, None
    for any number; experts that only dead ranks had are placed anew beyond it. ``target``: the
    maximum / mean load over ranks at which a layer is left alone, as a multiple of the least that
    its largest expert allows. ``within_nodes``: no expert goes to a node that does not have it.
    """

    node_W: tuple[int, ...] | None = None
    dead: frozenset[int] = frozenset()
    max_received: int | None = None
    target: float = 1.05
    within_nodes: bool = False


@dataclass(frozen=True, eq=False)
class Moves:
    """Arrays [M], in the order of layers, ranks and slots: slot ``slots`` of rank ``ranks`` gets
    ``experts`` from rank ``sources``; ``NOWHERE`` where only dead ranks had it, so that its weights
    come from the checkpoint.
    """

    layers: Ints
    ranks: Ints
    slots: Ints
    experts: Ints
    sources: Ints

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, eq=False)
class Balanced:
    """``placement`` after ``moves``. Slots of dead ranks are empty in it."""

    placement: Placement
    moves: Moves


def balance(loads_LE: ArrayLike, placement: Placement, limits: Limits = Limits()) -> Balanced:
    """Lowers the largest load over ranks, layer by layer.

    loads_LE: tokens per layer and expert, at least 0. A layer whose maximum would not fall keeps
    its placement, except for experts that lost all their slots. Raises ValueError if the ranks
    alive have fewer slots than there are experts.
    """
    loads_LE = np.asarray(loads_LE, np.float64)
    shape = placement.num_layers, placement.num_experts
    assert loads_LE.shape == shape, f"loads {loads_LE.shape}, placement {shape}"
    alive = np.array([rank for rank in range(placement.num_ranks) if rank not in limits.dead], np.int64)
    if len(alive) * placement.num_slots < placement.num_experts:
        raise ValueError(
            f"{len(alive)} ranks of {placement.num_slots} expert slots cannot hold {placement.num_experts} "
            "experts: allowed are fewer dead ranks or more redundant experts"
        )
    node_W = np.zeros(placement.num_ranks, np.int64) if limits.node_W is None else np.array(limits.node_W)
    assert len(node_W) == placement.num_ranks, f"{len(node_W)} nodes for {placement.num_ranks} ranks"
    state = Layers(loads_LE, placement.experts_LWS[:, alive])
    _restore(state)
    before_LP = state.experts_LP.copy()
    was_L = state.maximum_L()
    if len(alive) > 1:
        _Search(state, limits, node_W[alive]).run()
    worse_L = state.maximum_L() >= was_L - _LEAST
    state.experts_LP[worse_L] = before_LP[worse_L]
    experts_LWS = np.full(placement.experts_LWS.shape, EMPTY, np.int32)
    experts_LWS[:, alive] = state.placed_LWS()
    old_LWS = once(placement.experts_LWS)
    old_LWS[:, sorted(limits.dead)] = EMPTY
    experts_LWS = _stay(old_LWS, experts_LWS)
    return Balanced(Placement(experts_LWS, placement.num_experts), _moves(old_LWS, experts_LWS, node_W))


def imbalance(loads_LE: ArrayLike, placement: Placement, dead: frozenset[int] = frozenset()) -> Floats:
    """Maximum / mean load over the ranks alive, by layer; 1 for a layer without load."""
    alive = [rank for rank in range(placement.num_ranks) if rank not in dead]
    state = Layers(np.asarray(loads_LE, np.float64), placement.experts_LWS[:, alive])
    maximum_L = state.maximum_L()
    return np.where(maximum_L > 0, maximum_L, 1.0)


def weighted_imbalance(loads_LE: Floats, placement: Placement) -> float:
    """``imbalance`` averaged over layers by their load; 1 without load."""
    weights_L = loads_LE.sum(axis=1)
    if not weights_L.any():
        return 1.0
    return float(np.average(imbalance(loads_LE, placement), weights=weights_L))


class _Search:
    """Takes steps in all layers at once, within the limits."""

    def __init__(self, state: Layers, limits: Limits, node_W: Ints) -> None:
        self._state, self._near_WW = state, nearness(node_W, limits.within_nodes)
        self._left = limits.max_received
        self._level_L = state.level_L()
        self._target_L = self._level_L * limits.target
        self._scarcity_L = np.zeros_like(self._target_L)

    def run(self) -> None:
        """Gives experts too large for any rank more replicas; exchanges experts of all ranks where
        room is scarce; then lowers maxima, until no single step does or the target is reached.
        """
        every = np.arange(len(self._target_L))
        layers = every
        while len(layers):
            layers = self._take(layers, self._look(layers).split_largest(), 0.0)
        self._scarcity_L = scarcity(self._state.ranks_LW, self._target_L)
        scarce_L = self._scarcity_L > _SCARCE
        near = self._exchange(every[scarce_L])
        self._scarcity_L[near] = scarcity(self._state.ranks_LW[near], self._target_L[near])
        self._step(every, replicas=not scarce_L.all() or not len(near))

    def _exchange(self, layers: Ints) -> Ints:
        """Exchanges experts of all ranks at once and returns the layers that are near their target
        then. Nothing changes for few layers or ranks, if the budget is too small, or if not every
        rank may get every expert.
        """
        few = 2 * len(layers) < len(self._target_L) or self._state.num_ranks < _MANY_RANKS
        if few or not self._near_WW.all():
            return layers[:0]
        earlier, left, self._left = self._state.copy(), self._left, None
        hot = layers
        for _ in range(_BEFORE):
            hot = self._take(hot, self._look(hot).replicate(), _LEAST) if len(hot) else hot
        far = self._exchange_all(layers, earlier)
        # Swaps come first if replicas leave ranks that no single exchange mends.
        hot = far
        for _ in range(_BEFORE):
            hot = self._take(hot, self._look(hot).best(replicas=True), _LEAST) if len(hot) else hot
        far = self._exchange_all(far, self._state.copy())
        received = int(self._state.foreign_LP.sum() - earlier.foreign_LP.sum())
        self._left = left
        if left is not None and received > left:
            self._state.reset(layers, earlier)
            return layers[:0]
        if left is not None:
            self._left = left - received
        return np.setdiff1d(layers, far)

    def _exchange_all(self, layers: Ints, earlier: Layers) -> Ints:
        """Exchanges experts in ``layers``. Restores and returns those that it does not bring near
        their targets.
        """
        if not len(layers):
            return layers
        target_L = np.maximum(self._target_L, self._level_L * _EXCHANGE_TARGET)[layers]
        found = Exchanges(self._state, layers, target_L)
        self._state.exchange(found.layers, found.slots, found.experts)
        far: Ints = layers[self._state.ranks_LW[layers].max(axis=1) > target_L + _NEAR]
        self._state.reset(far, earlier)
        return far

    def _step(self, layers: Ints, *, replicas: bool) -> None:
        """Takes the best step of each layer while there is one. Without ``replicas``, replicas are
        searched for only in layers without a swap.
        """
        number, last = 0, False
        while len(layers):
            regular = replicas and (number < _REPLICAS_FIRST or number % _REPLICAS_EVERY == 0)
            both = last or regular
            taken = self._take(layers, self._look(layers).best(replicas=both), _LEAST)
            # Layers without a swap are searched again, for replicas.
            number, last = number + 1, not both and len(taken) < len(layers)
            layers = taken if both else layers

    def _look(self, layers: Ints) -> Search:
        target_L, scarcity_L = self._target_L[layers], self._scarcity_L[layers]
        return Search(self._state, layers, target_L, scarcity_L, self._near_WW)

    def _take(self, layers: Ints, steps: SlotSteps, least: float) -> Ints:
        """Takes the steps worth more than ``least``, the best first while the budget lasts. Returns
        their layers.
        """
        order = np.flatnonzero(steps.value > least)
        if self._left is not None:
            order = order[np.argsort(-steps.value[order], kind="stable")]
            slots_N2, experts_N2 = steps.slots[order], steps.experts[order]
            received_N2 = self._state.received(layers[order, None], slots_N2, experts_N2)
            received = np.where(slots_N2 != EMPTY, received_N2, 0).sum(axis=1)
            allowed = np.cumsum(received) <= self._left
            order, self._left = order[allowed], self._left - int(received[allowed].sum())
        taken, slots, experts = layers[order], steps.slots[order], steps.experts[order]
        both = slots[:, 1] != EMPTY
        self._state.swap(taken[both], slots[both].T)
        if not both.all():
            self._state.put(taken[~both], slots[~both, 0], experts[~both, 0])
        return np.sort(taken) if self._left is not None else taken


def _restore(state: Layers) -> None:
    """Gives every expert without a slot one, the heaviest first, where the maximum load stays
    least: an empty slot if there is one, else that of a replica.
    """
    lost_LE = state.replicas_LE[:, :-1] == 0
    for _ in range(int(lost_LE.sum(axis=1).max(initial=0))):
        layers = np.flatnonzero(lost_LE.any(axis=1))
        each = np.arange(len(layers))
        expert = np.where(lost_LE[layers], state.loads_LE[layers, :-1], -1.0).argmax(axis=1)
        columns_LP, shares_LP = state.experts_LP[layers], state.shares_LP(layers)
        may_LP = np.take_along_axis(state.replicas_LE[layers], columns_LP, axis=1) >= 2
        ranks_LP = np.repeat(state.ranks_LW[layers], state.num_slots, axis=1)
        rests_LP = np.where(may_LP, ranks_LP - shares_LP, np.inf)
        rests_LP[columns_LP == state.num_experts] -= state.num_ranks  # less than any load
        slot = rests_LP.argmin(axis=1)
        assert may_LP[each, slot].all(), "no slot can be spared"
        state.put(layers, slot, expert)
        lost_LE[layers, expert] = False


def _stay(old_LWS: NDArray[np.int32], new_LWS: NDArray[np.int32]) -> NDArray[np.int32]:
    """``new_LWS`` with every expert that stays on its rank in its old slot."""
    result = new_LWS.copy()
    layers, ranks, slots = np.nonzero((old_LWS != new_LWS) & (new_LWS != EMPTY))
    elsewhere = (old_LWS[layers, ranks] == new_LWS[layers, ranks, slots][:, None]).any(axis=1)
    layers, ranks = np.unique(np.stack([layers, ranks])[:, elsewhere], axis=1)
    old_NS, new_NS = old_LWS[layers, ranks], new_LWS[layers, ranks]
    same_NSS = (old_NS[:, :, None] == new_NS[:, None]) & (new_NS != EMPTY)[:, None]
    stays_NS = same_NSS.any(axis=2)
    comes_NS = (new_NS != EMPTY) & ~same_NSS.any(axis=1)
    merged_NS = np.where(stays_NS, old_NS, EMPTY)
    # The n-th expert that comes goes to the n-th slot that is free.
    into = np.argsort(stays_NS, axis=1, kind="stable")
    coming = np.argsort(~comes_NS, axis=1, kind="stable")
    rows, nth = np.nonzero(np.take_along_axis(comes_NS, coming, axis=1))
    merged_NS[rows, into[rows, nth]] = new_NS[rows, coming[rows, nth]]
    result[layers, ranks] = merged_NS
    return result


def _moves(old_LWS: NDArray[np.int32], new_LWS: NDArray[np.int32], node_W: Ints) -> Moves:
    """The slots that get an expert, each from a rank that had it, on its own node if one has."""
    layers, ranks, slots = np.nonzero((old_LWS != new_LWS) & (new_LWS != EMPTY))
    experts = new_LWS[layers, ranks, slots].astype(np.int64)
    sources = np.full(len(layers), NOWHERE)
    num_experts = int(max(old_LWS.max(initial=0), new_LWS.max(initial=0))) + 1
    had_LEW = np.zeros((len(old_LWS), num_experts + 1, len(node_W)), np.bool_)  # and one for EMPTY
    had_LEW[np.arange(len(old_LWS))[:, None, None], old_LWS, np.arange(len(node_W))[:, None]] = True
    # Ranks on the node first, then the next in a circle: the sources of an expert take turns.
    each_W = np.arange(len(node_W))
    distance_WW = ((each_W - each_W[:, None]) % len(node_W)).astype(np.int16)
    distance_WW += (node_W != node_W[:, None]) * np.int16(len(node_W))
    for start in range(0, len(layers), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        has_MW = had_LEW[layers[part], experts[part]]
        nearest = np.where(has_MW, distance_WW[ranks[part]], np.int16(2 * len(node_W))).argmin(axis=1)
        sources[part] = np.where(has_MW.any(axis=1), nearest, NOWHERE)
    return Moves(layers, ranks, slots, experts, sources)
