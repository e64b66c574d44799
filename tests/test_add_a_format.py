"""The format that the page about formats writes down: it loads, answers and refuses as the page demands of formats."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault import models
from divault.errors import InputInvalid, SealedFileDamaged
from divault.models.base import Inputs
from tests.markdown_blocks import blocks
from tests.memory_models import load, memory_files

PAGE = Path(__file__).parent.parent / "docs/how-to/add-a-format.md"
CENTRES = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a file of its own: nothing of this one, nor of its `__future__`, helps it."""
    (code,) = [block.code for block in blocks(PAGE) if block.language == "python"]
    file = tmp_path_factory.mktemp("page") / "centres.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("centres", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Centres()


def saved(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_it_loads_and_answers(form: Any) -> None:
    model = load(form, {"centres.npy": saved(CENTRES)})
    rows = [[1.0, 1.0], [9.0, 1.0], [-1.0, 12.0]]

    assert model.predict([Inputs({"features": rows}, {})])[0].result == {"predictions": [0, 1, 2]}
    alone = [model.predict([Inputs({"features": row}, {})])[0] for row in rows]
    assert model.predict([Inputs({"features": row}, {}) for row in rows]) == alone
    assert model.predict([Inputs(model.description.example, {})])[0].rows == 1


def test_nobody_else_recognises_its_files(form: Any) -> None:
    with memory_files({"centres.npy": saved(CENTRES)}) as files:
        assert form.recognises(files)
        assert not any(other.recognises(files) for other in models.formats())
    with memory_files({"other": b"\x80\x04N."}) as files:
        assert not form.recognises(files)


@pytest.mark.parametrize("data", [{"features": [1.0]}, {"features": [[1.0, "x"]]}, {"features": []}, {}, []])
def test_other_input_is_refused_with_an_example_that_works(form: Any, data: Any) -> None:
    model = load(form, {"centres.npy": saved(CENTRES)})
    with pytest.raises(InputInvalid) as caught:
        model.predict([Inputs(data, {})])
    if caught.value.data.get("example"):
        assert model.predict([Inputs(caught.value.data["example"], {})])


@pytest.mark.parametrize(
    "array", [CENTRES.astype("f4"), CENTRES[0], np.asfortranarray(CENTRES), CENTRES * np.nan, np.zeros((0, 2))]
)
def test_other_arrays_are_damaged(form: Any, array: Any) -> None:
    with pytest.raises(SealedFileDamaged):
        load(form, {"centres.npy": saved(array)})


@given(st.integers(6, 150), st.binary(min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_model_or_damaged(form: Any, place: int, other: bytes) -> None:
    raw = bytearray(saved(CENTRES))
    raw[place : place + len(other)] = other
    try:
        load(form, {"centres.npy": bytes(raw)})
    except SealedFileDamaged:
        return
