"""Selectors and event topics that published clients compute are in the compiled contracts."""

from __future__ import annotations

from typing import Any

import pytest

from divault.chain import contracts
from divault.keccak import keccak256

VAULT = {
    "registerModel(bytes32,string,address,uint256,uint8,string[],string,uint256)": "f9ca6e08",
    "getModelInfo(bytes32)": "b005b08b",
    "models(bytes32)": "e236f46b",
    "hasAccess(bytes32,address)": "83177db3",
    "updatePrice(bytes32,uint256)": "5f704f3e",
    "updateModelMetadata(bytes32,string,string[],string)": "7f431a2a",
    "deactivateModel(bytes32)": "047af67f",
    "reactivateModel(bytes32)": "4efe16ca",
    "getModelsByOwner(address)": "2123c159",
    "getModelsByCategory(uint8)": "0d387ef5",
    "getAllModels(uint256,uint256)": "b5aaadd6",
    "totalModels()": "017d7196",
    "totalActiveModels()": "cdd076e5",
    "totalInferences()": "df5d152f",
    "generateModelId(address,string,string)": "db1b3a92",
    "paymentToken(bytes32)": "01d46ce2",
    "gate(bytes32)": "5d818bd4",
    "manifestHash(bytes32)": "02017e0b",
}
VAULT_EVENTS = {
    "ModelRegistered": "0bc6b4748a7a745d4c6435ad8169a9408b558765bb34ecff224d6566f06b2caf",
    "ModelUpdated": "8a9b48d9ebfa01b35a7bbce0ea18103b206cf7d2ac60f080ff5f4f2b019d858c",
    "PriceUpdated": "bcd10d64fce9dcf9568572ed92e371df336d32649e8960a045c9548794a44b26",
    "ModelDeactivated": "d2790cd05b00426c4d8313fe05d2883fe0e63078a189e70a598a4ab12fc5939c",
    "ModelReactivated": "3255700864c691c3ba68979b71dc9e546e8b8645d1d1633915888d0e1e751932",
    "InferenceRecorded": "efd66ada587b37ba71099a38e59c81bbf07d4ce333cc6ce1304a5371440d7d20",
}
USDC = {
    "balanceOf(address)": "70a08231",
    "decimals()": "313ce567",
    "name()": "06fdde03",
    "version()": "54fd4d50",
    "DOMAIN_SEPARATOR()": "3644e515",
    "authorizationState(address,bytes32)": "e94a0102",
}
TOKEN = {"balanceOf(address)": "70a08231", "modelOwner()": "f4dc9f85", "decimals()": "313ce567"}
MULTICALL = {"aggregate3((address,bool,bytes)[])": "82ad56cb"}


def signature(entry: dict[str, Any]) -> str:
    return f"{entry['name']}({','.join(kind(item) for item in entry['inputs'])})"


def kind(item: dict[str, Any]) -> str:
    if not item["type"].startswith("tuple"):
        return item["type"]
    return f"({','.join(kind(part) for part in item['components'])}){item['type'][5:]}"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("ModelVault", VAULT), ("TestUSDC", USDC), ("ModelAccessToken", TOKEN), ("Multicall", MULTICALL)],
)
def test_published_selectors_are_kept(name: str, wanted: dict[str, str]) -> None:
    functions = [signature(e) for e in contracts.load(name).abi if e["type"] == "function"]
    selectors = {function: keccak256(function.encode())[:4].hex() for function in functions}

    assert wanted == {function: selectors.get(function) for function in wanted}


def test_published_events_are_kept() -> None:
    entries = [e for e in contracts.load("ModelVault").abi if e["type"] == "event"]
    topics = {e["name"]: keccak256(signature(e).encode()).hex() for e in entries}

    assert {name: topics[name] for name in VAULT_EVENTS} == VAULT_EVENTS
    assert "ContentChanged(bytes32,string,uint256)" in {signature(e) for e in entries}


def test_model_info_is_one_dynamic_tuple() -> None:
    info = next(e for e in contracts.load("ModelVault").abi if e.get("name") == "getModelInfo")

    assert [kind(output) for output in info["outputs"]] == [
        "(string,address,uint256,address,bool,uint256,uint256,uint256,string[],string,uint256)"
    ]


def test_nothing_that_an_administrator_could_use() -> None:
    names = {e["name"].lower() for e in contracts.load("ModelVault").abi if e["type"] == "function"}
    words = ("admin", "pause", "fee", "withdraw", "grantrole", "recordinference", "upgrade")

    assert not [name for name in names if any(word in name for word in words)]
    assert "owner" not in names
