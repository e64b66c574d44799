"""`NodeDescriptor`: a node's own word on who it is, to be pinned by its clients (EIP-712).

    NodeDescriptor(address node, string ageRecipient, string url, uint256 chainId, address vault, uint64 notBefore)

in the domain `DIV Node`, version 1, of the chain and the vault that it names, signed by `node`. A newer descriptor is
one with a later `notBefore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from divault.errors import BadRequest
from divault.messages.reasons import refusal
from divault.messages.signatures import require_signer, signature_text
from divault.messages.typed import Domain, Struct
from divault.messages.windows import CLOCK_SKEW_S
from divault.values import Address, Digest, Secret

DESCRIPTOR = Struct(
    "NodeDescriptor",
    "address node,string ageRecipient,string url,uint256 chainId,address vault,uint64 notBefore",
)


@dataclass(frozen=True, slots=True)
class NodeDescriptor:
    """Who a node is: signing address, age recipient, public URL, chain and vault; `not_before` in unix seconds."""

    node: Address
    age_recipient: str
    url: str
    chain_id: int
    vault: Address
    not_before: int

    @property
    def domain(self) -> Domain:
        """The EIP-712 domain that the descriptor is signed in."""
        return Domain("DIV Node", "1", self.chain_id, self.vault)

    def digest(self) -> Digest:
        """What the node signs."""
        return self.domain.digest(DESCRIPTOR.hash(self._values()))

    def sign(self, key: Secret) -> dict[str, Any]:
        """The descriptor as a node serves it: `{domain, descriptor, signature}`; `key` is that of `node`."""
        return {
            "domain": self.domain.to_json(),
            "descriptor": DESCRIPTOR.to_json(self._values()),
            "signature": signature_text(key, self.digest()),
        }

    @classmethod
    def verify(cls, value: Any, *, now: int) -> Self:
        """The descriptor out of what a node served, if its own `node` signed it and it counts already.

        Raises BadRequest for another shape, WrongChain for another domain, SignatureInvalid, and SignatureExpired
        before `notBefore`. Whether this is the node you want is yours to compare.
        """
        if not isinstance(value, dict) or not {"domain", "descriptor", "signature"} <= value.keys():
            raise BadRequest("a node's descriptor has domain, descriptor and signature", field="descriptor")
        fields = DESCRIPTOR.parse(value["descriptor"])
        made = cls(
            node=fields["node"],
            age_recipient=fields["ageRecipient"],
            url=fields["url"],
            chain_id=fields["chainId"],
            vault=fields["vault"],
            not_before=fields["notBefore"],
        )
        made.domain.require(Domain.parse(value["domain"]))
        require_signer(made.digest(), value["signature"], made.node)
        if made.not_before > now + CLOCK_SKEW_S:
            raise refusal("not_yet_valid", "this descriptor counts only later: check your clock", now=now)
        return made

    def _values(self) -> dict[str, Address | str | int]:
        return {
            "node": self.node,
            "ageRecipient": self.age_recipient,
            "url": self.url,
            "chainId": self.chain_id,
            "vault": self.vault,
            "notBefore": self.not_before,
        }
