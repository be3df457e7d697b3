"""A grammar that a request needs, before it is known whether it can be followed."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from ..api.errors import ApiError, bad_request


@dataclass(frozen=True, slots=True)
class Claim:
    """A grammar to be followed, and the request's field that it comes from."""

    grammar: str
    param: str

    @property
    def digest(self) -> bytes:
        return blake2b(self.grammar.encode(), digest_size=16).digest()

    def refused(self, fault: str) -> ApiError:
        """The error of a claim that has a fault."""
        return bad_request(f"{self.param}: {fault}", self.param)
