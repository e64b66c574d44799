"""Names for content that this release recognises and does not load."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import PurePosixPath

from divault.models.files import ModelFile, base_name

SUPPORTED = (
    "scikit-learn estimator (pickle or joblib)",
    "PyTorch state dict or safetensors with an architecture in divault.json",
    "Hugging Face directory in a tar, for text classification or embeddings",
)
SUPPORTED_TEXT = "; ".join(SUPPORTED)

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras h5), which carries code"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array (npy)"),
    (b"\x7fELF", "an executable"),
    (b"\x04\x22\x4d\x18", "an lz4-compressed joblib file: compress it with zlib, gzip, bz2 or xz"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"%PDF", "a PDF"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"tree\nversion=", "a LightGBM model"),
    (b'{"learner"', "an XGBoost model"),
    (b"{L\x00\x00", "an XGBoost model"),
)
_OLD_PICKLE = re.compile(rb"(\((lp|dp|i)|c)[A-Za-z_][A-Za-z0-9_.]*\n|\((lp|dp)[0-9]*\n|\]q|\}q|\(l\.|\(d\.", re.DOTALL)
_ONNX = re.compile(rb"\x08[\x01-\x0f]\x12.{1,64}?(\x1a|\x22|\x3a)", re.DOTALL)
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number that `torch.save` wrote first before 1.6, as a pickle of its own."""


def name(files: Sequence[ModelFile]) -> str:
    """What these files are, in words that a publisher understands."""
    if len(files) == 1:
        return single(files[0])
    names = {base_name(file) for file in files}
    if "saved_model.pb" in names:
        return "a TensorFlow SavedModel, which carries code"
    found = [single(file) for file in files]
    known = [text for text in found if not text.startswith("unknown content")]
    telling = next((text for text in known if "carries code" in text), None) or (known[0] if known else None)
    listed = ", ".join(sorted(names)[:4])
    return f"a folder with {telling}" if telling else f"a folder with {len(files)} files ({listed}) and no model in it"


def single(file: ModelFile) -> str:
    """What one file is."""
    head = file.head()
    if not head:
        return "an empty file"
    if head.startswith(b"PK\x03\x04"):
        return archive(file)
    for magic, text in _MAGIC:
        if head.startswith(magic):
            return text
    if head.startswith(b"\x80") and _LEGACY_TORCH in head[:32]:
        return "a PyTorch file of before 1.6: save its state dict again"
    if _OLD_PICKLE.match(head):
        return "a pickle of protocol 0 or 1: write it with protocol 2 or later"
    if _ONNX.match(head):
        return "an ONNX model"
    return _by_text(head)


def archive(file: ModelFile) -> str:
    """What a zip is, by the names in its directory."""
    try:
        with file.open() as raw, zipfile.ZipFile(raw) as zipped:
            names = zipped.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, zlib.error):
        return "a damaged zip"
    parts = {PurePosixPath(entry).name for entry in names}
    folders = {part for entry in names for part in PurePosixPath(entry).parts[:-1]}
    if "constants.pkl" in parts or "code" in folders:
        return "a TorchScript archive, which carries code"
    if "archive_format" in parts or any(entry.endswith("serialized_exported_program.json") for entry in names):
        return "a torch.export archive (.pt2), which carries code"
    if "data.pkl" in parts:
        return "a PyTorch file"
    if "model.weights.h5" in parts or {"config.json", "metadata.json"} <= parts:
        return "a Keras archive, which carries code"
    if "schema.json" in parts:
        return "a skops file"
    if names and all(entry.endswith(".npy") for entry in names):
        return "numpy arrays (npz)"
    return "a zip"


def _by_text(head: bytes) -> str:
    stripped = head.lstrip()
    if stripped.startswith((b"{", b"[")):
        return "JSON"
    if stripped.startswith(b"<"):
        return "XML or HTML"
    try:
        head.decode()
    except UnicodeDecodeError as err:
        if err.start < len(head) - 4:
            return f"unknown content (first bytes {head[:8].hex()})"
    return "unknown content (text)"
