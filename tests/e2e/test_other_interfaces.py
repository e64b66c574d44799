"""Clients that know nothing of this project, unmodified: tritonclient and openai."""

from __future__ import annotations

import asyncio
import base64
import json
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import orjson
import pytest
import tritonclient.http as triton

from divault import receipts
from divault.api.openai import covered_choices
from divault.cli.top import read
from divault.client import Client
from divault.values import Secret, Usdc
from tests.e2e.conftest import MINIMUM, World
from tests.e2e.test_http_payment import pay
from tests.markdown_blocks import blocks
from tests.memory_models import mini_lm, tiny_language_model

pytestmark = pytest.mark.asyncio(loop_scope="session")


OPEN: list[Any] = []
"""Clients to be closed when a test's story ends."""


PAGE = Path(__file__).parent.parent.parent / "docs/how-to/use-clients-that-you-have.md"
PUBLISHED: list[str] = []
TARGETS: list[str] = []


def page() -> dict[str, Any]:
    """What the page of other clients defines."""
    names: dict[str, Any] = {}
    for block in blocks(PAGE):
        if block.language == "python":
            exec(block.code, names)
    return names


def our_client(world: World, key: Secret) -> Client:
    known = world.folder / "known.json"
    client = Client(world.node.url, key, rpc=world.chain.devnet.url, known_nodes=known, timeout_s=60)
    OPEN.append(client)
    return client


def openai_client(world: World, client: Client) -> openai.OpenAI:
    made: openai.OpenAI = page()["openai_of"](client, world.node.url)
    OPEN.append(made)
    return made


async def on_a_thread(work: Any) -> Any:
    try:
        return await asyncio.to_thread(work)
    finally:
        while OPEN:
            await asyncio.to_thread(OPEN.pop().close)


def check(world: World, client: Client, receipt: dict[str, Any], asked: bytes, result: bytes) -> None:
    """The receipt holds, and covers exactly these bytes."""
    node = client.node()
    about: dict[str, Any] = {"chain_id": node.chain_id, "vault": node.vault, "node": node.address}
    receipts.require_valid(receipts.check(receipt, **about, input_data=asked, result=result))
    for other in ({"input_data": asked + b" ", "result": result}, {"input_data": asked, "result": result + b" "}):
        steps = receipts.check(receipt, **about, **other)  # type: ignore[arg-type]
        assert any(step.outcome is receipts.Outcome.FAILED for step in steps)


def packed(folder: Path, files: dict[str, bytes]) -> Path:
    """A tar of the files, as publishers make it."""
    for name, data in files.items():
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    out = folder / "model.tar"
    with tarfile.open(out, "w") as tar:
        tar.add(folder / "model", arcname="model")
    return out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("language")
    saved = made / "saved"
    saved.mkdir()
    return packed(made, tiny_language_model(saved))


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("sentences"), mini_lm())


async def language(world: World, path: Path) -> str:
    """Publish the language model, once for all tests."""
    if not PUBLISHED:
        PUBLISHED.append((await world.publish("openai-text", path)).text)
    return PUBLISHED[0]


# --- Open Inference Protocol ------------------------------------------------------------------------------------------


def triton_client(world: World) -> Any:
    OPEN.append(triton.InferenceServerClient(world.node.url.removeprefix("http://"), network_timeout=60))
    return OPEN[-1]


def rows_as_tensor(rows: list[list[float]], *, binary: bool) -> Any:
    tensor = triton.InferInput("features", [len(rows), len(rows[0])], "FP64")
    tensor.set_data_from_numpy(np.array(rows), binary_data=binary)
    return tensor


