"""Chat templates for families whose checkpoints ship code that encodes conversations instead of a
template. The code is never run.
"""

from __future__ import annotations

import ast
import json
import logging
from importlib.resources import files
from pathlib import Path

ENCODING = "encoding/encoding_dsv32.py"  # in a checkpoint of DeepSeek-V3.2
TOOLS_NAME = "TOOLS_SYSTEM_TEMPLATE"
_TEMPLATES = {"deepseek_v32": "deepseek_v32.jinja"}
_TAGS = {"dsml_token": "｜DSML｜", "thinking_start_token": "<think>", "thinking_end_token": "</think>"}

_log = logging.getLogger("lockstep.frontend")


def encoding_template(path: Path, model_type: str) -> str | None:
    """The chat template for a checkpoint of a family whose checkpoints have none; None for another
    family. The text that describes tools is a constant of the checkpoint's own code; without that
    file the template shows no tools. Raises ValueError where the file does not hold it.
    """
    name = _TEMPLATES.get(model_type)
    if name is None:
        return None
    text = ""
    if (path / ENCODING).exists():
        text = _tools_text(path / ENCODING)
    else:
        _log.warning("no tools in chats: %s has no %s, which describes them to the model", path, ENCODING)
    template = (files(__package__) / name).read_text(encoding="utf-8")
    return f"{{%- set TOOLS_TEXT = {json.dumps(text)} -%}}{template}"


def _tools_text(file: Path) -> str:
    """The text about tools, with ``{tool_schemas}`` as the place of their schemas."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file}: no Python source: {error}") from error
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        if any(isinstance(target, ast.Name) and target.id == TOOLS_NAME for target in targets):
            value = statement.value  # type: ignore[attr-defined]
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return _filled(value.value, file)
    raise ValueError(f"{file}: {TOOLS_NAME} should be there, a constant text")


def _filled(text: str, file: Path) -> str:
    schemas = "{tool_schemas}"
    try:
        found = text.format(**_TAGS, tool_schemas=schemas)
    except (LookupError, ValueError) as error:
        raise ValueError(f"{file}: {TOOLS_NAME} has a field that is not known: {error}") from error
    if schemas not in found:
        raise ValueError(f"{file}: {TOOLS_NAME} should hold {schemas}")
    return found
