"""A node starts where it was told to, and not at all where it could serve nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from divault.errors import NotReady
from tests.e2e.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_node_without_its_device_does_not_start(world: World, tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="'cuda:99' is not here") as caught:
        async with world.other_node(tmp_path, DIVAULT_DEVICE="cuda:99"):
            pass

    assert "setting=DIVAULT_DEVICE" in caught.value.detail


async def test_an_address_of_nobody_is_named_by_its_setting(world: World, tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"can't listen on 192\.0\.2\.1.*set HOST"):
        async with world.other_node(tmp_path, HOST="192.0.2.1"):
            pass


async def test_a_node_listens_on_an_address_of_version_6(world: World, tmp_path: Path) -> None:
    if not _has_loopback_6():
        return  # the test above says what happens then
    async with world.other_node(tmp_path, HOST="::1") as node:
        status, _, _ = await world.request("GET", "/health/live", node)
        async with world.client(world.operator, node) as client:
            about = await client.node()

    assert (status, node.url.startswith("http://[::1]:")) == (200, True)
    assert about.url == node.url


def _has_loopback_6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True