@pytest.mark.parametrize("binary", [True, False])
async def test_a_triton_client_runs_a_model_and_its_answer_has_a_receipt(world: World, binary: bool) -> None:
    model = (await world.publish(f"triton-{binary}")).text
    key = await world.consumer()

    def story() -> None:
        client, ours = triton_client(world), our_client(world, key)
        path = f"v2/repository/models/{model}/load"
        # `load_model` sends this body; every request is signed over what it sends.
        client.load_model(model, headers=ours.headers("POST", "/" + path, json.dumps({}).encode()))
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(model)
        told = client.get_model_metadata(model)
        assert told["inputs"] == [{"name": "features", "datatype": "FP64", "shape": [-1, 30]}]
        assert [row["state"] for row in client.get_model_repository_index() if row["name"] == model] == ["READY"]

        narrow = [rows_as_tensor([[1.0, 2.0]], binary=binary)]
        wrong, _ = triton.InferenceServerClient.generate_request_body(narrow)
        with pytest.raises(triton.InferenceServerException, match=r"input_invalid: .*30") as caught:
            client.infer(model, narrow, headers=ours.headers("POST", f"/v2/models/{model}/infer", wrong))
        assert "422" in caught.value.status()

        inputs = [rows_as_tensor(world.trained.rows[:5], binary=binary)]
        body, size = triton.InferenceServerClient.generate_request_body(inputs, request_id="q1")
        headers = ours.headers("POST", f"/v2/models/{model}/infer", body)
        answer = client.infer(model, inputs, request_id="q1", headers=headers)
        assert page()["infer"](world.node.url, ours, model, inputs).as_numpy("predictions").shape == (5,)

        assert (size is not None) is binary
        assert answer.as_numpy("predictions").shape == (5,)
        assert answer.as_numpy("probabilities").shape == (5, 2)
        assert (answer.as_numpy("probabilities").argmax(1) == answer.as_numpy("predictions")).all()
        response = answer.get_response()
        assert response["id"] == "q1"
        # Asked for no output by name, this client takes all of them as bytes.
        assert [output["parameters"]["binary_data_size"] for output in response["outputs"]] == [40, 80, 16]
        tensors = [answer.as_numpy(output["name"]).tobytes() for output in response["outputs"]]
        covered = orjson.dumps(response["outputs"]) + b"".join(tensors)
        check(world, ours, response["parameters"]["receipt"], body, covered)
        with pytest.raises(triton.InferenceServerException) as replayed:
            client.infer(model, inputs, request_id="q1", headers=headers)
        assert "401" in str(replayed.value.status())

    await on_a_thread(story)


async def test_a_wrong_name_of_an_output_costs_no_run(world: World) -> None:
    model = (await world.publish("outputs-v2")).text
    key = await world.consumer()

    def runs() -> float:
        return read(world.node.url).value("divault_model_pass_callers_count", model=model)

    def story() -> None:
        client, ours = triton_client(world), our_client(world, key)
        ours.load(model)
        inputs = [rows_as_tensor(world.trained.rows[:2], binary=True)]

        def infer(name: str, *, binary: bool) -> Any:
            outputs = [triton.InferRequestedOutput(name, binary_data=binary)]
            body, _ = triton.InferenceServerClient.generate_request_body(inputs, outputs=outputs)
            headers = ours.headers("POST", f"/v2/models/{model}/infer", body)
            return client.infer(model, inputs, outputs=outputs, headers=headers)

        before = runs()
        with pytest.raises(triton.InferenceServerException) as caught:
            infer("logits", binary=False)
        assert "input_invalid" in str(caught.value)
        assert runs() == before
        as_bytes, as_json = (infer("probabilities", binary=binary) for binary in (True, False))
        assert runs() == before + 2
        assert (as_bytes.as_numpy("probabilities") == as_json.as_numpy("probabilities")).all()
        assert "data" in as_json.get_output("probabilities")
        assert "data" not in as_bytes.get_output("probabilities")

    await on_a_thread(story)


async def test_a_kept_answer_with_bytes_is_the_same_again(world: World) -> None:
    model = (await world.publish("kept-bytes-v2", price="0.02")).text
    key = await world.consumer()
    async with world.client(key) as client:
        transfer = await pay(world, key, Usdc.parse("0.10"))
        await client.run(model, {"features": world.trained.rows[0]}, max_price="0.02", payment=transfer)
        tensor = {"name": "features", "datatype": "FP64", "shape": [30], "data": world.trained.rows[0]}
        asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
        body, path = json.dumps(asked).encode(), f"/v2/models/{model}/infer"
        headers = await client.headers("POST", path, body, max_price="0.02")

    def post() -> tuple[bytes, str]:
        request = urllib.request.Request(world.node.url + path, body, dict(headers))
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read(), answer.headers["inference-header-content-length"]

    first, again = await asyncio.to_thread(post), await asyncio.to_thread(post)
    told = json.loads(first[0][: int(first[1])])

    assert again == first
    assert sum(one["parameters"]["binary_data_size"] for one in told["outputs"]) == len(first[0]) - int(first[1])


@pytest.mark.parametrize("path", ["/v2/models/{m}/infer", "/v2/models/{m}/versions/1/infer"])
async def test_without_a_signature_nothing_of_a_model_is_reached(world: World, path: str) -> None:
    model = (await world.publish("unsigned")).text
    tensor = {"name": "features", "datatype": "FP64", "shape": [1, 30], "data": world.trained.rows[0]}
    for where, body in (
        (path.format(m=model), {"inputs": [tensor]}),
        (f"/v2/repository/models/{model}/load", {}),
        (f"/v2/repository/models/{model}/unload", {}),
        ("/v1/embeddings", {"model": model, "input": "x"}),
        ("/v1/completions", {"model": model, "prompt": "x"}),
        ("/v1/chat/completions", {"model": model, "messages": []}),
    ):
        status, answer, headers = await world.request("POST", where, json=body)
        assert (status, answer["code"]) == (401, "signature_incomplete"), where
        assert "www-authenticate" in headers


