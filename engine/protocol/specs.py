"""Start parameters of each process: frozen structs, which the launcher passes as JSON on standard
input.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ...parallel.mesh import Mesh


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """CURVE keys (z85 text) for a process that talks to the controller."""

    server_public: str
    public: str
    secret: str


class SchedulerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the planner; the first two hold per data index.

    ``inter_token_target``: seconds of a step that prompts may cause while others decode. Prompts
    get at least ``prompt_share`` of the time where decoding alone takes longer. No prompt makes a
    step longer than ``step_time_limit`` seconds; 0: no limit, and costs are fitted late.
    ``overlap``: off | on | auto. Recordings made before these three existed have their defaults.
    """

    max_batch_tokens: int = 8192
    max_running: int = 128
    max_queue: int = 1024
    inter_token_target: float = 0.2
    max_advance: int = 1
    prefix_caching: bool = True
    checksum_every: int = 64
    pacing: bool = True
    prompt_share: float = 0.0
    step_time_limit: float = 0.0
    overlap: str = "off"


class Succession(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of a run that a controller takes over from one that died, the ``life``-th in its place.

    ``addresses`` are those that ranks and frontends know. ``epoch`` is the last one that the
    launcher was told of; ranks may know of later ones. Requests are taken within ``max_len`` and
    ``page_size`` (0: no prefix caching) while ranks come back. ``draining``: the cluster takes no
    more requests. ``lost`` ranks may be away: the others served without them.
    """

    life: int
    addresses: tuple[str, ...]
    epoch: int
    max_len: int
    page_size: int
    draining: bool = False
    lost: tuple[int, ...] = ()


class KVEventsSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses (tcp://HOST:PORT) where the controller tells changes of the block index, and
    replays them; no replays without ``replay_address``. ``topic`` comes before each message.
    """

    address: str
    replay_address: str = ""
    topic: str = ""


class ControllerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a controller, which binds free ports of ``host``, or those of its
    ``succession``, and reports its addresses to the lobby. ``placement_i32``: the expert in every
    slot, [MoE layer, rank of a stage, slot], -1 where there is none; empty: consecutive experts on
    each rank. ``balance``: experts move between ranks by load. ``kv_events``: None for none.
    ``survivors``: ranks go on without one that is lost, if they can hold all experts.
    """

    host: str
    secret: str
    public: str
    allowed: tuple[str, ...]
    mesh: Mesh
    scheduler: SchedulerSpec
    model_max_len: int
    max_len: int | None
    rank_deadline: float = 300.0
    collective_deadline: float = 60.0
    recording: str | None = None
    succession: Succession | None = None
    lobby: LobbySpec | None = None
    placement_i32: bytes = b""
    balance: bool = False
    survivors: bool = True
    kv_events: KVEventsSpec | None = None


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a rank, which waits ``pause_deadline`` seconds for a controller that is away.
    ``store_address``: the store where ranks meet. ``kv_memory``: bytes of the page pool, None for a
    share of free memory.
    ``keep_fp8``: experts and linear layers stay in the checkpoint's FP8, other weights are held in
    ``dtype``. ``placement_i32``: as ``ControllerSpec``. ``capacity``: most tokens of a data index
    in a step, a bucket. ``overlap``: steps may have two microbatches. ``balance``: experts may
    move. ``weights``: random ones need no checkpoint. ``wire``: hidden states travel to experts in
    ``dtype`` or in FP8, which FP8 experts alone take. ``libraries``: by op, those that compute it
    in place of our own kernels.
    """

    rank: int
    mesh: Mesh
    keys: Keys
    step_address: str
    bulk_address: str
    store_address: str
    store_keys: Keys
    model_path: str
    dtype: str
    keep_fp8: bool
    kv_dtype: str
    page_size: int
    kv_memory: int | None
    ranks_per_host: int
    max_running: int
    max_len: int | None
    dispatch: str
    device: str
    threads: int
    weights: Literal["checkpoint", "random"] = "checkpoint"
    wire: Literal["full", "fp8"] = "full"
    capacity: int = 8192
    libraries: dict[str, str] = msgspec.field(default_factory=dict)
    overlap: bool = False
    balance: bool = False
    collective_deadline: float = 60.0
    pause_deadline: float = 120.0
    lobby: LobbySpec | None = None
    placement_i32: bytes = b""


class AcceptorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The source of frontends' connections: a Unix packet socket in the abstract namespace, and
    the token that opens it.
    """

    address: str
    token: str


class FrontendLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on the clients of one frontend: bytes of a body, connections and bytes of bodies at
    once, and seconds for a head, for a body, between requests, and for a client that reads none of
    its answer.
    """

    max_connections: int = 4096
    max_body: int = 8 * 2**20
    body_memory: int = 256 * 2**20
    head_deadline: float = 20.0
    body_deadline: float = 120.0
    idle_deadline: float = 75.0
    read_deadline: float = 60.0


class FrontendSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a frontend. ``kv_format`` goes into prompt hashes. ``grammar_seconds`` of CPU
    and ``grammar_memory`` bytes bound the check of a grammar; they, ``cors_origins`` and
    ``access_log`` are those of the recipe. ``access_log_file`` is absolute; ``tracing`` is a
    collector's base URL, empty for OTEL_* variables; None is off for both. Requests wait
    ``pause_deadline`` seconds for a controller that does not answer.

    ``index`` numbers the frontends behind a port; a restarted one keeps its index and its name.
    """

    name: str
    keys: Keys
    address: str
    acceptor: AcceptorSpec
    model_path: str
    served_name: str
    vocab_size: int
    index: int = 0
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    kv_format: str = "auto"
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    cors_origins: tuple[str, ...] = ()
    access_log: bool = False
    access_log_file: str | None = None
    tracing: str | None = None
    pause_deadline: float = 120.0
    grammar_seconds: float = 1.5
    grammar_memory: int = 256 << 20
    limits: FrontendLimits = FrontendLimits()
    lobby: LobbySpec | None = None


class LobbySpec(msgspec.Struct, frozen=True, kw_only=True):
    """The launcher's PULL socket, to which starting processes report."""

    address: str
    keys: Keys
