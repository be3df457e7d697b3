"""Which replica of an expert a token goes to: a table that all ranks compute alike.

Every rank's tokens take turns. Over all ranks and turns, each replica gets an equal share, at most
one turn more; within that, ranks send to themselves first, then to their own node.

Suffixes: L MoE layers, E logical experts, W ranks, N nodes, C turns, X experts of R replicas each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .layers import Ints, once
from .placement import Placement

TURNS = 12
"""Tokens after which a rank's turns repeat: 2, 3, 4 and 6 divide it."""

_GOLDEN = (5**0.5 - 1) / 2


def places_by_turn(placement: Placement, source: int, node_W: Sequence[int] | None = None) -> Ints:
    """places_LEC: the place (as in ``Placement.homes_LE``) that tokens of rank ``source`` go to, by
    turn; one turn where no expert has several. ``node_W``: the node of every rank, None for one
    node.
    """
    homes_LE1 = placement.homes_LE[:, :, None]
    num_places = placement.num_ranks * placement.num_slots
    flat_LP = once(placement.experts_LWS).reshape(placement.num_layers, num_places)
    each = np.arange(placement.num_layers)[:, None]
    counts_LE = np.zeros((placement.num_layers, placement.num_experts + 1), np.int64)  # EMPTY's first
    np.add.at(counts_LE, (each, flat_LP + 1), 1)
    if counts_LE[:, 1:].max(initial=0) <= 1:
        return homes_LE1
    sorted_LP = np.argsort(flat_LP, axis=1, kind="stable")
    firsts_LE = np.cumsum(counts_LE, axis=1)
    nodes = np.zeros(placement.num_ranks, np.int64) if node_W is None else np.array(node_W, np.int64)
    places_LEC = np.repeat(homes_LE1, TURNS, axis=2)
    for num in np.unique(counts_LE[:, 1:][counts_LE[:, 1:] > 1]).tolist():
        layers, experts = (counts_LE[:, 1:] == num).nonzero()
        places_XR = sorted_LP[layers[:, None], firsts_LE[layers, experts][:, None] + np.arange(num)]
        chosen_XC = share_turns(places_XR // placement.num_slots, nodes, source)
        places_LEC[layers, experts] = np.take_along_axis(places_XR, chosen_XC, axis=1)
    return places_LEC


def share_turns(ranks_XR: Ints, node_W: Ints, source: int) -> Ints:
    """chosen_XC: the replica that each turn of rank ``source`` goes to. ranks_XR: the replicas'
    ranks, which differ.

    A rank with a replica gives it all its turns. Turns of the other ranks of a node go to its
    replicas up to their shares, first turns first; the remaining turns of all ranks fill the
    remaining shares. Turns that are given together are counted rank by rank, so that each rank
    knows its own without a table of all.
    """
    num_experts, num_replicas = ranks_XR.shape
    shares_R, more = np.divmod(TURNS * len(node_W), np.full(num_replicas, num_replicas))
    left_R = shares_R + (np.arange(num_replicas) < more) - TURNS
    every = np.arange(num_experts)
    turns_C = np.arange(TURNS)
    node_XR, here = node_W[ranks_XR], node_W[source]
    free_XW = np.ones((num_experts, len(node_W)), np.bool_)
    free_XW[every[:, None], ranks_XR] = False
    room_XN = np.zeros((num_experts, int(node_W.max()) + 1), np.int64)
    num_free_XN = np.tile(np.bincount(node_W), (num_experts, 1))
    np.add.at(room_XN, (every[:, None], node_XR), left_R)
    np.subtract.at(num_free_XN, (every[:, None], node_XR), 1)
    given_XN = np.minimum(TURNS * num_free_XN, room_XN)
    whole_XN, extra_XN = np.divmod(given_XN, np.maximum(num_free_XN, 1))
    number_XW = _number_on_node(free_XW, node_W)
    near_XW = np.where(free_XW, whole_XN[:, node_W] + (number_XW < extra_XN[:, node_W]), 0)
    # The replicas of a node share its turns in proportion to their room.
    same_XRR = (node_XR[:, :, None] == node_XR[:, None]) & np.tri(num_replicas, dtype=np.bool_)
    until_XR = (same_XRR * left_R).sum(axis=2)
    given_XR, room_XR = (np.take_along_axis(part_XN, node_XR, axis=1) for part_XN in (given_XN, room_XN))
    room_XR = np.maximum(room_XR, 1)
    near_XR = until_XR * given_XR // room_XR - (until_XR - left_R) * given_XR // room_XR
    number, near = number_XW[:, source], near_XW[:, source]
    first_near = whole_XN[:, here] * number + np.minimum(number, extra_XN[:, here])
    rest_XW = np.where(free_XW, TURNS - near_XW, 0)
    first_far = rest_XW[:, :source].sum(axis=1) - near
    near_XC = _mixed(first_near[:, None] + turns_C, np.where(node_XR == here, near_XR, 0))
    far_XC = _mixed(first_far[:, None] + turns_C, left_R - near_XR)
    chosen_XC = np.where(turns_C < near[:, None], near_XC, far_XC)
    own_X = (ranks_XR == source).argmax(axis=1)
    return np.asarray(np.where(free_XW[:, source, None], chosen_XC, own_X[:, None]), np.int64)


def _number_on_node(free_XW: NDArray[np.bool_], node_W: Ints) -> Ints:
    """How many free ranks of its node are before each rank."""
    number_XW = np.zeros(free_XW.shape, np.int64)
    for node in np.unique(node_W):
        ranks = np.flatnonzero(node_W == node)
        number_XW[:, ranks] = np.cumsum(free_XW[:, ranks], axis=1) - free_XW[:, ranks]
    return number_XW


def _mixed(places_XC: Ints, shares_XR: Ints) -> Ints:
    """The replicas at some places of a sequence in which each has its share, spread over all of it:
    the places go around the replicas' shares in wide steps, and meet each once.
    """
    total_X1 = np.maximum(shares_XR.sum(axis=1, keepdims=True), 1)
    alike_X1 = np.ptp(shares_XR, axis=1, keepdims=True) <= 1  # then they simply take turns
    step_X1 = np.where(
        alike_X1, total_X1 // shares_XR.shape[1] + 1, (total_X1 * _GOLDEN).astype(np.int64) + 1
    )
    while (wrong_X1 := np.gcd(step_X1, total_X1) > 1).any():
        step_X1 += wrong_X1
    around_XC = places_XC * step_X1 % total_X1
    return np.asarray((around_XC[:, :, None] >= np.cumsum(shares_XR, axis=1)[:, None]).sum(axis=2), np.int64)
