"""The allow-list loader for pickle and joblib files: builds data, calls nothing that a stranger chose.

Rules, beyond the names of `allowed`:

1. Only what a global resolved to may be called, and never what was built from it.
2. State is given to objects built here, not to classes or functions; names like `__class__` are refused.
3. Items go into plain lists, dicts and sets only; an array is filled once; trees and sparse matrices are checked
   when all is built.
4. A stream that is cut is refused; compressed ones may unfold to 50 times their size, or 32 MiB.
5. joblib's arrays are read here, so that joblib itself loads nothing.

The interpreter of opcodes is the standard library's own, in Python: the one in C can't be held to rules 1 to 3.
"""

from __future__ import annotations

import bz2
import lzma
import pickle
import re
import struct
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

from divault.errors import UnsupportedModel
from divault.models import native, rebuilding
from divault.models.allowed import resolve
from divault.models.files import head, opened
from divault.values import MemoryFile

RATIO = 50
FREE_BYTES = 32 << 20
_CHUNK = 1 << 16
_LZMA_MEMORY = 256 << 20
_PICKLE_PROTOCOLS = (2, 3, 4, 5)
_BZ2_BLOCK = 1 << 20
"""bz2 gives nothing before its first block is complete, which has at most 900 kB."""
_MAX_NESTING = 3
"""joblib writes arrays of objects as pickles inside the stream; one level is usual."""

_VERSION = re.compile(rb"_sklearn_version.{1,12}?(\d+\.\d+[\w.]{0,20})", re.DOTALL)
"""What an estimator's state says, with the opcodes between."""
_VERSION_BYTES = 64

DAMAGE = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
    ArithmeticError, RecursionError, AssertionError, NotImplementedError, struct.error, zlib.error, lzma.LZMAError,
    OSError,
)  # fmt: skip
"""What a malformed stream makes the interpreter, numpy or an estimator's `__setstate__` raise."""

_SPARSE_STATE = frozenset(
    {
        "_shape", "maxprint", "data", "indices", "indptr", "_has_canonical_format", "_has_sorted_indices",
        "has_canonical_format", "has_sorted_indices",
    }
)  # fmt: skip
"""Attributes of a CSR or CSC matrix; any other could stand in the place of a method."""


def looks_pickled(file: MemoryFile) -> bool:
    """True for a pickle of protocol 2 to 5, plain or under zlib, gzip, bz2 or xz (as joblib writes them)."""
    start = head(file, 64)
    packed = _inflater(start) is not None
    return _starts_pickle(start) or (packed and _starts_pickle(_first_bytes(head(file, _BZ2_BLOCK))))


def load(file: MemoryFile) -> Any:
    """The object in the file. Raises UnsupportedModel naming the first global that is not allowed, or the damage."""
    with opened(file) as raw:
        try:
            return _Loader(_source(file, raw.read)).load_checked()
        except DAMAGE as err:
            text = str(err).encode("ascii", "backslashreplace").decode()[:120]
            version = version_of(file)
            raise UnsupportedModel(
                f"the pickle is damaged{version and f', or scikit-learn {version} wrote what is read otherwise here'}: "
                f"{type(err).__name__} {text}",
                seen=f"a damaged pickle ({type(err).__name__})",
            ) from err


def version_of(file: MemoryFile) -> str:
    """The version of scikit-learn that a pickle says it is of; empty where it says none."""
    last = b""
    with opened(file) as raw:
        try:
            for part in _source(file, raw.read).chunks():
                if told := _VERSION.search(last + part):
                    return told[1].decode()
                last = part[-_VERSION_BYTES:]
        except DAMAGE:
            pass  # the end of what can be read
    return ""


def _source(file: MemoryFile, read: Callable[[int], bytes]) -> _Source:
    inflate = _inflater(head(file, 16))
    return _Source(read, file.size) if inflate is None else _Inflated(read, inflate, file.size)


def _starts_pickle(start: bytes) -> bool:
    return (
        len(start) > 2
        and start[0] == 0x80
        and start[1] in _PICKLE_PROTOCOLS
        and b"\x8a\nl\xfc\x9cF\xf9" not in start[:16]
    )


