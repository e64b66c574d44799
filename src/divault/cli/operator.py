"""`divault serve`, `divault config` and `divault doctor`: the operator's side."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer
import uvloop

from divault import app as node_app
from divault.cli.console import say, show
from divault.cli.diagnosis import diagnose
from divault.errors import NotReady
from divault.settings import Settings

app = typer.Typer()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option("--host", help="instead of HOST")] = None,
    port: Annotated[int | None, typer.Option("--port", help="instead of PORT; 0: the system chooses")] = None,
    *,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="end with standard input: for programs that start a node")
    ] = False,
) -> None:
    """Serve models: settings come from the environment and .env (see .env.example).

    Example: VAULT_CONTRACT_ADDRESS=0x... USDC_CONTRACT_ADDRESS=0x... divault serve --port 8000
    """
    chosen = {name: str(value) for name, value in (("HOST", host), ("PORT", port)) if value is not None}
    settings = Settings.load(os.environ | chosen)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(node_app.serve(settings, until_eof=until_eof))


@app.command()
def config() -> None:
    """Print every setting as the node would use it; secrets are masked.

    Example: divault config
    """
    for name, value in Settings.load().redacted().items():
        show(f"{name}={value}")


@app.command()
def doctor() -> None:
    """Test everything a node needs, and say cause and fix for what fails. Exit status 1 if anything does.

    Example: divault doctor
    """
    findings = asyncio.run(diagnose(Settings.load()))
    for finding in findings:
        show(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
    failed = [finding.name for finding in findings if not finding.ok]
    if failed:
        raise NotReady(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")
    say("everything a node needs is there")
