"""The consumer's side of one node: sign, pay if told to, retry safely, verify the receipt, and only then answer."""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from divault import messages, receipts
from divault.client.known_nodes import KnownNodes
from divault.client.paying import Payer
from divault.client.signing import ISSUED_AGO_S, Signed, Signer
from divault.client.transport import Exchange, Transport
from divault.errors import DeadlineExceeded, DivaultError, NodeUntrusted, PaymentRequired, ReceiptInvalid
from divault.messages import NodeDescriptor, SignInContext, SignInMessage, compose
from divault.messages.session_calls import resources_of, statement
from divault.values import Address, ModelId, ReceiptStatus, Secret, Usdc

RUN = "/api/v1/inference/run"
LOAD = "/api/v1/models/load"
SESSIONS = "/api/v1/auth"
_RETRYABLE = frozenset(
    {"request_running", "payment_pending", "settlement_pending", "overloaded", "chain_unavailable", "not_ready"}
)
_AFTER_THE_CLAIM = frozenset(
    {
        *("cid_mismatch", "wrong_key", "sealed_file_damaged", "unsupported_model", "storage_failed"),
        *("input_invalid", "model_failed", "deadline_exceeded"),
    }
)
"""What a node refuses a run with only once it has credited the transfer that paid for it."""
_PAUSE_S = (0.2, 5.0)  # first and longest pause between tries, unless the node names one
_LONGEST_WAIT_S = 1e6  # beyond it a number is no wish to wait
_THIS_MACHINE = re.compile(r"(?:localhost|127\.0\.0\.1)(:[0-9]+)?", re.ASCII)
USDC: dict[int, str] = {
    1: "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48",
    8453: "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913",
    84532: "0x036CbD53842c5426634e7929541eC2318f3dCF7e",
}
"""Circle's USDC by chain id: on these chains a client pays in nothing else unless told to."""


@dataclass(frozen=True, slots=True)
class Result:
    """A verified answer: what the model said, what it cost, and the node's signed receipt of both."""

    output: Any
    """The model's answer as Python values."""
    price: Usdc
    """What was charged."""
    request_id: str
    receipt: dict[str, Any]
    """The receipt's envelope; save it, `divault verify` checks it later."""
    raw: bytes
    """The answer's bytes that the receipt binds."""
    payment: str | None
    """Transaction of the payment made for this call, if one was made."""
    request: bytes
    """The request's body as it was sent; empty for a stored answer."""
    response: bytes
    """The response's body as it came."""


