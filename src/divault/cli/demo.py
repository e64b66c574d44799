"""`divault demo`: the whole story in half a minute, and then a node to play with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer

from divault import receipts
from divault.chain import contracts
from divault.cli import story
from divault.cli.console import out
from divault.cli.outputs import Output
from divault.cli.story import GATE_MINIMUM, MODEL, PRICE, Report, Stage, World
from divault.client import Result
from divault.devnet import start_devnet
from divault.errors import AccessDenied, NodeUntrusted
from divault.models.example import Trained
from divault.settings import variables
from divault.values import Secret, Usdc

app = typer.Typer()
_POCKET_MONEY = Usdc.parse("10")


@app.command()
def demo(
    host: Annotated[str, typer.Option("--host", help="where the node listens")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: the system chooses")] = 8000,
    json_file: Annotated[Path | None, typer.Option("--json", help="where the report of every step goes")] = None,
    *,
    once: Annotated[
        bool, typer.Option("--once", help="end after the story, on a port that the system chooses")
    ] = False,
    anvil: Annotated[bool, typer.Option("--anvil", help="use anvil instead of the embedded chain")] = False,
) -> None:
    """Run the whole story on a development chain: publish, gate, pay, run, verify; then keep serving.

    Example: divault demo --once --json report.json
    """
    try:
        asyncio.run(_demo(host, 0 if once else port, json_file, once=once, anvil=anvil))
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


async def _demo(host: str, port: int, json_file: Path | None, *, once: bool, anvil: bool) -> None:
    report = Report()
    async with AsyncExitStack() as held:
        held.enter_context(_cancelled_by_sigterm())
        told = None if json_file is None else held.enter_context(Output(json_file, "json"))
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="divault-demo-")))
        devnet = await held.enter_async_context(
            await asyncio.to_thread(start_devnet, anvil=anvil or None, environ=variables())
        )
        there = await held.enter_async_context(story.world(devnet, folder, report))
        on = await held.enter_async_context(story.stage(there, folder, (host, port), report))
        trained = await story.publish(on)
        await _refuse_stranger(on)
        first = await _buy(on, trained)
        await _score(on, trained)
        if told is not None:
            told.write(report.as_json())
        if not once:
            _invite(on, trained, first)
            with contextlib.suppress(asyncio.CancelledError):
                await on.node.process.wait()


@contextlib.contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """End this task like Ctrl-C does: what it holds is closed, and the folder with the keys is removed."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:
        raise RuntimeError("only a task can be cancelled")
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def _refuse_stranger(on: Stage) -> None:
    async with on.client(Secret(secrets.token_bytes(32))) as client:
        try:
            await client.run(MODEL, {"features": [0.0] * 30})
        except AccessDenied as refusal:
            have, need = int(refusal.data["have"]), int(refusal.data["need"])
            on.report.step(
                "refuse",
                f"A stranger is refused (403 {refusal.code}): he has {have // 10**18} access tokens and needs "
                f"{need // 10**18}",
                refusal=refusal.data | {"code": refusal.code, "status": 403, "detail": refusal.detail},
                receipt=refusal.evidence,
            )
            return
    raise NodeUntrusted("the node let a stranger in")


async def _buy(on: Stage, trained: Trained) -> Result:
    there, report = on.there, on.report
    token, usdc = contracts.load("ModelAccessToken"), contracts.load("TestUSDC")
    minted = await there.owner.invoke(token, there.token, "mint", there.consumer.address, GATE_MINIMUM)
    report.step("grant", f"The owner gives the consumer 100 access tokens (transaction {minted.transaction_hash})")
    await there.consumer.invoke(usdc, there.usdc, "mint", there.consumer.address, _POCKET_MONEY.atomic)
    before = await _owners_balance(there)
    async with on.client(there.devnet.accounts[2].key) as client:
        result = await client.run(MODEL, {"features": trained.rows[0]}, max_price=PRICE)
        about = await client.node()
    received = Usdc(await _owners_balance(there) - before)
    report.step(
        "pay",
        f"The consumer paid the owner {result.price} USDC, wallet to wallet (transaction {result.payment}); "
        f"the owner has {received} more",
    )
    said = trained.classes[int(result.output["predictions"][0])]
    report.step("answer", f"The node answered over HTTP: this tumour is {said}: {json.dumps(result.output)}")
    receipts.require_valid(receipts.check(result.receipt, node=about.address, vault=there.vault, result=result.raw))
    report.step("verify", f"The signed receipt {result.receipt['receipt_hash']} verifies offline")
    report.facts["transactions"] |= {"grant": str(minted.transaction_hash), "payment": result.payment}
    report.facts |= {
        "owner_received_atomic": str(received.atomic),
        "request": json.loads(result.request),
        "response": json.loads(result.response),
        "receipt": result.receipt,
    }
    return result


async def _score(on: Stage, trained: Trained) -> None:
    async with on.client(on.there.devnet.accounts[2].key) as client:
        result = await client.run(MODEL, {"features": trained.rows}, max_price=PRICE)
    hits = sum(int(said) == true for said, true in zip(result.output["predictions"], trained.labels, strict=True))
    accuracy = hits / len(trained.labels)
    on.report.step(
        "score", f"All {len(trained.labels)} test rows in one more call: {accuracy:.1%} right, as before it was sealed"
    )
    on.report.facts["accuracy"] = accuracy
    on.report.facts["transactions"]["second_payment"] = result.payment


async def _owners_balance(there: World) -> int:
    return int(await there.owner.read(contracts.load("TestUSDC"), there.usdc, "balanceOf", there.owner.address))


def _invite(on: Stage, trained: Trained, first: Result) -> None:
    there = on.there
    key = "0x" + there.devnet.accounts[2].key.reveal().hex()
    node = first.receipt["receipt"]["node"]
    row = json.dumps([round(value, 4) for value in trained.rows[1]])
    out.print(f"\nThe node keeps serving at {on.node.url} until Ctrl-C. Ask it what it offers:\n")
    print(f"  curl -s {on.node.url}/api/v1/models/{MODEL}")
    out.print("\nRun the model from Python, as the consumer with tokens and money:\n")
    print("  from divault import Client")
    print(f'  client = Client("{on.node.url}", "{key}", node="{node}", rpc="{there.devnet.url}")')
    print(f'  print(client.run("{MODEL}", {{"features": {row}}}, max_price="{PRICE}").output)\n', flush=True)
