"""Other recipients for a sealed file, by whoever opens it already.

Rules:

1. `rewrap` lets recipients in: the header gets their stanzas behind its own, which stay byte for byte, and a new MAC.
   Payload, nonce and file key stay, so everybody who opened the old file opens the new one.
2. `reseal` shuts recipients out of what comes: everything is opened and sealed again under a new file key, a quarter of
   a MiB at a time. Nobody can be shut out of the old file.
3. Both work on age files that are sealed to recipients, armored ones too; what comes out is binary. A passphrase stanza
   must stand alone, and who opens a Lighthouse file is for Kavach's nodes to say.

>>> import io
>>> from divault.vault.age import Identity
>>> from divault.vault.keys import NodeIdentity
>>> from divault.vault.sealed import open_stream, seal_stream
>>> mine, other, sealed, wider, opened = Identity.generate(), Identity.generate(), *(io.BytesIO() for _ in range(3))
>>> seal_stream(io.BytesIO(b"model"), sealed, [mine.recipient])
5
>>> rewrap(io.BytesIO(sealed.getvalue()), wider, NodeIdentity(mine), [other.recipient]) - len(sealed.getvalue())
98
>>> open_stream(io.BytesIO(wider.getvalue()), opened, [NodeIdentity(other)]), opened.getvalue()
(5, b'model')
"""

from __future__ import annotations

from collections.abc import Sequence

from divault.errors import BadRequest, WrongKey
from divault.values import ModelId, Secret
from divault.vault import age, stream
from divault.vault.header import MAX_HEADER_BYTES, Header, extend_header, parse_header
from divault.vault.keys import KeySource, SealFormat
from divault.vault.sealed import Preamble, read_preamble, require_sealed_for, sealing_sink
from divault.vault.streams import Reader, Writer, fill, write_all

_PIECE_BYTES = 1 << 18


def rewrap(
    source: Reader, sink: Writer, key: KeySource, add: Sequence[age.Recipient], model: ModelId | None = None
) -> int:
    """Write the file of `source` so that the recipients `add` open it too; the number of bytes written.

    The payload is copied unread. Raises WrongKey (`key` does not open the file), SealedFileDamaged (stages `armor`,
    `header`, `mac`), UnsupportedModel (sealed for other models than `model`), BadRequest (nobody to add, or too many; a
    passphrase or Lighthouse file; a recipient of low order).
    """
    if not add:
        raise BadRequest("there is nobody to add")
    preamble, payload = read_preamble(source)
    header, file_key = _unwrapped(preamble, key, model)
    stanzas = [recipient.wrap(file_key) for recipient in dict.fromkeys(add)]
    widened = extend_header(header, stanzas, lambda covered: age.header_mac(file_key, covered))
    if len(widened) > MAX_HEADER_BYTES:
        raise BadRequest(f"that are too many recipients: a header has at most {MAX_HEADER_BYTES} bytes")
    write_all(sink, memoryview(widened + preamble.salt))
    return len(widened) + len(preamble.salt) + _copy(payload, sink)


def reseal(
    source: Reader, sink: Writer, key: KeySource, recipients: Sequence[age.Recipient], model: ModelId | None = None
) -> int:
    """Write the plaintext of `source` sealed anew, to these recipients alone; the number of plaintext bytes.

    What the sink holds counts only after the return. Raises as `rewrap`, and SealedFileDamaged (stage `payload`).
    """
    preamble, payload = read_preamble(source)
    _, file_key = _unwrapped(preamble, key, model)
    sealing = sealing_sink(sink, list(dict.fromkeys(recipients)), model)
    stream.open_payload(age.payload_key(file_key, preamble.salt).reveal(), payload, sealing)
    return sealing.finish()


def recipient_count(source: Reader) -> int:
    """How many recipients the file is sealed to; who they are, no header tells.

    Raises SealedFileDamaged, BadRequest (a passphrase or Lighthouse file).
    """
    return _count(_header(read_preamble(source)[0]))


def _unwrapped(preamble: Preamble, key: KeySource, model: ModelId | None) -> tuple[Header, Secret]:
    """The authenticated header and its file key."""
    header = _header(preamble)
    file_key = key.unwrap(preamble.header, None)
    if file_key is None:
        raise WrongKey(f"the identity opens nothing: the file is sealed to {_count(header)} others")
    age.check_mac(file_key, header)
    if model is not None:
        require_sealed_for(model, header)
    return header, file_key


def _header(preamble: Preamble) -> Header:
    if preamble.format is SealFormat.LIGHTHOUSE:
        raise BadRequest(
            "the file is no age file, so it is taken for one in Lighthouse's format: who opens that is for Kavach's "
            "key nodes to say (share and revoke there); its bytes and its CID stay"
        )
    header = parse_header(preamble.header)
    if any(stanza.kind == "scrypt" for stanza in header.stanzas):
        raise BadRequest(
            "the file is sealed with a passphrase, which stands alone by the rules of age: publish the model again, "
            "sealed to recipients"
        )
    return header


def _count(header: Header) -> int:
    return sum(stanza.kind == "X25519" for stanza in header.stanzas)


def _copy(source: Reader, sink: Writer) -> int:
    buffer, total = memoryview(bytearray(_PIECE_BYTES)), 0
    while count := fill(source, buffer):
        write_all(sink, buffer[:count])
        total += count
    return total
