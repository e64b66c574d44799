"""Signing in once: the token opens every interface for its wallet, and neither gate, price nor operator's routes."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import orjson
import pytest
import tritonclient.http as triton
from typer.testing import CliRunner

from divault import messages, receipts
from divault.cli import app_for
from divault.errors import BadRequest, ReceiptInvalid
from divault.receipts import Outcome, redact
from divault.values import Secret, Usdc
from tests.e2e.conftest import World
from tests.e2e.test_http_payment import pay
from tests.e2e.test_other_interfaces import PAGE, check, on_a_thread, our_client, packed, page
from tests.markdown_blocks import blocks
from tests.memory_models import mini_lm, tiny_language_model

pytestmark = pytest.mark.asyncio(loop_scope="session")
RUN = "/api/v1/inference/run"
PAGE_ORIGIN = "https://app.example"


async def token_of(world: World, key: Secret, **how: Any) -> str:
    async with world.client(key) as client:
        return (await client.sign_in(**how)).token


def bearer(token: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}", **more}


async def test_a_token_runs_a_model_and_the_receipt_says_how_the_user_was_proved(world: World) -> None:
    model = (await world.publish("session-run")).text
    key = await world.consumer()
    token = await token_of(world, key)
    raw = json.dumps({"model_id": model, "input_data": {"features": world.trained.rows[0]}}).encode()
    headers = bearer(token, **{"content-type": "application/json", "idempotency-key": "first"})
    status, answer, _ = await world.request("POST", RUN, data=raw, headers=headers)
    again, problem, _ = await world.request("POST", RUN, data=raw, headers=headers)
    stored, kept, _ = await world.request("GET", "/api/v1/results/0x" + "11" * 32, headers=bearer(token))

    assert status == 200, answer
    assert (again, problem["code"]) == (401, "nonce_used"), "a free call counts once by its key, as by a nonce"
    assert (stored, kept["code"]) == (404, "result_unknown"), "and asking for results is open to a session"
    envelope = answer["receipt"]
    assert envelope["request"]["request_id"] == "first"
    steps = {step.name: step for step in receipts.check(envelope)}
    assert all(step.outcome is not Outcome.FAILED for step in steps.values()), steps
    assert "signed no single call" in steps["request"].detail
    assert steps["request_signature"].outcome is Outcome.PASSED
    public = receipts.check(redact(envelope))
    assert all(step.outcome is not Outcome.FAILED for step in public)
    for name, forged in (
        ("request.request_id", {"request": envelope["request"] | {"request_id": "second"}}),
        ("request.body_hash", {"request": envelope["request"] | {"body_hash": "0x" + "00" * 32}}),
        ("request.message", {"request": envelope["request"] | {"message": envelope["request"]["message"] + " "}}),
        ("request_signature", {"request_signature": "0x" + "11" * 64 + "1b"}),
    ):
        with pytest.raises(ReceiptInvalid) as caught:
            receipts.require_valid(receipts.check(envelope | forged))
        assert caught.value.data["field"] == name


async def test_an_openai_client_needs_nothing_but_the_token(world: World, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    text = (await world.publish("session-text", packed(tmp_path / "a", tiny_language_model(saved)))).text
    sentences = (await world.publish("session-sentences", packed(tmp_path / "b", mini_lm()))).text
    key, stranger = await world.consumer(), await world.consumer(tokens=0)

    def story() -> None:
        ours = our_client(world, key)
        client: openai.OpenAI = page()["openai_of_session"](ours, world.node.url)
        raw = client.embeddings.with_raw_response.create(model=sentences, input=["good", "bad"])
        body = json.loads(raw.text)
        check(world, ours, body["receipt"], raw.http_response.request.content, orjson.dumps(body["data"]))
        talk: dict[str, Any] = {
            "model": text,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 8,
            "seed": 1,
        }
        whole = client.chat.completions.create(**talk).choices[0].message.content
        pieces = [event.choices[0].delta.content or "" for event in client.chat.completions.create(**talk, stream=True)]
        assert "".join(pieces) == whole

        other: openai.OpenAI = page()["openai_of_session"](our_client(world, stranger), world.node.url)
        with pytest.raises(openai.PermissionDeniedError) as denied:
            other.embeddings.create(model=sentences, input="x")
        assert denied.value.body["code"] == "access_denied"  # type: ignore[index]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=world.node.url + "/v1", api_key="none").embeddings.create(model=sentences, input="x")
        ours.sign_out(client.api_key)
        with pytest.raises(openai.AuthenticationError) as over:
            client.embeddings.create(model=sentences, input="x")
        assert over.value.body["code"] == "session_invalid"  # type: ignore[index]
        client.close()
        other.close()

    await on_a_thread(story)


async def test_a_triton_client_takes_the_token_as_a_header(world: World) -> None:
    model = (await world.publish("session-triton")).text
    token = await token_of(world, await world.consumer())

    def story() -> None:
        client = triton.InferenceServerClient(world.node.url.removeprefix("http://"))
        client.load_model(model, headers=bearer(token))
        tensor = triton.InferInput("features", [2, 30], "FP64")
        tensor.set_data_from_numpy(np.array(world.trained.rows[:2]))
        for _ in range(2):
            answer = client.infer(model, [tensor], headers=bearer(token))
            assert answer.as_numpy("predictions").shape == (2,)
        with pytest.raises(triton.InferenceServerException) as caught:
            client.unload_model(model, headers=bearer(token))
        assert "401" in str(caught.value.status())
        client.close()

    await on_a_thread(story)


async def test_a_session_spends_what_was_allowed_from_credit_and_no_more(world: World) -> None:
    model = (await world.publish("session-priced", price="0.02")).text
    key = await world.consumer()
    async with world.client(key) as client:
        transfer = await pay(world, key, Usdc.parse("0.20"))
        await client.run(model, {"features": world.trained.rows[0]}, max_price="0.02", payment=transfer)
    nothing, some = await token_of(world, key), await token_of(world, key, spend="0.05")

    async def call(token: str, name: str | None, **more: str) -> tuple[int, dict[str, Any]]:
        headers = bearer(token, **more) | ({} if name is None else {"idempotency-key": name})
        body = {"model_id": model, "input_data": {"features": world.trained.rows[0]}} | body_too
        status, answer, _ = await world.request("POST", RUN, json=body, headers=headers)
        return status, answer

    body_too: dict[str, str] = {}

    assert (await call(nothing, "a"))[1]["code"] == "price_changed"
    status, answer = await call(some, None)
    assert (status, answer["code"], answer["field"]) == (400, "bad_request", "idempotency-key")
    assert (await call(some, "cheap", **{"divault-max-price": "10000"}))[1]["code"] == "price_changed"
    body_too["max_price"] = "10000"
    assert (await call(some, "cheap-in-the-body"))[1]["code"] == "price_changed"
    body_too.clear()
    first, again, second = await call(some, "b"), await call(some, "b"), await call(some, "c")
    status, problem = await call(some, "d")

    assert first[0] == second[0] == 200
    assert again == first, "the kept answer, charged once"
    assert first[1]["receipt"]["receipt"]["price"] == "20000"
    receipts.require_valid(receipts.check(first[1]["receipt"]))
    assert (status, problem["have"], problem["need"]) == (409, "10000", "20000")
    assert "receipt" not in problem, "nothing was used up"
    assert (await call(await token_of(world, key, spend="0.02"), "d"))[0] == 200, "the same key, with a larger sum"
    headers = bearer(some)
    found = await world.request(
        "GET", f"/api/v1/results/{first[1]['receipt']['receipt']['requestHash']}", headers=headers
    )
    assert found[1] == first[1]


async def test_a_session_that_may_spend_nothing_is_told_so_before_money_is_sent(world: World) -> None:
    model, key = (await world.publish("session-unpaid", price="0.02")).text, await world.consumer()
    async with world.client(key) as client:
        await client.load(model)
    nothing, some = await token_of(world, key), await token_of(world, key, spend="0.05")
    tensor = {"name": "features", "datatype": "FP64", "shape": [1, 30], "data": world.trained.rows[0]}
    calls: list[tuple[str, dict[str, Any]]] = [
        (RUN, {"model_id": model, "input_data": {"features": world.trained.rows[0]}}),
        (f"/v2/models/{model}/infer", {"inputs": [tensor]}),
        ("/v1/embeddings", {"model": model, "input": "x"}),
    ]
    for path, body in calls:
        status, answer, _ = await world.request("POST", path, json=body, headers=bearer(nothing))
        assert (status, answer["code"], answer["have"], answer["need"]) == (409, "price_changed", "0", "20000")
        assert "sign in again with a larger sum" in answer["detail"]
        status, answer, _ = await world.request("POST", path, json=body, headers=bearer(some))
        assert (status, answer["code"]) == (402, "payment_required"), "what may be spent is offered"


async def test_a_session_ends_nothing_at_the_node(world: World) -> None:
    model = (await world.publish("session-operator")).text
    async with world.client(world.operator) as client:
        token = (await client.sign_in()).token
    for method, path in (
        ("DELETE", f"/api/v1/models/{model}"),
        ("DELETE", "/api/v1/cache"),
        ("POST", f"/v2/repository/models/{model}/unload"),
    ):
        for headers in (bearer(token), {}):
            status, answer, _ = await world.request(method, path, headers=headers)
            assert (status, answer["code"], answer["missing"]) == (
                401,
                "signature_incomplete",
                ["signature-input", "signature"],
            )
            assert "token of a session" not in answer["detail"], "who sends nothing is not told to send what won't do"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/v1/results/0x12"),
        ("POST", "/v2/models/any/infer"),
        ("POST", "/v2/repository/models/any/load"),
        ("POST", "/v1/embeddings"),
    ],
)
async def test_where_a_session_does_who_sends_nothing_is_told_of_it(world: World, method: str, path: str) -> None:
    body = {"model": "any"} if method == "POST" else None
    status, answer, _ = await world.request(method, path, json=body)

    assert (status, answer["code"]) == (401, "signature_incomplete")
    assert "or send the token of a session" in answer["detail"]


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ({"authorization": "Bearer div1_AAAA"}, {}, "session_invalid"),
        ({"authorization": "Bearer none"}, {}, "signature_incomplete"),
        ({"authorization": "Basic dXNlcjpwYXNz"}, {}, "signature_incomplete"),
        ({"idempotency-key": "two words"}, {}, "bad_request"),
        ({"idempotency-key": "x" * 256}, {}, "bad_request"),
        ({"divault-max-price": "0.02"}, {}, "bad_request"),
        ({}, {"user_signature": "0x"}, "bad_request"),
        ({}, {"user_address": "0x" + "11" * 20}, "bad_request"),
        ({}, {"chain_id": 1}, "wrong_chain"),
        ({"origin": "https://evil.example"}, {}, "session_invalid"),
    ],
)
async def test_what_comes_beside_a_token_must_fit_it(
    world: World, headers: dict[str, str], body: dict[str, Any], code: str
) -> None:
    token = await token_of(world, Secret(secrets.token_bytes(32)))
    asked = {"model_id": "any", "input_data": {"features": [1]}, "user_address": "0x" + "22" * 20} | body
    if "user_address" not in body and "authorization" not in headers:
        del asked["user_address"]
    status, answer, told = await world.request("POST", RUN, json=asked, headers=bearer(token) | headers)

    assert answer["code"] == code, answer
    assert status in (400, 401)
    if status == 401:
        assert "Bearer" in told["www-authenticate"]


async def test_a_token_with_a_query_or_sent_twice_is_refused(world: World) -> None:
    token = await token_of(world, Secret(secrets.token_bytes(32)))
    status, answer, _ = await world.request("POST", RUN + "?a=1", json={"model_id": "m"}, headers=bearer(token))
    assert (status, answer["field"]) == (400, "query")
    twice = [("authorization", f"Bearer {token}"), ("authorization", "Bearer none")]
    status, answer, _ = await world.request("POST", RUN, json={"model_id": "m"}, headers=twice)
    assert (status, answer["field"]) == (400, "authorization")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("nonce", b"[]"), ("nonce", b'{"user_address": 1}'), ("nonce", b'{"spend": {}}'),
        ("nonce", b'{"spend": [{"token": "0x", "amount": "1"}]}'), ("nonce", b"x" * 20_000),
        ("login", b""), ("login", b"{}"), ("login", b'{"message": "x", "signature": 1}'),
        ("login", b'{"message": "x", "signature": "0x"}'), ("login", b'{"message": "x", "message": "x"}'),
        ("logout", b""), ("logout", b'{"everywhere": "yes"}'),
    ],
)  # fmt: skip
async def test_a_malformed_body_of_signing_in_is_told_and_never_a_500(world: World, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    status, answer, _ = await world.request("POST", f"/api/v1/auth/{path}", data=body, headers=headers)

    assert status in (400, 401, 413), answer
    assert answer["detail"]


async def test_a_page_signs_in_where_its_origin_is_named_and_nowhere_else(world: World, tmp_path: Path) -> None:
    key = Secret(secrets.token_bytes(32))
    user = str(messages.address_of(key))
    async with world.other_node(tmp_path, DIVAULT_CORS_ORIGINS=PAGE_ORIGIN) as node:

        async def post(name: str, body: dict[str, Any], origin: str = PAGE_ORIGIN, **headers: str) -> Any:
            sent = {"origin": origin, **headers}
            return await world.request("POST", f"/api/v1/auth/{name}", node, json=body, headers=sent)

        _, asked, allowed = await post("nonce", {"user_address": user})
        text = asked["message"]
        signature = messages.signature_text(key, messages.personal_digest(text))
        status, answer, _ = await post("login", {"message": text, "signature": signature}, "https://evil.example")
        assert (status, answer["reason"]) == (401, "wrong_origin")
        status, answer, _ = await post("login", {"message": text, "signature": signature})
        asking = {"origin": PAGE_ORIGIN, "access-control-request-method": "POST"}
        asking["access-control-request-headers"] = "authorization,content-type,idempotency-key"
        async with aiohttp.request("OPTIONS", node.url + RUN, headers=asking) as preflight:
            may_send = preflight.headers["access-control-allow-headers"].lower()

        assert text.startswith("app.example wants you to sign in with your Ethereum account:\n")
        assert allowed["access-control-allow-origin"] == PAGE_ORIGIN
        assert (status, answer["origin"]) == (200, PAGE_ORIGIN)
        assert "authorization" in may_send
        ended = await post("logout", {}, "https://evil.example", **bearer(answer["token"]))
        assert (ended[0], ended[1]["reason"]) == (401, "wrong_origin")
        assert (await post("logout", {}, **bearer(answer["token"])))[0] == 200
        status, answer, _ = await post("nonce", {}, "https://evil.example")
        assert (status, answer["reason"]) == (401, "wrong_origin")
        # what was signed for this node opens nothing at another
        _, asked, _ = await post("nonce", {"user_address": user})
        signature = messages.signature_text(key, messages.personal_digest(asked["message"]))
        body = {"message": asked["message"], "signature": signature}
        assert (await world.request("POST", "/api/v1/auth/login", json=body))[0] == 401


async def test_the_page_s_own_code_signs_in_with_a_wallet_of_javascript(world: World) -> None:
    (code,) = [block.code for block in blocks(PAGE) if block.language == "javascript"]
    program = f"""
        import {{ createRequire }} from 'node:module'
        const sdk = createRequire(import.meta.url).resolve('@lighthouse-web3/sdk')
        const {{ Wallet }} = createRequire(sdk)('ethers')
        {code}
        const wallet = Wallet.createRandom()
        const token = await signIn(process.argv[1], wallet)
        const headers = {{ authorization: `Bearer ${{token}}` }}
        const out = await fetch(process.argv[1] + '/api/v1/auth/logout', {{ method: 'POST', headers }})
        console.log(JSON.stringify({{ status: out.status, ended: (await out.json()).ended }}))
    """
    folder = Path(__file__).parent.parent / "js"
    command = ["node", "--input-type=module", "-e", program, world.node.url]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"status": 200, "ended": 1}


async def test_the_command_line_signs_in_and_out(world: World, tmp_path: Path) -> None:
    key = Secret(secrets.token_bytes(32))
    file = tmp_path / "wallet.key"
    file.write_text("0x" + key.reveal().hex())
    file.chmod(0o600)
    told = ["--node", world.node.url, "--key", str(file)]
    runner = CliRunner(env={"HOME": str(tmp_path)})
    wrong = await asyncio.to_thread(runner.invoke, app_for(()), ["sign-in", *told, "--spend", "1,5"])
    signed_in = await asyncio.to_thread(runner.invoke, app_for(()), ["sign-in", *told])
    token = signed_in.stdout.strip()
    found = await world.request("GET", "/api/v1/results/0x" + "11" * 32, headers=bearer(token))
    signed_out = await asyncio.to_thread(runner.invoke, app_for(()), ["sign-out", *told])
    after = await world.request("GET", "/api/v1/results/0x" + "11" * 32, headers=bearer(token))

    assert isinstance(wrong.exception, BadRequest), "which the command prints in a line"
    assert signed_in.exit_code == signed_out.exit_code == 0, (signed_in.output, signed_out.output)
    assert found[1]["code"] == "result_unknown"
    assert "sessions ended: 1" in signed_out.output
    assert after[1]["code"] == "session_invalid"
