"""The ZeroMQ sockets that messages travel on.

Every socket is CURVE-encrypted: the controller accepts only the client keys that the launcher
handed out. Plans are two frames (header shared by the group, section of the recipient);
everything else is one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import zmq

from .specs import Keys

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

T = TypeVar("T")

ABSENCE_SECONDS = 10.0  # a peer that neither closes a connection nor answers for so long is gone
_HEARTBEAT_SECONDS = 2.0
_MAX_MESSAGE = 64 << 20  # bytes; a stranger may send them before it has shown a key
_HANDSHAKE_SECONDS = 10.0
_BIND_POLL = 0.05


def new_keypair() -> tuple[str, str]:
    """A fresh CURVE key pair (public, secret), z85 text."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def server_socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, public: str, secret: str
) -> zmq.Socket[bytes]:
    """An unbound CURVE server socket; ``authenticate`` decides which clients may connect."""
    socket = context.socket(kind)
    socket.curve_server = True
    socket.curve_publickey = public.encode()
    socket.curve_secretkey = secret.encode()
    socket.linger = 0
    socket.sndhwm = 0
    socket.rcvhwm = 0
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * _HANDSHAKE_SECONDS))
    return socket


def client_socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, keys: Keys, identity: bytes = b""
) -> zmq.Socket[bytes]:
    """An unconnected CURVE client socket that names itself ``identity`` to a ROUTER."""
    socket = context.socket(kind)
    socket.curve_serverkey = keys.server_public.encode()
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()
    if identity:
        socket.setsockopt(zmq.IDENTITY, identity)
    socket.linger = 0
    socket.sndhwm = 0
    socket.rcvhwm = 0
    return socket


def bind_when_free(socket: zmq.Socket[bytes], address: str, patience: float, name: str) -> None:
    """Binds to ``address``, which another process may take ``patience`` seconds to leave. Raises
    OSError that begins with ``name``.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.bind(address)
            return
        except zmq.ZMQError as error:
            if time.monotonic() >= deadline:
                within = f" was not free within {patience:g} s" if patience else " cannot be listened on"
                raise OSError(f"{name} {address}{within}: {error}") from None
            time.sleep(_BIND_POLL)


def rank_identity(rank: int) -> bytes:
    """A rank's identity on ROUTER sockets."""
    return b"r%d" % rank


def pulse_identity(rank: int) -> bytes:
    """The identity of a rank's pulse on the bulk socket."""
    return b"p%d" % rank


def keep_watch(socket: zmq.Socket[bytes]) -> None:
    """Ends connections whose other side has not answered for ``ABSENCE_SECONDS``. Call it before
    the socket binds or connects.
    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * _HEARTBEAT_SECONDS))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * ABSENCE_SECONDS))


class AllowedKeys:
    """Credentials provider for ``zmq.auth``: the public keys that the launcher handed out."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = {key.encode() for key in allowed}

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._allowed  # already z85 text


def authenticate(context: zmq.Context[zmq.Socket[bytes]], allowed: tuple[str, ...]) -> ThreadAuthenticator:
    """Starts the ZAP thread of ``context``; ``stop()`` it before the context ends."""
    from zmq.auth.thread import ThreadAuthenticator  # imports asyncio, which `launch simulate` does not need

    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback("*", credentials_provider=AllowedKeys(allowed))
    return authenticator
