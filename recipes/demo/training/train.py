"""Trains the demo model: ``python -m lockstep.recipes.demo.training.train --help``.

On a CPU, one single-threaded worker per core shares the work of every step. Products run in bf16,
which is fast on cores with AVX512-BF16 or AMX. On a GPU there is one worker. Every batch is a
function of (seed, step, worker).

The learning rate is constant until decay is requested, by ``--decay MILLIONS`` or by writing the
number into ``state/decay`` during training. It then falls to zero over that many million tokens,
and training ends. The state before the decay is kept as ``before-decay.pt``. A restart continues
from the last state, or from the state or checkpoint given by ``--resume``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from torch.multiprocessing.spawn import spawn

from ..cases.mixture import TAUGHT
from ..files import STATE
from .batches import Packer, exact, held_out_cases
from .compiled import Compiled, build, supported
from .export import copy_tokenizer, read_network
from .network import Network, Packed
from .optimiser import Optimiser
from .shape import CONFIG
from .tokenizer import write_tokenizer

SEED = 20261121
WARMUP_STEPS = 60
BALANCE_RATE = 0.002
MTP_WEIGHT = 0.2
MTP_EVERY = 4  # steps
LONG_EVERY = 4  # steps; all workers take a long conversation in the same step, since they wait for each other
# The step at which training continues from a checkpoint: past warm-up and the growth of contexts.
STEPS_OF_A_CHECKPOINT = 10_000
JUDGED_CASES = 40
JUDGED_LENGTH = 1500


@dataclass(frozen=True)
class Settings:
    """Settings of the command line. ``batch``: tokens per worker and step. ``decay`` is in millions
    of tokens, ``judge_every`` and ``save_every`` in seconds. ``resume``: the state to continue
    from, None for the last.
    """

    workers: int
    batch: int
    muon_rate: float
    adam_rate: float
    longest: int
    decay: float
    judge_every: float
    save_every: float
    resume: Path | None


@dataclass
class Shared:
    """State shared by the workers: weights, optimiser state, and a row of gradients and of sums per
    worker. ``decided`` is set by worker 0: the first step and the tokens seen before it, the
    current factor of the learning rate, and whether to judge and to save.
    """

    network: Network
    optimiser: Optimiser
    gradients_WN: torch.Tensor
    sums_WS: torch.Tensor
    decided: torch.Tensor
    barrier: Any


class Trainer:
    """One worker's part of the training."""

    def __init__(self, settings: Settings, shared: Shared, worker: int, device: torch.device) -> None:
        self.settings, self.shared, self.worker, self.device = settings, shared, worker, device
        self.network = shared.network
        self.parameters = dict(self.network.named_parameters())
        self.gates = self.network.gates()
        for gate in self.gates:
            gate.counts_E = torch.zeros_like(gate.counts_E)  # this worker's own
        self.packer = Packer(STATE)
        self.step = int(shared.decided[0])
        self.tokens_seen = int(shared.decided[1])
        self.decay_from, self.decay_tokens = 0, 0.0
        self.rate = 1.0

    def run(self) -> None:
        """Trains until a decay has ended."""
        judged = saved = shown = time.monotonic()
        sums = torch.zeros(4)
        while self.rate > 0:
            sums = sums + self._one_step()
            now = time.monotonic()
            if self.step % 20 == 0:
                self._say(self._progress(sums, now - shown))
                sums, shown = torch.zeros(4), now
            if self.step % 10 == 0:
                judge, save = self._agree(
                    now - judged > self.settings.judge_every, now - saved > self.settings.save_every
                )
                if judge:
                    self.judge()
                    judged = time.monotonic()
                if save:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.judge()

    def _progress(self, sums: torch.Tensor, seconds: float) -> str:
        losses = f"loss {sums[0] / sums[2]:.4f}  second token {sums[1] / sums[2]:.4f}"
        skews = " ".join(f"{skew:.1f}" for skew in self.skews)
        return f"step {self.step}  {losses}  {sums[3] / seconds:.0f} tokens/s  load max/mean {skews}"

    # ----------------------------------------------------------------- decisions of worker 0

    def _agree(self, judge: bool, save: bool) -> tuple[bool, bool]:
        if self.worker == 0:
            self.shared.decided[3:] = torch.tensor([judge, save])
            self._begin_decay()
        self._wait()
        return bool(self.shared.decided[3]), bool(self.shared.decided[4])

    def _begin_decay(self) -> None:
        millions = self.settings.decay or _read_decay()
        if millions and not self.decay_tokens:
            self.save("before-decay.pt")
            self.decay_from, self.decay_tokens = self.tokens_seen, 1e6 * millions
            self._say(f"the learning rate falls to zero over {millions:g} M tokens from step {self.step} on")

    def _now(self) -> float:
        """The current factor of the learning rate."""
        rate = min(1.0, (self.step + 1) / WARMUP_STEPS)
        if not self.decay_tokens:
            return rate
        return rate * max(0.0, 1 - (self.tokens_seen - self.decay_from) / self.decay_tokens)

    # ----------------------------------------------------------------- a step

    def _one_step(self) -> torch.Tensor:
        """Trains one step. Returns sums over the workers: losses on the next token and the one
        after, their weight, and the number of tokens.
        """
        batch = self._batch()
        predict = self.step % MTP_EVERY == 0
        loss, ahead = self.network.losses(batch, predict)
        (loss + MTP_WEIGHT * ahead).backward()
        sums = torch.tensor(
            [loss.item(), ahead.item() * MTP_EVERY, batch.weights_T.sum().item(), len(batch.tokens_T)]
        )
        self._offer(sums)
        if self.worker == 0:
            self.shared.decided[2] = self._now()
        self._wait()
        self.rate = float(self.shared.decided[2])
        total = self.shared.sums_WS.sum(0)
        self._update(float(total[2]))
        self.step += 1
        self.tokens_seen += int(total[3])
        self._wait()
        return total[:4]

    def _batch(self) -> Packed:
        s = self.settings
        length = random.Random(self.step).randint(300, min(s.longest, 400 + self.step))
        long = length if self.step % LONG_EVERY == LONG_EVERY // 2 else 0
        batch = self.packer.training_batch(f"{SEED} {self.step} {self.worker}", s.batch, long)
        return Packed(batch.tokens_T.to(self.device), batch.weights_T.to(self.device), batch.lengths)

    def _offer(self, sums: torch.Tensor) -> None:
        """Shares this worker's gradients, sums and expert counts."""
        parameters = list(self.parameters.values())
        parts = self.shared.gradients_WN[self.worker].split([each.numel() for each in parameters])
        for part, parameter in zip(parts, parameters, strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.flatten())
            parameter.grad = None
        counts = [gate.counts_E.float().cpu() for gate in self.gates]
        self.shared.sums_WS[self.worker] = torch.cat([sums, *counts])

    def _update(self, weight: float) -> None:
        """Updates the weights that this worker owns by the mean gradient over ``weight``, the
        weight of all tokens.
        """
        optimiser = self.shared.optimiser
        rates = (self.settings.muon_rate * self.rate, self.settings.adam_rate * self.rate)
        start = 0
        for name, parameter in self.parameters.items():
            end = start + parameter.numel()
            if optimiser.owners[name] == self.worker:
                gradient = self.shared.gradients_WN[:, start:end].sum(0).div_(weight).view_as(parameter)
                if "predictor" not in name or self.step % MTP_EVERY == 0:
                    optimiser.update(name, parameter, gradient, rates, self.step + 1)
            start = end
        counts = self.shared.sums_WS.sum(0)[4:].split([len(gate.counts_E) for gate in self.gates])
        self.skews = [float(count.max() / count.mean().clamp(min=1)) for count in counts]
        for gate, count in zip(self.gates, counts, strict=True):
            gate.counts_E.zero_()
            if self.worker == 0:
                gate.balance(count.to(self.device), BALANCE_RATE * self.rate)

    def _wait(self) -> None:
        if self.settings.workers > 1:
            self.shared.barrier.wait()

    # ----------------------------------------------------------------- evaluation and saving

    def judge(self) -> None:
        """Prints the share of held-out cases answered exactly. Each worker evaluates some of the
        families.
        """
        self.network.eval()
        found = self.shared.sums_WS[:, : 3 * len(TAUGHT)]
        self._wait()
        found[self.worker] = 0
        cases = held_out_cases(JUDGED_CASES, longest=JUDGED_LENGTH, families=TAUGHT)
        for index, family in enumerate(cases.values()):
            if index % self.settings.workers == self.worker:
                found[self.worker, 3 * index : 3 * index + 3] = torch.tensor(
                    exact(self.network, self.packer, family, self.device)
                )
        self._wait()
        hits, foretold, total = found.sum(0).view(-1, 3).T
        self.network.train()
        shares = "  ".join(
            f"{family} {100 * hit / JUDGED_CASES:.0f}%" for family, hit in zip(TAUGHT, hits, strict=True)
        )
        ahead = f"second token predicted {100 * float(foretold.sum() / total.sum()):.0f}%"
        self._say(f"held out after {self.tokens_seen / 1e6:.1f} M tokens: {shares}  ({ahead})")
        self._wait()

    def save(self, name: str = "") -> None:
        """Writes the state; keeps the last two."""
        if self.worker:
            return
        path = STATE / (name or f"step-{self.step:07}.pt")
        state = {
            "network": self.network.state_dict(),
            "averages": self.shared.optimiser.averages,
            "counts": [self.step, self.tokens_seen],
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        for old in sorted(STATE.glob("step-*.pt"))[:-2]:
            old.unlink()

    def _say(self, text: str) -> None:
        if not self.worker:
            print(f"{datetime.datetime.now():%H:%M:%S}  {text}", flush=True)


def _read_decay() -> float:
    try:
        return float((STATE / "decay").read_text())
    except (OSError, ValueError):
        return 0.0


def share(settings: Settings, device: torch.device, context: Any) -> Shared:
    """Builds the state that workers share: the network, new or from the last state, and the
    rest.
    """
    torch.manual_seed(SEED)
    compiled = device.type == "cpu" and supported()
    print("compiled operations" if compiled else "plain operations", flush=True)
    network = Network(CONFIG, Compiled(build()) if compiled else None).to(device)
    optimiser = Optimiser(network, settings.workers)
    decided = torch.zeros(5, dtype=torch.float64)
    states = [settings.resume] if settings.resume else sorted(STATE.glob("step-*.pt"))
    if states and states[-1].is_dir():
        network.load_state_dict(read_network(states[-1]).state_dict())
        decided[0] = STEPS_OF_A_CHECKPOINT
    elif states:
        state = torch.load(states[-1], map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        for name, averages in state["averages"].items():
            for target, average in zip(optimiser.averages[name], averages, strict=True):
                target.copy_(average)
        decided[:2] = torch.tensor(state["counts"])
    if states:
        print(f"continues from {states[-1].name}", flush=True)
    size = sum(parameter.numel() for parameter in network.parameters())
    sums = 4 + sum(len(gate.counts_E) for gate in network.gates())
    return Shared(
        network=network.share_memory(),
        optimiser=optimiser,
        gradients_WN=torch.zeros(settings.workers, size, device=device).share_memory_(),
        sums_WS=torch.zeros(settings.workers, sums).share_memory_(),
        decided=decided.share_memory_(),
        barrier=context.Barrier(settings.workers),
    )


def _work(worker: int, settings: Settings, shared: Shared, device: torch.device) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.workers))
    Trainer(settings, shared, worker, device).run()


