"""One development chain, whichever program runs it: started, funded, proved to be ours, stopped.

```python
with start_devnet() as devnet:
    assert devnet.rpc("eth_chainId") == hex(devnet.chain_id)
```
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from divault.chain import contracts
from divault.devnet.anvil import SETTING, AnvilProcess, find_anvil
from divault.errors import ChainUnavailable, SettingsInvalid, TransactionFailed
from divault.keccak import keccak256
from divault.messages.signatures import address_of
from divault.values import Address, Secret

DEVNET_CHAIN_ID = 77001
"""Of no public chain, so that what is signed here is worth nothing anywhere else."""
MULTICALL = Address(bytes.fromhex("ca11bde05977b3631167028862be2a173976ca11"))
"""The well-known address of Multicall3; the devnet carries an `aggregate3` contract there."""
ACCOUNTS = 10
FUNDS_WEI = 10_000 * 10**18
"""Native coin of each account at the start."""
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class DevAccount:
    """A funded account. Its key is the same on every devnet, so everybody knows it: never use it elsewhere."""

    address: Address
    key: Secret


class _Backend(Protocol):
    """What runs the chain: the embedded server or anvil."""

    @property
    def url(self) -> str:
        """Where it listens."""
        ...

    def close(self) -> None:
        """Stop it; may be called twice."""
        ...


class Devnet:
    """A running chain: its URL, chain id and funded accounts. Close it, or use it in a `with` or `async with` block."""

    def __init__(self, backend: _Backend, name: str, chain_id: int) -> None:
        self._backend = backend
        self.name = name
        """`embedded` or `anvil`."""
        self.chain_id = chain_id
        self.accounts = tuple(_account(index) for index in range(ACCOUNTS))

    @property
    def url(self) -> str:
        """JSON-RPC over HTTP."""
        return self._backend.url

    def rpc(self, method: str, *params: Any) -> Any:
        """The result of one call, blocking; for control and looking (`evm_snapshot`), not for speed.

        Raises TransactionFailed when the chain answers with an error, ChainUnavailable when it does not answer.
        """
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})  # noqa: S310 - own http URL
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310 - the same
                answer = json.load(response)
        except (OSError, ValueError) as err:
            raise ChainUnavailable(f"the devnet does not answer {method}") from err
        if "error" in answer:
            raise TransactionFailed(
                f"{method}: {answer['error'].get('message')}", reason=answer["error"].get("message")
            )
        return answer["result"]

    def close(self) -> None:
        """Stop the chain; may be called twice."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


def start_devnet(
    *,
    anvil: bool | None = None,
    chain_id: int = DEVNET_CHAIN_ID,
    host: str = "127.0.0.1",
    port: int = 0,
    environ: Mapping[str, str] | None = None,
) -> Devnet:
    """A running chain with ten funded accounts and a multicall contract; blocks for some tenths of a second.

    `anvil` None: the embedded chain, or anvil where pyrevm isn't installed; True or False insists. Host and port are
    the embedded chain's; anvil always listens on a free port of 127.0.0.1. `environ` (default: the process's) is
    where `DIVAULT_ANVIL` and `PATH` are looked up. Raises SettingsInvalid naming what to install, ChainUnavailable.
    """
    embeddable = importlib.util.find_spec("pyrevm") is not None
    if anvil is False and not embeddable:
        raise SettingsInvalid('the embedded chain needs pyrevm: pip install "divault[devnet]"', setting="anvil")
    if anvil or not embeddable:
        return _start_anvil(chain_id, os.environ if environ is None else environ)
    return _start_embedded(chain_id, host, port)


def _start_embedded(chain_id: int, host: str, port: int) -> Devnet:
    from divault.devnet.embedded import serve

    return Devnet(serve(chain_id, _genesis(), host=host, port=port), "embedded", chain_id)


def _start_anvil(chain_id: int, environ: Mapping[str, str]) -> Devnet:
    executable = find_anvil(environ)
    if executable is None:
        raise SettingsInvalid(
            'a devnet needs pyrevm (pip install "divault[devnet]", Linux with Python 3.11 or 3.12) or anvil '
            f"(from npm: @foundry-rs/anvil; on PATH, or its path in {SETTING})",
            setting=SETTING,
        )
    process = AnvilProcess(executable, chain_id)
    devnet = Devnet(process, "anvil", chain_id)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(devnet.close)
        _prove(devnet, process)
        _fund(devnet)
        on_failure.pop_all()
    return devnet


def _prove(devnet: Devnet, process: AnvilProcess) -> None:
    answered = devnet.rpc("eth_chainId")
    if answered != hex(devnet.chain_id) or not process.alive():
        raise ChainUnavailable(f"{devnet.url} is not the anvil that was started (it says chain {answered})")


def _fund(devnet: Devnet) -> None:
    for address, balance, code in _genesis():
        if balance:
            devnet.rpc("anvil_setBalance", str(address), hex(balance))
        if code:
            devnet.rpc("anvil_setCode", str(address), "0x" + code.hex())


def _genesis() -> list[tuple[Address, int, bytes]]:
    """Address, wei and code of everything that is there from the start."""
    multicall = (MULTICALL, 0, contracts.load("Multicall").deployed_bytecode)
    return [*((_account(index).address, FUNDS_WEI, b"") for index in range(ACCOUNTS)), multicall]


def _account(index: int) -> DevAccount:
    key = Secret(keccak256(f"divault devnet account {index}".encode()))
    return DevAccount(address_of(key), key)
