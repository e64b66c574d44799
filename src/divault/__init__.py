"""divault: the backend of a Decentralized Inference Vault.

`Client` is imported on first use, so that `import divault` costs little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from divault.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        import divault.client

        return getattr(divault.client, name)
    raise AttributeError(f"module 'divault' has no attribute {name!r}")
