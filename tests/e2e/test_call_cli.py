"""`divault call` as a consumer types it: no paid answer is lost, and what keeps one from being paid is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from divault import receipts
from divault.values import ModelId, Secret
from tests.e2e.conftest import World
from tests.e2e.test_http_payment import PRICE, balances, priced
from tests.e2e.test_publish_cli import Done, run

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def call(world: World, folder: Path, key: Secret, model: ModelId | str, *more: str, **settings: str) -> Done:
    """Run the command on a row of the model's own data, paying its price at most."""
    file = folder / "consumer.key"
    file.touch(mode=0o600)
    file.write_text("0x" + key.reveal().hex())
    row = json.dumps({"features": world.trained.rows[0]})
    paying = ["--node", world.node.url, "--key", str(file), "--max-price", str(PRICE)]
    rpc = {"WEB3_PROVIDER_URL": world.chain.devnet.url} | settings
    environment = {name: value for name, value in rpc.items() if value}
    return await run(folder, environment, "-m", "divault", "call", str(model), row, *paying, *more)


async def test_nothing_is_paid_for_an_answer_that_has_no_place(world: World, tmp_path: Path) -> None:
    model, key = await priced(world), await world.consumer()
    before = await balances(world, key)
    missing = await call(world, tmp_path, key, model, "--save", "answers/a.json")
    folder = await call(world, tmp_path, key, model, "--save", ".")

    assert (missing.status, "code: bad_request  field=save" in missing.err) == (1, True), missing.err
    assert (folder.status, "can't be written" in folder.err) == (1, True), folder.err
    assert await balances(world, key) == before


async def test_the_whole_answer_is_saved_in_place_of_what_was_there(world: World, tmp_path: Path) -> None:
    model, key = await priced(world), await world.consumer()
    (tmp_path / "a.json").write_text("x" * 100_000)
    done = await call(world, tmp_path, key, model, "--save", "a.json")
    assert done.status == 0, done.err
    envelope, result = receipts.read_receipt((tmp_path / "a.json").read_bytes())

    assert done.status == 0, done.err
    receipts.require_valid(receipts.check(envelope, result=result))
    assert json.loads(done.out)["predictions"]


async def test_an_answer_that_fills_the_disk_is_printed_and_can_be_had_again(world: World, tmp_path: Path) -> None:
    model, key = await priced(world), await world.consumer()
    before = await balances(world, key)
    done = await call(world, tmp_path, key, model, "--save", "/dev/full")
    assert (done.status, "No space left" in done.err) == (1, True), done.err
    request_id = done.err.split("whole, under ", 1)[1].split()[0]
    async with world.client(key) as client:
        stored = await client.stored(request_id)

    assert (done.status, "No space left" in done.err) == (1, True), done.err
    assert json.loads(done.out) == stored.output
    assert (await balances(world, key))[0] == before[0] - PRICE.atomic


async def test_a_call_that_fails_leaves_no_file(world: World, tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text("kept")
    key = await world.consumer()
    for name in ("new.json", "kept.json"):
        done = await call(world, tmp_path, key, "no-such-model", "--save", name)
        assert (done.status, "model_unknown" in done.err) == (1, True), done.err

    assert not (tmp_path / "new.json").exists()
    assert (tmp_path / "kept.json").read_text() == "kept"


async def test_a_wallet_that_has_too_little_is_told_how_much_more(world: World, tmp_path: Path) -> None:
    model, key = await priced(world), await world.consumer(usdc="0.015")
    done = await call(world, tmp_path, key, model)

    assert (done.status, "send it 0.005 more" in done.err) == (1, True), done.err
    assert "code: transaction_failed  reason=insufficient_funds" in done.err


async def test_the_chain_may_be_named_in_the_file(world: World, tmp_path: Path) -> None:
    model, key = await priced(world), await world.consumer()
    unknown = await call(world, tmp_path, key, model, WEB3_PROVIDER_URL="")
    (tmp_path / ".env").write_text(f"WEB3_PROVIDER_URL={world.chain.devnet.url}\n")
    done = await call(world, tmp_path, key, model, WEB3_PROVIDER_URL="")

    assert unknown.status == 1
    assert done.status == 0, done.err
