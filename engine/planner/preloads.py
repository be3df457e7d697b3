"""Prompts on their way to ranks, ahead of their admission."""

from __future__ import annotations

from ...parallel.mesh import Mesh
from ..protocol.bulk import Preload, Preloaded, Unload
from .request import Request


class Preloads:
    """Sends prompts to all members of a data index and tracks which members have them.

    Prompt numbers start at 2**32 times the group's first ``epoch``, since ranks may still hold
    prompts of an earlier controller. ``oldest_valid`` [D]: after a rebase a data index drops
    prompts below it, as plans that were to admit them may never have been executed.
    """

    def __init__(self, mesh: Mesh, epoch: int) -> None:
        self._mesh = mesh
        self._next = epoch << 32
        self.oldest_valid = [self._next] * mesh.data
        self._requests: dict[int, Request] = {}
        self._messages: list[tuple[int, Preload | Unload]] = []

    def send(self, request: Request, data: int) -> None:
        """Sends the tokens that ``request`` has so far to ``data``."""
        members = self._mesh.members(data)
        request.staged = self._next
        request.unacknowledged = set(members)
        self._next += 1
        self._requests[request.staged] = request
        preload = Preload(
            request.staged, request.prompt_i32 + request.emitted_i32, request.grammar, request.num_emitted
        )
        self._messages.extend([(rank, preload) for rank in members])

    def waiting_for(self, message: Preloaded) -> Request | None:
        """The request whose prompt a rank acknowledges, if it still waits for its admission."""
        return self._requests.get(message.staged)

    def admitted(self, request: Request) -> None:
        """Removes the prompt of ``request``, which a plan admits."""
        del self._requests[request.staged]

    def withdraw(self, request: Request, data: int) -> None:
        """Tells ``data`` to drop the prompt of ``request``."""
        self._messages.extend((rank, Unload(request.staged)) for rank in self._mesh.members(data))
        self._requests.pop(request.staged, None)

    def set_back(self, data: int) -> None:
        """Invalidates all prompts sent to ``data`` so far: a rebase drops them."""
        self.oldest_valid[data] = self._next

    def take(self) -> list[tuple[int, Preload | Unload]]:
        """Messages since the last call, as (rank, message)."""
        messages, self._messages = self._messages, []
        return messages
