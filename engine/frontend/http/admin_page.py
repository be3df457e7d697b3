"""The page /admin: a view of the running cluster, which polls /admin/cluster from the browser."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from .page import load_page


def admin_page() -> APIRouter:
    """The page holds no data, so it needs no key; the user enters the admin key in it."""
    router = APIRouter()
    page = load_page("admin.html")

    @router.get("/admin", include_in_schema=False)
    async def admin() -> Response:
        return page()

    return router
