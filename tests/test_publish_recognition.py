"""What a publisher's model is, found out in a worker as a node would, and refused with what to do instead."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

import divault
from divault.errors import BadRequest, DeadlineExceeded, ModelFailed, SettingsInvalid, UnsupportedModel
from divault.models.unsupported import SUPPORTED_TEXT
from divault.publishing import recognise
from divault.publishing.recognition import safe_formats
from divault.workers.process import COMMAND
from tests.worker_models import HOSTILE

NETWORK = {"architecture": {"type": "mlp", "sizes": [4, 3], "activation": "relu"}}


class Evil:
    """A pickle that runs a command where nobody stops it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/divault-was-here",)


def hostile(behaviour: str) -> tuple[str, ...]:
    return (sys.executable, "-I", str(HOSTILE), behaviour)


def estimator() -> LogisticRegression:
    return LogisticRegression().fit(np.eye(4), [0, 1, 0, 1])


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(estimator()))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights of a network with its architecture."""
    path = tmp_path / "network"
    path.mkdir()
    save_file({"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)}, path / "model.safetensors")
    (path / "divault.json").write_text(json.dumps(NETWORK))
    return path


async def test_a_pickle_is_recognised_and_warned_about(pickled: Path) -> None:
    found = await recognise(pickled)

    assert found.description is not None
    assert (found.description.format, found.description.task) == ("sklearn", "classification")
    assert found.description.example == {"features": [0.0] * 4}
    assert found.sha256.raw == hashlib.sha256(pickled.read_bytes()).digest()
    assert found.size == pickled.stat().st_size
    assert [warning.startswith("a pickle is a program") for warning in found.warnings] == [True]
    assert not found.carries_code


async def test_a_folder_is_what_its_tar_is(folder: Path, tmp_path: Path) -> None:
    found = await recognise(folder)
    packed = tmp_path / "network.tar"
    with tarfile.open(packed, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("divault.json", "model.safetensors"):
            entry = tarfile.TarInfo(name)
            entry.size = (folder / name).stat().st_size
            tar.addfile(entry, io.BytesIO((folder / name).read_bytes()))
    as_tar = await recognise(packed)

    assert found == as_tar
    assert found.description is not None
    assert found.description.format == "torch"
    assert found.warnings == ()


async def test_nothing_is_left_open(pickled: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    await recognise(pickled)
    with pytest.raises(ModelFailed):
        await recognise(pickled, command=hostile("load_exit"))
    await asyncio.sleep(0)

    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# --- what no node loads ---------------------------------------------------------------------------------------------


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 1), (torch.zeros(1, 2),)), path)


def module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 1), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
async def test_code_that_no_node_runs_is_refused_in_any_case(tmp_path: Path) -> None:
    name = "checkpoint.pt"
    torch.save({"epoch": 3, "model": torch.nn.Linear(2, 1)}, tmp_path / name)
    with pytest.raises(UnsupportedModel, match="safetensors") as caught:
        await recognise(tmp_path / name, allow_code=True)

    assert "--code-bearing" not in caught.value.detail


@pytest.mark.parametrize(
    ("name", "write"), [("exported.pt2", exported), ("torchscript.pt", torchscript), ("module.pt", module)]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
async def test_what_carries_code_is_refused_unless_asked_for(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    with pytest.raises(UnsupportedModel) as caught:
        await recognise(tmp_path / name)
    found = await recognise(tmp_path / name, allow_code=True)

    assert "safetensors" in caught.value.detail
    assert "--code-bearing for nodes that set DIVAULT_ALLOW_CODE_MODELS=1" in caught.value.detail
    assert caught.value.data["seen"] == found.seen
    assert found.carries_code
    assert found.description is None


REFUSED = {
    "evil.pkl": (pickle.dumps(Evil()), "posix.system"),
    "list.pkl": (pickle.dumps([1, 2, 3]), "builtins.list"),
    "bomb.joblib": (zlib.compress(bytes(1 << 26)), "nothing was published"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "empty": (b"", "an empty file"),
    "text.txt": (b"hello", "unknown content"),
    "page.html": (b"<!DOCTYPE html><html>", "an HTML page"),
    "model.gguf": (b"GGUF" + bytes(100), "a GGUF file"),
    "cut.pkl": (pickle.dumps([0] * 1000)[:500], "damaged"),
    "packed.tar.gz": (b"\x1f\x8b" + bytes(50), "gzip"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_other_content_is_refused_by_what_was_seen(tmp_path: Path, name: str) -> None:
    """Also where code is allowed: it is none that a node runs."""
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=words) as caught:
        await recognise(tmp_path / name, allow_code=True)

    assert caught.value.detail.startswith(f"{name}: ")
    assert caught.value.detail.endswith("nothing was published")
    assert not Path("/tmp/divault-was-here").exists()


def test_only_formats_that_nodes_load_are_offered_instead() -> None:
    offered = {
        "pickle": safe_formats("a pickle that needs posix.system"),
        "torch": safe_formats("TorchScript (torch.jit.save), which carries code"),
        "keras": safe_formats("an HDF5 file (Keras h5), which carries code"),
        "pt2": safe_formats("a torch.export archive (.pt2), which carries code"),
    }
    loads = SUPPORTED_TEXT.lower()

    assert offered["torch"] == offered["pt2"]
    assert [("skops" in way) for way in offered["pickle"]].count(True) == ("skops" in loads)
    assert all(("export it to ONNX" in ways) == ("onnx" in loads) for ways in offered.values())
    assert offered["torch"][0].startswith("save its state dict as safetensors")
    assert safe_formats("a PDF") == []


@pytest.mark.parametrize("name", ["nothing", "empty-folder", "linked"])
async def test_nothing_to_read_is_a_bad_request(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "passwd").symlink_to("/etc/passwd")

    with pytest.raises(BadRequest):
        await recognise(tmp_path / name)


# --- what breaks where it is loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behaviour", ["load_exit", "exit", "garbage", "giant", "wrong_kind", "load_undescribed", "two", "not_json"]
)
async def test_a_model_that_breaks_its_worker_is_refused(pickled: Path, behaviour: str) -> None:
    with pytest.raises(ModelFailed, match=r"model\.pkl can't be loaded"):
        await recognise(pickled, command=hostile(behaviour), timeout_s=20)


@pytest.mark.parametrize("behaviour", ["load_hang", "hang"])
async def test_a_model_that_hangs_ends_at_the_deadline(pickled: Path, behaviour: str) -> None:
    with pytest.raises(DeadlineExceeded, match="nothing was published"):
        await recognise(pickled, command=hostile(behaviour), timeout_s=0.5)


async def test_an_example_that_the_model_refuses_is_a_warning(pickled: Path) -> None:
    found = await recognise(pickled, command=hostile("terminal"), timeout_s=20)

    assert "does not take the inferred example" in found.warnings[-1]
    assert found.warnings[-1].isprintable()


async def test_a_missing_library_is_named_with_its_extra(pickled: Path) -> None:
    without = (
        "import sys; root = sys.argv[1]; sys.path.insert(0, root)\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'sklearn': raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from divault.workers.child import main; main()"
    )
    root = str(Path(divault.__file__).parent.parent)
    with pytest.raises(SettingsInvalid) as caught:
        await recognise(pickled, command=(sys.executable, "-I", "-B", "-c", without, root))

    assert COMMAND[-1] == root
    assert "pip install 'divault[sklearn]'" in caught.value.detail
    assert "--unchecked" in caught.value.detail
