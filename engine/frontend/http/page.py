"""A page of the server's own: one packaged file of HTML, style and script, which loads nothing
else, so that it works in a closed network.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from functools import partial
from importlib import resources

from starlette.responses import HTMLResponse

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


def load_page(name: str) -> Callable[[], HTMLResponse]:
    """Makes answers with the page; layers outside add headers to each. Its policy allows exactly
    the scripts and styles of the file, and requests to this server only.
    """
    text = (resources.files(__package__) / name).read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hashes(_SCRIPT, text)}; style-src {_hashes(_STYLE, text)}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return partial(HTMLResponse, text, headers=headers)


def _hashes(part: re.Pattern[str], text: str) -> str:
    digests = (hashlib.sha256(found.encode()).digest() for found in part.findall(text))
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