def _inflater(start: bytes) -> Callable[[bytes, int], bytes] | None:
    """A function (more input, most output) -> output, chosen by the magic number; None for no compression."""
    if start.startswith(b"\x1f\x8b"):
        return _ZlibStream(31).decompress
    if len(start) > 1 and start[0] == 0x78 and int.from_bytes(start[:2], "big") % 31 == 0:
        return _ZlibStream(15).decompress
    if start.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress
    if start.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress
    return None


class _ZlibStream:
    """zlib's decompressor with the interface of the others: what is left over is kept inside."""

    def __init__(self, wbits: int) -> None:
        self._inner = zlib.decompressobj(wbits)

    def decompress(self, data: bytes, most: int) -> bytes:
        """At most `most` bytes of output, out of what is left over and `data`."""
        return self._inner.decompress(self._inner.unconsumed_tail + data, most)


def _first_bytes(start: bytes) -> bytes:
    inflate = _inflater(start)
    try:
        return inflate(start, 64) if inflate else b""
    except (zlib.error, lzma.LZMAError, OSError, EOFError):
        return b""


class _Source:
    """Reads exactly, or raises EOFError: a length in the stream never makes memory."""

    def __init__(self, read: Callable[[int], bytes], size: int) -> None:
        self._read = read
        self._left = size

    def read(self, count: int) -> bytes:
        """`count` bytes."""
        if count > self._left:
            raise EOFError("the stream is cut")
        self._left -= count
        return self._read(count)

    def readline(self) -> bytes:
        """Bytes up to a line feed, at most 1 KiB."""
        line = bytearray()
        while not line.endswith(b"\n"):
            if len(line) > 1024:
                raise pickle.UnpicklingError("a name over 1 KiB")
            line += self.read(1)
        return bytes(line)

    def chunks(self) -> Iterator[bytes]:
        """What is left, in parts."""
        while self._left:
            yield self.read(min(_CHUNK, self._left))


class _Inflated(_Source):
    """The same over a compressed stream; raises UnsupportedModel beyond the ratio."""

    def __init__(self, read: Callable[[int], bytes], inflate: Callable[[bytes, int], bytes], size: int) -> None:
        super().__init__(read, max(FREE_BYTES, RATIO * size))
        self._inflate = inflate
        self._buffer = bytearray()

    def read(self, count: int) -> bytes:
        """`count` bytes after decompression."""
        if count > self._left:
            raise UnsupportedModel(
                f"the compressed model unfolds to more than {RATIO} times its size; compress it less",
                seen=f"a compressed pickle that unfolds to more than {RATIO} times its size",
            )
        while len(self._buffer) < count:
            data = self._inflate(b"", _CHUNK) or self._more()
            self._buffer += data
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._left -= count
        return taken

    def chunks(self) -> Iterator[bytes]:
        """The same as far as it unfolds. Raises EOFError at the end."""
        while self._left > 0:
            data = self._inflate(b"", _CHUNK) or self._more()
            self._left -= len(data)
            yield data

    def _more(self) -> bytes:
        while True:
            packed = self._read(_CHUNK)
            if not packed:
                raise EOFError("the stream is cut")
            if data := self._inflate(packed, _CHUNK):
                return data


