"""When a generation stops before its length limit, and how stop strings are found in its text."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StopRule:
    """The stop ids and stop strings of a request.

    ``eos_ids``: those of ``ids`` that the model ends its texts with and the client did not name;
    the client gets no stop reason for them. ``include``: the text that stops a generation is shown.
    The engine stops at ids by itself; strings are found here.
    """

    ids: frozenset[int]
    eos_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    include: bool = False
    automaton: StopAutomaton | None = field(init=False, compare=False)  # one for all generations

    def __post_init__(self) -> None:
        object.__setattr__(self, "automaton", StopAutomaton(self.strings) if self.strings else None)

    def packed_i32(self) -> bytes:
        """The ids as the engine gets them."""
        return array("i", sorted(self.ids)).tobytes()

    def matcher(self) -> StopMatcher | None:
        """A new matcher for one generation, None where there are no stop strings."""
        return None if self.automaton is None else StopMatcher(self.automaton, self.include)


class StopAutomaton:
    """All stop strings in one automaton (Aho and Corasick, 1975): a character costs the same,
    however many strings there are. Threads may share it.

    A state is the longest end of the text that begins a stop string: its length is ``depth``.
    ``step`` are the next states by character, ``back`` is the state of the next shorter end,
    ``hit`` the longest stop string that ends here. State 0: no stop string has begun.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.step: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.back = [0]
        self.hit: list[str | None] = [None]
        for string in strings:
            self._add(string)
        self._link()

    def advance(self, state: int, char: str) -> int:
        """The state after another character."""
        steps = self.step
        while char not in steps[state]:
            if not state:
                return 0
            state = self.back[state]
        return steps[state][char]

    def open(self, state: int) -> int:
        """The state without the ends that no further text makes a stop string."""
        while state and not self.step[state]:
            state = self.back[state]
        return state

    def _add(self, string: str) -> None:
        state = 0
        for char in string:
            if char not in self.step[state]:
                self.step[state][char] = len(self.step)
                self.step.append({})
                self.depth.append(self.depth[state] + 1)
                self.back.append(0)
                self.hit.append(None)
            state = self.step[state][char]
        self.hit[state] = string

    def _link(self) -> None:
        """Sets ``back`` and inherits ``hit``, shorter states first."""
        waiting = deque(self.step[0].values())
        while waiting:
            state = waiting.popleft()
            self.hit[state] = self.hit[state] or self.hit[self.back[state]]
            for char, after in self.step[state].items():
                self.back[after] = self.advance(self.back[state], char)
                waiting.append(after)


class StopMatcher:
    """Finds the stop string that completes first, however the text is cut; of several that complete
    together, the one that starts first.

    ``push`` returns text that no stop string can claim any more; text that may be the start of one
    is held back. After a match ``matched`` names the stop string and nothing more may be pushed.
    """

    __slots__ = ("_automaton", "_held", "_include", "_state", "matched")

    def __init__(self, automaton: StopAutomaton, include: bool) -> None:
        self.matched: str | None = None
        self._automaton = automaton
        self._include = include
        self._held = ""
        self._state = 0

    def push(self, text: str, armed: bool = True) -> str:
        """Takes the text of the next token. A stop string that completes in text that is not
        ``armed`` (before min_tokens) does not count.
        """
        automaton, state = self._automaton, self._state
        steps, hits = automaton.step, automaton.hit
        for at, char in enumerate(text):
            state = steps[state].get(char) or automaton.advance(state, char)
            if hits[state] is not None and armed:
                return self._match(hits[state] or "", text[: at + 1])
        state = self._state = automaton.open(state)
        buffer = self._held + text
        cut = len(buffer) - automaton.depth[state]
        self._held = buffer[cut:]
        return buffer[:cut]

    def finish(self) -> str:
        """The text still held back when the sequence ends for another reason."""
        held = self._held
        self._held = ""
        return held

    def _match(self, stop: str, text: str) -> str:
        """The text to show, which ends with ``stop``."""
        self.matched = stop
        buffer = self._held + text
        self._held = ""
        return buffer if self._include else buffer[: -len(stop)]
