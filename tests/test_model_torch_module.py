"""Pickled modules carry code: refused by name, and loaded in a confined worker, with their classes, where allowed."""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from divault import models
from divault.errors import DivaultError, InputInvalid, UnsupportedModel
from divault.models.base import CPU, Inputs
from divault.models.containers import Container, container_of
from divault.models.torch_module import TORCH_MODULE
from tests.memory_models import as_json, memory_files, state_dict_file
from tests.test_model_torch_worker import opened
from tests.worker_calls import MakePool, confined_pool, run

__all__ = ["confined_pool"]  # a fixture
TOLD = {"input_shape": [2], "labels": ["no", "yes"], "task": "classification"}
NET = """
import torch
from helpers.parts import doubled

class Net(torch.nn.Module):
    def forward(self, x):
        total = doubled(x).sum(dim=1, keepdim=True)
        return torch.cat([-total, total], dim=1)
"""
PARTS = "def doubled(x):\n    return x * 2\n"
OWN = {"helpers/__init__.py": b"", "helpers/parts.py": PARTS.encode()}


@contextmanager
def module_of(name: str, source: str) -> Iterator[types.ModuleType]:
    """A module that exists while a model is saved, and not where it is loaded."""
    helpers, parts = types.ModuleType("helpers"), types.ModuleType("helpers.parts")
    exec(PARTS, parts.__dict__)
    made = types.ModuleType(name)
    before = {key: sys.modules.get(key) for key in (name, "helpers", "helpers.parts")}
    sys.modules |= {"helpers": helpers, "helpers.parts": parts, name: made}
    try:
        exec(source, made.__dict__)
        yield made
    finally:
        for key, value in before.items():
            sys.modules.pop(key)
            if value is not None:
                sys.modules[key] = value


def saved(module: Any, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    torch.save(module, out, pickle_protocol=protocol)
    return out.getvalue()


def net(module: str = "net", protocol: int = 2) -> bytes:
    with module_of(module, NET) as made:
        return saved(made.Net(), protocol)


def sequential() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()


async def ready(confined_pool: MakePool) -> Any:
    pool = confined_pool(True)
    assert await pool.prove_sandbox() == "standard"
    return pool


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes]], Any]]:
    """Loads files in this process, which afterwards finds modules as it did before."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = set(sys.modules)

    def load_here(files: dict[str, bytes]) -> Any:
        with memory_files(files) as found:
            return TORCH_MODULE.load(found, CPU)

    yield load_here
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("net", "helpers"):
            del sys.modules[name]


async def test_a_network_of_torch_s_classes_needs_no_code_of_its_own(confined_pool: MakePool) -> None:
    pool, network = await ready(confined_pool), sequential()
    own = {"torch.py": b"raise SystemExit", "json.py": b"raise SystemExit"}  # what is installed comes first
    model = opened("sequential", {"model.pt": saved(network), **own, "divault.json": as_json(TOLD)})
    loaded = await pool.load(model)
    rows = [[1.0, 2.0], [-4.0, 0.5]]
    answer = await run(pool, model, {"tensor": rows})
    expected = network.float()(torch.tensor(rows)).detach()

    assert loaded.description.code
    assert loaded.sandbox == "standard"
    assert loaded.description.runtime["adapter"] == "torch-module"
    for got, row in zip(answer["predictions"], expected, strict=True):
        assert got["label"] == ("no", "yes")[int(row.argmax())]
        assert got["score"] == pytest.approx(float(row.max()), rel=1e-5)
    with pytest.raises(InputInvalid):
        await run(pool, model, {"tensor": [[1.0]]})


async def test_its_classes_come_as_python_files_beside_it(confined_pool: MakePool) -> None:
    pool = await ready(confined_pool)
    files = {"model.pt": net("__main__"), "__main__.py": NET.encode(), **OWN, "divault.json": as_json(TOLD)}
    model = opened("own", files)
    await pool.load(model)
    answer = await run(pool, model, {"tensor": [[1.0, 2.0]]})

    assert [(row["label"], row["score"]) for row in answer["predictions"]] == [("yes", 6.0)]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("folder", ["", "model/"])
def test_a_module_of_the_tar_is_found_by_its_name(here: Any, protocol: int, folder: str) -> None:
    files = {"model.pt": net("net", protocol), "net.py": NET.encode(), **OWN, "divault.json": as_json(TOLD)}
    model = here({folder + name: data for name, data in files.items()})

    answer = model.predict([Inputs({"tensor": [[1.0, 2.0]]}, {})])[0].result
    assert [(row["label"], row["score"]) for row in answer["predictions"]] == [("yes", 6.0)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"net.py": None}, "No module named 'net'"),
        ({"helpers/parts.py": None}, "No module named 'helpers.parts'"),
        ({"net.py": b"class Other: pass"}, "Net"),
        ({"net.py": b"class ("}, "invalid syntax"),
        ({"divault.json": None}, "input_shape"),
    ],
)
def test_code_that_is_not_there_is_asked_for(here: Any, changed: dict[str, bytes | None], words: str) -> None:
    files = {"model.pt": net(), "net.py": NET.encode(), **OWN, "divault.json": as_json(TOLD)} | changed
    with pytest.raises(UnsupportedModel, match=words):
        here({name: data for name, data in files.items() if data is not None})


@pytest.mark.parametrize("proven", [False, True])
async def test_it_is_refused_by_its_class_where_code_is_not_allowed(confined_pool: MakePool, proven: bool) -> None:
    pool = confined_pool(not proven)
    if not proven:
        pool._confinement._canary = Path("/nowhere/at/all")
    files = {"model.pt": net(), "net.py": NET.encode(), **OWN, "divault.json": as_json(TOLD)}
    with pytest.raises(UnsupportedModel) as caught:
        await pool.load(opened("refused", files))
    assert caught.value.data["seen"] == "a pickled model (net.Net)"


class Reader:
    """What a hostile pickle is: no network, but a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.read_text, (self.path,)


