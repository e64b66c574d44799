"""Stricter stand-ins for the functions and classes with which numpy and joblib rebuild arrays from a pickle.

Why not numpy's own: an array of objects laid over chosen bytes is a forged pointer, and numpy lets a pickle ask for one
in several ways (`ndarray(shape, "O", buffer)`; a dtype whose flags deny that it holds objects). Here:

1. `ndarray` and `MaskedArray` are tokens that can't be called.
2. A dtype is built by its public constructor from the pickled state; object fields are refused.
3. An array takes its content once, and only bytes or a list of exactly its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

from divault.errors import UnsupportedModel

_PLAIN_KINDS = "biufcSUV?"
_MAX_DIMENSIONS = 32


class Token:
    """Stands for a class or function that only this node's own code may use."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


NDARRAY = Token("numpy.ndarray")
MASKED = Token("numpy.ma.MaskedArray")
ASARRAY = Token("numpy.asarray")
CHECK_ARRAY = Token("sklearn.utils.validation.check_array")


class Forgotten:
    """What is left of a random generator: prediction needs none."""

    __slots__ = ()

    def __init__(self, *_: Any) -> None:
        pass


class NumbersOnly:
    """Stands for the one `functools.partial` that scikit-learn holds itself, in histogram boosting with categories.

    It takes that function and those arguments alone, so what it does is nothing that a file chooses.
    """

    __slots__ = ()

    def __init__(self, *functions: Any) -> None:
        if len(functions) != 1 or functions[0] is not CHECK_ARRAY:
            _other_partial()

    def __setstate__(self, state: Any) -> None:
        import numpy as np

        if not isinstance(state, tuple) or len(state) != 4 or state[0] is not CHECK_ARRAY:
            _other_partial()
        _, args, words, attributes = state
        told = dict(words) if isinstance(words, dict) else {}
        # Until version 1.5 the word was another one.
        finite = told.pop("ensure_all_finite", told.pop("force_all_finite", None))
        if args != () or attributes or finite is not False or told != {"dtype": [np.float64]}:
            _other_partial()

    def __call__(self, rows: Any) -> Any:
        """float64 [rows, columns], as the estimator has its columns of numbers."""
        import numpy as np
        from sklearn.utils.validation import check_array

        return check_array(rows, dtype=[np.float64], ensure_all_finite=False)


def _other_partial() -> NoReturn:
    raise UnsupportedModel(
        "the model needs a functools.partial of its own; keep to estimators of scikit-learn itself",
        seen="a model that needs functools.partial",
    )


class StoredArray:
    """joblib's record of an array whose bytes follow in the stream."""

    subclass: Any
    shape: Any
    order: Any
    dtype: Any
    numpy_array_alignment_bytes: int | None = None

    def read(self, take: Callable[[int], bytearray], nested: Callable[[], Any]) -> Any:
        """The array; `take(n)` gives the next n bytes, `nested` loads the pickle that follows.

        Raises UnsupportedModel.
        """
        import numpy as np

        checked = is_dtype(self.dtype) and self.order in ("C", "F") and isinstance(self.shape, tuple)
        if not checked or self.subclass is not NDARRAY:
            damaged("an array record that is none")
        count = size_of(self.shape)
        if self.dtype.hasobject:
            array = nested()
            if not isinstance(array, np.ndarray) or array.dtype != self.dtype:
                damaged("an array of objects that is none")
            return array
        if self.numpy_array_alignment_bytes is not None:
            take(take(1)[0])
        array = np.frombuffer(take(count * self.dtype.itemsize), dtype=self.dtype, count=count)
        if self.order == "F":
            return array.reshape(self.shape[::-1]).transpose()
        return array.reshape(self.shape)


def dtype(kind: Any, align: Any = False, copy: Any = False) -> Any:  # noqa: ARG001, FBT002  # numpy's signature
    """A dtype of its own by the short text that numpy pickles (`f8`, `O8`, `V64`)."""
    import numpy as np

    if isinstance(kind, type) and issubclass(kind, np.generic):
        return np.dtype(kind)
    if not isinstance(kind, str) or kind[:1] not in _PLAIN_KINDS + "O":
        damaged("a dtype that is none")
    return np.dtype(kind)


