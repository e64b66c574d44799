"""Vectors of `payments/`: claims of plain transfers, judged offline."""

from __future__ import annotations

import json
from typing import Any

import pytest

from divault.chain import records
from divault.payments.transfer import Claim, Evidence, Judgement, Terms, judge
from divault.values import Address, BlockRef, Digest, Usdc
from tests.vectors_root import vectors_root

CASES = json.loads((vectors_root() / "payments" / "onchain_receipts.json").read_text())["vectors"]


def judged(case: dict[str, Any]) -> Judgement:
    query, chain = case["query"], case["chain"]
    claim = Claim(
        query["tx_hash"],
        query["chain_id"],
        records.address(query["token"]),
        records.address(query["expected_from"]),
        records.address(query["expected_to"]),
        Usdc.parse_atomic(query["price"]),
    )
    # The vectors leave out the fields that no rule reads.
    transaction = records.transaction({"nonce": "0x0", **chain["transaction"]}) if chain["transaction"] else None
    receipt = records.receipt({"contractAddress": None, **chain["receipt"]}) if chain["receipt"] else None
    block = records.block(chain["block"]) if chain["block"] is not None else None
    if block is not None and "canonical_hash" in query:
        block = BlockRef(block.number, Digest.parse(query["canonical_hash"]), block.timestamp)
    spent = [
        int(index)
        for chain_id, tx, index in (key.split(":") for key in query["already_spent"])
        if (int(chain_id), tx) == (query["chain_id"], query["tx_hash"])
    ]
    terms = Terms(frozenset({claim.token}), query["min_confirmations"], query["max_age_seconds"])
    return judge(
        claim, terms, Evidence(transaction, receipt, block, query["head_block"]), spent=spent, now=query["now"]
    )


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_claimed_transfer_is_judged(case: dict[str, Any]) -> None:
    found = judged(case)

    assert case["expect"]["verdict"] == found.verdict
    assert case["expect"]["reason"] == found.reason
    assert case["expect"].get("credit", "0") == str(found.credit.atomic)


def test_there_are_vectors_of_every_verdict() -> None:
    assert {case["expect"]["verdict"] for case in CASES} == {"accept", "reject", "pending"}


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_only_a_claim_by_the_payer_to_the_owner_in_the_token_is_accepted(case: dict[str, Any]) -> None:
    """Each accepted vector with one party changed is refused."""
    stranger = str(Address(b"\x77" * 20))
    for name in ("token", "expected_from", "expected_to"):
        found = judged({**case, "query": {**case["query"], name: stranger}})

        assert found.verdict != "accept"
