"""Directories written into a store by hand, plain or as HAMT shards, right or wrong."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

from divault.ipfs.cid import DAG_PB, SHA2_256, cid_bytes, make_cid
from divault.ipfs.dagpb import encode_node
from divault.storage.local import LocalStore
from divault.values import Cid

Link = tuple[bytes, bytes, int]
Tree = Mapping[str, Any]
"""Bytes for a file, another mapping for a folder, a Cid for what is there already."""
DIRECTORY, SYMLINK = b"\x08\x01", b"\x08\x04\x12\x0b/etc/passwd"


def put_folder(store: LocalStore, tree: Tree, *, shards: bool = False) -> Cid:
    links = [(cid_bytes(_put(store, content, shards=shards)), name.encode(), 1) for name, content in tree.items()]
    return put_sharded(store, links) if shards else put_node(store, sorted(links, key=lambda link: link[1]), DIRECTORY)


def put_node(store: LocalStore, links: list[Link], data: bytes) -> Cid:
    block = encode_node(links, data)
    digest = hashlib.sha256(block).digest()
    store.put_block(b"\x12\x20" + digest, block)
    return make_cid(1, DAG_PB, SHA2_256, digest)


def put_sharded(store: LocalStore, links: list[Link]) -> Cid:
    """Two levels of fanout 256: half of the entries in the root, half one below. Readers need no hash of names."""
    half = len(links) // 2
    deep = [(cid, b"%02X" % (2 * number) + name, size) for number, (cid, name, size) in enumerate(links[:half])]
    flat = [(cid, b"%02X" % (2 * number) + name, size) for number, (cid, name, size) in enumerate(links[half:], 1)]
    below = [(cid_bytes(put_node(store, deep, _shard(deep))), b"01", 1)] if deep else []
    every = sorted([*flat, *below], key=lambda link: link[1][:2])
    return put_node(store, every, _shard(every))


def _shard(links: list[Link]) -> bytes:
    bits = bytearray(32)
    for _, name, _ in links:
        bucket = int(name[:2], 16)
        bits[31 - bucket // 8] |= 1 << bucket % 8
    return b"\x08\x05\x12\x20" + bytes(bits) + b"\x28\x22\x30\x80\x02"


def _put(store: LocalStore, content: Any, *, shards: bool) -> Cid:
    if isinstance(content, Cid):
        return content
    if not isinstance(content, bytes):
        return put_folder(store, content, shards=shards)
    return store.put_file(io.BytesIO(content))
