"""Sealed files of either format, from their first byte to the plaintext.

The steps, each of which hands its result to the next: `read_preamble` (what is this, and its header), `payload_key`
(which key source opens it; the header is authenticated here), `open_payload` (the plaintext). `open_stream` is all.

An age file may say for which model it was sealed: a stanza `divault-model` with the model's key in the vault, which
every age program steps over and the header's MAC covers. Anybody can register anybody's CID, and a node opens what was
sealed to it, so without that a priced model could be had under another name for nothing.

>>> import io
>>> from divault.vault.age import Identity
>>> from divault.vault.keys import NodeIdentity
>>> me, sealed, opened = Identity.generate(), io.BytesIO(), io.BytesIO()
>>> seal_stream(io.BytesIO(b"model"), sealed, [me.recipient])
5
>>> open_stream(io.BytesIO(sealed.getvalue()), opened, [NodeIdentity(me)]), opened.getvalue()
(5, b'model')
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from divault.errors import SealedFileDamaged, UnsupportedModel, WrongKey
from divault.values import Grant, ModelId, Secret
from divault.vault import age, lighthouse, stream
from divault.vault.armor import ArmorReader
from divault.vault.header import MAX_HEADER_BYTES, Header, Stanza, parse_header
from divault.vault.keys import KeySource, SealFormat, recognise
from divault.vault.streams import Reader, Rest, Writer, fill, write_all

_FOR_MODEL = "divault-model"
_ARMOR_LABEL = b"BEGIN AGE ENCRYPTED FILE"


class Spelling(StrEnum):
    """How the bytes stand in the file."""

    BINARY = "binary"
    ARMORED = "armored"


@dataclass(frozen=True, slots=True)
class Preamble:
    """What stands before the payload of a sealed file.

    `header` is what key sources are asked with; `salt` is the payload nonce (age, 16 bytes) or the iv (Lighthouse, 12);
    `size` counts all bytes before the payload, after the armor is taken off.
    """

    format: SealFormat
    spelling: Spelling
    header: bytes
    salt: bytes
    size: int


def read_preamble(source: Reader) -> tuple[Preamble, Reader]:
    """The preamble, and a reader that stands at the payload.

    Raises SealedFileDamaged (stage `header` or `armor`), also for what is too short to be a sealed file.
    """
    head = _take(source, MAX_HEADER_BYTES + age.PAYLOAD_NONCE_BYTES)
    spelling = Spelling.BINARY
    if _looks_armored(head):
        spelling = Spelling.ARMORED
        source = ArmorReader(Rest(head, source))
        head = _take(source, MAX_HEADER_BYTES + age.PAYLOAD_NONCE_BYTES)
    armored = spelling is Spelling.ARMORED
    preamble = (
        _age_preamble(head, spelling) if armored or recognise(head) is SealFormat.AGE else _lighthouse_preamble(head)
    )
    return preamble, Rest(head[preamble.size :], source)


def payload_key(preamble: Preamble, sources: Sequence[KeySource], grant: Grant | None = None) -> Secret:
    """The key of the payload, from the first source that has one; an age header is authenticated with it.

    May take seconds and 1 GiB (passphrase) or 0.1 s (Lighthouse): run it in a thread, one at a time, and only for
    callers who were let in. Raises WrongKey, SealedFileDamaged (stage `mac`), UnsupportedModel (with a grant: the file
    was sealed for other models).
    """
    for source in sources:
        key = source.unwrap(preamble.header, grant)
        if key is None:
            continue
        if preamble.format is SealFormat.LIGHTHOUSE:
            return key
        header = parse_header(preamble.header)
        age.check_mac(key, header)
        if grant is not None:
            require_sealed_for(grant.model.model, header)
        return age.payload_key(key, preamble.salt)
    raise WrongKey(_no_key(preamble))


def open_payload(preamble: Preamble, key: Secret, source: Reader, sink: Writer) -> int:
    """Write the plaintext, in constant memory; its size in bytes.

    What the sink holds counts only after the return. Raises SealedFileDamaged (stage `payload`), WrongKey (Lighthouse).
    """
    if preamble.format is SealFormat.LIGHTHOUSE:
        return lighthouse.open_payload(key.reveal(), preamble.salt, source, sink)
    return stream.open_payload(key.reveal(), source, sink)


def open_stream(source: Reader, sink: Writer, sources: Sequence[KeySource], grant: Grant | None = None) -> int:
    """Open a sealed file of any kind; the number of plaintext bytes. Raises as the three steps do."""
    preamble, payload = read_preamble(source)
    return open_payload(preamble, payload_key(preamble, sources, grant), payload, sink)


def seal_stream(
    source: Reader, sink: Writer, recipients: Sequence[age.Recipient | age.Passphrase], model: ModelId | None = None
) -> int:
    """Seal everything in `source` as a binary age file; the number of plaintext bytes.

    Nodes open it for `model` alone, where that is given. Raises BadRequest for no recipient, a recipient of low order,
    and a passphrase beside anything else.
    """
    return sealing_sink(sink, recipients, model).drain(source)


def sealing_sink(
    sink: Writer, recipients: Sequence[age.Recipient | age.Passphrase], model: ModelId | None = None
) -> stream.SealingSink:
    """As `seal_stream`, for a plaintext that comes by and by: what is written to the result, until its `finish`."""
    beside = [] if model is None else [Stanza(_FOR_MODEL, (str(model.key),), b"")]
    header, file_key = age.new_header(recipients, beside)
    nonce = secrets.token_bytes(age.PAYLOAD_NONCE_BYTES)
    write_all(sink, memoryview(header + nonce))
    return stream.SealingSink(age.payload_key(file_key, nonce).reveal(), sink)


def plain_size(preamble: Preamble, file_size: int) -> int:
    """Bytes of plaintext in a file of this size; for an armored one an upper bound."""
    if preamble.format is SealFormat.LIGHTHOUSE:
        return file_size - lighthouse.OVERHEAD_BYTES
    decoded = file_size if preamble.spelling is Spelling.BINARY else file_size * 3 // 4
    return stream.plain_size(max(0, decoded - preamble.size))


def require_sealed_for(model: ModelId, header: Header) -> None:
    """Raises UnsupportedModel for a seal that names other models alone; one that names none is for every model."""
    named = [stanza.args for stanza in header.stanzas if stanza.kind == _FOR_MODEL]
    if named and (str(model.key),) not in named:
        raise UnsupportedModel(
            f"this file was sealed for another model than {model}: who sealed it seals it for this one",
            seen="a file sealed for another model",
        )


def _looks_armored(head: bytes) -> bool:
    """True for what is armor or was meant to be: then the rules of armor hold, and it is no other format."""
    return head.lstrip().startswith(b"-----BEGIN ") or _ARMOR_LABEL in head[:2048]


def _take(source: Reader, count: int) -> bytes:
    buffer = bytearray(count)
    return bytes(buffer[: fill(source, memoryview(buffer))])


def _age_preamble(head: bytes, spelling: Spelling) -> Preamble:
    header = parse_header(head)
    size = header.size + age.PAYLOAD_NONCE_BYTES
    if len(head) < size:
        raise SealedFileDamaged("the sealed file ends inside its payload nonce: it was cut", stage="header")
    return Preamble(SealFormat.AGE, spelling, head[: header.size], head[header.size : size], size)


def _lighthouse_preamble(head: bytes) -> Preamble:
    if len(head) < lighthouse.OVERHEAD_BYTES:
        raise SealedFileDamaged(
            f"not a sealed file: {len(head)} bytes, and neither age nor Lighthouse makes one under 44", stage="header"
        )
    salt, size = head[lighthouse.SALT_BYTES : lighthouse.PREFIX_BYTES], lighthouse.PREFIX_BYTES
    return Preamble(SealFormat.LIGHTHOUSE, Spelling.BINARY, head[:size], salt, size)


def _no_key(preamble: Preamble) -> str:
    if preamble.format is SealFormat.LIGHTHOUSE:
        return "the file is not an age file, so it is read as Lighthouse-sealed: send its key as decryption_key"
    if any(stanza.kind == "scrypt" for stanza in parse_header(preamble.header).stanzas):
        return "the file is sealed with a passphrase, and the one at hand (if any) does not open it"
    return "the file is sealed to other recipients: its owner seals it to this node's, or the caller sends an identity"
