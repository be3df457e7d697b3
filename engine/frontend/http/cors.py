"""Lets pages of other origins use the server from a browser (CORS), as the recipe allows.

Pages set the key's header themselves and need no cookies: no answer allows credentials, and ``*``
is safe to send.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from ..api.errors import ApiError, error_response

METHODS = ("GET", "HEAD", "POST", "OPTIONS")
EXPOSED = ("X-Request-Id", "Retry-After", "WWW-Authenticate")
LOCALHOST = "localhost"
_LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?"
_KEPT = ("access-control-", "vary")


class Cors(CORSMiddleware):
    """Answers preflights and adds the headers to every answer. A refused preflight has the shape of
    all errors and says what to change.
    """

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        origin = request_headers["origin"][:200]
        if self.is_allowed_origin(origin):
            method = request_headers["access-control-request-method"][:20]
            error = ApiError(400, f"CORS: {method} is not among the methods {', '.join(METHODS)}")
        else:
            error = ApiError(400, f"CORS: the origin {origin} is not in the recipe's frontend.cors_origins")
        refusal = error_response(error)
        refusal.headers.update({k: v for k, v in answer.headers.items() if k.startswith(_KEPT)})
        return refusal


def with_cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """``app`` for pages of ``origins``: exact ones, ``*`` for all, ``localhost`` for this machine's
    own of any port. As it is if there are none.
    """
    if not origins:
        return app
    return Cors(
        app,
        allow_origins=[origin for origin in origins if origin != LOCALHOST],
        allow_origin_regex=_LOCAL_ORIGIN if LOCALHOST in origins else None,
        allow_methods=METHODS,
        allow_headers=["*"],
        allow_private_network=True,  # the origin has been named, and may be outside this network
        expose_headers=EXPOSED,
    )
