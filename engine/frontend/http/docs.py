"""The OpenAPI document, and the page /docs that shows it and sends requests: one file without any
outside address, so that it works in a closed network.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from .page import load_page


def docs_router(describe: Callable[[], dict[str, Any]]) -> APIRouter:
    """Routes of the docs page and the OpenAPI document. Neither needs a key; the page has a field
    for one. ``describe`` makes the document at the first request for it.
    """
    router = APIRouter()
    page = load_page("docs.html")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page()

    @functools.cache
    def document() -> bytes:
        return msgspec.json.encode(describe())

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(await asyncio.to_thread(document), media_type="application/json")

    return router
