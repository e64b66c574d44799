"""`divault seal` and `divault open`: sealed files without a node or a chain."""

from __future__ import annotations

import getpass
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from divault import keyfiles
from divault.cli.console import progress, say, show
from divault.cli.outputs import writing
from divault.errors import BadRequest
from divault.publishing import seal_path
from divault.values import ModelId, Secret
from divault.vault.age import Passphrase, Recipient
from divault.vault.keys import CallerKey, KeySource, NodeIdentity
from divault.vault.sealed import open_stream

app = typer.Typer()


@app.command()
def seal(
    path: Annotated[Path, typer.Argument(help="a model file, or a folder that becomes one tar")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the sealed file goes; must not exist")],
    recipient: Annotated[
        list[str] | None, typer.Option("--recipient", "-r", help="age1... of a node; repeat for several")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="the model id that it is for; nodes open it under no other")
    ] = None,
    *,
    passphrase: Annotated[bool, typer.Option("--passphrase", "-p", help="ask for a passphrase instead")] = False,
) -> None:
    """Seal a model so that only the named recipients open it (age v1).

    Example: divault seal model.joblib -o model.age -r age1node... -m breast-cancer
    """
    if bool(recipient) == passphrase:
        raise BadRequest("name recipients with -r, or ask for a passphrase with -p", field="recipient")
    to: list[Recipient | Passphrase] = [Recipient.parse(text) for text in recipient or []]
    if passphrase:
        to.append(Passphrase(_ask_passphrase(confirm=True)))
    with progress(f"sealing {path.name}"), writing(output, "output"):
        size = seal_path(path, output, to, None if model is None else ModelId.parse(model))
    say(f"sealed {path} into {output}")
    show({"output": str(output), "bytes": size, "recipients": [str(r) for r in recipient or []]})


@app.command(name="open")
def open_command(
    path: Annotated[Path, typer.Argument(help="a sealed file: age v1 or Lighthouse")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the plaintext goes; must not exist")],
    identity: Annotated[Path | None, typer.Option("--identity", "-i", help="age identity file")] = None,
    *,
    passphrase: Annotated[bool, typer.Option("--passphrase", "-p", help="ask for a passphrase or Kavach key")] = False,
) -> None:
    """Open a sealed file; nothing appears under OUTPUT unless all of it was authenticated.

    Example: divault open model.age -o model.joblib -i node.age.key
    """
    if (identity is None) != passphrase:
        raise BadRequest("give an identity file with -i, or ask for a passphrase with -p", field="identity")
    source: KeySource = (
        NodeIdentity(keyfiles.read_identity(identity)) if identity else CallerKey(_ask_passphrase(confirm=False))
    )
    if not path.is_file():
        raise BadRequest(f"{path} is no file", field="path")
    with _source(path) as sealed, writing(output, "output"):
        size = _open_into(sealed, output, source)
    say(f"opened {path} into {output}")
    show({"output": str(output), "bytes": size})


def _source(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as err:
        raise BadRequest(f"{path} can't be read: {err.strerror}", field="path") from err


def _open_into(sealed: io.BufferedReader, output: Path, source: KeySource) -> int:
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".divault-open-") as folder:
        draft = Path(folder, "plaintext")
        with draft.open("xb") as sink, progress(f"opening {Path(sealed.name).name}"):
            size = open_stream(sealed, sink, [source])
        os.link(draft, output)  # unlike a rename it never replaces a file
    return size


def _ask_passphrase(*, confirm: bool) -> Secret:
    if not sys.stdin.isatty():
        text = sys.stdin.readline().rstrip("\n")
    else:
        text = getpass.getpass("passphrase: ")
        if confirm and getpass.getpass("again: ") != text:
            raise BadRequest("the two passphrases differ", field="passphrase")
    if not text:
        raise BadRequest("an empty passphrase protects nothing", field="passphrase")
    return Secret.of_text(text)
