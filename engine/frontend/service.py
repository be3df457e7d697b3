"""The frontend between HTTP and the controller: what the cluster says, who may enter, and how a
request is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import Drain, Rejected, Started, Submit, TokenBatch
from ..protocol.message import Sampling, Stop
from ..protocol.results import PromptLogprobs
from ..protocol.specs import FrontendSpec
from .api.errors import ApiError, bad_request
from .api.schemas import MAX_SEQUENCES, ChatRequest, CompletionRequest, Generate
from .controller_link import ControllerLink, FromController
from .metrics.metrics import Metrics
from .open_requests import OpenRequests
from .reply import Outline, Receive, Reply
from .requests.echo import Echo
from .requests.generation import Generation
from .requests.prepare import Limits, Prompt, load_model, prepare, prepare_chat, prepare_texts
from .requests.sampling import build_sampling, with_seed
from .requests.stops import StopMatcher

P = ParamSpec("P")
R = TypeVar("R")

THREADS = 4
RETRY_STARTING = 5.0
RETRY_DRAINING = 30.0
PROBE_SECONDS = 30.0
PUBLISH_SECONDS = 0.25


class Service:
    """Lives on one event loop."""

    def __init__(self, spec: FrontendSpec) -> None:
        self.spec = spec
        self.model = load_model(spec)
        self.metrics = Metrics(spec.served_name)
        self.cluster: ClusterState | None = None
        self.started = time.time()
        self._on_stop: Callable[[], None] = lambda: None
        self._heard = asyncio.Event()
        self._publishing: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(THREADS, "prepare")
        self._link = ControllerLink(spec, self._on_message, self._on_lost)
        self.requests = OpenRequests(self._link.send, self.metrics, self._unfinished)

    def start(self, on_stop: Callable[[], None]) -> None:
        """On the running loop. ``on_stop`` is called when the controller says Stop."""
        self._on_stop = on_stop
        self._link.start()
        self._publishing = asyncio.get_running_loop().create_task(self._publish())

    def close(self) -> None:
        self.requests.fail_all(ApiError(503, "The server is shutting down", retry_after=RETRY_STARTING))
        if self._publishing is not None:
            self._publishing.cancel()
        self.metrics.publish(len(self.requests))
        self._link.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """For what may take long: tokenising, rendering, hashing."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(function, *args, **kwargs)
        )

    async def wait_heard(self, seconds: float) -> None:
        """Returns when the controller has said how the cluster is, at the latest after
        ``seconds``.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), seconds)

    async def _publish(self) -> None:
        """Shows the other frontends what this one has counted, so that any of them can answer for
        all.
        """
        while True:
            self.metrics.publish(len(self.requests))
            await asyncio.sleep(PUBLISH_SECONDS)

    # ----------------------------------------------------------------- the cluster

    def unable(self) -> str | None:
        """Why no token can be generated, or None: what /health says."""
        if self.cluster is None:
            return "The engine is starting: the controller has not been heard yet"
        if self._link.lost:
            return "The controller does not answer"
        if self.cluster.phase in ("serving", "draining"):
            return None
        return f"The engine is {self.cluster.phase}" + (
            f": {self.cluster.reason}" if self.cluster.reason else ""
        )

    def closed(self) -> ApiError | None:
        """Why no new request is taken, or None: what /ready says. While a rank is being replaced
        requests are taken, and wait.
        """
        if self.cluster is not None and self.cluster.phase == "recovering" and not self._link.lost:
            return None
        reason = self.unable()
        if reason is not None:
            return ApiError(503, reason, retry_after=RETRY_STARTING)
        if self.cluster is not None and self.cluster.phase == "draining":
            return ApiError(
                503, "The engine is draining and takes no new requests", retry_after=RETRY_DRAINING
            )
        return None

    def _unfinished(self) -> ApiError:
        """What a client is told whose request the engine has ended without a result."""
        if self.cluster is not None and self.cluster.phase in ("draining", "drained"):
            text = "The server is shutting down, and this request had not finished when the time for running ones was over"
            return ApiError(503, text, retry_after=RETRY_DRAINING)
        return ApiError(500, "The engine could not finish this request")

    def limits(self) -> Limits:
        """Raises ApiError 503 while no new request is taken."""
        error = self.closed()
        if error is not None:
            raise error
        assert self.cluster is not None
        return Limits(self.cluster.max_len, self.cluster.page_size if self.cluster.prefix_caching else 0)

    def drain(self, deadline: float) -> None:
        self._link.send(Drain(deadline))

    def _on_message(self, message: FromController) -> None:
        match message:
            case TokenBatch():
                self.requests.on_tokens(message)
            case PromptLogprobs():
                self.requests.on_prompt(message)
            case Started():
                self.requests.on_started(message)
            case Rejected():
                self.requests.on_rejected(message)
            case ClusterState():
                self.cluster = message
                self.metrics.state(message)
                self._heard.set()
            case Stop():
                self._on_stop()

    def _on_lost(self) -> None:
        self.requests.fail_all(ApiError(500, "The controller was lost while the request was running"))

    # ----------------------------------------------------------------- requests

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; this server serves {self.model.name!r}",
                "model",
            )

    async def chat(self, ask: ChatRequest, request_id: str, receive: Receive) -> Reply:
        """Submits a chat request; the reply's client is watched from here on. Raises ApiError."""
        self.check_model(ask.model)
        limits = self.limits()
        prompt = await self.in_thread(prepare_chat, self.model, limits, ask)
        outline = self._outline(f"chatcmpl-{request_id}", ask, chat=True, num_logprobs=ask.num_logprobs)
        return self._open(ask, [prompt], outline, receive)

    async def complete(self, ask: CompletionRequest, request_id: str, receive: Receive) -> Reply:
        """Submits a text completion; see ``chat``."""
        self.check_model(ask.model)
        limits = self.limits()
        sources = ask.prompts
        if not sources:
            raise bad_request("prompt: at least one prompt is needed", "prompt")
        if len(sources) * (ask.n or 1) > MAX_SEQUENCES:
            raise bad_request(
                f"prompt: {len(sources)} prompts x n {ask.n or 1} are more than {MAX_SEQUENCES} sequences",
                "prompt",
            )
        prompts = await self.in_thread(prepare_texts, self.model, limits, ask)
        outline = self._outline(f"cmpl-{request_id}", ask, chat=False, num_logprobs=ask.num_logprobs)
        return self._open(ask, prompts, outline, receive, echo=bool(ask.echo))

    async def probe(self) -> float:
        """Generates one real token; returns the seconds it took. Raises ApiError."""
        limits = self.limits()
        prompt = prepare(self.model, limits, [0], False, 1, "")
        outline = Outline("probe", 0, self.model.name, chat=False)
        reply = Reply(outline, self.model.codec, self.requests)
        reply.generations.append(
            self._generation(
                Generate(ignore_eos=True, temperature=0.0), prompt, Sampling(temperature=0.0), 0, reply
            )
        )
        began = time.monotonic()
        reply.submit()
        try:
            await asyncio.wait_for(asyncio.shield(reply.done), PROBE_SECONDS)
        except TimeoutError:
            raise ApiError(
                503, f"No token was generated within {PROBE_SECONDS:.0f} s", retry_after=RETRY_STARTING
            ) from None
        finally:
            reply.close()
        reply.raise_error()
        return time.monotonic() - began

    def _outline(self, id: str, ask: Generate, chat: bool, num_logprobs: int) -> Outline:
        options = ask.stream_options
        return Outline(
            id=id,
            created=int(time.time()),
            model=self.model.name,
            chat=chat,
            num_logprobs=num_logprobs,
            return_token_ids=bool(ask.return_token_ids),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            interval=ask.stream_interval or 1,
        )

    def _open(
        self, ask: Generate, prompts: Sequence[Prompt], outline: Outline, receive: Receive, echo: bool = False
    ) -> Reply:
        """n generations per prompt, numbered in that order."""
        for prompt in prompts:
            if ask.min_tokens and ask.min_tokens > prompt.max_tokens:
                raise bad_request(
                    f"min_tokens {ask.min_tokens} is more than the {prompt.max_tokens} that may follow",
                    "min_tokens",
                )
        self.limits()  # the cluster may have closed while the prompt was prepared
        reply = Reply(outline, self.model.codec, self.requests)
        first = build_sampling(ask, self.model.defaults, self.model.vocab_size, outline.num_logprobs)
        for prompt in prompts:
            for choice in range(ask.n or 1):
                generation = self._generation(
                    ask, prompt, with_seed(first, choice), len(reply.generations), reply
                )
                if echo:
                    self._echo(ask, generation)
                reply.generations.append(generation)
        reply.num_prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        if prompts[0].max_tokens == 0 and not ask.scores_prompt:  # echo alone: nothing to compute
            for generation in reply.generations:
                generation.close("length")
                reply.advance(generation)
            return reply
        reply.watch(receive)
        reply.submit()
        return reply

    def _echo(self, ask: Generate, generation: Generation) -> None:
        """The prompt is shown first: as it is, or when its log-probabilities are here."""
        codec, skip = self.model.codec, ask.skip_special_tokens is not False
        if ask.scores_prompt:
            generation.begin_with(
                Echo(codec, generation.prompt, generation.submit.sampling.num_prompt_logprobs, skip)
            )
        else:
            generation.pieces.append(codec.decode(generation.prompt, skip_special_tokens=skip))

    def _generation(
        self, ask: Generate, prompt: Prompt, sampling: Sampling, index: int, reply: Reply
    ) -> Generation:
        eos = () if ask.ignore_eos else self.model.defaults.eos_ids
        stop_ids: list[int] = array("i", sampling.stop_i32).tolist()
        include = bool(ask.include_stop_str_in_output)
        parser = prompt.manner.parser() if prompt.manner is not None else None
        shown = self.model.codec.ids_of(self.model.formats.markers) if parser is not None else frozenset()
        submit = Submit(
            handle=self.requests.new_handle(),
            request_id=f"{self.spec.name}-{secrets.token_hex(12)}",
            prompt_i32=prompt.packed_i32,
            hashes_h128=prompt.hashes_h128,
            limit=len(prompt.ids) + prompt.max_tokens,
            sampling=sampling,
            priority=ask.priority or 0,
            grammar=prompt.grammar,
        )
        return Generation(
            submit=submit,
            index=index,
            sink=reply,
            prompt=prompt.ids,
            detokenizer=self.model.codec.detokenizer(ask.skip_special_tokens is not False, prompt.ids, shown),
            stop_ids=frozenset(stop_ids),
            eos_ids=frozenset(eos) - frozenset(ask.stop_token_ids or ()),
            matcher=StopMatcher(ask.stops, include) if ask.stops else None,
            parser=parser,
            include_stop=include,
            logprobs=[] if sampling.num_logprobs >= 0 else None,
        )


