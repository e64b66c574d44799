"""`divault call` as a consumer types it: no paid answer is lost, and what keeps one from being paid is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from divault import receipts
from divault.values import ModelId, Secret
from tests.e2e.conftest import World
from tests.e2e.test_http_payment import PRICE, balances, pay, priced
from tests.e2e.test_publish_cli import Done, run

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def call(
    world: World,
    folder: Path,
    key: Secret,
    model: ModelId | str,
    *more: str,
    limit: str = str(PRICE),
    features: object = None,
    **settings: str,
) -> Done:
    """Run the command on a row of the model's own data, paying its price at most."""
    file = folder / "consumer.key"
    file.touch(mode=0o600)
    file.write_text("0x" + key.reveal().hex())
    row = json.dumps({"features": features or world.trained.rows[0]})
    paying = ["--node", world.node.url, "--key", str(file), "--max-price", limit]
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

    assert (unknown.status, "WEB3_PROVIDER_URL" in unknown.err) == (1, True), unknown.err
    assert done.status == 0, done.err


# --- what to do next, in words of the command ------------------------------------------------------------------------


async def test_an_offer_names_the_option_that_pays_it(world: World, tmp_path: Path) -> None:
    model, key = await priced(world), await world.consumer()
    before = await balances(world, key)
    offered = await call(world, tmp_path, key, model, limit="0")
    told = offered.err.splitlines()[0]
    named = told.partition("--max-price ")[2].split()[0]
    paid = await call(world, tmp_path, key, model, limit=named)

    assert (offered.status, named, "tx_hash" in told) == (1, "0.02", False), offered.err
    assert paid.status == 0, paid.err
    assert (await balances(world, key))[0] == before[0] - PRICE.atomic


async def test_after_a_refused_run_the_payment_is_credit_and_the_next_call_draws_on_it(
    world: World, tmp_path: Path
) -> None:
    """The node has taken the claim: it refuses whoever brings the same transaction again."""
    model, key = await priced(world), await world.consumer()
    before = await balances(world, key)
    refused = await call(world, tmp_path, key, model, features=[1, 2])
    again = await call(world, tmp_path, key, model)

    assert (refused.status, "code: input_invalid" in refused.err) == (1, True), refused.err
    assert ("it is credit at this node now: call again" in refused.err, "pass it as" in refused.err) == (True, False)
    assert again.status == 0, again.err
    assert (await balances(world, key))[0] == before[0] - PRICE.atomic


async def test_a_payment_that_was_not_taken_is_passed_to_the_next_call(world: World, tmp_path: Path) -> None:
    model, key = await priced(world), await world.consumer()
    tx = await pay(world, key)
    before = await balances(world, key)
    early = await call(world, tmp_path, key, model, "--payment", tx, limit="0.01")
    taken = await call(world, tmp_path, key, model, "--payment", tx)
    twice = await call(world, tmp_path, key, model, "--payment", tx)

    assert (early.status, "code: price_changed" in early.err) == (1, True), early.err
    assert f"{tx}; pass it as payment= (divault call: --payment) to use it" in early.err
    assert taken.status == 0, taken.err
    assert (twice.status, "reason=already_spent" in twice.err) == (1, True), twice.err
    assert ("it is credit at this node now" in twice.err, "pass it as" in twice.err) == (True, False), twice.err
    assert await balances(world, key) == before


async def test_a_node_that_changed_is_named_as_the_option_takes_it(world: World, tmp_path: Path) -> None:
    key = await world.consumer()
    known = tmp_path / "divault" / "known_nodes.json"
    known.parent.mkdir()
    known.write_text(json.dumps({world.node.url: "0x" + "11" * 20}))
    refused = await call(world, tmp_path, key, "no-such-model")
    named = refused.err.partition("on the command line --node ")[2].partition(")")[0]
    pinned = await call(world, tmp_path, key, "no-such-model", "--node", named)

    assert "code: node_untrusted" in refused.err, refused.err
    assert "code: model_unknown" in pinned.err, pinned.err
