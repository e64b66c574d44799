"""Sealed blobs and grants for tests of opening; what `storage` and `chain` would have proven is stated here."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from divault.values import (
    Address,
    BlockRef,
    Cid,
    Digest,
    GateType,
    Grant,
    ModelId,
    ModelInfo,
    Nonce,
    OpenedModel,
    Principal,
    PrincipalKind,
    Usdc,
    VerifiedBlob,
)
from divault.vault import lighthouse
from divault.vault.age import Identity, Passphrase, Recipient
from divault.vault.sealed import seal_stream

SOMEBODY = Address(bytes(19) + b"\x01")
ME = Identity.generate()


def grant() -> Grant:
    """A grant for model `m`, as the chain would give it."""
    principal = Principal(SOMEBODY, PrincipalKind.BODY, Digest.ZERO, Nonce(bytes(32)), 0, 0, Usdc(0))
    info = ModelInfo(
        model=ModelId.parse("m"),
        cid="bafk",
        token=SOMEBODY,
        price=Usdc(0),
        owner=SOMEBODY,
        active=True,
        total_inferences=0,
        created_at=0,
        updated_at=0,
        tags=(),
        version="1",
        min_balance=1,
        payment_token=SOMEBODY,
        gate=GateType.TOKEN,
    )
    return Grant(principal, info, BlockRef(1, Digest.ZERO, 0), 1)


def blob(folder: Path, sealed: bytes) -> VerifiedBlob:
    """A file in the cache that was verified."""
    digest = hashlib.sha256(sealed).digest()
    path = folder / digest.hex()
    path.write_bytes(sealed)
    return VerifiedBlob(Cid("bafk" + digest.hex()[:8], 1, 0x55, 0x12, digest), path, len(sealed))


def sealed(plain: bytes, *recipients: Recipient | Passphrase) -> bytes:
    """An age file; sealed to ME without recipients."""
    out = io.BytesIO()
    seal_stream(io.BytesIO(plain), out, recipients or [ME.recipient])
    return out.getvalue()


def lighthouse_sealed(plain: bytes, key: bytes) -> bytes:
    out = io.BytesIO()
    lighthouse.seal(key, io.BytesIO(plain), out)
    return out.getvalue()


def tar_of(files: Iterable[tuple[str, bytes]], *, change: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    """A pax archive of regular files; `change` may spoil each entry."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out.getvalue()


def contents(opened: OpenedModel) -> dict[str, bytes]:
    """Everything in the model's memory files, which are closed."""
    found = {}
    for file in opened.files:
        found[file.name] = os.pread(file.fd, file.size + 1, 0)
        os.close(file.fd)
    return found


def memory_files_at_hand() -> list[str]:
    """Names of the anonymous memory files that this process could read now."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:
            continue  # the descriptor of the listing itself
    return [link for link in links if "memfd:" in link]