def describe(cluster: ClusterState) -> dict[str, Any]:
    """A cluster state as JSON: what /admin/cluster shows."""
    loads = array("q", cluster.expert_i64).tolist() if cluster.expert_layers else []
    width = len(loads) // cluster.expert_layers if cluster.expert_layers else 0
    apart = ("expert_i64", "expert_layers", "placement_i32", "ranks", "totals")  # totals are for /metrics
    shown = {name: getattr(cluster, name) for name in cluster.__struct_fields__ if name not in apart}
    shown["ranks"] = [
        {name: getattr(rank, name) for name in rank.__struct_fields__} for rank in cluster.ranks
    ]
    shown["expert_load"] = (
        [loads[start : start + width] for start in range(0, len(loads), width)] if width else []
    )
    shown["placement"] = _placement(cluster)
    return shown


def _placement(cluster: ClusterState) -> list[dict[str, Any]]:
    """Per range of MoE layers, both ends included, and rank: the ranges of experts that live
    there.
    """
    numbers = array("i", cluster.placement_i32).tolist()
    layers: dict[tuple[int, int], list[list[list[int]]]] = {}
    for first, last, rank, low, high in zip(*[iter(numbers)] * 5, strict=True):
        layers.setdefault((first, last), [[] for _ in cluster.ranks])[rank].append([low, high])
    return [{"layers": list(span), "experts": experts} for span, experts in layers.items()]
