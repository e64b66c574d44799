"""Write the generated documents again: `python tools/write_reference.py` (or `make docs`).

Each comes from the code that it describes, and `tests/test_repository.py` fails when one of them is stale:

    docs/reference/errors.md     divault.errors and divault.api.problems
    docs/reference/settings.md   divault.settings
    docs/reference/cli.md        the commands' own help
    docs/reference/contracts.md  the ABIs in divault.chain.abi
    .env.example                 divault.settings
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from divault.api.problems import STATUS
from divault.errors import ContentInvalid, DivaultError, error_classes
from divault.keccak import keccak256
from divault.settings import Settings
from divault.values import Secret

ROOT = Path(__file__).parent.parent
ABI = ROOT / "src/divault/chain/abi"
_GROUP = re.compile(r"^    # --- (?P<group>.+?) -+$|^    (?P<field>[a-z0-9_]+): ")

SIGNATURE_REASONS = {
    "bad_hex": "not hex digits with an optional lower-case `0x`, or an odd number of them",
    "bad_length": "neither 65 bytes nor the 64 bytes of EIP-2098; of a contract wallet: over 8 KiB",
    "bad_rs": "r or s is zero or not below the group order",
    "bad_v": "v is none of 0, 1, 27, 28",
    "high_s": "s is in the upper half: the same signature in its malleable form",
    "bad_address": "an address that is not 0x and 40 digits, all lower, all upper or with the exact checksum; or zero",
    "signer_mismatch": "somebody else signed, or something else was signed: other body, path, node or price",
    "body_mismatch": "the signed hash is not that of the body that arrived",
    "method_mismatch": "signed for another HTTP method",
    "path_mismatch": "signed for another path, or the URL has a query that no signature covers",
    "node_mismatch": "signed for another node",
    "wrong_chain": "signed for another chain",
    "wrong_domain": "signed for another vault or another application",
    "bad_window": "it expires before it is issued",
    "ttl_too_long": "the window is longer than 300 s",
    "issued_in_future": "issued more than 5 s ahead of the node's clock",
    "not_yet_valid": "created more than 5 s ahead of the node's clock",
    "expired": "the window is over; expiry itself is already too late",
    "replay": "this wallet used this nonce before",
    "price_above_max": "the price is above the maximum that was signed",
    "missing_headers": "a header or parameter of the signature is missing",
    "replayable_not_allowed": "header signature without a nonce",
    "class_bound": "the signature does not cover method, authority, path, query and body",
    "digest_mismatch": "`Content-Digest` is not that of the body that arrived",
    "bad_wrapper": "an ERC-6492 wrapper that is not canonical",
    "bad_message": "a text, or a header, that is not of the form that is signed; or one that says a thing twice",
    "wrong_uri": "a text to sign in with whose URI is of another page than its domain",
    "wrong_nonce": "a text to sign in with whose nonce this node did not give out, or that was used, or 10 minutes old",
    "too_old": "a text to sign in with that was issued an hour ago",
}
SESSION_REASONS = {
    "bad_token": "no token, or none of this node, vault and chain",
    "signed_out": "the session was ended",
    "idle": "no call came for 15 minutes",
    "expired": "24 hours are over, or what its text says",
    "wrong_origin": "the call, or the sign-in, comes from another page than the session's, or from one that may not",
}
STORAGE_REASONS = {
    "unreachable": "no connection, or it broke off",
    "timeout": "no byte came for too long, or too few",
    "cut": "the answer or the exchange broke off",
    "busy": "the source asks to come back later",
    "not_found": "the source does not have it",
    "unsupported": "the source does not answer this form of request",
    "redirect": "a redirect to where none is followed",
    "encoded": "a compressed answer, which nobody asked for",
    "http_...": "that status",
    "malformed": "an answer that does not say what it must",
    "not_json": "the same, where JSON is due",
    "too_large": "an answer longer than any right one",
    "all_sources_failed": "several sources, each with a reason of its own",
    "no_source": "no gateway is configured",
    "key_nodes": "too few key nodes gave a shard, for different reasons",
    "cid_mismatch": "a storage service names another CID than the one computed here; nothing is published",
    "file": "the file to upload can't be read",
    "disk": "the node's own disk",
    "cache_damaged": "`divault cache verify` found damaged entries and removed them",
    "cache_full": "content that is in use fills the cache: raise `DIVAULT_CACHE_MAX_MB`",
    "cache_file_gone": "somebody removed a file from the cache",
}
TRANSACTION_REASONS = {
    "gas_price": "the chain asks more per gas than the wallet pays; nothing was sent",
    "not_mined": "not in a block in time; it may still get there",
    "model_exists": "the id belongs to somebody else",
    "not_owner": "the model belongs to somebody else, and only its owner changes who serves it",
    "changed": "the vault names another CID since the change was begun; nothing was registered: run it again",
    "replaced": "another transaction of the wallet took its nonce: it is dead",
    "insufficient_funds": "the wallet has less than the transaction costs at most; nothing was sent",
}
TRANSFER_REASONS = {
    "bad_tx_hash": "not 0x and 64 lower-case hex digits",
    "unsupported_token": "a token that this node takes no payment in",
    "tx_not_found": "pending: no receipt at the node's endpoint yet",
    "wrong_chain": "a transaction of another chain",
    "not_canonical": "its block is not part of the chain any more",
    "tx_failed": "the transaction reverted",
    "no_transfer": "it moved no token",
    "wrong_token": "it moved another token",
    "recipient_mismatch": "the money did not go to the owner of the model",
    "payer_mismatch": "somebody else's money",
    "already_spent": "claimed before",
    "amount_too_low": "less than the price",
    "payment_too_old": "older than `DIVAULT_TRANSFER_MAX_AGE_SECONDS`",
    "credit_held": "pending: the credit is reserved for a run that has not ended",
    "not_enough_confirmations": "pending: fewer blocks on it than `DIVAULT_TRANSFER_CONFIRMATIONS`",
}


_ERRORS = """\
# Errors

