"""The OpenAPI document, and the page /docs that shows it and sends requests: one file without any
outside address, so that it works in a closed network.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def docs_router(describe: Callable[[], dict[str, Any]]) -> APIRouter:
    """The routes of both. A browser opens them without a key; one can be typed in there.
    ``describe`` makes the document, when it is first asked for.
    """
    router = APIRouter()
    page = (resources.files(__package__) / "docs.html").read_text(encoding="utf-8")
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in _SCRIPT.findall(page))
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page, headers=headers)

    @functools.cache
    def document() -> bytes:
        return msgspec.json.encode(describe())

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(await asyncio.to_thread(document), media_type="application/json")

    return router


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
