"""The file that describes a model: config.json, or Mistral's params.json where that is all there
is.
"""

from __future__ import annotations

from pathlib import Path

from .config_fields import Fields
from .mistral_format import PARAMS_FILE, described


def description_file(folder: Path) -> Path:
    """The file in ``folder``, which may be missing."""
    config, params = folder / "config.json", folder / PARAMS_FILE
    return params if params.is_file() and not config.is_file() else config


def read_description(folder: Path) -> Fields:
    """The description of the text model in ``folder``, in the words of a config.json. Raises
    ValueError naming the file at fault.
    """
    file = description_file(folder)
    fields = Fields.read(file)
    return described(fields) if file.name == PARAMS_FILE else fields.text_model()