<!-- {generated} -->

Every error has a stable `code`. Over HTTP it comes as `application/problem+json` (RFC 9457) with `type`, `title`,
`status`, `detail`, `code`, `error` (the code again; under `/v2` with the detail, under `/v1` an object), `request_id`,
`actor` and the data named below; in Python it is the class, with the same facts in `.data`. *Receipt* says whether the
caller of a run who proved who he is gets a signed refusal or failure receipt with it; what is no run, a load say, has
none. *Who acts* is who can mend it. A code without a status belongs to the command line and the client: no node
answers with it.

| code | status | class | what went wrong | who acts | data | receipt |
|---|---|---|---|---|---|---|
{rows}

## Why content was refused

`storage_failed` carries one of these as `reason` when what came is not what the CID names or the rules allow:

{content}

## Why storage failed

And one of these when nothing came, or it could not be kept:

{storage}

## Why a signature was refused

The `reason` of the 401 codes. A node builds the signed message from its own address and the path of the request, so a
request for another node or path shows as `signer_mismatch`; the finer words appear where the whole typed data is at
hand.

{signature}

## Why a session's token does not count

The `reason` of `session_invalid`:

{session}

## Why a transfer does not pay

The `reason` of `payment_required` and `payment_pending`:

{transfer}

## Why a transaction failed

The `reason` of `transaction_failed` is what the contract said, or one of:

{transaction}
"""

_SETTINGS = """\
# Settings

<!-- {generated} -->

