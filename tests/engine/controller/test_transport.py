"""The controller's sockets: messages are read frame by frame."""

from __future__ import annotations

import time

import zmq
from msgspec import structs

from lockstep.engine.controller.transport import Transport
from lockstep.engine.protocol.frontends import Abort, FromFrontend
from lockstep.engine.protocol.message import encode
from lockstep.engine.protocol.sockets import client_socket, new_keypair
from lockstep.engine.protocol.specs import Keys
from lockstep.parallel.mesh import Mesh
from support.engine.controller_spec import controller_spec


def test_frames_beyond_the_first_do_not_shift_the_messages_that_follow() -> None:
    server, client = new_keypair(), new_keypair()
    spec = controller_spec(Mesh(data=1), survivors=False)
    transport = Transport(
        structs.replace(spec, host="127.0.0.1", public=server[0], secret=server[1], allowed=(client[0],))
    )
    context = zmq.Context()
    keys = Keys(server_public=server[0], public=client[0], secret=client[1])
    peer = client_socket(context, zmq.DEALER, keys, b"f0")
    peer.connect(transport.addresses[2])
    peer.send_multipart([encode(Abort(1)), b"more", b""])
    peer.send(encode(Abort(2)))
    received: list[tuple[bytes, FromFrontend]] = []
    deadline = time.monotonic() + 20
    while len(received) < 2 and time.monotonic() < deadline:
        transport.wait(1.0)
        received += transport.frontend_messages()
    assert received == [(b"f0", Abort(1)), (b"f0", Abort(2))], "after at most 20 s"
    peer.close(linger=0)
    context.term()
    transport.close()
