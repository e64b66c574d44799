"""All commands under one roof. What one of them needs is imported when it is called: all of it takes a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated

import typer

import divault

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "operator": ("serve", "config", "doctor"),
    "demo": ("demo",),
    "publisher": ("publish",),
    "files": ("seal", "open"),
    "consumer": ("call", "sign-in", "sign-out", "verify"),
    "development": ("lighthouse",),
    "top": ("top",),
}
"""Commands by the module that has them, in the order in which they are listed."""
GROUPS: Mapping[str, tuple[str, str]] = {
    "keys": ("keys", "app"),
    "nodes": ("nodes", "app"),
    "cache": ("cache", "app"),
    "receipt": ("consumer", "receipt_app"),
}
"""Commands that have commands of their own: their module, and the name there."""


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command line for these arguments: with the command that they name, or with all."""
    named = next((word for word in arguments if not word.startswith("-")), "")
    module = next((module for module, names in COMMANDS.items() if named in names), None)
    if module is not None:
        return _app((module,), ())
    return _app((), (named,)) if named in GROUPS else _app(tuple(COMMANDS), tuple(GROUPS))


def _app(modules: Sequence[str], groups: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Decentralized Inference Vault: sealed models, wallet gates, direct payment, signed receipts. "
        "Start with: divault demo",
    )
    app.callback()(_before)
    for module in modules:
        app.registered_commands += _part(module, "app").registered_commands
    for name in groups:
        app.add_typer(_part(*GROUPS[name]), name=name)
    return app


def _part(module: str, name: str) -> typer.Typer:
    found: typer.Typer = getattr(import_module(f"divault.cli.{module}"), name)
    return found


def _version(*, value: bool) -> None:
    if value:
        print(divault.__version__)
        raise typer.Exit


def _before(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