Read once at start, from `.env` in the working directory and then from the environment, which wins. Lists are separated
by commas; an empty value means the default; switches take `1`, `0`, `true`, `false`. An unknown name that starts with
`DIVAULT_` is an error that suggests the nearest one. `divault config` prints what is in force, secrets masked and URLs
by their host alone, and `divault doctor` tests it.
"""


def errors_page() -> str:
    """Text of docs/reference/errors.md."""
    return _ERRORS.format(
        generated=_generated("divault.errors and divault.api.problems"),
        rows="\n".join(_error_row(cls) for cls in error_classes() if _is_raised(cls)),
        content="\n".join(f"- `{cls.__name__}`: {_first_line(cls)}" for cls in _content_errors()),
        storage=_words(STORAGE_REASONS),
        signature=_words(SIGNATURE_REASONS),
        session=_words(SESSION_REASONS),
        transfer=_words(TRANSFER_REASONS),
        transaction=_words(TRANSACTION_REASONS),
    )


_OTHER_RECEIPTS = {"result_unknown": "that of the run, if there was one"}


def _words(meanings: dict[str, str]) -> str:
    return "\n".join(f"- `{word}`: {text}" for word, text in meanings.items())


def _is_raised(cls: type[DivaultError]) -> bool:
    """Whether this is a leaf or the base; inner nodes of the tree are never raised themselves."""
    return cls is DivaultError or (cls.code != "internal" and bool({"code", "receipt"} & set(vars(cls))))


def _error_row(cls: type[DivaultError]) -> str:
    data = ", ".join(f"`{name}`" for name in cls.all_fields())
    status = str(STATUS.get(cls.code, ""))
    receipt = _OTHER_RECEIPTS.get(cls.code, "yes" if cls.receipt else "no")
    cells = (f"`{cls.code}`", status, f"`{cls.__name__}`", _first_line(cls), cls.actor.value, data, receipt)
    return "| " + " | ".join(cells) + " |"


def settings_page() -> str:
    """Text of docs/reference/settings.md."""
    lines = [_SETTINGS.format(generated=_generated("divault.settings")).rstrip("\n")]
    for group, fields in _groups():
        lines += ["", f"## {group.capitalize()}", "", "| name | default | meaning |", "|---|---|---|"]
        for name, field in fields:
            shown = _default(field)
            lines.append(f"| `{name.upper()}` | {f'`{shown}`' if shown else ''} | {field.description} |")
    return "\n".join(lines) + "\n"


def env_example() -> str:
    """Text of .env.example: every setting with its default; what has none is left open."""
    lines = [
        "# Copy to .env and fill in the three lines that are not commented out; the others show the defaults.",
        "# Written by tools/write_reference.py; docs/reference/settings.md says more.",
    ]
    for group, fields in _groups():
        lines += ["", f"# --- {group} ---"]
        for name, field in fields:
            lines.append(f"# {field.description}")
            required = name in ("web3_provider_url", "vault_contract_address", "usdc_contract_address")
            lines.append(("" if required else "# ") + f"{name.upper()}={_default(field)}")
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Text of docs/reference/cli.md, out of the commands' own help."""
    from divault.cli import app_for

    root: Any = typer.main.get_command(app_for(()))
    parts = ["# Command line", f"<!-- {_generated('the help of the commands')} -->"]
    parts += ["`divault COMMAND --help` says the same."]
    parts += [_command(path, command) for path, command in _commands(root, "divault")]
    return "\n\n".join(parts) + "\n"


def _command(path: str, command: Any) -> str:
    params = [param for param in command.params if param.name != "help" and not getattr(param, "hidden", False)]
    usage = " ".join([path, *(_usage(param) for param in params)])
    text = f"## {path}\n\n```text\n{usage}\n```\n\n{_help(command.help)}"
    options = [f"- `{_names(param)}`: {' '.join(param.help.split())}" for param in params if param.help]
    return "\n\n".join([text, "\n".join(options)] if options else [text])


_CONTRACTS = """\
# Contracts

<!-- {generated} -->

Sources in `contracts/`, compiled with solc {compiler}; ABI and bytecode are shipped in `divault/chain/abi`, and CI
compiles again and compares. What they are for: [chain](chain.md).
"""


