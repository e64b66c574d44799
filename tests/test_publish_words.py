"""What a publisher types, and what he is told: parsed or refused by field, and read aloud."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.cli import offer
from divault.errors import BadRequest, DivaultError
from divault.publishing import Cost, Listing, SealedTo
from divault.values import Address, ModelId, Usdc
from divault.vault.age import Identity

TOKEN = Address(b"\x11" * 20)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("breast-cancer.joblib", "breast-cancer"),
        ("my model (2).joblib", "my-model-2"),
        ("v1.2:final.onnx", "v1.2:final"),
        ("--draft--.onnx", "draft"),
        ("größe.pkl", "gr-e"),
        ("x" * 200 + ".bin", "x" * 128),
    ],
)
def test_a_name_is_made_of_the_file(name: str, made: str) -> None:
    assert offer.model_id(None, Path("/somewhere") / name).text == made


def test_a_folder_keeps_what_looks_like_a_suffix(tmp_path: Path) -> None:
    (tmp_path / "llama-3.1").mkdir()

    assert offer.model_id(None, tmp_path / "llama-3.1").text == "llama-3.1"


@pytest.mark.parametrize("name", ["....", "---", "模型"])
def test_no_name_can_be_made_of_nothing(name: str) -> None:
    with pytest.raises(BadRequest, match="--id"):
        offer.model_id(None, Path("/") / name)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1))
def test_any_file_name_makes_an_id_or_is_refused(name: str) -> None:
    try:
        made = offer.model_id(None, Path("/dir") / name)
    except BadRequest as err:
        told = err.data["field"]
        assert told in ("id", "model_id")
    else:
        assert made == ModelId.parse(made.text)


def test_gates_and_prices_are_read() -> None:
    assert offer.gate("open") == (None, 0)
    assert offer.gate(f"{TOKEN}:100") == (TOKEN, 100)
    assert offer.price("0.02") == Usdc(20_000)


@pytest.mark.parametrize("minimum", ["", ":", ":0", ":-1", ":1.5", ":01", ":\u0661", f":{2**256}", ":1:1"])
def test_wrong_minimums_are_refused(minimum: str) -> None:
    with pytest.raises(BadRequest):
        offer.gate(f"{TOKEN}{minimum}")


@pytest.mark.parametrize("gate", ["", "closed", "Open", "0x1:100", "open:1"])
def test_wrong_gates_are_refused(gate: str) -> None:
    with pytest.raises(DivaultError):
        offer.gate(gate)


@pytest.mark.parametrize("price", ["", "free", "-1", "0.0000001", "1e3", "0,02", "1" * 61])
def test_wrong_prices_are_refused(price: str) -> None:
    with pytest.raises(BadRequest) as caught:
        offer.price(price)

    assert caught.value.data["field"] == "price"


@pytest.mark.parametrize(("wei", "text"), [(0, "0"), (1, "0.000000000000000001"), (10**18, "1"), (15 * 10**17, "1.5")])
def test_native_coin_is_told_exactly(wei: int, text: str) -> None:
    assert offer.eth(wei) == text


def test_cost_names_its_parts() -> None:
    line = offer.cost_line(Cost(300_000, 40_000_000, 10**18), 12_345, "lighthouse", 2)

    assert "up to 0.000012 ETH" in line
    assert "300000 gas at 0.04 gwei" in line
    assert "12345 sealed bytes for 2 nodes go to Lighthouse" in line


@pytest.mark.parametrize(("price", "warned"), [("10000", False), ("20000000000000000", True)])
def test_a_price_that_looks_like_wei_is_questioned(price: str, warned: bool) -> None:
    node = SealedTo("http://n", TOKEN, Identity.generate().recipient)
    lines = offer.offer_lines(Listing(ModelId.parse("m"), Usdc.parse(price)), [node], TOKEN)

    assert warned == any(line.startswith("warning") for line in lines)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({}, "{}"),
        ({"properties": {}}, "an object"),
        ({"properties": {"text": {"type": "string"}}, "required": ["text"]}, "text: a text"),
        ({"properties": {"k": {"type": "integer"}}}, "k (optional): a whole number"),
        ({"properties": {"x": True}, "required": ["x"]}, "x: anything"),
        (
            {
                "required": ["f"],
                "properties": {
                    "f": {
                        "anyOf": [
                            {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
                            {
                                "type": "array",
                                "minItems": 1,
                                "items": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
                            },
                        ]
                    }
                },
            },
            "f: a list of 3 numbers, or a list of 1 or more lists, each of 3 numbers",
        ),
    ],
)
def test_schemas_are_read_aloud(schema: dict[str, object], words: str) -> None:
    assert offer.schema_words(schema) == words


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "properties", "required", "items", "anyOf", "enum", "minItems", "x"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_schema_is_a_line(schema: object) -> None:
    """A model says it of itself, so it may be anything."""
    assert offer.schema_words({"properties": schema, "required": schema}).isprintable()
    assert offer.schema_words({"properties": {"a": schema}}).isprintable()