class _Loader(pickle._Unpickler):  # noqa: SLF001  # the documented class is the one in C, see the module's text
    """Opcodes by the standard library, globals by `allowed`, and the rules above."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # noqa: SLF001

    stack: list[Any]
    memo: dict[int, Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, source: _Source, outer: _Loader | None = None) -> None:
        super().__init__(source)
        self._source = source
        self.level: int = 0 if outer is None else outer.level + 1
        self._granted: dict[int, Any] = {}
        self.natives: list[Any] = [] if outer is None else outer.natives

    def load_checked(self) -> Any:
        """The object, with every tree and sparse matrix in it checked: compiled code trusts their indices."""
        found = self.load()
        for made in self.natives:
            native.check(made)
        return found

    def find_class(self, module: str, name: str) -> Any:
        """What `allowed` gives; noted, since nothing else may be called."""
        found = resolve(module, name)
        self._granted[id(found)] = found
        return found

    def persistent_load(self, pid: Any) -> NoReturn:
        """References to objects outside the pickle are refused."""
        rebuilding.damaged("a reference to something outside it")
        raise AssertionError(pid)

    def get_extension(self, code: int) -> NoReturn:
        """Extension codes are a registry of this process, which has none."""
        rebuilding.damaged("an extension code")
        raise AssertionError(code)

    def _call(self, function: Any, args: Any) -> Any:
        if id(function) not in self._granted or not callable(function) or not isinstance(args, tuple | list):
            rebuilding.damaged("a call of something that is no allowed name")
        return self._noted(function(*args))

    def load_reduce(self) -> None:
        """REDUCE: a call, by rule 1."""
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: read before memory is taken, since its length is only what the stream says."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.stack.append(self._call(klass, args))

    def load_newobj(self) -> None:
        """NEWOBJ: an instance without its constructor, by rule 1."""
        args = self.stack.pop()
        self._make(args, {})

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: the same with keywords."""
        keywords = self.stack.pop()
        args = self.stack.pop()
        self._make(args, keywords)

    def _make(self, args: Any, keywords: Any) -> None:
        klass = self.stack.pop()
        if id(klass) not in self._granted or not isinstance(klass, type):
            rebuilding.damaged("an instance of something that is no allowed class")
        self.stack.append(self._noted(klass.__new__(klass, *args, **keywords)))

    def _noted(self, made: Any) -> Any:
        if native.is_native(made):
            self.natives.append(made)
        return made

    def load_append(self) -> None:
        """APPEND: one item for a list."""
        value = self.stack.pop()
        _exactly(self.stack[-1], list).append(value)

    def load_appends(self) -> None:
        """APPENDS: items for a list."""
        items = self.pop_mark()
        _exactly(self.stack[-1], list).extend(items)

    def load_setitem(self) -> None:
        """SETITEM: one item for a dict."""
        value = self.stack.pop()
        key = self.stack.pop()
        _mapping(self.stack[-1])[key] = value

    def load_setitems(self) -> None:
        """SETITEMS: items for a dict."""
        items = self.pop_mark()
        _mapping(self.stack[-1]).update(zip(items[::2], items[1::2], strict=True))

    def load_additems(self) -> None:
        """ADDITEMS: items for a set."""
        items = self.pop_mark()
        _exactly(self.stack[-1], set).update(items)

    def load_build(self) -> None:
        """BUILD: state for an object, by rules 2 and 3."""
        state = self.stack.pop()
        target = self.stack[-1]
        if id(target) in self._granted or isinstance(target, type):
            rebuilding.damaged("state for a class or function")
        built = self._with_state(target, state)
        if built is not target:
            self.stack[-1] = built
            for key in [key for key, value in self.memo.items() if value is target]:
                self.memo[key] = built

    def _with_state(self, target: Any, state: Any) -> Any:
        """The object with its state: a new one where state has to be checked before there is an object."""
        import numpy as np

        if isinstance(target, np.dtype):
            return rebuilding.dtype_with_state(target, state)
        if isinstance(target, np.ndarray):
            rebuilding.fill(target, state)
        elif isinstance(target, rebuilding.Forgotten):
            pass
        elif isinstance(target, rebuilding.StoredArray):
            _give(target, state)
            return target.read(lambda count: bytearray(self._source.read(count)), self._nested)
        else:
            _set(target, state)
        return target

    def _nested(self) -> Any:
        if self.level == _MAX_NESTING:
            rebuilding.damaged("pickles nested in each other")
        return _Loader(self._source, self).load()

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.BUILD[0]] = load_build


def _exactly(value: Any, kind: type) -> Any:
    return value if type(value) is kind else rebuilding.damaged(f"items for something that is no {kind.__name__}")


def _mapping(value: Any) -> Any:
    from sklearn.utils import Bunch

    kinds = (dict, OrderedDict, defaultdict, Bunch)
    return value if type(value) in kinds else rebuilding.damaged("items for something that is no dict")


def _set(target: Any, state: Any) -> None:
    from scipy import sparse

    if isinstance(state, dict):
        _check_names(state)
        if sparse.issparse(target) and not state.keys() <= _SPARSE_STATE:
            rebuilding.damaged("a sparse matrix with strange attributes")
    setter = getattr(target, "__setstate__", None)
    if setter is None:
        _give(target, state)
    else:
        setter(state)


def _give(target: Any, state: Any) -> None:
    if not isinstance(state, dict):
        rebuilding.damaged("state that is no dict")
    _check_names(state)
    target.__dict__.update(state)


def _check_names(state: dict[Any, Any]) -> None:
    for name in state:
        if type(name) is not str or (name.startswith("__") and name.endswith("__")):
            rebuilding.damaged("state with a reserved name")
