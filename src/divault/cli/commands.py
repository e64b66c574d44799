"""All commands under one roof."""

from __future__ import annotations

from typing import Annotated

import typer

import divault
from divault.cli import cache, consumer, demo, development, files, keys, nodes, operator, publisher, top

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Decentralized Inference Vault: sealed models, wallet gates, direct payment, signed receipts. "
    "Start with: divault demo",
)
for part in (operator, demo, publisher, files, consumer, development, top):
    app.registered_commands += part.app.registered_commands
app.add_typer(keys.app, name="keys")
app.add_typer(nodes.app, name="nodes")
app.add_typer(cache.app, name="cache")
app.add_typer(consumer.receipt_app, name="receipt")


def _version(*, value: bool) -> None:
    if value:
        print(divault.__version__)
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
