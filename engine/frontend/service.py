"""The frontend between HTTP and the controller: tracks the state of the cluster, decides whether to
accept new requests, and opens them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from ..protocol.cluster_state import ClusterState
from ..protocol.frontends import Drain, Rejected, Started, TokenBatch
from ..protocol.message import Stop
from ..protocol.results import PromptLogprobs
from ..protocol.specs import FrontendSpec
from ..protocol.timeline import StepSpans, TimelineEnd
from .api.errors import CLIENT_GONE, ApiError
from .api.schemas import CompletionRequest, GenerationRequest
from .cluster_history import ClusterHistory
from .controller_link import ControllerLink, FromController
from .grammars.claim import Claim
from .grammars.desk import GrammarDesk
from .grammars.keeper import KeeperSpec
from .metrics.metrics import Metrics
from .metrics.shared_counters import SharedCounters
from .open_requests import OpenRequests
from .reply import Receive, Reply
from .requests.model import ServedModel
from .requests.prepare import EngineLimits, prepare
from .timelines import Timelines

P = ParamSpec("P")
R = TypeVar("R")

THREADS = 4
RETRY_STARTING = 5.0
RETRY_DRAINING = 30.0
PROBE_SECONDS = 30.0
PUBLISH_SECONDS = 0.25


class Service:
    """Belongs to the event loop it is made on. Sends a hello to the controller at once; calls
    ``on_stop`` at a Stop from the controller.
    """

    def __init__(
        self, spec: FrontendSpec, model: ServedModel, shared: SharedCounters, on_stop: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.model = model
        self.metrics = Metrics(spec.served_name, shared)
        self.cluster: ClusterState | None = None
        self.history = ClusterHistory()
        self.started = time.time()
        self._on_stop = on_stop
        self._heard = asyncio.Event()
        self._threads = ThreadPoolExecutor(THREADS, "prepare")
        self.grammars = GrammarDesk(_keeper_spec(spec, model))
        self._link = ControllerLink(spec, self._on_message, self._on_found, self._on_lost)
        self.requests = OpenRequests(spec.name, self._link.send, self.metrics, self._unfinished)
        self.timelines = Timelines(self._link.send)
        self._publishing = asyncio.get_running_loop().create_task(self._publish())

    def close(self) -> None:
        self.requests.fail_all(ApiError(503, "The server is shutting down", retry_after=RETRY_STARTING))
        self._publishing.cancel()
        self.metrics.publish(len(self.requests))
        self._link.close()
        self.grammars.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs slow work in a thread: tokenizing, rendering, hashing."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(function, *args, **kwargs)
        )

    async def wait_heard(self, seconds: float) -> None:
        """Returns when the controller has sent its state, or after ``seconds``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), seconds)

    async def _publish(self) -> None:
        """Shows this frontend's counts to the others, so that each of them can answer for all."""
        while True:
            self.metrics.publish(len(self.requests))
            await asyncio.sleep(PUBLISH_SECONDS)

    # ----------------------------------------------------------------- the cluster

    def unable(self) -> str | None:
        """Why no token can be generated, or None; shown by /health."""
        if self.cluster is None:
            return "The engine is starting: no message from the controller yet"
        if self._link.lost:
            return "The controller does not answer"
        if self.cluster.phase in ("serving", "draining"):
            return None
        reason = f": {self.cluster.reason}" if self.cluster.reason else ""
        return f"The engine is {self.cluster.phase}{reason}"

    def not_ready(self) -> ApiError | None:
        """Why this frontend should get no requests, or None; shown by /ready. If only the grammar
        check fails, other requests are still accepted.
        """
        trouble = self.grammars.trouble
        return self.closed() or (trouble and ApiError(503, trouble, retry_after=RETRY_STARTING)) or None

    def closed(self) -> ApiError | None:
        """Why no new request is taken, or None. While a rank is being replaced requests are taken,
        and wait.
        """
        if self.cluster is not None and self.cluster.phase == "recovering" and not self._link.lost:
            return None
        reason = self.unable()
        if reason is not None:
            return ApiError(503, reason, retry_after=RETRY_STARTING)
        if self.cluster is not None and self.cluster.phase == "draining":
            text = "The engine is draining and takes no new requests"
            return ApiError(503, text, retry_after=RETRY_DRAINING)
        return None

    def degraded(self) -> dict[str, str]:
        """The part of /health that names missing processes while the cluster still serves."""
        text = "" if self.cluster is None else self.cluster.degraded
        return {"degraded": text} if text else {}

    def limits(self) -> EngineLimits:
        """Raises ApiError 503 while no new request is taken."""
        error = self.closed()
        if error is not None:
            raise error
        assert self.cluster is not None
        return EngineLimits(
            self.cluster.max_len, self.cluster.page_size if self.cluster.prefix_caching else 0
        )

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
                self.history.heard(message)
                self.metrics.state(message)
                self._heard.set()
            case StepSpans():
                self.timelines.on_spans(message)
            case TimelineEnd():
                self.timelines.on_end(message)
            case Stop():
                self._on_stop()

    def _on_found(self) -> None:
        """Handles an answer of the controller after messages may have been lost."""
        self.requests.submit_again()

    def _on_lost(self) -> None:
        self.requests.fail_all(ApiError(500, "The controller was lost while the request was running"))

    def _unfinished(self) -> ApiError:
        """The error of a request that the engine has ended without a result."""
        if self.cluster is not None and self.cluster.phase in ("draining", "drained"):
            text = "The server is shutting down, and the request did not finish before the drain's deadline"
            return ApiError(503, text, retry_after=RETRY_DRAINING)
        return ApiError(500, "The engine could not finish this request")

    # ----------------------------------------------------------------- requests

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            text = f"The model {name[:200]!r} does not exist; this server serves {self.model.name!r}"
            raise ApiError(404, text, "model")

    async def open(self, ask: GenerationRequest, request_id: str, receive: Receive) -> Reply:
        """Prepares and submits a request. Its client is watched from here on. Raises ApiError."""
        self.check_model(ask.model)
        prepared = await self.in_thread(prepare, self.model, self.limits(), ask, request_id)
        if prepared.claims and not self.grammars.settled(prepared.claims):
            await self._check(prepared.claims, receive)
        self.limits()  # the cluster may have closed meanwhile
        reply = Reply(prepared, self.model.codec, self.requests, receive)
        reply.submit()
        return reply

    async def _check(self, claims: Sequence[Claim], receive: Receive) -> None:
        """Waits for a check of grammars, which ends when the client goes away. Raises ApiError."""
        loop = asyncio.get_running_loop()
        checking = loop.create_task(self.grammars.check(claims))
        gone = loop.create_task(_disconnected(receive))
        try:
            await asyncio.wait({checking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not checking.done():
                raise ApiError(CLIENT_GONE, "The client went away while its grammar was checked")
        finally:
            checking.cancel()
            gone.cancel()
            await asyncio.wait({checking, gone})
        checking.result()

    async def probe(self) -> float:
        """Generates one token as any request does; returns the seconds it took. Raises ApiError."""
        began = time.monotonic()
        error = self.not_ready()
        if error is not None:
            raise error
        ask = CompletionRequest(prompt=[0], max_tokens=1, ignore_eos=True, temperature=0.0)
        preparing = self.in_thread(prepare, self.model, self.limits(), ask, "probe")
        try:
            prepared = await asyncio.wait_for(preparing, PROBE_SECONDS)
        except TimeoutError:
            text = f"No thread was free to prepare a request within {PROBE_SECONDS:.0f} s"
            raise ApiError(503, text, retry_after=RETRY_STARTING) from None
        reply = Reply(prepared, self.model.codec, self.requests)
        reply.submit()
        try:
            await asyncio.wait_for(asyncio.shield(reply.done), PROBE_SECONDS)
        except TimeoutError:
            text = f"No token was generated within {PROBE_SECONDS:.0f} s"
            raise ApiError(503, text, retry_after=RETRY_STARTING) from None
        finally:
            reply.close()
        reply.raise_error()
        return time.monotonic() - began


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _keeper_spec(spec: FrontendSpec, model: ServedModel) -> KeeperSpec:
    return KeeperSpec(
        model_path=spec.model_path,
        vocab_size=spec.vocab_size,
        eos_ids=tuple(id for id in model.defaults.eos_ids if id < spec.vocab_size),
        seconds=spec.grammar_seconds,
        memory=spec.grammar_memory,
    )
