"""The page /admin: a view of the running cluster, which polls /admin/cluster from the browser."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from .page import load_page


def admin_page() -> APIRouter:
    """The page holds no data, so it is open; the admin key is typed in there."""
    router = APIRouter()
    page = load_page("admin.html")

    @router.get("/admin", include_in_schema=False)
    async def admin() -> Response:
        return page()

    return router
