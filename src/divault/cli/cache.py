"""`divault cache`: what of the cache of ciphertext is there, whether it is right, and how to be rid of it."""

from __future__ import annotations

from datetime import UTC, datetime

import typer
from rich.table import Table

from divault.cli.console import out, say, show
from divault.errors import ContentInvalid
from divault.settings import MB, Settings
from divault.storage.cache import CiphertextCache
from divault.storage.inventory import inventory, verify

app = typer.Typer(
    no_args_is_help=True, help="Look after the cache of fetched models (ciphertext). Example: divault cache ls"
)


@app.command()
def ls() -> None:
    """List what is cached, the most recently used first. May run beside a node.

    Example: divault cache ls
    """
    cache = _cache()
    table = Table("kind", "CID", "bytes", "last used", "in use", box=None, pad_edge=False)
    for listed in inventory(cache):
        used = datetime.fromtimestamp(listed.used_at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(listed.kind, listed.cid or "inline", str(listed.bytes), used, "yes" if listed.in_use else "")
    out.print(table)
    usage = cache.usage()
    say(f"{usage.entries} entries, {usage.bytes} of {usage.max_bytes} bytes")


@app.command(name="verify")
def verify_command() -> None:
    """Hash every cached byte again and remove what is damaged; nodes fetch it anew. Exit status 1 if anything was.

    Example: divault cache verify
    """
    damaged = 0
    for listed, right in verify(_cache()):
        show(f"{'ok     ' if right else 'DAMAGED'}  {listed.cid}  {listed.bytes} bytes")
        damaged += not right
    if damaged:
        raise ContentInvalid(f"{damaged} damaged entries were removed; nodes fetch them anew", reason="cache_damaged")


@app.command()
def clear() -> None:
    """Remove everything that no process uses now.

    Example: divault cache clear
    """
    freed = _cache().clear()
    kept = f"; {freed.in_use} in use kept" if freed.in_use else ""
    show(f"{freed.entries} entries and {freed.bytes} bytes freed{kept}")


def _cache() -> CiphertextCache:
    settings = Settings.load()
    return CiphertextCache(settings.model_cache_dir, settings.divault_cache_max_mb * MB)
