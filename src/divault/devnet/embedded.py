"""The embedded chain behind its HTTP server. Importing this needs pyrevm."""

from __future__ import annotations

from collections.abc import Iterable

from divault.devnet.chain import EmbeddedChain
from divault.devnet.rpc import JsonRpc
from divault.devnet.server import RpcServer
from divault.devnet.world import Account
from divault.values import Address


def serve(chain_id: int, genesis: Iterable[tuple[Address, int, bytes]], *, host: str, port: int) -> RpcServer:
    """A listening server over a new chain with these accounts (address, wei, code). Raises SettingsInvalid."""
    accounts = [(address.raw, Account(int(bool(code)), balance, code)) for address, balance, code in genesis]
    return RpcServer(JsonRpc(EmbeddedChain(chain_id, accounts)).answer, host=host, port=port)
