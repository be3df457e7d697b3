"""The Typer application. Each command registers itself here, ``main`` runs it."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

DEFAULT = "launch"


class _DefaultGroup(TyperGroup):
    """Runs the default command unless the first argument names another one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] == DEFAULT or args[0] not in self.commands:
            ctx.info_name = None  # so that usage lines read "launch ...", not "launch launch ..."
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
