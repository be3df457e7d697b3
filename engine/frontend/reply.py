"""The answer to one HTTP request: its generations, and the JSON document of an answer that is not
streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from itertools import product
from typing import Any

import msgspec

from ..protocol.frontends import Submit
from ..protocol.message import Sampling
from ..text.tokenizer import Codec
from .api.errors import ApiError
from .open_requests import OpenRequests
from .requests.echo import Echo
from .requests.generation import Generation
from .requests.logprobs import chat_logprobs, text_logprobs
from .requests.places import Places
from .requests.prepared import PreparedRequest, Prompt
from .requests.prompt_scores import PromptScores, RankedPrompt

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Reply:
    """Collects the generations of a request until they are done, or until a stream takes over as
    their sink.

    ``opened`` is set by the first token, finish or error; ``done`` by the last finish or an error;
    ``gone`` when the client has gone away, together with both.
    """

    def __init__(
        self, request: PreparedRequest, codec: Codec, requests: OpenRequests, receive: Receive | None = None
    ) -> None:
        """``receive`` reports that the client has gone away, which aborts the answer at once."""
        loop = asyncio.get_running_loop()
        self.outline = request.outline
        self.codec = codec
        self.num_prompt_tokens = sum(len(prompt.ids) for prompt in request.prompts)
        self.opened: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self.error: ApiError | None = None
        self._request = request
        self._requests = requests
        choices = product(request.prompts, request.samplings)
        self.generations = [
            self._generation(prompt, sampling, index) for index, (prompt, sampling) in enumerate(choices)
        ]
        self._watcher = None if receive is None else loop.create_task(self._wait_for_disconnect(receive))

    def _generation(self, prompt: Prompt, sampling: Sampling, index: int) -> Generation:
        """One choice of a prompt, not yet submitted."""
        request = self._request
        skip = request.skip_special_tokens
        parser = None if request.manner is None else request.manner.parser()
        markers = () if request.manner is None or parser is None else request.manner.formats.markers
        submit = Submit(
            handle=self._requests.new_handle(),
            request_id=self._requests.new_request_id(),
            prompt_i32=prompt.packed_i32,
            hashes_h128=prompt.hashes_h128,
            limit=len(prompt.ids) + prompt.max_tokens,
            sampling=sampling,
            priority=request.priority,
            grammar=request.grammar,
            affinity=request.affinity,
        )
        echo, ranked = self._scored(prompt, sampling)
        sinks = [sink for sink in (echo, ranked) if sink is not None]
        scores = PromptScores(prompt.ids, sinks) if sinks else None
        scored = request.outline.num_logprobs >= 0
        return Generation(
            submit=submit,
            index=index,
            sink=self,
            prompt=prompt.ids,
            detokenizer=self.codec.detokenizer(skip, prompt.ids, self.codec.ids_of(markers)),
            stop=request.stop,
            matcher=request.stop.matcher(),
            echo=echo,
            ranked=ranked,
            prompt_scores=scores,
            places=None
            if request.outline.chat or not scored
            else Places(self.codec, skip, prompt.ids, len(prompt.text)),
            parser=parser,
            logprobs=[] if scored else None,
            pieces=self._first_pieces(prompt, None if echo is None else scores),
        )

    def _scored(self, prompt: Prompt, sampling: Sampling) -> tuple[Echo | None, RankedPrompt | None]:
        """Collectors of the prompt's log-probabilities, for those that were asked for."""
        request, outline = self._request, self._request.outline
        echo: Echo | None = None
        ranked: RankedPrompt | None = None
        if request.echoes_scores:
            skip = request.skip_special_tokens
            echo = Echo(self.codec, prompt.ids, prompt.text, outline.num_logprobs, skip)
        if sampling.prompt_ranks:
            ranked = RankedPrompt(self.codec, prompt.ids, outline.num_prompt_logprobs)
        return echo, ranked

    def _first_pieces(self, prompt: Prompt, awaited: PromptScores | None) -> list[str]:
        """Text that is shown before any token: the prompt, unless its log-probabilities are
        ``awaited`` (one of a single token has none).
        """
        return [prompt.text] if self._request.echo and (awaited is None or awaited.complete) else []

    def choices(self) -> list[list[Generation]]:
        """The generations by prompt."""
        width = len(self._request.samplings)
        return [self.generations[start : start + width] for start in range(0, len(self.generations), width)]

    def submit(self) -> None:
        """Hands the generations to the engine, or ends them if it has nothing to compute."""
        for generation in self.generations:
            if not self._request.needs_engine:
                generation.close("length")
                self.advance(generation)
            elif self.error is None:
                self._requests.submit(generation)

    def advance(self, generation: Generation) -> None:
        _set(self.opened)
        if generation.finish is not None and all(other.finish is not None for other in self.generations):
            _set(self.done)

    def fail(self, generation: Generation, error: ApiError) -> None:
        """Fails the answer: one of its generations failed, so the others are aborted."""
        if self.error is None:
            self.error = error
            self.abort()
        _set(self.opened)
        _set(self.done)

    def abort(self) -> None:
        """Tells the engine to end the generations that still run."""
        for generation in self.generations:
            if generation.submitted:
                self._requests.abort(generation)

    def close(self) -> None:
        """Releases the reply: its answer has been sent, or the client has gone."""
        if self._watcher is not None:
            self._watcher.cancel()
        self.abort()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def usage(self, generation: Generation | None = None) -> dict[str, Any]:
        """Usage of the whole answer, or of one choice. Counts ids, not text."""
        chosen = self.generations if generation is None else [generation]
        prompt = self.num_prompt_tokens if generation is None else len(generation.prompt)
        output = sum(len(item.tokens) for item in chosen)
        cached = {id(item.prompt): item.num_cached for item in chosen}  # n choices share a prompt
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "completion_tokens_details": {"reasoning_tokens": sum(item.num_reasoning for item in chosen)},
        }

    def document(self) -> dict[str, Any]:
        """The JSON document of the finished answer. A part that is empty or was not asked for is
        null: clients read attributes, which have to be there.
        """
        outline = self.outline
        document: dict[str, Any] = {
            "id": outline.id,
            "object": "chat.completion" if outline.chat else "text_completion",
            "created": outline.created,
            "model": outline.model,
            "service_tier": None,
            "system_fingerprint": None,
            "choices": [self._choice(generation) for generation in self.generations],
            "usage": self.usage(),
        }
        if outline.chat:
            first = self.generations[0]
            document["prompt_logprobs"] = _ranked(first)
            document["prompt_token_ids"] = first.prompt if outline.return_token_ids else None
        return document

    def logprobs(self, generation: Generation) -> dict[str, Any] | None:
        """Log-probabilities of the tokens that the sink has not taken yet."""
        if generation.logprobs is None:
            return None
        num_top = self.outline.num_logprobs
        taken = generation.num_taken
        tokens = generation.tokens[taken:]
        entries = generation.logprobs[taken:]
        if self.outline.chat:
            return chat_logprobs(self.codec, tokens, entries, num_top)
        assert generation.places is not None, "a completion with log-probabilities has places"
        shown = text_logprobs(self.codec, tokens, entries, num_top, generation.places)
        echo = generation.echo
        return shown if echo is None or generation.lacks_prompt else echo.before(shown)

    def _choice(self, generation: Generation) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": generation.index}
        if self.outline.chat:
            choice["message"] = _message(generation, self.outline.legacy_call)
        else:
            choice["text"] = generation.take_text()
        choice |= {
            "logprobs": self.logprobs(generation),
            "finish_reason": self.outline.reason(generation.finish_reason),
            "stop_reason": generation.stop_reason,
        }
        shows_ids = self.outline.return_token_ids
        choice["token_ids"] = generation.tokens if shows_ids else None
        if not self.outline.chat:
            scored = self.generations[generation.index - generation.index % len(self._request.samplings)]
            choice["prompt_logprobs"] = _ranked(scored)
            choice["prompt_token_ids"] = generation.prompt if shows_ids else None
        return choice

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abort()
        _set(self.gone)
        _set(self.opened)
        _set(self.done)


def _ranked(generation: Generation) -> msgspec.Raw | None:
    """``prompt_logprobs`` of a prompt; the first of its choices has them."""
    return None if generation.ranked is None else generation.ranked.document()


def _message(generation: Generation, legacy_call: bool) -> dict[str, Any]:
    """The finished message. ``content`` is null if there is only reasoning or tool calls. With
    ``legacy_call`` the call is in ``function_call``.
    """
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": None,
        "reasoning_content": None,
    }
    if generation.parser is None:
        return message | {"content": generation.take_text()}
    said = generation.parser.take()
    if said.content or not (said.reasoning or said.calls):
        message["content"] = said.content
    if said.reasoning:
        message["reasoning"] = message["reasoning_content"] = said.reasoning
    if legacy_call:
        return message | {"function_call": next((call["function"] for call in said.calls), None)}
    message["tool_calls"] = [
        {name: value for name, value in call.items() if name != "index"} for call in said.calls
    ]
    return message


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
