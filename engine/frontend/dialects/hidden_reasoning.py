"""Reasoning as ``encrypted_content``, the only form that some clients send back. It is not
encrypted: the client has the plain text as well.
"""

from __future__ import annotations

import base64
import binascii


def write_hidden(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def read_hidden(content: str) -> str:
    """The text; empty where another server has written ``content``."""
    try:
        return base64.b64decode(content, validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
