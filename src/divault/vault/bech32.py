"""Bech32 spelling of age keys (BIP 173, without its length limit; age v1 s2.2).

>>> decode("age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj")[0]
'age'
"""

from __future__ import annotations

from collections.abc import Iterable

from divault.errors import BadRequest

_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM_LETTERS = 6
_MAX_LETTERS = 256
"""An age identity has 74; the bound keeps hostile text cheap."""


def encode(prefix: str, data: bytes) -> str:
    """Lower-case text of the bytes under this lower-case prefix."""
    values = list(_regroup(data, 8, 5, pad=True))
    checksum = _polymod([*_expand(prefix), *values, 0, 0, 0, 0, 0, 0]) ^ 1
    values += [(checksum >> 5 * (5 - i)) & 31 for i in range(_CHECKSUM_LETTERS)]
    return prefix + "1" + "".join(_ALPHABET[v] for v in values)


def decode(text: str) -> tuple[str, bytes]:
    """Prefix (in lower case) and bytes of the text. Raises BadRequest for anything but one-case, canonical spelling."""
    lower = text.lower()
    if len(text) > _MAX_LETTERS or not text.isascii() or text not in (lower, text.upper()):
        raise BadRequest("not a Bech32 key: one case, ASCII, at most 256 characters")
    prefix, separator, letters = lower.rpartition("1")
    if not separator or not prefix.isprintable() or not prefix or len(letters) < _CHECKSUM_LETTERS:
        raise BadRequest("not a Bech32 key: prefix, the digit 1 and data are needed")
    if any(letter not in _VALUES for letter in letters):
        raise BadRequest("not a Bech32 key: a character outside the alphabet")
    values = [_VALUES[letter] for letter in letters]
    if _polymod([*_expand(prefix), *values]) != 1:
        raise BadRequest("the checksum of this key is wrong: a character is missing or mistyped")
    return prefix, bytes(_regroup(values[:-_CHECKSUM_LETTERS], 5, 8, pad=False))


def _expand(prefix: str) -> list[int]:
    return [ord(c) >> 5 for c in prefix] + [0] + [ord(c) & 31 for c in prefix]


def _polymod(values: Iterable[int]) -> int:
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, term in enumerate(_GENERATOR):
            check ^= term if (top >> bit) & 1 else 0
    return check


def _regroup(values: Iterable[int], width: int, into: int, *, pad: bool) -> Iterable[int]:
    """The same bits in groups of another width; without `pad`, what is left over must be short and zero."""
    pending = bits = 0
    for value in values:
        pending = (pending << width) | value
        bits += width
        while bits >= into:
            bits -= into
            yield (pending >> bits) & ((1 << into) - 1)
    rest = pending & ((1 << bits) - 1)
    if pad and bits:
        yield (rest << (into - bits)) & ((1 << into) - 1)
    elif not pad and (bits >= width or rest):
        raise BadRequest("not a Bech32 key: padding that is not canonical")