async def test_a_pickle_that_reads_a_file_reads_none_in_its_worker(confined_pool: MakePool, tmp_path: Path) -> None:
    pool = await ready(confined_pool)
    secret = tmp_path / "canary"
    secret.write_text("canary-7d1c")
    with pytest.raises(DivaultError) as caught:
        await pool.load(opened("hostile", {"model.pt": saved(Reader(secret)), "divault.json": as_json(TOLD)}))
    assert "canary-7d1c" not in str(caught.value.detail)
    assert "canary-7d1c" not in str(caught.value.data)
    honest = opened("honest", {"model.pt": saved(sequential()), "divault.json": as_json(TOLD)})
    await pool.load(honest)
    assert await run(pool, honest, {"tensor": [[1.0, 2.0]]})


def test_no_damage_is_anything_but_told() -> None:
    whole = saved(sequential())
    begin, codes = whole.index(b"ctorch.nn.modules"), set()
    for at in range(begin, whole.index(b"PK", begin), 41):
        try:
            broken = whole[:at] + b"\xff\xff\xff" + whole[at + 3 :]
            with memory_files({"model.pt": broken, "divault.json": as_json(TOLD)}) as files:
                models.load(files, allow_code=True)
        except DivaultError as err:
            codes.add(err.code)

    assert codes
    assert codes <= {"sealed_file_damaged", "unsupported_model"}


def test_what_is_no_network_is_named(here: Any) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        here({"model.pt": saved(types.SimpleNamespace(a=1)), "divault.json": as_json(TOLD)})
    assert caught.value.data["seen"] == "a pickled types.SimpleNamespace"


def test_what_is_no_object_is_none() -> None:
    """State dicts, checkpoints and tensors stay so; only a pickle that begins with an object is a module."""

    def kind(data: bytes) -> Container:
        with memory_files({"model": data}) as (file,):
            return container_of(file)

    assert kind(saved(sequential())) is kind(saved(sequential(), 4)) is Container.TORCH_MODULE
    assert kind(net()) is Container.TORCH_MODULE
    for other in (
        sequential().state_dict(),
        {"state_dict": sequential().state_dict(), "epoch": 3},
        torch.zeros(2),
        [1],
        7,
    ):
        for protocol in (2, 4, pickle.HIGHEST_PROTOCOL):
            assert kind(saved(other, protocol)) is Container.TORCH_ZIP, (other, protocol)
    assert kind(state_dict_file(sequential().state_dict())) is Container.TORCH_ZIP
    assert kind(b"\x80\x02cnet\nNet\n)\x81.") is Container.OTHER