def contracts_page() -> str:
    """Text of docs/reference/contracts.md: every function, event and error with what it is called by on the wire."""
    artifacts = [json.loads(path.read_text()) for path in sorted(ABI.glob("*.json"))]
    generated = _generated("the ABIs in src/divault/chain/abi")
    parts = [_CONTRACTS.format(generated=generated, compiler=artifacts[0]["compiler"]).rstrip("\n")]
    for artifact in artifacts:
        parts.append(f"## {artifact['name']}")
        if all(entry["type"] == "constructor" for entry in artifact["abi"]):
            parts.append("Never deployed: `eth_call` runs it ([contract wallets](signatures.md#contract-wallets)).")
        for kind, head in (("function", "selector"), ("event", "topic"), ("error", "selector")):
            rows = sorted(_abi_row(entry) for entry in artifact["abi"] if entry["type"] == kind)
            if rows:
                parts.append("\n".join([f"| {kind} | {head} |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _abi_row(entry: dict[str, Any]) -> str:
    signature = f"{entry['name']}({','.join(_abi_type(part) for part in entry['inputs'])})"
    digest = keccak256(signature.encode()).hex()
    named = ", ".join(f"{_abi_type(part)} {part['name']}".rstrip() for part in entry["inputs"])
    shown = f"{entry['name']}({named})"
    returned = ", ".join(_abi_type(part) for part in entry.get("outputs", ()))
    arrow = f" -> {returned}" if returned else ""
    return f"| `{shown}{arrow}` | `{digest if entry['type'] == 'event' else digest[:8]}` |"


def _abi_type(part: dict[str, Any]) -> str:
    if not part["type"].startswith("tuple"):
        return str(part["type"])
    return f"({','.join(_abi_type(inner) for inner in part['components'])}){part['type'].removeprefix('tuple')}"


PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/errors.md": errors_page,
    "docs/reference/settings.md": settings_page,
    "docs/reference/cli.md": cli_page,
    "docs/reference/contracts.md": contracts_page,
    ".env.example": env_example,
}


def _generated(source: str) -> str:
    return f"Written by tools/write_reference.py from {source}; edit that, then run `make docs`."


def _first_line(cls: type[DivaultError]) -> str:
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


def _content_errors() -> Iterator[type[DivaultError]]:
    return (cls for cls in error_classes() if issubclass(cls, ContentInvalid) and cls is not ContentInvalid)


def _groups() -> list[tuple[str, list[tuple[str, FieldInfo]]]]:
    """The settings in the order and under the headings of their source."""
    groups: list[tuple[str, list[tuple[str, FieldInfo]]]] = []
    for line in inspect.getsource(Settings).splitlines():
        found = _GROUP.match(line)
        if found and found["group"]:
            groups.append((found["group"], []))
        elif found and found["field"] in Settings.model_fields:
            groups[-1][1].append((found["field"], Settings.model_fields[found["field"]]))
    return groups


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, Secret):  # a default is no secret
        return value.reveal().decode()
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return f"./{value}" if isinstance(value, Path) else f"{value:g}" if isinstance(value, float) else str(value)


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if not children:
        yield path, command
        return
    for name, child in children.items():
        if not child.hidden:
            yield from _commands(child, f"{path} {name}")


def _usage(param: Any) -> str:
    if param.param_type_name == "argument":
        name = (param.metavar or param.name).upper().strip("[]")
        return name if param.required else f"[{name}]"
    shown = _names(param)
    return shown if param.required else f"[{shown}]"


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return (param.metavar or param.name).upper().strip("[]")
    longest = max(param.opts, key=len)
    if param.is_flag:
        return str(longest)
    return f"{longest} {(param.metavar or param.name).upper()}"


def _help(text: str | None) -> str:
    """Help as Markdown: a block that must keep its lines (marked for click by a backspace) becomes a code block."""
    blocks = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(f"```console\n{b[2:]}\n```" if b.startswith("\b\n") else b for b in blocks)


def main() -> int:
    """Write every page that can be written; `--check` only says which are stale."""
    stale = 0
    for name, page in PAGES.items():
        path, text = ROOT / name, page()
        if path.is_file() and path.read_text() == text:
            continue
        stale += 1
        if "--check" not in sys.argv:
            path.write_text(text)
        print(f"{'stale' if '--check' in sys.argv else 'wrote'} {name}")
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
