"""The answer to one HTTP request: its generations, and the JSON document they make when it is not
streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from ..text.tokenizer import Codec
from .api.errors import ApiError
from .open_requests import OpenRequests
from .requests.generation import Generation
from .requests.logprobs import chat_logprobs, text_logprobs

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Outline:
    """What every document of an answer repeats, and which optional parts the client asked for."""

    id: str
    created: int
    model: str
    chat: bool
    num_logprobs: int = -1
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    interval: int = 1


class Reply:
    """Collects the generations of a request until they are done, or until a stream takes over as
    their sink.

    ``opened`` is set by the first token, finish or error; ``done`` by the last finish or an error;
    ``gone`` when the client has gone away, together with both.
    """

    def __init__(self, outline: Outline, codec: Codec, requests: OpenRequests) -> None:
        loop = asyncio.get_running_loop()
        self.outline = outline
        self.codec = codec
        self.generations: list[Generation] = []
        self.num_prompt_tokens = 0
        self.opened: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self._requests = requests
        self._watcher: asyncio.Task[None] | None = None

    def submit(self) -> None:
        for generation in self.generations:
            if self.error is None:  # a lost controller fails the first one at once
                self._requests.submit(generation)

    def advance(self, generation: Generation) -> None:
        _set(self.opened)
        if generation.finish is not None and all(other.finish is not None for other in self.generations):
            _set(self.done)

    def fail(self, generation: Generation, error: ApiError) -> None:
        """One failed generation fails the answer; the others are not worth finishing."""
        if self.error is None:
            self.error = error
            self.abort()
        _set(self.opened)
        _set(self.done)

    def abort(self) -> None:
        """Tells the engine to end what still runs. Harmless when all is done."""
        for generation in self.generations:
            if generation.submitted:
                self._requests.abort(generation)

    def watch(self, receive: Receive) -> None:
        """From now on a client that goes away aborts the answer at once."""
        self._watcher = asyncio.create_task(self._wait_for_disconnect(receive))

    def close(self) -> None:
        """The answer has been sent, or nobody wants it."""
        if self._watcher is not None:
            self._watcher.cancel()
        self.abort()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def usage(self, generation: Generation | None = None) -> dict[str, Any]:
        """Of the whole answer, or of one choice. Counts ids, not text."""
        chosen = self.generations if generation is None else [generation]
        prompt = self.num_prompt_tokens if generation is None else len(generation.prompt)
        output = sum(len(item.tokens) for item in chosen)
        cached = sum(
            {id(item.prompt): item.num_cached for item in chosen}.values()
        )  # n choices share a prompt
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def document(self) -> dict[str, Any]:
        """The finished answer."""
        outline = self.outline
        document: dict[str, Any] = {
            "id": outline.id,
            "object": "chat.completion" if outline.chat else "text_completion",
            "created": outline.created,
            "model": outline.model,
            "choices": [self._choice(generation) for generation in self.generations],
            "usage": self.usage(),
        }
        if outline.chat and outline.return_token_ids:
            document["prompt_token_ids"] = self.generations[0].prompt
        return document

    def logprobs(self, generation: Generation) -> dict[str, Any] | None:
        """Of the tokens that have not been taken yet."""
        if generation.logprobs is None:
            return None
        taken, num_top = generation.num_taken, self.outline.num_logprobs
        tokens, entries = generation.tokens[taken:], generation.logprobs[taken:]
        if self.outline.chat:
            return chat_logprobs(self.codec, tokens, entries, num_top)
        echo = generation.echo
        offset = 0 if echo is None else len(echo.text)
        offset += sum(
            len(self.codec.piece(token).decode("utf-8", "replace")) for token in generation.tokens[:taken]
        )
        shown = text_logprobs(self.codec, tokens, entries, num_top, offset)
        return shown if echo is None or not echo.complete else echo.before(shown)

    def _choice(self, generation: Generation) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": generation.index}
        if self.outline.chat:
            choice["message"] = _message(generation)
        else:
            choice["text"] = generation.take_text()
        choice |= {
            "logprobs": self.logprobs(generation),
            "finish_reason": generation.finish_reason,
            "stop_reason": generation.stop_reason,
        }
        if self.outline.return_token_ids:
            choice["token_ids"] = generation.tokens
            if not self.outline.chat:
                choice["prompt_token_ids"] = generation.prompt
        return choice

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abort()
        _set(self.gone)
        _set(self.opened)
        _set(self.done)


def _message(generation: Generation) -> dict[str, Any]:
    """The finished message. ``content`` is null where there is only reasoning or tool calls."""
    if generation.parser is None:
        return {"role": "assistant", "content": generation.take_text()}
    said = generation.parser.take()
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if not said.content and (said.reasoning or said.calls):
        message["content"] = None
    if said.reasoning:
        message["reasoning"] = message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"} for call in said.calls
        ]
    return message


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
