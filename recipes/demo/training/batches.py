"""Batches of packed documents, and the number of held-out cases that a network answers exactly."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..cases.case import Case
from ..cases.mixture import FAMILIES, draw_case, draw_held_out, draw_long
from ..cases.words import Dice
from ..chat import Piece, render
from .network import Network, Packed

PROMPT_SHARE = 0.15  # share of the non-answer tokens that are learned from
PROMPT_WEIGHT = 0.3
TOKENS_STEP = 64  # batches hold a multiple of this many tokens: oneDNN compiles kernels for every new size
IMPATIENCE = 40  # cases that may exceed the remaining room before a batch counts as full


class Packer:
    """Turns cases into tokens."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def tokens(self, case: Case) -> tuple[list[int], list[Piece]]:
        """The tokens of the whole conversation, and the piece of each."""
        tokens: list[int] = []
        pieces: list[Piece] = []
        for piece in render(case):
            ids = self._tokenizer.encode(piece.text, add_special_tokens=False).ids
            tokens += ids
            pieces += [piece] * len(ids)
        return tokens, pieces

    def training_batch(self, seed: str, size: int, long: int = 0) -> Packed:
        """At most ``size`` tokens of training cases; the first case has ``long`` tokens unless that
        is 0. Depends on the arguments only.
        """
        dice = Dice(seed, held_out=False)
        prompts = random.Random(seed + "prompts")
        found: list[tuple[list[int], list[float]]] = []
        room, refused = size, 0
        while refused < IMPATIENCE and room > 24:
            tokens, pieces = self.tokens(draw_long(dice, long) if long and not found else draw_case(dice))
            if len(tokens) > room:
                refused += 1
                continue
            room -= len(tokens)
            weights = [
                1.0 if piece.answer else PROMPT_WEIGHT * (prompts.random() < PROMPT_SHARE and not piece.given)
                for piece in pieces
            ]
            found.append((tokens, weights))
        _shorten(found, (size - room) % TOKENS_STEP)
        return _packed(found)

    def pack(self, cases: list[Case]) -> Packed:
        """Packs cases for evaluation: only their last answer has weight."""
        found = []
        for case in cases:
            tokens, pieces = self.tokens(case)
            start = max(index for index, piece in enumerate(pieces) if not piece.answer) + 1
            found.append((tokens, [float(index >= start) for index in range(len(tokens))]))
        return _packed(found)


def _shorten(documents: list[tuple[list[int], list[float]]], surplus: int) -> None:
    """Cuts ``surplus`` tokens off the end of the longest document."""
    longest = max(documents, key=lambda document: len(document[0]))
    for values in longest:
        del values[len(values) - surplus :]


def _packed(documents: list[tuple[list[int], list[float]]]) -> Packed:
    return Packed(
        tokens_T=torch.tensor([token for tokens, _ in documents for token in tokens]),
        weights_T=torch.tensor([weight for _, weights in documents for weight in weights]),
        lengths=[len(tokens) for tokens, _ in documents],
    )


@torch.no_grad()
def exact(network: Network, packer: Packer, cases: list[Case], device: torch.device) -> tuple[int, int, int]:
    """The number of cases whose whole answer is the greedy one; the number of answer tokens that
    the predictor gets right; the number of all answer tokens.

    An answer is greedy exactly if each of its tokens is the top one after those before it, so one
    pass is enough.
    """
    hits = foretold = total = 0
    for start in range(0, len(cases), 16):
        batch = packer.pack(cases[start : start + 16])
        batch = Packed(batch.tokens_T.to(device), batch.weights_T.to(device), batch.lengths)
        states_TD, angles = network.states(batch)
        next_TD = torch.nn.functional.embedding(batch.tokens_T.roll(-1), network.embed)
        ahead_TD = network.predictor(states_TD, next_TD, angles, batch.lengths)
        answers_T = batch.weights_T > 0
        right_T = (network.head(states_TD).argmax(-1).roll(1) == batch.tokens_T) | ~answers_T
        hits += sum(bool(part.all()) for part in right_T.split(batch.lengths))
        foretold += int(((network.head(ahead_TD).argmax(-1).roll(2) == batch.tokens_T) & answers_T).sum())
        total += int(answers_T.sum())
    return hits, foretold, total


def held_out_cases(
    count: int,
    seed: int = 0,
    longest: int = 3000,
    final: bool = False,
    families: Iterable[str] = tuple(FAMILIES),
) -> dict[str, list[Case]]:
    """``count`` cases per family that training never sees. ``final`` selects the phrases kept for
    the final evaluation.
    """
    found = {}
    for family in families:
        dice = Dice(f"held out {seed} {family}", held_out=True, final=final)
        found[family] = [draw_held_out(dice, family, longest) for _ in range(count)]
    return found