async def test_a_wallet_without_tokens_gets_a_refusal_with_its_receipt(world: World) -> None:
    model = (await world.publish("gated-v2")).text
    member, stranger = await world.consumer(), await world.consumer(tokens=0)
    async with world.client(member) as client:
        await client.load(model)
    tensor = {"name": "features", "datatype": "FP64", "shape": [1, 30], "data": world.trained.rows[0]}
    body = json.dumps({"inputs": [tensor]}).encode()
    path = f"/v2/models/{model}/infer"
    async with world.client(stranger) as client:
        headers = await client.headers("POST", path, body)
    status, answer, _ = await world.request("POST", path, data=body, headers=headers)

    assert (status, answer["code"]) == (403, "access_denied")
    assert answer["need"] == str(MINIMUM)
    assert answer["receipt"]["receipt"]["status"] == "3"


async def malformed_target(world: World) -> str:
    """Publish one model for all malformed requests."""
    if not TARGETS:
        TARGETS.append((await world.publish("malformed")).text)
    return TARGETS[0]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", 400), (b"[]", 400), (b'{"inputs": []}', 400), (b'{"inputs": [{"name": "features"}]}', 422),
        (b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 3], "data": [1, 2]}]}', 422),
        (b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 3], "data": [1, 2, 3]}]}', 422),
        (b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [2147483647, 2147483647], "data": []}]}', 422),
        (b'{"inputs": [{"name": "x", "datatype": "NONE", "shape": [1], "data": [1]}]}', 422),
        (b'{"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "parameters": {"binary_data_size": 8}}]}', 400),
    ],
)  # fmt: skip
async def test_a_malformed_tensor_is_told_and_never_a_500(world: World, body: bytes, status: int) -> None:
    model = await malformed_target(world)
    path = f"/v2/models/{model}/infer"
    async with world.client(await world.consumer()) as client:
        await client.load(model)
        headers = await client.headers("POST", path, body)
    found, answer, _ = await world.request("POST", path, data=body, headers=headers)

    assert found == status, answer


async def test_a_priced_model_is_paid_from_credit(world: World) -> None:
    model = (await world.publish("priced-v2", price="0.02")).text
    key = await world.consumer()
    async with world.client(key) as client:
        # The transfer brings credit for five runs; the first of them is this one.
        transfer = await pay(world, key, Usdc.parse("0.10"))
        await client.run(model, {"features": world.trained.rows[0]}, max_price="0.02", payment=transfer)
        tensor = {"name": "features", "datatype": "FP64", "shape": [30], "data": world.trained.rows[0]}
        body, path = json.dumps({"inputs": [tensor]}).encode(), f"/v2/models/{model}/infer"
        headers = await client.headers("POST", path, body, max_price="0.02")
        cheap = await client.headers("POST", path, body, max_price="0.01")
    status, answer, _ = await world.request("POST", path, data=body, headers=headers)
    again, same, _ = await world.request("POST", path, data=body, headers=headers)
    refused, problem, _ = await world.request("POST", path, data=body, headers=cheap)

    assert status == 200, answer
    assert answer["parameters"]["receipt"]["receipt"]["price"] == "20000"
    assert (again, same) == (200, answer), "the kept answer, charged once"
    assert (refused, problem["code"]) == (409, "price_changed")


