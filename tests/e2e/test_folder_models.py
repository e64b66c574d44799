"""A model that lies on IPFS as a folder of sealed files, through a real node, and folders that are refused."""

from __future__ import annotations

import asyncio
import io
import json
import struct
from typing import Any

import pytest

from divault.errors import DivaultError, UnsupportedModel, WrongKey
from divault.ipfs.cid import cid_bytes
from divault.values import Cid, ModelId
from divault.vault.age import Recipient
from divault.vault.sealed import seal_stream
from tests.e2e.conftest import World
from tests.ipfs_folders import DIRECTORY, put_folder, put_node

pytestmark = pytest.mark.asyncio(loop_scope="session")

WEIGHT, BIAS = [[1.0, 2.0, 3.0], [0.5, 0.0, -1.0]], [0.25, -0.5]
MANIFEST = {"name": "two sums", "architecture": {"type": "linear", "in": 3, "out": 2}}


def safetensors() -> bytes:
    numbers = struct.pack("<8f", *(value for row in WEIGHT for value in row), *BIAS)
    header = {
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "bias": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


async def sealed(world: World, plain: bytes, model: str) -> bytes:
    out, node = io.BytesIO(), (await world.request("GET", "/api/v1/node"))[1]
    await asyncio.to_thread(
        seal_stream, io.BytesIO(plain), out, [Recipient.parse(node["age_recipient"])], ModelId.parse(model)
    )
    return out.getvalue()


async def files(world: World, model: str) -> dict[str, bytes]:
    return {
        "divault.json.age": await sealed(world, json.dumps(MANIFEST).encode(), model),
        "model.safetensors.age": await sealed(world, safetensors(), model),
    }


async def answer(world: World, model: str, cid: Cid, row: list[float]) -> Any:
    key = await world.consumer()
    await world.chain.register_open(model, cid.text)
    async with world.client(key) as client:
        return (await client.run(model, {"tensor": [row]})).output


@pytest.mark.parametrize("shards", [False, True])
async def test_a_folder_of_sealed_files_answers(world: World, *, shards: bool) -> None:
    name = f"folder-{shards}".lower()
    cid = put_folder(world.store.blocks, await files(world, name), shards=shards)

    result = await answer(world, name, cid, [1.0, 1.0, 1.0])

    assert json.dumps([6.25, -1.0])[1:-1] in json.dumps(result)


async def test_a_folder_with_a_file_for_another_model_is_refused(world: World) -> None:
    mixed = await files(world, "folder-mixed") | {
        "model.safetensors.age": (await files(world, "someone-else"))["model.safetensors.age"]
    }
    with pytest.raises(UnsupportedModel) as caught:
        await answer(world, "folder-mixed", put_folder(world.store.blocks, mixed), [1.0, 1.0, 1.0])

    assert caught.value.data["file"] == "model.safetensors.age"


async def test_a_folder_with_an_unsealed_file_is_refused(world: World) -> None:
    plain = await files(world, "folder-plain") | {"model.safetensors": safetensors()}
    del plain["model.safetensors.age"]
    with pytest.raises(WrongKey) as caught:
        await answer(world, "folder-plain", put_folder(world.store.blocks, plain), [1.0, 1.0, 1.0])

    assert caught.value.data["file"] == "model.safetensors"


async def test_a_folder_with_an_unsafe_name_is_refused(world: World) -> None:
    leaf = cid_bytes(world.store.blocks.put_file(io.BytesIO(await sealed(world, b"x", "folder-unsafe"))))
    cid = put_node(world.store.blocks, [(leaf, b"../../etc/passwd", 1)], DIRECTORY)
    with pytest.raises(DivaultError) as caught:
        await answer(world, "folder-unsafe", cid, [1.0, 1.0, 1.0])

    assert caught.value.data["reason"] == "UnsafeName"
    status, body, _ = await world.request("GET", "/api/v1/models/folder-unsafe")
    assert (status, body["model_info"]["state"]) == (200, "not loaded")