@dataclass(frozen=True, slots=True)
class Login:
    """An open session: its token is what other programs send as bearer token or API key."""

    token: str = field(repr=False)
    """Keep it secret: it is all that a call of the session needs."""
    user: Address
    expires_at: int
    """Unix seconds; it ends earlier when it is not used for `idle_s`."""
    idle_s: int


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node that proved its address."""

    url: str
    address: Address
    chain_id: int
    vault: Address
    age_recipient: str
    about: dict[str, Any]
    """All of `GET /api/v1/node`."""


class AsyncClient:
    """A consumer's side of one node, on the event loop that uses it. Close it, or use it as a context manager."""

    def __init__(
        self,
        url: str,
        key: str | Secret,
        *,
        node: str | None = None,
        rpc: str | None = None,
        timeout_s: float = 180.0,
        known_nodes: Path | None = None,
    ) -> None:
        """`key`: the wallet's private key, 0x and 64 hex digits. `node`: the node's address, if you know it.

        `rpc`: a JSON-RPC endpoint of the chain, needed to pay (default: WEB3_PROVIDER_URL of the environment).
        `timeout_s` bounds a whole call, payment and retries included. `known_nodes`: where first uses are remembered.
        Nothing is sent before the first call.
        """
        self._transport = Transport(url, timeout_s=timeout_s)
        self._key = key if isinstance(key, Secret) else messages.parse_key(key)
        self._pinned = Address.parse(node) if node else None
        self._rpc = rpc or os.environ.get("WEB3_PROVIDER_URL", "").split(",")[0].strip()
        self._timeout_s = timeout_s
        self._known = KnownNodes(known_nodes)
        self._node: NodeInfo | None = None
        self._payer: Payer | None = None
        self.address = messages.address_of(self._key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close connections."""
        await self._transport.close()
        if self._payer is not None:
            await self._payer.close()
            self._payer = None

    # --- what anybody may ask -------------------------------------------------------------------------------------

    async def node(self) -> NodeInfo:
        """Who the node is, after it proved it. Raises NodeUntrusted."""
        if self._node is None:
            about = await self._json(Exchange("GET", "/api/v1/node"))
            try:
                descriptor = NodeDescriptor.verify(about.get("descriptor"), now=int(time.time()))
            except DivaultError as err:
                raise NodeUntrusted(f"the node does not prove who it is: {err.detail}") from err
            self._require_trusted(descriptor.node)
            self._node = NodeInfo(
                self._transport.url,
                descriptor.node,
                descriptor.chain_id,
                descriptor.vault,
                descriptor.age_recipient,
                about,
            )
        return self._node

    async def models(self) -> list[dict[str, Any]]:
        """What the node has loaded, one row per model."""
        return list(_part(await self._json(Exchange("GET", "/api/v1/models")), "models", list))

    async def model(self, model: str) -> dict[str, Any]:
        """What the vault says of the model, and what its worker says if it is loaded."""
        path = f"/api/v1/models/{ModelId.parse(model).text}"
        return dict(_part(await self._json(Exchange("GET", path)), "model_info", dict))

    # --- signed calls ---------------------------------------------------------------------------------------------

    async def run(
        self,
        model: str,
        input_data: Any,
        *,
        max_price: str = "0",
        parameters: dict[str, Any] | None = None,
        decryption_key: str | None = None,
        payment: str | None = None,
    ) -> Result:
        """Run the model once and give its verified answer.

        `max_price`: the most this call may cost, text in USDC ("0.02"); "0" runs free models only. `payment`: hash of
        a transfer made earlier. Raises the node's error as the class of its code (`AccessDenied`, `PriceChanged`, ...),
        ReceiptInvalid when the answer's receipt does not hold, NodeUntrusted, DeadlineExceeded.
        """
        limit = Usdc.parse(max_price)
        body: dict[str, Any] = {"model_id": model, "user_address": str(self.address), "input_data": input_data}
        optional = {"parameters": parameters, "decryption_key": decryption_key}
        body |= {name: value for name, value in optional.items() if value is not None}
        if payment is not None:
            body["payment"] = {"tx_hash": payment}
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._run(ModelId.parse(model), body, limit)
        except TimeoutError as err:
            late = DeadlineExceeded(f"no answer within {self._timeout_s:g} s", limit_s=self._timeout_s)
            raise _with_payment(late, body, credited=False) from err

    async def load(
        self, model: str, *, decryption_key: str | None = None, lighthouse_authorization: str | None = None
    ) -> dict[str, Any]:
        """Have the node load the model. Gives its answer: `model_info` and `load_result`.

        `lighthouse_authorization`: a Kavach signature or `jwt:` token of this wallet. The node fetches the key with it,
        and could fetch the keys of this wallet's other Lighthouse files: pass it to nodes that you trust.
        """
        body: dict[str, Any] = {"model_id": model, "user_address": str(self.address)}
        optional = {"decryption_key": decryption_key, "lighthouse_authorization": lighthouse_authorization}
        body |= {name: value for name, value in optional.items() if value is not None}
        signer = await self._signer()
        return await self._json(signer.post(LOAD, ModelId.parse(model), body, Usdc(0)).exchange)

    async def unload(self, model: str) -> dict[str, Any]:
        """Have the node unload the model; for its owner and the node's operators."""
        signer = await self._signer()
        return await self._json(signer.bare("DELETE", f"/api/v1/models/{ModelId.parse(model).text}").exchange)

    async def clear_cache(self) -> dict[str, Any]:
        """Have the node unload all models and drop cached ciphertext; for its operators."""
        return await self._json((await self._signer()).bare("DELETE", "/api/v1/cache").exchange)

    async def stored(self, request_id: str) -> Result:
        """Fetch the stored answer of an earlier paid call of this wallet, by its `request_id`."""
        signer = await self._signer()
        raw = await self._transport.send(signer.bare("GET", f"/api/v1/results/{request_id}").exchange)
        return self._verified(await self.node(), raw, request_id)

    async def headers(
        self, method: str, path: str, body: bytes = b"", *, max_price: str = "0", payment: str | None = None
    ) -> dict[str, str]:
        """The headers that sign one request of another program to this node: of an OpenAI client, for example.

        They cover method, path and raw body, count once, and for a minute. `max_price` and `payment` as for `run`.
        """
        return (await self._signer()).headers(method, path, body, Usdc.parse(max_price), payment)

    # --- sessions, for programs that sign nothing ------------------------------------------------------------------

    async def sign_in(self, *, spend: str = "0") -> Login:
        """Open a session at the node: its token speaks for this wallet, as `Authorization: Bearer`, or as an API key.

        `spend`: most that all of its calls may cost together, text in USDC; "0" runs free models only. Priced calls
        draw on credit (header `divault-payment` claims a transfer), and each carries an `Idempotency-Key` header.
        """
        node, most = await self.node(), Usdc.parse(spend)
        asked = await self._json(Exchange("POST", f"{SESSIONS}/nonce", b"{}"))
        scheme, authority = self._transport.url.partition("://")[0], self._authority(node)
        context = SignInContext(
            authority,
            f"{scheme}://{authority}",
            node.chain_id,
            _part(asked, "nonce", str),
            int(time.time()) - ISSUED_AGO_S,
        )
        allowed = {self._token(node): most} if most.atomic else {}
        text = compose(
            self.address,
            context,
            statement=statement(allowed),
            resources=resources_of(node.address, node.vault, allowed),
        )
        SignInMessage.parse(text)  # a nonce that says more than a nonce makes no text
        body = {"message": text, "signature": messages.signature_text(self._key, messages.personal_digest(text))}
        told = await self._json(Exchange("POST", f"{SESSIONS}/login", orjson.dumps(body)))
        token, ends, idle = (_part(told, *one) for one in (("token", str), ("expires_at", int), ("idle_seconds", int)))
        return Login(token, self.address, ends, idle)

    async def sign_out(self, token: str | None = None) -> int:
        """End the session of a token; without one, all sessions of this wallet. Gives how many were ended."""
        path = f"{SESSIONS}/logout"
        if token is None:
            exchange = (await self._signer()).bare("POST", path).exchange
        else:
            exchange = Exchange("POST", path, b"{}", {"authorization": f"Bearer {token}"})
        return int(_part(await self._json(exchange), "ended", int))

    # --- one signed exchange, its payment and its proof -----------------------------------------------------------

    async def _run(self, model: ModelId, body: dict[str, Any], limit: Usdc) -> Result:
        try:
            return await self._answer(model, body, limit)
        except DivaultError as err:
            if not isinstance(err, PaymentRequired) or limit.atomic == 0 or "payment" in body:
                raise _with_payment(err, body, credited=_is_credited(err)) from err.__cause__
            body["payment"] = {"tx_hash": await self._pay(model, err, limit)}
        try:
            return await self._answer(model, body, limit)
        except DivaultError as err:
            raise _with_payment(err, body, credited=_is_credited(err)) from err.__cause__

    async def _answer(self, model: ModelId, body: dict[str, Any], limit: Usdc) -> Result:
        signer = await self._signer()
        signed = signer.post(RUN, model, body, limit)
        pause, longest = _PAUSE_S
        tries = 0
        while True:
            tries += 1
            try:
                raw = await self._transport.send(signed.exchange)
                break
            except DivaultError as err:
                ran_before = err.code == "nonce_used" and tries > 1  # a free run whose answer was lost
                if err.code not in _RETRYABLE and not ran_before:
                    raise
                # Whatever may cost money is repeated with the same bytes, which can't be charged twice.
                repeat = limit.atomic > 0 and not ran_before
                if repeat and signed.expires_at <= time.time() + 1:
                    err.add_note(f"it may have run: ask for stored({str(signed.id)!r}) before you call again")
                    raise
                await asyncio.sleep(min(longest, _wait_of(err) or pause))
            pause = min(longest, 2 * pause)
            signed = signed if repeat else signer.post(RUN, model, body, limit)
        payment = body.get("payment", {}).get("tx_hash")
        result = self._verified(await self.node(), raw, str(signed.id), signed=signed, limit=limit, payment=payment)
        if result.receipt["receipt"]["modelId"] != str(model.key):
            raise ReceiptInvalid("the receipt is for another model than the one that was asked", field="modelId")
        return result

    def _verified(
        self,
        node: NodeInfo,
        raw: bytes,
        request_id: str,
        *,
        signed: Signed | None = None,
        limit: Usdc | None = None,
        payment: str | None = None,
    ) -> Result:
        envelope, result = receipts.read_receipt(raw)
        if result is None:
            raise ReceiptInvalid("the answer has no result beside its receipt", field="result")
        steps = receipts.check(
            envelope,
            chain_id=node.chain_id,
            vault=node.vault,
            node=node.address,
            input_data=None if signed is None else signed.covered,
            result=result,
        )
        receipts.require_valid(steps)
        fields = envelope["receipt"]
        if envelope.get("request_signer") is not None:
            raise ReceiptInvalid(
                "this wallet signs with a key, and the receipt says it is a contract", field="request_signer"
            )
        self._require_mine(fields, request_id, limit)
        price = Usdc.parse_atomic(fields["price"])
        try:
            output = orjson.loads(result)
        except orjson.JSONDecodeError as err:
            raise ReceiptInvalid("the result is not JSON", field="result") from err
        sent = b"" if signed is None else signed.exchange.body
        return Result(output, price, request_id, envelope, result, payment, sent, raw)

    def _require_mine(self, fields: dict[str, Any], request_id: str, limit: Usdc | None) -> None:
        """A valid receipt may still be somebody else's, or of another call, or over the agreed price."""
        expected = {"user": str(self.address).lower(), "requestHash": request_id, "status": str(int(ReceiptStatus.OK))}
        for name, need in expected.items():
            if str(fields[name]).lower() != need:
                raise ReceiptInvalid(f"the receipt's {name} is not the one of this call", field=name)
        if limit is not None and Usdc.parse_atomic(fields["price"]) > limit:
            raise ReceiptInvalid("the receipt charges more than was agreed to", field="price")

    async def _pay(self, model: ModelId, offer: PaymentRequired, limit: Usdc) -> str:
        rails = offer.data.get("rails")
        if not isinstance(rails, list) or "transfer" not in rails:
            raise offer  # the money would be gone, and this node would not count it
        if not self._rpc:
            raise PaymentRequired(
                f"{offer.detail}; to pay, give the client an RPC endpoint of the chain (rpc=)", **offer.data
            ) from offer
        node = await self.node()
        if self._payer is None:
            self._payer = Payer(self._rpc, self._key, node.chain_id, node.vault)
        return str(await self._payer.pay(model, node.address, limit, frozenset({self._token(node)})))

    @staticmethod
    def _token(node: NodeInfo) -> Address:
        return Address.parse(USDC.get(node.chain_id) or _part(node.about, "payment_token", str))

    def _authority(self, node: NodeInfo) -> str:
        return _authority(self._transport.url, node.about.get("authority"))

    async def _signer(self) -> Signer:
        node = await self.node()
        return Signer(self._key, node.address, node.chain_id, node.vault, self._authority(node))

    def _require_trusted(self, shown: Address) -> None:
        if self._pinned is None:
            self._known.check(self._transport.url, shown)
        elif self._pinned != shown:
            raise NodeUntrusted(
                f"this node is {shown}, not {self._pinned}: check its URL and the address you were given",
                have=str(shown),
                need=str(self._pinned),
            )

    async def _json(self, exchange: Exchange) -> dict[str, Any]:
        raw = await self._transport.send(exchange)
        try:
            members = orjson.loads(raw)
        except orjson.JSONDecodeError:
            members = None
        if not isinstance(members, dict):
            raise NodeUntrusted("the answer is no JSON object: is this a node?")
        return members


def _authority(url: str, shown: object) -> str:
    """Host and port of the URL that the caller gave, for header signatures.

    Not what the node says of itself: these signatures name no node but by it, so one that named another's would get
    signatures that the other takes. The two names of this machine are one.
    """
    own = messages.authority_of(url)
    here, there = _THIS_MACHINE.fullmatch(own), _THIS_MACHINE.fullmatch(str(shown))
    return str(shown) if here and there and here[1] == there[1] else own


def _part(answer: dict[str, Any], name: str, kind: type[Any]) -> Any:
    if not isinstance(answer.get(name), kind):
        raise NodeUntrusted(f"the node's answer has no {name}: is this a node?")
    return answer[name]


def _wait_of(err: DivaultError) -> float | None:
    """What the node asks to wait, in seconds, if it is a number at all."""
    wait = err.data.get("retry_after")
    return float(wait) if isinstance(wait, int | float) and 0 < wait < _LONGEST_WAIT_S else None


def _is_credited(err: DivaultError) -> bool:
    """Whether a node that answers this has made the claimed transfer credit, so that claiming it again is refused."""
    return err.code in _AFTER_THE_CLAIM or err.data.get("reason") == "already_spent"


def _with_payment(err: DivaultError, body: dict[str, Any], *, credited: bool) -> DivaultError:
    """The same error with a note that keeps the payment findable, or says that it is found already."""
    if "payment" in body:
        paid = f"paid by transaction {body['payment']['tx_hash']}"
        if credited:
            err.add_note(f"{paid}; it is credit at this node now: call again, and don't pass it again")
        else:
            err.add_note(f"{paid}; pass it as payment= (divault call: --payment) to use it")
    return err
