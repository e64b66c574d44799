"""Names for content that this release recognises and does not load."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import PurePosixPath

from divault.models.files import base_name, head, opened
from divault.values import MemoryFile

SUPPORTED = (
    "scikit-learn estimator (skops, pickle or joblib)",
    "PyTorch state dict or safetensors with an architecture in divault.json",
    "ONNX with its data inside the file",
    "XGBoost (.ubj or .json) or LightGBM (text) as save_model writes them",
    "Hugging Face directory in a tar, for embeddings, labels of texts, tokens or images, masks or text generation",
)
SUPPORTED_TEXT = "; ".join(SUPPORTED)

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras h5), which carries code"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array (npy)"),
    (b"\x7fELF", "an executable"),
    (b"\x04\x22\x4d\x18", "an lz4-compressed joblib file: compress it with zlib, gzip, bz2 or xz"),
    (b"\x1f\x8b", "a gzip file with no pickle in it"),
    (b"BZh", "a bzip2 file with no pickle in it"),
    (b"\xfd7zXZ\0", "an xz file with no pickle in it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"%PDF", "a PDF"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"tree\nversion=", "a damaged LightGBM model"),
    (b'{"learner"', "a damaged XGBoost model"),
    (b"{L\x00\x00", "a damaged XGBoost model, or other UBJSON"),
)
_PATTERNS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (
        # The number that torch.save wrote first before 1.6, as a pickle of its own.
        re.compile(rb"\x80.\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL),
        "a PyTorch file of before 1.6: save its state dict again",
    ),
    (
        re.compile(rb"(\((lp|dp|i)|c)[A-Za-z_][A-Za-z0-9_.]*\n|\((lp|dp)[0-9]*\n|\]q|\}q|\(l\.|\(d\.", re.DOTALL),
        "a pickle of protocol 0 or 1: write it with protocol 2 or later",
    ),
    (re.compile(rb"\x08[\x01-\x0f]\x12.{1,64}?(\x1a|\x22|\x3a)", re.DOTALL), "a damaged ONNX model"),
    (
        # Parameters of 136 bytes, then the names of objective and booster, each after its length.
        re.compile(rb"(binf)?.{136}[\x01-\x40]\0{7}[a-z0-9:_]{1,64}[\x01-\x10]\0{7}(gbtree|gblinear|dart)", re.DOTALL),
        "an XGBoost model in the old binary form: load it with XGBoost 1.6 to 3.0 and save_model it as .ubj or .json",
    ),
    (re.compile(rb".{4}ORTM", re.DOTALL), "a model in onnxruntime's own format: seal the ONNX file it was made of"),
    (re.compile(rb"\Z"), "an empty file"),
)


def name(files: Sequence[MemoryFile]) -> str:
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


def single(file: MemoryFile) -> str:
    """What one file is."""
    start = head(file)
    if start.startswith(b"PK\x03\x04"):
        return archive(file)
    for magic, text in _MAGIC:
        if start.startswith(magic):
            return text
    for pattern, text in _PATTERNS:
        if pattern.match(start):
            return text
    return _by_text(start)


def archive(file: MemoryFile) -> str:
    """What a zip is, by the names in its directory."""
    try:
        with opened(file) as raw, zipfile.ZipFile(raw) as zipped:
            names = zipped.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, zlib.error):
        return "a damaged zip"
    parts = {PurePosixPath(entry).name for entry in names}
    folders = {part for entry in names for part in PurePosixPath(entry).parts[:-1]}
    found = {
        "a TorchScript archive, which carries code": "constants.pkl" in parts or "code" in folders,
        "a torch.export archive (.pt2), which carries code": "archive_format" in parts
        or "serialized_exported_program.json" in parts,
        "a PyTorch file": "data.pkl" in parts,
        "a Keras archive, which carries code": "model.weights.h5" in parts or {"config.json", "metadata.json"} <= parts,
        "a damaged skops file": "schema.json" in parts,
        "numpy arrays (npz)": bool(names) and all(entry.endswith(".npy") for entry in names),
    }
    return next((text for text, holds in found.items() if holds), "a zip")


def _by_text(start: bytes) -> str:
    stripped = start.lstrip()
    if stripped.startswith((b"{", b"[")):
        return "JSON"
    if stripped.startswith(b"<"):
        return "XML or HTML"
    try:
        start.decode()
    except UnicodeDecodeError as err:
        if err.start < len(start) - 4:
            return f"unknown content (first bytes {start[:8].hex()})"
    return "unknown content (text)"
