"""Signatures of contract wallets (ERC-1271), also of ones that are not deployed yet (ERC-6492).

Rules:

1. A key first, and without the chain: most callers are keys, and so are accounts that delegate to code (EIP-7702).
2. Whatever is no signature of a key is put to the wallet's contract in one `eth_call`, at a block hash, with a bound on
   gas. An address without code that no wrapper deploys accepts nothing, so the strict rules for keys stay as they are.
3. Anyone can make a node ask: questions are counted per peer and for the node before they are put, few are under way at
   a time, so that what others read of the chain does not wait for them, and a no is remembered for a while. A yes is
   not: the next request has another digest.
4. An answer that can't be had is no answer: ChainUnavailable, and nobody is let in.
5. The call comes from an address of no meaning: some contracts accept anything from the zero address, which only
   simulations have.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from divault.chain import contracts
from divault.chain.answers import Reverted
from divault.chain.chain import Chain
from divault.errors import ChainUnavailable, RateLimited, SignatureInvalid
from divault.limits import Buckets
from divault.messages import refusal, signature_bytes, unwrap
from divault.messages.signatures import require_signer_raw
from divault.values import Address, Digest

MAX_SIGNATURE = 8192
"""Bytes of a contract wallet's signature; a passkey's has about 700, a wrapped one of many owners 3000."""
_PER_PEER, _PER_NODE = 60, 600  # questions per minute; each is an `eth_call` of some milliseconds
_OF_PEER, _WAITING, _AT_ONCE = 4, 32, 4  # questions that wait or are under way, of a peer and in all; and under way
# A passkey's signature checked in Solidity takes 0.4 to 3 million and a wallet's deployment 1 million; half of what is
# left goes to each.
_GAS = 10_000_000
_REMEMBERED, _REMEMBERED_S = 10_000, 30.0  # refusals; a wallet may get a new owner, or be deployed, meanwhile
_CALLER = Address(Digest.keccak(b"divault/contract wallets/v1").raw[12:])
_NO, _YES = b"\x00", b"\x01"


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
        self._question = contracts.load("WalletSignature").bytecode
        self._peers, self._node = Buckets(per_peer, clock=clock), Buckets(per_node, clock=clock)
        self._waiting: Counter[str] = Counter()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._refused: OrderedDict[Digest, float] = OrderedDict()

    async def require(self, digest: Digest, signature: str, claimed: Address, peer: str) -> bool:
        """As `messages.signatures.Signers` says.

        The reason of a refusal is that of the rules for keys; `signer_mismatch` for a wrapped signature, `bad_wrapper`
        for a malformed one, `bad_length` for one over `MAX_SIGNATURE`.
        """
        raw = signature_bytes(signature)
        wrapped = unwrap(raw)
        if wrapped is not None:
            why = "signer_mismatch", f"the contract wallet {claimed} does not accept this signature"
            factory, prepare, inner = wrapped.factory, wrapped.calldata, wrapped.inner
        else:
            try:
                require_signer_raw(digest, raw, claimed)
            except SignatureInvalid as err:
                # Not the error itself: it holds this frame, and with it the request, as long as this frame holds it.
                why = str(err.data["reason"]), f"{err.detail}; nor does a contract wallet at {claimed} accept it"
            else:
                return False
            factory, prepare, inner = Address.ZERO, b"", raw
        if len(raw) > MAX_SIGNATURE:
            raise refusal("bad_length", f"a contract wallet's signature has at most {MAX_SIGNATURE} bytes")
        asked = Digest.keccak(claimed.raw + digest.raw + raw)
        if self._clock() - self._refused.get(asked, -_REMEMBERED_S) < _REMEMBERED_S:
            raise refusal(*why)
        code = self._question + _packed(claimed, digest, factory, prepare, inner)
        if not await self._accepted(code, peer, why[0]):
            self._refused[asked] = self._clock()
            if len(self._refused) > _REMEMBERED:
                self._refused.popitem(last=False)
            raise refusal(*why)
        return True

    async def _accepted(self, code: bytes, peer: str, reason: str) -> bool:
        full = self._waiting[peer] >= _OF_PEER or self._waiting.total() >= _WAITING
        if wait := 1.0 if full else self._peers.take(peer) or self._node.take("node"):
            raise RateLimited(
                f"no key gave this signature ({reason}), and the node has enough to ask about contract wallets",
                retry_after=wait,
            )
        self._waiting[peer] += 1
        try:
            async with self._turns:
                return await self._ask(code)
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer]

    async def _ask(self, code: bytes) -> bool:
        try:
            answer = await self._chain.run(code, await self._chain.head(), sender=_CALLER, gas=_GAS)
        except Reverted:  # the gas is spent
            return False
        if answer not in (_NO, _YES):
            raise ChainUnavailable("the RPC endpoint does not run creation code, so it can't ask contract wallets")
        return answer == _YES


def _packed(wallet: Address, digest: Digest, factory: Address, prepare: bytes, signature: bytes) -> bytes:
    """The arguments of `WalletSignature`: (address, bytes32, address, bytes, bytes) as the ABI packs them."""
    first, second = _dynamic(prepare), _dynamic(signature)
    head = (bytes(12) + wallet.raw, digest.raw, bytes(12) + factory.raw, _word(160), _word(160 + len(first)))
    return b"".join((*head, first, second))


def _dynamic(value: bytes) -> bytes:
    return _word(len(value)) + value + bytes(-len(value) % 32)


def _word(number: int) -> bytes:
    return number.to_bytes(32, "big")
