"""``launch canary``: stores a server's greedy answers, and compares them later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..defaults import CANARY_TOKENS, CANARY_TOLERANCE
from .app import app
from .options import Against, ApiKeyEnv, ModelName, Silence, answers, messages, refusal, server_for

if TYPE_CHECKING:
    from ..client.answers import AnswersFile, CanaryPrompt
    from ..client.comparison import Comparison
    from ..client.server import Server

_Save = typer.Option("--save", help="Ask the prompts and store the answers in this file.")
_Answers = typer.Option("--answers", help="Ask the prompts of this file again and compare the answers.")
_Prompts = typer.Option(
    help="With --save: JSON lines with name and prompt (text) or messages (a conversation), max_tokens if "
    "it is to differ. Default: 12 packaged texts."
)
_MaxTokens = typer.Option(min=1, max=4096, help="With --save: tokens of each answer.")
_Tolerance = typer.Option(
    min=0.0,
    help="Log-probabilities within this distance count as equal, and two tokens within it as a near tie.",
)


@app.command()
def canary(
    against: Against,
    save: Annotated[Path | None, _Save] = None,
    stored: Annotated[Path | None, _Answers] = None,
    prompts: Annotated[Path | None, _Prompts] = None,
    max_tokens: Annotated[int | None, _MaxTokens] = None,
    tolerance: Annotated[float, _Tolerance] = CANARY_TOLERANCE,
    api_key_env: ApiKeyEnv = None,
    model: ModelName = None,
    timeout: Silence = 120.0,
) -> None:
    """Store a server's greedy answers, or compare its answers with stored ones.

    launch canary --against URL --save answers.json

    launch canary --against URL --answers answers.json

    Exit status: 0 stored, or the same but for near ties; 1 answers differ, 2 bad input or refused
    by the server, 3 server unreachable.
    """
    import asyncio

    from ..client.answers import AnswersError, default_prompts, read_answers, read_prompts
    from ..client.server import ServerError

    if (save is None) == (stored is None):
        raise refusal("give one of --save FILE and --answers FILE")
    if stored is not None and not (prompts is None and max_tokens is None):
        raise refusal("--prompts and --max-tokens go with --save; --answers has those of its file")
    server = server_for(against, timeout, api_key_env)
    try:
        if save is not None:
            asked = default_prompts() if prompts is None else read_prompts(prompts)
            asyncio.run(_save(server, save, asked, max_tokens or CANARY_TOKENS, model))
        elif stored is not None:
            differs = asyncio.run(_compare(server, read_answers(stored), tolerance, model))
            raise typer.Exit(1 if differs else 0)
    except AnswersError as error:
        raise refusal(error) from None
    except ServerError as error:
        raise refusal(error, 2 if error.asked_wrongly else 3) from None


async def _save(
    server: Server, path: Path, prompts: list[CanaryPrompt], max_tokens: int, wanted: str | None
) -> None:
    from ..client.answers import check_writable, write_answers
    from ..client.canary import ask_canary, server_version
    from ..client.server import served_model

    check_writable(path)
    model = str((await served_model(server, wanted))["id"])
    version = await server_version(server)
    found = [answer async for answer in ask_canary(server, model, prompts, max_tokens)]
    write_answers(path, model, version, max_tokens, found)
    count = sum(len(answer.tokens) for answer in found)
    text = f"{path}: {len(found)} answers of {model}, {count:,} tokens, server version {version}"
    answers().print(text, markup=False)


async def _compare(server: Server, before: AnswersFile, tolerance: float, wanted: str | None) -> bool:
    """Prints the comparison of the prompts answered so far; returns whether answers differ."""
    from ..client.canary import ask_canary, server_version
    from ..client.canary_screen import show_comparisons
    from ..client.comparison import compare, worst
    from ..client.server import ServerError, served_model

    model = str((await served_model(server, wanted))["id"])
    version = await server_version(server)
    console = answers()
    console.print(
        f"stored: {before.model}, server version {before.version}; now: {model}, server version {version}",
        markup=False,
    )
    compared: list[Comparison] = []
    asked = [answer.asked for answer in before.answers]
    try:
        async for answer in ask_canary(server, model, asked, before.max_tokens):
            compared.append(compare(before.answers[len(compared)], answer, tolerance))
    except ServerError:
        messages().print(f"stopped early: {len(compared)} of {len(asked)} prompts were answered")
        raise
    finally:
        if compared:
            show_comparisons(compared, tolerance, console)
    return worst(compared)
