"""What the settings name on the chain is looked at before a node starts, and by the doctor, with the same words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from divault import app
from divault.chain import configured
from divault.chain.contracts import of_artifact
from divault.cli.diagnosis import diagnose
from divault.devnet import Devnet, start_devnet
from divault.errors import ChainStale, ChainUnavailable, SettingsInvalid
from divault.settings import Settings
from divault.testing import TestChain
from divault.values import Address
from tests.test_doctor import finding

WALLET = Address.parse("0x" + "11" * 20)
VAULT, USDC, MORE = "VAULT_CONTRACT_ADDRESS", "USDC_CONTRACT_ADDRESS", "DIVAULT_PAYMENT_TOKENS"


@pytest.fixture(scope="module")
def devnet() -> Iterator[Devnet]:
    with start_devnet(anvil=False) as devnet:
        yield devnet


@pytest.fixture
async def chain(devnet: Devnet) -> AsyncIterator[TestChain]:
    chain = await TestChain.deploy(devnet)
    yield chain
    await chain.close()


def settings_of(chain: TestChain, **changed: object) -> dict[str, str]:
    right = {
        "WEB3_PROVIDER_URL": chain.devnet.url,
        VAULT: chain.vault,
        USDC: chain.usdc,
        "DIVAULT_HEAD_MAX_AGE_SECONDS": "0",
    }
    return {name: str(value) for name, value in (right | changed).items()}


async def refusal(environment: dict[str, str], folder: Path) -> SettingsInvalid:
    """Why a node does not start."""
    places = {"DIVAULT_STATE_DIR": str(folder / "state"), "MODEL_CACHE_DIR": str(folder / "cache")}
    with pytest.raises(SettingsInvalid) as caught:
        async with app.running(Settings.load(environment | places, env_file=None)):
            pass
    return caught.value


async def test_the_right_ones_are_taken_further_tokens_included(chain: TestChain, tmp_path: Path) -> None:
    more = await chain.publisher.deploy("TestUSDC")
    settings = settings_of(chain, **{MORE: more})

    assert (await finding("vault", tmp_path, **settings)).ok
    token = await finding("payment token", tmp_path, **settings)
    assert (token.ok, token.detail) == (True, f"{chain.usdc}, {more}: 6 decimals")


async def test_a_vault_may_revert_for_a_model_that_it_does_not_have(chain: TestChain) -> None:
    """Three for totalModels(), a revert for all else."""
    found = await look_at(chain, "5f3560e01c63017d719614601157" + "5f5ffd" + "5b60035f5260205ff3")

    assert (found.has_code, found.models, found.decimals) == (True, 3, None)


async def test_a_contract_that_answers_everything_is_no_vault(chain: TestChain) -> None:
    """Six, whatever is asked."""
    found = await look_at(chain, "60065f5260205ff3")

    assert (found.has_code, found.models, found.decimals) == (True, None, 6)


async def look_at(chain: TestChain, runtime: str) -> configured.Found:
    """What is found where a contract has this code, of at most 32 bytes."""
    size = len(runtime) // 2
    creation = f"{0x5F + size:02x}{runtime}5f5260{size:02x}60{32 - size:02x}f3"  # PUSH, MSTORE, RETURN
    artifact = {"abi": [], "bytecode": f"0x{creation}", "deployedBytecode": f"0x{runtime}"}
    mined = await chain.publisher.send(None, of_artifact("Small", artifact).deployment())
    assert mined.contract is not None
    return await configured.look(chain.chain, mined.contract, await chain.chain.head(fresh=True))


RIGHT = {(VAULT, "vault"), (USDC, "usdc"), (MORE, "usdc")}
WRONG = [
    (setting, what)
    for setting in (VAULT, USDC, MORE)
    for what in ("wallet", "vault", "usdc", "18 decimals", "neither")
    if (setting, what) not in RIGHT
]


@pytest.mark.parametrize(("setting", "what"), WRONG)
async def test_another_address_is_named_with_what_is_there_by_node_and_doctor(
    setting: str, what: str, chain: TestChain, tmp_path: Path
) -> None:
    there = {
        "wallet": (WALLET, "no contract"),
        "vault": (chain.vault, "a ModelVault"),
        "usdc": (chain.usdc, "a token with 6 decimals"),
        "18 decimals": (chain.token, "a token with 18 decimals"),
        "neither": (await chain.publisher.deploy("Multicall"), "a contract that is neither a ModelVault nor a token"),
    }
    address, words = there[what]
    settings = settings_of(chain, **{setting: address})
    error = await refusal(settings, tmp_path)
    found = await finding("vault" if setting == VAULT else "payment token", tmp_path, **settings)

    assert error.data["setting"] == setting
    assert f"{setting} names {address}, and there is {words} on chain {chain.chain.chain_id}: set it to" in error.detail
    assert ("WEB3_PROVIDER_URL" in error.detail) is (what == "wallet")
    assert (found.ok, found.detail) == (False, error.detail)


async def test_swapped_addresses_fail_both_tests(chain: TestChain, tmp_path: Path) -> None:
    settings = settings_of(chain, **{VAULT: chain.usdc, USDC: chain.vault})
    vault, token = [await finding(name, tmp_path, **settings) for name in ("vault", "payment token")]

    assert (vault.ok, "a token with 6 decimals" in vault.detail) == (False, True)
    assert (token.ok, "a ModelVault" in token.detail) == (False, True)


# --- the chain itself ---------------------------------------------------------------------------------------------


async def test_an_old_head_fails_one_test_of_the_doctor_as_it_keeps_the_node_from_starting(
    chain: TestChain, tmp_path: Path
) -> None:
    await chain.advance_time(1)
    await wait_until_older(chain, 2.5)
    strict, loose = settings_of(chain, DIVAULT_HEAD_MAX_AGE_SECONDS="1"), settings_of(chain)
    with pytest.raises(ChainStale, match="DIVAULT_HEAD_MAX_AGE_SECONDS") as caught:
        async with app.running(Settings.load(strict, env_file=None)):
            pass
    environment = strict | {"DIVAULT_STATE_DIR": str(tmp_path / "s"), "MODEL_CACHE_DIR": str(tmp_path / "c")}
    failed = [one.name for one in await diagnose(Settings.load(environment, env_file=None)) if not one.ok]

    assert "set WEB3_PROVIDER_URL to an endpoint that keeps up" in caught.value.detail
    assert set(failed) & {"rpc", "vault", "payment token", "clock"} == {"rpc"}
    assert "DIVAULT_HEAD_MAX_AGE_SECONDS to more (0: no limit)" in (await finding("rpc", tmp_path, **strict)).detail
    assert (await finding("rpc", tmp_path, **loose)).ok


async def wait_until_older(chain: TestChain, seconds: float) -> None:
    head = await chain.chain.head(fresh=True)
    await asyncio.sleep(max(0.0, head.timestamp + seconds - time.time()))


async def test_a_chain_out_of_reach_is_named_by_its_setting(chain: TestChain, tmp_path: Path) -> None:
    settings = settings_of(chain, WEB3_PROVIDER_URL="http://127.0.0.1:9")
    with pytest.raises(ChainUnavailable, match=r"127\.0\.0\.1:9 is unreachable.*set WEB3_PROVIDER_URL"):
        async with app.running(Settings.load(settings, env_file=None)):
            pass
    found = await finding("rpc", tmp_path, **settings)

    assert (found.ok, "set WEB3_PROVIDER_URL" in found.detail) == (False, True)


async def test_a_chain_of_another_id_names_its_settings_once(chain: TestChain, tmp_path: Path) -> None:
    found = await finding("rpc", tmp_path, **settings_of(chain, DIVAULT_CHAIN_ID="1"))

    assert not found.ok
    assert found.detail.count("WEB3_PROVIDER_URL") == 1
