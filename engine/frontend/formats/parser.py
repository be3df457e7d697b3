"""Splits the text of an assistant, as it arrives, into reasoning, content and tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from .format import ToolFormat
from .lark import Lark
from .reader import NEWLINES, SPACE, Reader, Steps
from .speech import Delta, Speech


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags around reasoning."""

    open: str
    close: str

    @property
    def markers(self) -> tuple[str, ...]:
        """Tags that must reach the parser even if they are special tokens."""
        return self.open, self.close

    def head(self, lark: Lark) -> str:
        """The expression of the text before content; empty for none."""
        return ""

    def before(self, lark: Lark, body: str, opened: bool, openings: tuple[str, ...]) -> str:
        """The expression of ``body`` after the reasoning that has been ``opened``, or that the
        model may open. A call is one wherever it begins, so none of ``openings`` stands before the
        end of the reasoning.
        """
        rest = f"{lark.until(self.close, openings)} {lark.line_breaks(2)}"
        return f"{rest} {body}" if opened else f"({lark.tag(self.open)} {rest})? {body}"


class ReplyParser:
    """Parses one reply. ``thinking``: the prompt has opened the reasoning already. ``named``: the
    client asked for one function by name.

    Reasoning can only come first; its closing tag ends it, or a call. A later tag is content, and
    so is all that looks like a tool call but is none. ``full`` is set once the only call allowed
    has been read: nothing more is taken.

    ``reasoning_from`` and ``reasoning_to`` are places in the text, between the tags: None while
    unknown, or where there is no reasoning. ``reasoning_over`` is set when none can follow.
    """

    __slots__ = (
        "_done",
        "_in_reasoning",
        "_named",
        "_reader",
        "_speech",
        "_steps",
        "_strays",
        "_tags",
        "_tools",
        "full",
        "reasoning_from",
        "reasoning_over",
        "reasoning_to",
    )

    def __init__(
        self,
        speech: Speech,
        tags: Tags | None,
        tools: ToolFormat | None,
        thinking: bool = False,
        named: bool = False,
    ) -> None:
        self.full = False
        self.reasoning_from: int | None = None
        self.reasoning_to: int | None = None
        self.reasoning_over = tags is None
        self._done = False
        self._speech = speech
        self._tags = tags
        self._tools = tools
        self._named = named
        self._in_reasoning = thinking
        self._strays: tuple[str, ...] = ()
        if tools is not None:
            openings = " ".join(tools.openings)  # parts of them are no tags
            self._strays = tuple(marker for marker in tools.markers if marker not in openings)
        self._reader = Reader()
        self._steps = self._read()

    @property
    def pending(self) -> bool:
        """Whether the sink has something to take."""
        return self._speech.pending

    def push(self, text: str) -> None:
        if text and not self._done:
            self._reader.feed(text)
            self._go_on()

    def finish(self) -> None:
        """Ends the reply and decides about the text held back."""
        if not self._done:
            self._reader.ended = True
            self._go_on()
        self._speech.finish(self._in_reasoning)

    def take(self) -> Delta:
        return self._speech.take()

    def reason(self, finish: str) -> str:
        """The finish reason to show: a stop after complete calls is ``tool_calls``, unless the
        client named the function.
        """
        calls = self._speech.calls
        if finish == "stop" and calls and not self._named and all(call.complete for call in calls):
            return "tool_calls"
        return finish

    def _go_on(self) -> None:
        try:
            next(self._steps)
        except StopIteration:
            self._done = True

    def _read(self) -> Steps[None]:
        if self._tags is not None:
            yield from self._read_reasoning(self._tags)
            self.reasoning_over = True
        if self._tools is None:
            yield from self._reader.run(lambda text, start: -1, self._speech.plain)
        elif not self.full:
            yield from self._read_content(self._tools)

    def _read_reasoning(self, tags: Tags) -> Steps[None]:
        """Reads the reasoning, if any, with its tags and the line breaks around it. A call ends it
        too.
        """
        reader, speech = self._reader, self._speech
        pin = reader.pin()
        yield from reader.skip(SPACE)
        if (yield from reader.take(tags.open)):  # models may repeat the tag that the prompt ended with
            self._in_reasoning = True
            reader.release()
        else:
            reader.rewind(pin)
            if not self._in_reasoning:
                return
        self.reasoning_from = reader.position
        yield from reader.skip(NEWLINES)
        openings = self._tools.openings if self._tools is not None else ()
        while (found := (yield from reader.scan((tags.close, *openings), speech.reasoning))) is not None:
            end = reader.position - len(found)
            if found == tags.close:
                self.reasoning_to = end
                self._in_reasoning = False
                speech.end_reasoning()
                yield from reader.skip(NEWLINES)
                return
            assert self._tools is not None
            if (yield from self._read_call(self._tools)):
                self.reasoning_to = end
                self._in_reasoning = False
                self._strays = (tags.close, *self._strays)
                return
            speech.reasoning(found)

    def _read_content(self, tools: ToolFormat) -> Steps[None]:
        """Reads text and calls. Behind a call the format's other tags belong to no text."""
        reader, speech = self._reader, self._speech
        while not self.full:
            markers = (*tools.openings, *self._strays) if speech.calls else tools.openings
            found = yield from reader.scan(markers, speech.content)
            if found is None:
                return
            if found in tools.openings and not (yield from self._read_call(tools)):
                speech.content(found)

    def _read_call(self, tools: ToolFormat) -> Steps[bool]:
        """Reads the calls after an opening. False if there are none; the cursor is back then."""
        pin = self._reader.pin()
        if not (yield from tools.read(self._reader, self._speech)):
            self._reader.rewind(pin)
            return False
        self._reader.release()
        self.full = self._speech.full
        return True
