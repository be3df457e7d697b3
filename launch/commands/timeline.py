"""``launch timeline``: stores the timeline of a running cluster's next steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app
from .options import answers, refusal, server_for

if TYPE_CHECKING:
    from ..client.server import Server

_PATIENCE = 30.0  # seconds beyond those of the steps, until the server says something

_Url = typer.Option("--url", metavar="URL", help="Server, such as http://127.0.0.1:8000.")
_Out = typer.Option("--out", "-o", metavar="FILE", help="File for the trace, as JSON.")
_Key = typer.Option(metavar="NAME", help="Environment variable with the recipe's frontend.admin_key.")


@app.command()
def timeline(
    url: Annotated[str, _Url],
    out: Annotated[Path, _Out],
    steps: Annotated[int, typer.Option(min=1, max=512, help="Steps to record.")] = 64,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=60.0, help="Seconds within which the steps must be planned.")
    ] = 10.0,
    admin_key_env: Annotated[str | None, _Key] = None,
) -> None:
    """Store when plan, attention, exchanges, experts and waits of the next steps begin and end on
    every rank: a trace for https://ui.perfetto.dev or chrome://tracing.

    launch timeline --url URL --admin-key-env NAME --steps 64 --out trace.json

    Exit status: 0 all steps stored, 1 fewer (the trace says why), 2 bad input or refused by the
    server, 3 server unreachable.
    """
    import asyncio

    from ..client.server import ServerError

    names = "--url", "--admin-key-env"
    server = server_for(url, seconds + _PATIENCE, admin_key_env, names)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise refusal(f"--out {out}: cannot be written; should be a file in a folder that exists")
    try:
        trace = asyncio.run(_ask(server, steps, seconds))
        out.write_bytes(trace)
    except OSError as error:
        raise refusal(f"--out {out}: {error.strerror}") from None
    except ServerError as error:
        raise refusal(error, 2 if error.asked_wrongly else 3) from None
    raise typer.Exit(_told(out, trace, steps))


async def _ask(server: Server, steps: int, seconds: float) -> bytes:
    from ..client.server import ask

    body = {"steps": steps, "seconds": seconds}
    async with ask(server, "POST", "/admin/timeline", body) as answer:
        return await answer.whole()


def _told(out: Path, trace: bytes, asked: int) -> int:
    """Prints a summary of a trace; returns the exit status."""
    import msgspec

    document = msgspec.json.decode(trace)
    told = document["otherData"]
    text = f"{out}: {told['steps']} of {asked} steps on {len(told['ranks'])} ranks, {len(trace):,} bytes"
    reason = f"; {told['reason']}" if told["reason"] else ""
    answers().print(text + reason, markup=False)
    return 1 if reason else 0
