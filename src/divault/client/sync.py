"""The client for code without an event loop: `AsyncClient` in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from divault.client.asynchronous import AsyncClient, Login, NodeInfo, Result
from divault.values import Address, Secret

T = TypeVar("T")


class Client:
    """A consumer's side of one node. Same calls, rules and errors as `AsyncClient`; may be shared by threads."""

    def __init__(
        self,
        url: str,
        key: str | Secret,
        *,
        node: str | None = None,
        rpc: str | None = None,
        timeout_s: float = 180.0,
        known_nodes: Path | None = None,
    ) -> None:
        """See `AsyncClient`."""
        self._client = AsyncClient(url, key, node=node, rpc=rpc, timeout_s=timeout_s, known_nodes=known_nodes)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="divault-client", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        """The wallet's address."""
        return self._client.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and end the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def node(self) -> NodeInfo:
        """See `AsyncClient.node`."""
        return self._wait(self._client.node())

    def models(self) -> list[dict[str, Any]]:
        """See `AsyncClient.models`."""
        return self._wait(self._client.models())

    def run(
        self,
        model: str,
        input_data: Any,
        *,
        max_price: str = "0",
        parameters: dict[str, Any] | None = None,
        decryption_key: str | None = None,
        payment: str | None = None,
    ) -> Result:
        """See `AsyncClient.run`."""
        return self._wait(
            self._client.run(
                model,
                input_data,
                max_price=max_price,
                parameters=parameters,
                decryption_key=decryption_key,
                payment=payment,
            )
        )

    def load(
        self, model: str, *, decryption_key: str | None = None, lighthouse_authorization: str | None = None
    ) -> dict[str, Any]:
        """See `AsyncClient.load`."""
        return self._wait(
            self._client.load(model, decryption_key=decryption_key, lighthouse_authorization=lighthouse_authorization)
        )

    def unload(self, model: str) -> dict[str, Any]:
        """See `AsyncClient.unload`."""
        return self._wait(self._client.unload(model))

    def clear_cache(self) -> dict[str, Any]:
        """See `AsyncClient.clear_cache`."""
        return self._wait(self._client.clear_cache())

    def stored(self, request_id: str) -> Result:
        """See `AsyncClient.stored`."""
        return self._wait(self._client.stored(request_id))

    def headers(
        self, method: str, path: str, body: bytes = b"", *, max_price: str = "0", payment: str | None = None
    ) -> dict[str, str]:
        """See `AsyncClient.headers`."""
        return self._wait(self._client.headers(method, path, body, max_price=max_price, payment=payment))

    def sign_in(self, *, spend: str = "0") -> Login:
        """See `AsyncClient.sign_in`."""
        return self._wait(self._client.sign_in(spend=spend))

    def sign_out(self, token: str | None = None) -> int:
        """See `AsyncClient.sign_out`."""
        return self._wait(self._client.sign_out(token))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
