"""Sealed files: age v1 (the native format) and Lighthouse AES-256-GCM; pure, no I/O of its own.

Rules:

1. Everything works on bytes and on file-like objects that the caller hands in, in one pass and with a few MiB of
   buffers, whatever the size of the file.
2. A file is read exactly as its specification says; one spelling is accepted and nothing is repaired.
3. No key (`WrongKey`) and a damaged file (`SealedFileDamaged`, with the stage) are told apart where the format lets us.
4. What a sink received before an opening function returned is not authenticated to its end: drop it when it raises.
5. A work factor, a header length or a count read from a file is checked against its limit before it costs anything.

| module | what you find there |
|---|---|
| `sealed` | `recognise`, `read_preamble`, `payload_key`, `open_stream`, `seal_stream`: start here |
| `keys` | the seam `KeySource`, and `NodeIdentity`, `CallerKey`; `KeySearch` for keys that are elsewhere |
| `age` | `Recipient`, `Identity`, `Passphrase` and what the header says to them |
| `header`, `armor`, `bech32`, `stream` | the parts of age v1: header, ASCII armor, key spelling, payload |
| `lighthouse`, `kavach` | the second format, and its keys in shards |
| `conditions` | Kavach's access conditions, parsed and checked |
| `archive` | the strict tar reader for models that are folders |

This file imports nothing, so that the process that opens a model starts fast.
"""
