"""Which replica of an expert a token goes to: a table that all ranks compute alike.

Every rank's tokens take turns. Over all ranks and turns, each replica gets an equal share, at most
one turn more; within that, ranks send to themselves first, then to their own node.

Suffixes: L MoE layers, E logical experts, W ranks, C turns, R replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .layers import Ints, once
from .placement import EMPTY, Placement

TURNS = 12
"""Tokens after which a rank's turns repeat: 2, 3, 4 and 6 divide it."""


def places_by_turn(placement: Placement, source: int, node_W: Sequence[int] | None = None) -> Ints:
    """places_LEC: the place (as in ``Placement.homes_LE``) that tokens of rank ``source`` go to, by
    turn; one turn where no expert has several. ``node_W``: the node of every rank, None for one
    node.
    """
    homes_LE1 = placement.homes_LE[:, :, None]
    experts_LWS = once(placement.experts_LWS)
    nodes = np.zeros(placement.num_ranks, np.int64) if node_W is None else np.array(node_W, np.int64)
    found = []
    for layer in range(placement.num_layers):
        flat = experts_LWS[layer].ravel()
        counts = np.bincount(flat[flat != EMPTY], minlength=placement.num_experts)
        found += [(layer, expert, np.flatnonzero(flat == expert)) for expert in np.flatnonzero(counts > 1)]
    if not found:
        return homes_LE1
    places_LEC = np.repeat(homes_LE1, TURNS, axis=2)
    for layer, expert, places_R in found:
        shared_CW = share_turns(places_R // placement.num_slots, nodes)
        places_LEC[layer, expert] = places_R[shared_CW[:, source]]
    return places_LEC


def share_turns(ranks_R: Ints, node_W: Ints) -> Ints:
    """[C, W]: the replica that each turn of each rank goes to. ranks_R: the replicas' ranks."""
    num = TURNS * len(node_W)
    chosen_CW = np.full((TURNS, len(node_W)), EMPTY)
    left_R = num // len(ranks_R) + (np.arange(len(ranks_R)) < num % len(ranks_R))
    chosen_CW[:, ranks_R] = np.arange(len(ranks_R))
    left_R -= TURNS
    for node in np.unique(node_W[ranks_R]):
        here_R = np.where(node_W[ranks_R] == node, left_R, 0)
        _fill(chosen_CW, node_W == node, here_R, left_R)
    _fill(chosen_CW, np.ones(len(node_W), np.bool_), left_R.copy(), left_R)
    return chosen_CW


def _fill(
    chosen_CW: Ints, among_W: np.ndarray[tuple[int], np.dtype[np.bool_]], room_R: Ints, left_R: Ints
) -> None:
    """Gives the free turns of some ranks to replicas with room, well mixed; updates ``left_R``."""
    turns, ranks = np.nonzero((chosen_CW == EMPTY) & among_W)
    replicas = np.repeat(np.arange(len(room_R)), room_R)
    nth = np.arange(len(replicas)) - np.repeat(np.cumsum(room_R) - room_R, room_R)
    # The n-th of a replica's r turns stands at (n + 1/2) / r of the way.
    mixed = replicas[np.argsort((nth + 0.5) / np.maximum(room_R, 1)[replicas], kind="stable")]
    given = mixed[: len(turns)]
    # All ranks give their first turns; those of one rank are spread over all replicas.
    order = np.argsort(ranks[: len(given)], kind="stable")
    chosen_CW[turns[order], ranks[order]] = given
    left_R -= np.bincount(given, minlength=len(left_R))
