"""Harmony, the format of gpt-oss: a reply is a sequence of messages, each with a header that names
its channel and, in calls, its recipient (https://github.com/openai/harmony, ``docs/format.md``):

    <|channel|>analysis<|message|>I should look.<|end|><|start|>assistant<|channel|>commentary
    to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

(in one line). The prompt ends with ``<|start|>assistant``. ``analysis`` is reasoning; ``final``,
and ``commentary`` without a recipient, are content. The recipient may also follow ``assistant``. A
call ends the turn, so a reply has one at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from .call_object import call_arguments
from .format import Tools, arguments, close, opener
from .lark import Lark
from .parser import ReplyParser, Tags
from .reader import MAX_HEAD, Reader, Steps
from .speech import Speech

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
ROLE, FUNCTIONS = "assistant", "functions."
_TO = "to="
_ROLE_GIVEN = ""  # in place of START, where the prompt ends with the role
_BEGUN = re.compile(r"[\s\w.:=/<|>-]*")  # the start of a header, perhaps


@dataclass(frozen=True, slots=True)
class Channels(Tags):
    """Reasoning in a channel of its own."""

    @property
    def markers(self) -> tuple[str, ...]:
        return MARKERS

    def head(self, lark: Lark) -> str:
        return f"{lark.tag(CHANNEL)} {lark.text(FINAL)} {lark.tag(MESSAGE)}"

    def before(self, lark: Lark, body: str, opened: bool, openings: tuple[str, ...]) -> str:
        rest = f"{lark.until(END, (START, CALL, RETURN))} {lark.tag(START)} {lark.text(ROLE)}"
        if opened:
            return f"{rest} {body}"
        analysis = f"{lark.tag(CHANNEL)} {lark.text(ANALYSIS)} {lark.tag(MESSAGE)}"
        return f"({analysis} {rest})? {body}"


CHANNELS = Channels(f"{CHANNEL}{ANALYSIS}{MESSAGE}", END)


class Harmony:
    """Calls as messages to functions. ``recipient`` is the function of the call to be read."""

    openings: ClassVar[tuple[str, ...]] = (MESSAGE,)
    markers: ClassVar[tuple[str, ...]] = MARKERS
    id_length: ClassVar[int] = 0

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self.recipient = ""

    def read(self, reader: Reader, speech: Speech) -> Steps[bool]:
        begin = opener(reader, speech, self.recipient)
        if not (yield from call_arguments(reader, speech, begin, CALL)):
            return False
        yield from close(reader, speech, CALL, (START, END, RETURN))
        return True

    def write(self, lark: Lark, names: Iterable[str], many: bool) -> str:
        """One call, also where ``many`` are allowed: it ends the turn."""
        heads = {name: f"{COMMENTARY} {_TO}{FUNCTIONS}{name} " for name in names}
        return lark.either(
            f"{lark.tag(CHANNEL)} {lark.text(head)} {lark.tag(CONSTRAIN)} {lark.text('json')} "
            f"{lark.tag(MESSAGE)} {lark.json(arguments(self._tools, name))}"
            for name, head in heads.items()
        )


class HarmonyParser(ReplyParser):
    """Parses a reply in Harmony. Several messages of a kind are joined with an empty line between
    them. ``reasoning_from`` and ``reasoning_to`` are those of the first analysis.
    """

    __slots__ = ("_harmony", "_told")

    def __init__(
        self,
        speech: Speech,
        tags: Tags | None,
        tools: Harmony | None,
        thinking: bool = False,
        named: bool = False,
    ) -> None:
        super().__init__(speech, tags, tools, thinking, named)
        self._harmony = tools
        self._told: set[bool] = set()  # kinds already shown: reasoning or not

    def _read(self) -> Steps[None]:
        reader = self._reader
        if self._in_reasoning:
            found = yield from self._body(reasoning=True)
        else:
            pin = reader.pin()
            addressed = yield from reader.take(f" {_TO}")  # after the role, with which the prompt ends
            reader.rewind(pin)
            found = _ROLE_GIVEN if addressed else (yield from self._between())
        while found is not None and not self.full:
            if found in (START, CHANNEL, _ROLE_GIVEN):
                found = yield from self._message(found)
            else:
                found = yield from self._between()

    def _between(self) -> Steps[str | None]:
        """Passes on text without a header, up to the next tag."""
        return (yield from self._reader.scan((START, CHANNEL, END, CALL, RETURN), self._speech.content))

    def _message(self, opening: str) -> Steps[str | None]:
        """Reads a message after its ``opening``. Returns the next tag."""
        header = yield from self._header(opening)
        if header is None:
            return (yield from self._between())
        channel, recipient = header
        self._speech.end_reasoning()  # drops white space between messages
        if channel != ANALYSIS or self._tags is None:
            self.reasoning_over = True
        if recipient and self._harmony is not None:
            pin = self._reader.pin()
            self._harmony.recipient = recipient.removeprefix(FUNCTIONS)
            if (yield from self._harmony.read(self._reader, self._speech)):
                self._reader.release()
                self.full = self._speech.full
                return None if self.full else (yield from self._between())
            self._reader.rewind(pin)
        return (yield from self._body(reasoning=channel == ANALYSIS and self._tags is not None))

    def _header(self, opening: str) -> Steps[tuple[str, str] | None]:
        """Channel and recipient, both may be empty. None if it is no header, and has become content
        or, at the end of the text, nothing.
        """
        reader = self._reader
        pin = reader.pin()
        words: list[str] = []
        text = None
        if opening != CHANNEL:
            text = yield from reader.head(CHANNEL, MESSAGE)
            words = (text or "").split()
        if text is not None and reader.since(pin).endswith(MESSAGE):
            reader.release()
            return self._addressed(words)
        if opening == CHANNEL or text is not None:
            text = yield from reader.head(MESSAGE)
        if text is not None:
            words += text.replace(CONSTRAIN, " ").split()
            reader.release()
            return self._addressed(words)
        reader.rewind(pin)
        rest = yield from reader.ahead(2 * MAX_HEAD)
        if len(rest) < 2 * MAX_HEAD and _BEGUN.fullmatch(rest):  # cut
            reader.step(len(rest))
        else:
            self._speech.content(opening)
        return None

    def _addressed(self, words: list[str]) -> tuple[str, str]:
        named = [word for word in words if not word.startswith(_TO) and word != ROLE]
        recipients = [word.removeprefix(_TO) for word in words if word.startswith(_TO)]
        return (named or [""])[0], (recipients or [""])[0]

    def _body(self, reasoning: bool) -> Steps[str | None]:
        """Reads the text of a message. Returns the next tag, None at the end."""
        reader, speech = self._reader, self._speech
        first = reasoning and self.reasoning_from is None
        sink = speech.reasoning if reasoning else speech.content
        if reasoning in self._told:
            sink("\n\n")
        self._told.add(reasoning)
        self._in_reasoning = reasoning
        if first:
            self.reasoning_from = reader.position
        found = yield from reader.scan((START, END, CALL, RETURN), sink)
        if found is not None:
            if first:
                self.reasoning_to = reader.position - len(found)
                self.reasoning_over = True
            self._in_reasoning = False
            if reasoning:
                speech.end_reasoning()
        return found
