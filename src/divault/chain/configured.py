"""What an operator's or owner's settings name on the chain, proved to be there and to be what they take it for.

For the start of a program: whoever reads these errors can change the settings, so they name the setting, what was found
and what to set. What callers of a node are told comes from `chain` and `rpc`, which know of no settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from divault.chain import contracts, erc20
from divault.chain.answers import Reverted
from divault.chain.chain import Chain, ContractCall
from divault.chain.records import Malformed
from divault.chain.vault import parse_model
from divault.errors import ChainStale, ChainUnavailable, SettingsInvalid
from divault.values import Address, BlockRef, Digest, ModelId, Usdc

_VAULT, _TOKEN, _TOKENS = "VAULT_CONTRACT_ADDRESS", "USDC_CONTRACT_ADDRESS", "DIVAULT_PAYMENT_TOKENS"
_NOBODYS = ModelId.parse(str(Digest.ZERO))  # no vault registers it


@dataclass(frozen=True, slots=True)
class Found:
    """What is at an address, by what it answers."""

    has_code: bool
    models: int | None
    """How many a vault lists; None where this is no vault."""
    decimals: int | None
    """What a token tells; None where it tells none."""

    def __str__(self) -> str:
        if not self.has_code:
            return "no contract"
        if self.models is not None:
            return "a ModelVault"
        if self.decimals is not None:
            return f"a token with {self.decimals} decimals"
        return "a contract that is neither a ModelVault nor a token"


async def connect(chain: Chain) -> int:
    """The chain id, proved by an endpoint now. Raises ChainUnavailable naming WEB3_PROVIDER_URL."""
    try:
        return await chain.connect()
    except ChainUnavailable as err:
        raise _unreachable(err) from err


async def newest(chain: Chain) -> BlockRef:
    """The newest block of an endpoint that proved its chain. Raises ChainUnavailable, ChainStale, naming settings."""
    await connect(chain)
    try:
        return await chain.head(fresh=True)
    except ChainStale as err:
        raise ChainStale(
            f"{err.detail}; set WEB3_PROVIDER_URL to an endpoint that keeps up, or, where blocks come seldom, "
            "DIVAULT_HEAD_MAX_AGE_SECONDS to more (0: no limit)",
            **err.data,
        ) from err
    except ChainUnavailable as err:
        raise _unreachable(err) from err


async def require_vault(chain: Chain, vault: Address, block: BlockRef) -> Found:
    """What is at the vault's address, if that is a vault. Raises SettingsInvalid, ChainUnavailable."""
    found = await look(chain, vault, block)
    if found.models is None:
        raise _another(_VAULT, vault, chain, found, "the address of the ModelVault")
    return found


async def require_tokens(chain: Chain, token: Address, others: tuple[Address, ...], block: BlockRef) -> None:
    """Return only if the payment token and the further ones have 6 decimals. Raises SettingsInvalid, ChainUnavailable.

    Prices are whole numbers of 1/10^6 of a token.
    """
    for setting, address in ((_TOKEN, token), *((_TOKENS, other) for other in others)):
        found = await look(chain, address, block)
        if found.decimals != Usdc.DECIMALS:
            raise _another(setting, address, chain, found, f"a token with {Usdc.DECIMALS} decimals, like USDC")


async def look(chain: Chain, address: Address, block: BlockRef) -> Found:
    """What is at the address. Raises ChainUnavailable."""
    if not await chain.code(address, block):
        return Found(has_code=False, models=None, decimals=None)
    vault = contracts.load("ModelVault")
    asked = (vault.encode("totalModels"), vault.encode("getModelInfo", _NOBODYS), erc20.decimals())
    total, entry, decimals = await chain.calls([ContractCall(address, data) for data in asked], block)
    told = _number(decimals)
    return Found(
        has_code=True,
        models=_number(total) if _is_entry(entry) else None,
        decimals=told if told is not None and told < 2**8 else None,
    )


def _another(setting: str, address: Address, chain: Chain, found: Found, wanted: str) -> SettingsInvalid:
    elsewhere = "" if found.has_code else ", or WEB3_PROVIDER_URL to an endpoint of its chain"
    return SettingsInvalid(
        f"{setting} names {address}, and there is {found} on chain {chain.chain_id}: set it to {wanted}{elsewhere}",
        setting=setting,
    )


def _number(returned: bytes | Reverted) -> int | None:
    try:
        return None if isinstance(returned, Reverted) else erc20.parse_uint(returned)
    except Malformed:
        return None


def _is_entry(returned: bytes | Reverted) -> bool:
    """Whether a vault says this of a model that it doesn't have; some revert."""
    if isinstance(returned, Reverted):
        return True
    try:
        parse_model(_NOBODYS, returned, Address.ZERO)
    except (Malformed, OverflowError):
        return False
    return True


def _unreachable(err: ChainUnavailable) -> ChainUnavailable:
    if "WEB3_PROVIDER_URL" in err.detail:  # of an endpoint of another chain
        return err
    return ChainUnavailable(
        f"{err.detail}; if that does not help, set WEB3_PROVIDER_URL to an endpoint that answers", **err.data
    )
