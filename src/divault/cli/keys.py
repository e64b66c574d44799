"""`divault keys`: make and show key files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from divault import keyfiles
from divault.cli.console import say, show
from divault.errors import SettingsInvalid
from divault.messages import address_of
from divault.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Make and show key files. Example: divault keys new consumer.key")


@app.command()
def new(path: Annotated[Path, typer.Argument(help="the file to make, mode 0600; never overwritten")]) -> None:
    """Make a wallet key and print its address.

    Example: divault keys new consumer.key
    """
    key = keyfiles.new_signing_key(path)
    say(f"wallet key in {path}: whoever has the file owns the wallet")
    show(str(address_of(key)))


@app.command()
def age(path: Annotated[Path, typer.Argument(help="the file to make, mode 0600; never overwritten")]) -> None:
    """Make an age identity and print its recipient.

    Example: divault keys age node.age.key
    """
    identity = keyfiles.new_identity(path)
    say(f"age identity in {path}: whoever has the file opens what is sealed to it")
    show(str(identity.recipient))


@app.command(name="show")
def show_command(path: Annotated[Path, typer.Argument(help="a key file of either kind")]) -> None:
    """Print the public half of a key file: the address of a wallet key, the recipient of an age identity.

    Example: divault keys show consumer.key
    """
    try:
        show(str(address_of(keyfiles.read_signing_key(path))))
    except SettingsInvalid:
        show(str(keyfiles.read_identity(path).recipient))


@app.command()
def node() -> None:
    """Print this node's address and age recipient; the first call makes both keys in the state directory.

    Example: divault keys node
    """
    from divault.app import Identities  # with all of a node, which the other commands do without

    who = Identities.of(Settings.load())
    show({"address": str(who.address), "age_recipient": str(who.age.recipient)})
