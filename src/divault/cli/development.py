"""`divault lighthouse`: Lighthouse's hosts on this machine, for development."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

import typer

from divault.cli.console import say, show
from divault.testing.lighthouse import LighthouseDouble

app = typer.Typer()


@app.command()
def lighthouse(
    directory: Annotated[Path, typer.Argument(help="where content is kept; made if it is not there")],
) -> None:
    """Run a double of Lighthouse and Kavach on this machine until Ctrl-C, and print the settings that lead to it.

    Content stays in the directory; accounts and keys end with the program. For development alone: nothing in it keeps
    a secret, and no access condition is ever met.

    Example: divault lighthouse ./lighthouse | tee .env
    """
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(directory))


async def _serve(directory: Path) -> None:
    async with LighthouseDouble(directory) as double:
        for name, value in double.settings().items():
            show(f"{name}={value}")
        # Whoever reads the settings from a pipe gets them before anything happens.
        print(flush=True)
        say("serving until Ctrl-C")
        await asyncio.Event().wait()
