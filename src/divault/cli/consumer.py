"""`divault call`, `divault verify` and `divault receipt`: the consumer's side."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from divault import keyfiles, receipts
from divault.cli.console import say, show
from divault.cli.naming import named_node
from divault.cli.offer import price
from divault.cli.outputs import Output
from divault.client import Client, Result
from divault.errors import BadRequest, PaymentRequired
from divault.settings import variables
from divault.values import Address, Usdc

app = typer.Typer()
receipt_app = typer.Typer(no_args_is_help=True, help="Work on receipts. Example: divault receipt redact receipt.json")


@app.command()
def call(
    model: Annotated[str, typer.Argument(help="model id")],
    input_data: Annotated[str, typer.Argument(help="JSON, for example '{\"features\": [1, 2]}', or @FILE")],
    node: Annotated[str, typer.Option("--node", help="URL of the node, with #0xADDRESS to pin it")],
    key: Annotated[Path, typer.Option("--key", "-k", help="wallet key file (divault keys new)")],
    max_price: Annotated[str, typer.Option("--max-price", help="most the call may cost, in USDC")] = "0",
    save: Annotated[Path | None, typer.Option("--save", help="where the whole answer goes, receipt included")] = None,
    payment: Annotated[
        str | None, typer.Option("--payment", help="hash of a transfer made earlier, to pay with")
    ] = None,
) -> None:
    """Run a model: sign, pay if --max-price covers it (needs WEB3_PROVIDER_URL), verify the receipt, print the answer.

    Example: divault call breast-cancer @row.json --node http://127.0.0.1:8000 -k consumer.key --max-price 0.02
    """
    limit = price(max_price)  # a typed error before anything is asked
    rpc = variables().get("WEB3_PROVIDER_URL", "").split(",")[0].strip() or None
    with ExitStack() as held:
        kept = None if save is None else held.enter_context(Output(save, "save"))
        client = held.enter_context(_client(node, key, rpc))
        try:
            result = client.run(model, _input(input_data), max_price=max_price, payment=payment)
        except PaymentRequired as err:
            raise (err if payment is not None else _offered(err, limit, rpc)) from None
        say(f"charged {result.price} USDC, receipt {result.receipt['receipt_hash']} verified")
        show(result.output)
        if kept is not None:
            _keep(kept, result)


def _offered(err: PaymentRequired, limit: Usdc, rpc: str | None) -> PaymentRequired:
    """The offer in words of this command, which pays by itself: the node's are for who sends the money by hand."""
    rails, cost = err.data.get("rails"), str(err.data.get("price_usdc"))
    if not isinstance(rails, list) or "transfer" not in rails or not _is_price(cost):
        return err
    if not limit.atomic:
        return PaymentRequired(f"one run costs {cost} USDC: call again with --max-price {cost} to pay it", **err.data)
    if rpc is None:
        told = f"one run costs {cost} USDC: to pay it, name an RPC endpoint of the chain in WEB3_PROVIDER_URL"
        return PaymentRequired(told, **err.data)
    return err


def _is_price(text: str) -> bool:
    try:
        return Usdc.parse(text).atomic > 0
    except ValueError:
        return False


def _keep(kept: Output, result: Result) -> None:
    try:
        kept.write(result.response)
    except BadRequest as err:
        err.add_note(f"the answer is printed above; the node keeps a paid one whole, under {result.request_id}")
        raise


@app.command()
def sign_in(
    node: Annotated[str, typer.Option("--node", help="URL of the node, with #0xADDRESS to pin it")],
    key: Annotated[Path, typer.Option("--key", "-k", help="wallet key file (divault keys new)")],
    spend: Annotated[str, typer.Option("--spend", help="most that its calls may cost together, in USDC")] = "0",
) -> None:
    """Open a session for programs that sign nothing, and print its token: their API key, or bearer token.

    Example: export OPENAI_API_KEY=$(divault sign-in --node http://127.0.0.1:8000 -k consumer.key)
    """
    price(spend)
    with _client(node, key) as client:
        login = client.sign_in(spend=spend)
    ends = datetime.fromtimestamp(login.expires_at, UTC).isoformat(timespec="minutes")
    say(f"{login.user} is signed in until {ends}, or until {login.idle_s} s pass without a call; keep the token secret")
    show(login.token)


@app.command()
def sign_out(
    node: Annotated[str, typer.Option("--node", help="URL of the node, with #0xADDRESS to pin it")],
    key: Annotated[Path, typer.Option("--key", "-k", help="wallet key file (divault keys new)")],
) -> None:
    """End all sessions of a wallet at a node.

    Example: divault sign-out --node http://127.0.0.1:8000 -k consumer.key
    """
    with _client(node, key) as client:
        ended = client.sign_out()
    say(f"sessions ended: {ended}")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="a receipt, or an answer that holds one")],
    node: Annotated[str | None, typer.Option("--node", help="address that must have signed it")] = None,
    chain_id: Annotated[int | None, typer.Option("--chain-id", help="chain it must be for")] = None,
    vault: Annotated[str | None, typer.Option("--vault", help="vault it must be for")] = None,
    input_file: Annotated[Path | None, typer.Option("--input", help="file with the exact bytes of input_data")] = None,
) -> None:
    """Check a receipt offline; each step passes, fails by name, or is said to be not checked.

    Example: divault verify receipt.json --node 0x05b7cc97C107184f736Dc0f04E6231593c821384
    """
    envelope, result = receipts.read_receipt(_bytes(file))
    steps = receipts.check(
        envelope,
        chain_id=chain_id,
        vault=Address.parse(vault) if vault else None,
        node=Address.parse(node) if node else None,
        input_data=_bytes(input_file) if input_file else None,
        result=result,
    )
    for step in steps:
        show(f"{step.outcome:<11} {step.name}" + (f": {step.detail}" if step.detail else ""))
    receipts.require_valid(steps)
    say("the receipt holds")


@receipt_app.command()
def redact(
    file: Annotated[Path, typer.Argument(help="a receipt")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: standard output")] = None,
) -> None:
    """Drop the private part (request, its signature, salts); what is left still verifies.

    Example: divault receipt redact receipt.json -o public.json
    """
    text = json.dumps(receipts.redact(receipts.read_receipt(_bytes(file))[0]), indent=1)
    if output is None:
        show(text)
    else:
        with Output(output, "output") as public:
            public.write(f"{text}\n".encode())


def _client(node: str, key: Path, rpc: str | None = None) -> Client:
    url, pinned = named_node(node)
    return Client(url, keyfiles.read_signing_key(key), node=pinned, rpc=rpc)


def _input(text: str) -> Any:
    try:
        return json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except OSError as err:
        raise BadRequest(f"{text[1:]} can't be read: {err.strerror}", field="input_data") from err
    except ValueError as err:
        raise BadRequest(f"the input is no JSON: {err}", field="input_data") from err


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as err:
        raise BadRequest(f"{file} can't be read: {err.strerror}", field="file") from err
