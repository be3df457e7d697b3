"""The CURVE keys of one run."""

from __future__ import annotations

from ...engine.protocol.sockets import new_keypair
from ...engine.protocol.specs import Keys
from ..recipe.recipe import Recipe


class Keyring:
    """Key pairs for the sockets of the controller, the lobby and the ranks' store, and one per
    client process.
    """

    def __init__(self, names: list[str]) -> None:
        self._controller = new_keypair()
        self._lobby = new_keypair()
        self._store = new_keypair()
        self._clients = {name: new_keypair() for name in names}

    @property
    def controller(self) -> tuple[str, str]:
        """(public, secret) of the controller's server sockets."""
        return self._controller

    @property
    def lobby(self) -> tuple[str, str]:
        """(public, secret) of the lobby's server socket."""
        return self._lobby

    @property
    def store(self) -> tuple[str, str]:
        """(public, secret) of the server socket of the ranks' store."""
        return self._store

    @property
    def ranks(self) -> tuple[str, ...]:
        """Public keys of all ranks."""
        return tuple(public for name, (public, _) in self._clients.items() if name.startswith("rank "))

    @property
    def allowed(self) -> tuple[str, ...]:
        """Public keys of all clients."""
        return tuple(public for public, _ in self._clients.values())

    def to_controller(self, name: str) -> Keys:
        return self._keys(self._controller[0], name)

    def to_lobby(self, name: str) -> Keys:
        return self._keys(self._lobby[0], name)

    def to_store(self, name: str) -> Keys:
        return self._keys(self._store[0], name)

    def _keys(self, server_public: str, name: str) -> Keys:
        public, secret = self._clients[name]
        return Keys(server_public=server_public, public=public, secret=secret)


def process_names(recipe: Recipe) -> list[str]:
    """Every process that needs a key, including the launcher."""
    frontends = [f"frontend {index}" for index in range(recipe.frontend.processes)]
    ranks = [f"rank {rank}" for rank in range(recipe.world)]
    return ["launcher", "controller 0", *frontends, *ranks]