def _parse() -> tuple[Settings, Path | None]:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else os.cpu_count())
    parser.add_argument("--batch", type=int, default=4096, help="tokens per worker and step")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.004)
    parser.add_argument("--longest", type=int, default=3000, help="tokens of the longest conversation")
    parser.add_argument(
        "--decay", type=float, default=0.0, help="start the decay now, over this many million tokens"
    )
    parser.add_argument("--judge-every", type=float, default=240.0, help="seconds")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds")
    parser.add_argument(
        "--resume",
        type=Path,
        help="state or checkpoint folder to continue from; by default the last state",
    )
    parser.add_argument("--pid-file", type=Path, help="file to write the process ids to")
    values: dict[str, Any] = vars(parser.parse_args())
    pid_file = values.pop("pid_file")
    return Settings(**values), pid_file


def main() -> None:
    """The command line."""
    settings, pid_file = _parse()
    STATE.mkdir(exist_ok=True)
    if not (STATE / "tokenizer.json").exists():
        if settings.resume and settings.resume.is_dir():
            copy_tokenizer(settings.resume, STATE)
        else:
            write_tokenizer(STATE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = share(settings, device, processes.get_context("spawn"))
    if settings.workers == 1:
        _work(0, settings, shared, device)
        return
    started = spawn(_work, (settings, shared, device), nprocs=settings.workers, join=False)
    if pid_file:
        pid_file.write_text(" ".join(str(pid) for pid in (os.getpid(), *started.pids())))
    while not started.join():
        pass


if __name__ == "__main__":
    main()
