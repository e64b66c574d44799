"""Signatures of contract wallets (ERC-1271), also of ones that are not deployed yet (ERC-6492).

Rules:

1. A key first, and without the chain: most callers are keys, and so are accounts that delegate to code (EIP-7702).
2. Whatever is no signature of a key is put to the wallet's contract in one `eth_call`, at a block hash, with a bound on
   gas. An address without code that no wrapper deploys accepts nothing, so the strict rules for keys stay as they are.
3. Anyone can make a node ask: questions are counted per peer and for the node before they are put, and a no is
   remembered for a while. A yes is not: the next request has another digest.
4. An answer that can't be had is no answer: ChainUnavailable, and nobody is let in.
5. The call comes from an address of no meaning: some contracts accept anything from the zero address, which only
   simulations have.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from divault.chain import contracts
from divault.chain.answers import Reverted
from divault.chain.chain import Chain
from divault.errors import RateLimited, SignatureInvalid
from divault.limits import Buckets
from divault.messages import refusal, unwrap
from divault.messages.signatures import require_signer_raw, signature_bytes
from divault.values import Address, Digest

MAX_SIGNATURE = 8192
"""Bytes of a contract wallet's signature; a passkey's has about 700, a wrapped one of many owners 3000."""
_PER_PEER, _PER_NODE = 60, 600  # questions per minute; each is an `eth_call` of some milliseconds
_GAS = 10_000_000  # a passkey's signature checked in Solidity takes 0.4 to 3 million, the wallet's deployment 1 million
_REMEMBERED, _REMEMBERED_S = 10_000, 30.0  # refusals; a wallet may get a new owner, or be deployed, meanwhile
_CALLER = Address(Digest.keccak(b"divault/contract wallets/v1").raw[12:])
_YES = b"\x01"


class ContractWallets:
    """`Signers` that count keys and contract wallets. Safe for concurrent use within one event loop."""

    def __init__(
        self,
        chain: Chain,
        *,
        per_peer: int = _PER_PEER,
        per_node: int = _PER_NODE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`per_peer` and `per_node`: questions per minute."""
        self._chain = chain
        self._clock = clock
        self._peers, self._node = Buckets(per_peer, clock=clock), Buckets(per_node, clock=clock)
        self._refused: OrderedDict[Digest, float] = OrderedDict()

    async def require(self, digest: Digest, signature: str, claimed: Address, peer: str) -> bool:
        """As `messages.signatures.Signers` says.

        The reason of a refusal is that of the rules for keys; `signer_mismatch` for a wrapped signature, `bad_wrapper`
        for a malformed one, `bad_length` for one over `MAX_SIGNATURE`.
        """
        raw = signature_bytes(signature)
        wrapped = unwrap(raw)
        if wrapped is not None:
            refused = refusal("signer_mismatch", f"the contract wallet {claimed} does not accept this signature")
        else:
            try:
                require_signer_raw(digest, raw, claimed)
            except SignatureInvalid as err:
                refused = err
            else:
                return False
        if len(raw) > MAX_SIGNATURE:
            raise refusal("bad_length", f"a contract wallet's signature has at most {MAX_SIGNATURE} bytes")
        question = Digest.keccak(claimed.raw + digest.raw + raw)
        if self._clock() - self._refused.get(question, -_REMEMBERED_S) < _REMEMBERED_S:
            raise refused
        self._count(peer)
        factory, prepare, inner = (
            (Address.ZERO, b"", raw) if wrapped is None else (wrapped.factory, wrapped.calldata, wrapped.inner)
        )
        code = contracts.load("WalletSignature").deployment(claimed, digest, factory, prepare, inner)
        if await self._answer(code) == _YES:
            return True
        self._refused[question] = self._clock()
        if len(self._refused) > _REMEMBERED:
            self._refused.popitem(last=False)
        raise refused

    async def _answer(self, code: bytes) -> bytes:
        try:
            return await self._chain.run(code, await self._chain.head(), sender=_CALLER, gas=_GAS)
        except Reverted:  # the gas is spent, or the node allows none of this
            return b""

    def _count(self, peer: str) -> None:
        if wait := self._peers.take(peer) or self._node.take("node"):
            raise RateLimited(
                "too many signatures that are not of a key: those of contract wallets are put to the chain",
                retry_after=wait,
            )