def dtype_with_state(kind: Any, state: Any) -> Any:
    """The dtype that the pickled state describes, built by numpy's own checks."""
    import numpy as np

    if not (isinstance(state, tuple) and len(state) == 8 and state[1] in ("<", ">", "|", "=") and state[2] is None):
        damaged("a dtype of an unusual kind")
    _, endian, _, names, fields, itemsize, _, _ = state
    if names is None and fields is None:
        return kind.newbyteorder(endian)
    if not isinstance(names, tuple) or not isinstance(fields, dict) or set(names) != set(fields):
        damaged("a structured dtype that contradicts itself")
    parts = [fields[name] for name in names]
    if any(not is_dtype(part[0]) or part[0].hasobject or type(part[1]) is not int for part in parts):
        damaged("a structured dtype with objects in it")
    layout = {"names": list(names), "formats": [part[0] for part in parts], "offsets": [part[1] for part in parts]}
    return np.dtype(layout | {"itemsize": itemsize})  # type: ignore[call-overload]  # numpy's stub wants a literal dict


def latin1(text: Any, encoding: Any) -> bytes:
    """Bytes as protocol 2 writes them: a text of the characters 0 to 255."""
    if not isinstance(text, str) or encoding != "latin1":
        damaged("a text in a strange encoding")
    return text.encode("latin1")


def no_bytes() -> bytes:
    """The empty bytes, which protocol 2 writes as a call of `bytes`; with an argument that would make memory."""
    return b""


def reconstruct(subtype: Any, shape: Any, kind: Any) -> Any:
    """An empty array, to be filled by `fill`."""
    import numpy as np

    if subtype is not NDARRAY or shape != (0,) or kind not in (b"b", "b"):
        damaged("an array that does not start empty")
    return np.empty((0,), dtype="b")


def reconstruct_masked(subtype: Any, base: Any, shape: Any, kind: Any) -> Any:
    """An empty masked array, to be filled by `fill`."""
    import numpy as np

    if subtype is not MASKED:
        damaged("a masked array that is none")
    return np.ma.MaskedArray(reconstruct(base, shape, kind))


def fill(array: Any, state: Any) -> None:
    """Give an empty array its content, once."""
    import numpy as np

    masked = isinstance(array, np.ma.MaskedArray)
    size = 7 if masked else 5
    if array.shape != (0,) or not isinstance(state, tuple) or len(state) != size:
        damaged("an array that is filled twice, or wrongly")
    _, shape, kind, fortran, raw = state[:5]
    if not is_dtype(kind) or type(fortran) is not bool:
        damaged("an array state that is none")
    _check_content(shape, kind, raw)
    if masked:
        _check_content(shape, np.ma.make_mask_descr(kind), state[5])
    array.__setstate__(state)


def from_buffer(data: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    """An array over bytes of exactly its size."""
    import numpy as np

    if not isinstance(data, bytes | bytearray) or not is_dtype(kind) or kind.hasobject or order not in ("C", "F", "K"):
        damaged("an array that is none")
    if size_of(shape) * kind.itemsize != len(data) or not (axes is None or _is_order(axes, shape)):
        damaged("an array of another size than its bytes")
    array = np.frombuffer(data, dtype=kind)
    if axes is not None:
        return array.reshape(shape).transpose(axes)
    return array.reshape(shape, order="F" if order == "F" else "C")


def scalar(kind: Any, data: Any = None) -> Any:
    """One number out of its bytes."""
    import numpy as np

    if not is_dtype(kind) or kind.hasobject or not isinstance(data, bytes) or len(data) != kind.itemsize:
        damaged("a number that is none")
    return np.frombuffer(data, dtype=kind)[0]


def size_of(shape: Any) -> int:
    """The number of elements of a shape, in Python's integers. Raises UnsupportedModel."""
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS:
        damaged("an array of a strange shape")
    if any(type(size) is not int or not 0 <= size < 1 << 40 for size in shape):
        damaged("an array of a strange shape")
    return math.prod(shape)


def is_dtype(value: Any) -> bool:
    """True for a numpy dtype of a plain kind or of objects."""
    import numpy as np

    return isinstance(value, np.dtype)


def damaged(what: str) -> NoReturn:
    """Raise UnsupportedModel for a pickle that no library writes."""
    raise UnsupportedModel(f"the pickle is damaged or forged: it holds {what}", seen=f"a damaged pickle ({what})")


def _check_content(shape: Any, kind: Any, raw: Any) -> None:
    count = size_of(shape)
    if kind.hasobject:
        if kind.names is not None or not isinstance(raw, list) or len(raw) != count:
            damaged("an array of objects of another size")
    elif not isinstance(raw, bytes) or len(raw) != count * kind.itemsize:
        damaged("an array of another size than its bytes")


def _is_order(axes: Any, shape: Any) -> bool:
    return isinstance(axes, tuple | list) and sorted(axes) == list(range(len(shape)))