async def test_a_call_of_another_interface_pays_by_a_transfer_that_its_header_names(world: World) -> None:
    model = (await world.publish("paying-v2", price="0.02")).text
    key = await world.consumer()
    tensor = {"name": "features", "datatype": "FP64", "shape": [30], "data": world.trained.rows[0]}
    body, path = json.dumps({"inputs": [tensor]}).encode(), f"/v2/models/{model}/infer"
    async with world.client(key) as client:
        await client.load(model)

        async def infer(headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
            return (await world.request("POST", path, data=body, headers=headers))[:2]

        async def sign(**how: str) -> dict[str, str]:
            return await client.headers("POST", path, body, max_price="0.02", **how)

        unpaid = await infer(await sign())
        one, other = [str(await pay(world, key, Usdc.parse("0.04"))) for _ in range(2)]
        paid = await infer(await sign(payment=one))
        again = await infer(await sign(payment=one))
        unsigned = await infer(await sign() | {"divault-payment": other})
        token = (await client.sign_in(spend="0.04")).token
        by_session = await infer({"authorization": f"Bearer {token}", "idempotency-key": "1", "divault-payment": other})
        nonsense = await infer(await sign(payment="0x12"))

    assert unpaid[0] == 402
    assert unpaid[1]["accepts"][0]["extra"]["claim"] == "header divault-payment"
    assert paid[0] == by_session[0] == 200, (paid, by_session)
    assert paid[1]["parameters"]["receipt"]["receipt"]["price"] == "20000"
    assert (again[0], again[1]["reason"]) == (402, "already_spent")
    assert (unsigned[0], unsigned[1]["reason"]) == (401, "class_bound")
    assert (nonsense[0], nonsense[1]["reason"]) == (402, "bad_tx_hash")


# --- OpenAI -----------------------------------------------------------------------------------------------------------


async def test_an_openai_client_gets_embeddings(world: World, sentence_model: Path) -> None:
    model = (await world.publish("openai-embeddings", sentence_model)).text
    key = await world.consumer()

    def story() -> None:
        ours = our_client(world, key)
        client = openai_client(world, ours)
        texts = ["the film was good", "the book was bad"]
        packed = client.embeddings.create(model=model, input=texts)
        plain = client.embeddings.create(model=model, input=texts[0], encoding_format="float")
        raw = client.embeddings.with_raw_response.create(model=model, input=texts, encoding_format="base64")
        body = json.loads(raw.text)
        first = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), dtype="<f4")
        native = ours.run(model, {"text": texts}).output

        assert model in [one.id for one in client.models.list()]
        assert client.models.retrieve(model).id == model
        assert len(packed.data) == 2
        assert np.allclose(packed.data[0].embedding, plain.data[0].embedding, atol=1e-5)
        assert np.allclose(first, native["embeddings"][0], atol=1e-6)
        assert packed.usage.prompt_tokens == sum(native["tokens"]) == packed.usage.total_tokens
        covered = orjson.dumps(body["data"])
        check(world, ours, body["receipt"], raw.http_response.request.content, covered)
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.embeddings.create(model=model, input=["", "x"])
        assert refused.value.param == "input[0]", "in the words of the interface"

    await on_a_thread(story)


async def test_an_openai_client_completes_and_chats(world: World, language_model: Path) -> None:
    model = await language(world, language_model)
    key = await world.consumer()

    def story() -> None:
        ours = our_client(world, key)
        client = openai_client(world, ours)
        asked: dict[str, Any] = {"model": model, "prompt": "Once upon", "seed": 5, "max_tokens": 20}
        whole = client.completions.create(**asked, temperature=1.0)
        again = client.completions.create(**asked, temperature=1.0)
        native = ours.run(model, {"prompt": "Once upon"}, parameters={"seed": 5, "max_tokens": 20, "temperature": 1.0})
        assert whole.choices[0].text == again.choices[0].text == native.output["texts"][0]["text"]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 20
        assert whole.choices[0].finish_reason == "length"

        talk: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 16,
            "seed": 1,
        }
        said = client.chat.completions.create(**talk)
        assert said.choices[0].message.role == "assistant"
        pieces, usage, receipt = [], None, None
        streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = client.chat.completions.with_raw_response.create(**talk, **streaming)
        roles = []
        for event in streamed.parse():
            roles += [choice.delta.role for choice in event.choices]
            pieces += [choice.delta.content or "" for choice in event.choices]
            usage = event.usage or usage
            receipt = getattr(event, "receipt", None) or receipt
        assert roles[0] == "assistant"
        assert not any(roles[1:]), "clients would join them"
        text = "".join(pieces)
        assert text == said.choices[0].message.content
        assert len([piece for piece in pieces if piece]) > 3, "it came in pieces"
        assert usage is not None
        assert usage.completion_tokens == 16
        assert receipt is not None
        covered = covered_choices("chat", [(text, "length")])
        check(world, ours, receipt, streamed.http_response.request.content, covered)
        stops = client.chat.completions.create(**talk, stop=[text[3:5]])
        assert stops.choices[0].message.content == text[: text.index(text[3:5])]
        assert stops.choices[0].finish_reason == "stop"

    await on_a_thread(story)


