"""Whole networks as `torch.save(model)` pickles them. Reading one runs code: it loads only where that is allowed.

The file has the weights and the names of classes, not the classes. Those of torch are here; the publisher's own come as
Python files beside it in the tar (`net.py`, `package/__init__.py`), those of a script that was run as `__main__.py`.
They are imported from memory, after everything that is installed: a name that is installed is never taken from a tar.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from divault.errors import UnsupportedModel
from divault.models.containers import Container, check_torch_zip
from divault.models.files import Folder, path_of
from divault.models.torch_programs import Found, Program, broken
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch

_WORDS = "a pickled torch.nn.Module"
_MAX_SOURCE_BYTES = 4 << 20
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError),
    *(AssertionError, OverflowError, NotImplementedError),
)
"""What unpicklers and torch's reader raise for altered content; and what code of the file may raise while it loads."""


class _Sources(MetaPathFinder, Loader):
    """Modules out of the Python files of a folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where the module lies in the folder, if it does."""
        found = self._file_of(name)
        if found is None:
            return None
        return importlib.util.spec_from_loader(name, self, origin=found, is_package=found.endswith("/__init__.py"))

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's source. Raises whatever that raises."""
        origin = module.__spec__.origin if module.__spec__ is not None else None
        source = self._folder.text(origin or "", _MAX_SOURCE_BYTES)
        exec(compile(source or b"", origin or "", "exec"), vars(module))  # noqa: S102 - what the operator allowed

    def _file_of(self, name: str) -> str | None:
        base = name.replace(".", "/")
        return next((file for file in (f"{base}.py", f"{base}/__init__.py") if self._folder.find(file)), None)

    def script(self) -> ModuleType:
        """What was `__main__` where the model was saved: `__main__.py` of the folder. Raises ImportError."""
        spec = self.find_spec("__main__")
        if spec is None:
            raise ImportError("__main__")
        module = importlib.util.module_from_spec(spec)
        self.exec_module(module)
        return module


def _module(file: MemoryFile, device: torch.device, folder: Folder) -> Found:
    import torch

    check_torch_zip(file)
    sources = _Sources(folder)
    sys.meta_path.append(sources)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path_of(file), device, _pickle_of(sources), weights_only=False)
    except (ImportError, AttributeError, SyntaxError) as err:
        raise UnsupportedModel(
            f"{_WORDS} needs code that isn't here ({str(err)[:200]}): put the Python files of its classes beside it, "
            "those of a script as __main__.py",
            seen=f"{_WORDS} without the code of its classes",
            supported="classes of torch, and Python files beside the model in its tar",
        ) from None
    except _DAMAGE as err:
        raise broken(_WORDS, err) from None
    if not isinstance(found, torch.nn.Module):
        kind = f"{type(found).__module__}.{type(found).__qualname__}"
        raise UnsupportedModel(
            f"the file holds a {kind[:100]}, no network", seen=f"a pickled {kind[:100]}", supported=_WORDS
        )
    # Its numbers stay as they are: a program may lean on doubles of its own.
    return Found(found.to(device).eval().requires_grad_(requires_grad=False))


def _pickle_of(sources: _Sources) -> Any:
    """What torch uses in place of the pickle module: the same, where `__main__` is the script's."""
    script: list[ModuleType] = []

    class Unpickler(pickle.Unpickler):
        """Finds classes of the script as well."""

        def find_class(self, module: str, name: str) -> Any:
            """The class or function of this name. Raises ImportError, AttributeError."""
            if module != "__main__":
                return super().find_class(module, name)
            if not script:
                script.append(sources.script())
            found: Any = script[0]
            for part in name.split("."):
                found = getattr(found, part)
            return found

    made = ModuleType("pickle")  # torch asks for its name
    made.__dict__.update(vars(pickle) | {"Unpickler": Unpickler})
    return made


TORCH_MODULE = Program("torch-module", Container.TORCH_MODULE, _WORDS, _module)
"""The format: one file of `torch.save(model)`, the code of its classes, and `divault.json`."""