async def test_what_is_not_supported_is_named(world: World, language_model: Path) -> None:
    model = await language(world, language_model)
    key = await world.consumer()

    def story() -> None:
        ours = our_client(world, key)
        client = openai_client(world, ours)
        talk: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        odd_ones: list[dict[str, Any]] = [{"n": 2}, {"logprobs": True}, {"presence_penalty": 0.5}, {"tools": [1]}]
        for odd in odd_ones:
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                client.chat.completions.create(**talk, **odd)
            assert caught.value.body["code"] == "input_invalid"  # type: ignore[index]
            assert next(iter(odd)) in str(caught.value)
        for neutral in ({"n": 1}, {"presence_penalty": 0}, {"user": "me"}):
            assert client.chat.completions.create(**talk, **neutral).choices
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**talk, extra_body={"trust_remote_code": True})
        with pytest.raises(openai.UnprocessableEntityError):
            client.completions.create(model=model, prompt="x" * 200)
        with pytest.raises(openai.UnprocessableEntityError) as hot:
            client.chat.completions.create(**talk, temperature=-1)
        assert hot.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as other:
            client.embeddings.create(model=model, input="x")
        assert other.value.body["code"] == "unsupported_model"  # type: ignore[index]
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="nobodys-model", input="x")

    await on_a_thread(story)


async def test_a_stream_that_cannot_begin_is_an_ordinary_error(world: World, language_model: Path) -> None:
    model = await language(world, language_model)
    member, stranger = await world.consumer(), await world.consumer(tokens=0)

    def story() -> None:
        ours, other = our_client(world, member), our_client(world, stranger)
        with pytest.raises(openai.UnprocessableEntityError):
            openai_client(world, ours).completions.create(model=model, prompt="x" * 200, stream=True)
        with pytest.raises(openai.PermissionDeniedError) as caught:
            openai_client(world, other).completions.create(model=model, prompt="x", stream=True)
        assert caught.value.response.json()["receipt"]["receipt"]["user"] == str(other.address)

    await on_a_thread(story)


async def test_what_a_node_cannot_load_otherwise_is_refused(world: World) -> None:
    model = (await world.publish("as-it-is")).text
    path = f"/v2/repository/models/{model}"
    key = await world.consumer()
    other = {"config": "{}", "file:1/model.onnx": "AAAA"}
    for way, body, expected in (
        ("load", {"parameters": other}, 400), ("load", [], 400), ("load", {"parameters": 3}, 400),
        ("load", {"parameters": {"x": "y" * 70_000}}, 413), ("load", {"parameters": {}}, 200),
        ("unload", {"parameters": {"unload_dependents": True}}, 400),
        ("unload", {"parameters": {"unload_dependents": False}}, 403),
    ):  # fmt: skip
        raw = json.dumps(body).encode()
        async with world.client(key) as client:
            headers = await client.headers("POST", f"{path}/{way}", raw)
        status, answer, _ = await world.request("POST", f"{path}/{way}", data=raw, headers=headers)
        assert status == expected, (way, answer)
    for body, expected in (({}, 200), ({"ready": True}, 200), ({"ready": "yes"}, 400)):
        status, rows, _ = await world.request("POST", "/v2/repository/index", json=body)
        assert status == expected
        assert expected != 200 or model in [row["name"] for row in rows]


async def test_heads_are_answered_and_odd_encodings_are_not_read(world: World) -> None:
    for path in ("/v2/health/live", "/v1/models", "/api/v1/node"):
        status, body, headers = await world.request("HEAD", path)
        assert (status, body) == (200, None)
        assert int(headers["content-length"]) > 2
    assert (await world.request("HEAD", "/api/v1/inference"))[0] == 405
    status, answer, _ = await world.request("POST", "/v1/embeddings", data=b"{}", headers={"content-encoding": "GZIP"})
    assert (status, answer["field"]) == (400, "content-encoding")
    status, answer, _ = await world.request(
        "POST", "/v1/embeddings", data=b"{}", headers={"content-encoding": "Identity"}
    )
    assert status == 400
    assert answer["field"] == "model"


@pytest.mark.parametrize("version", ["", "2", "1/1"])
async def test_a_model_has_one_version(world: World, version: str) -> None:
    status, answer, _ = await world.request("POST", f"/v2/models/m/versions/{version}/infer", json={})
    assert (status, answer["code"]) == (404, "route_unknown")


async def test_the_other_interfaces_are_described(world: World) -> None:
    _, told, _ = await world.request("GET", "/openapi.json")

    for path in ("/v2/models/{model_id}/infer", "/v1/embeddings", "/v1/completions", "/v1/chat/completions"):
        assert "requestBody" in told["paths"][path]["post"]
        assert {"200", "401", "402", "403"} <= told["paths"][path]["post"]["responses"].keys()
    _, server, _ = await world.request("GET", "/v2")
    assert server["extensions"] == ["model_repository", "binary_tensor_data"]
