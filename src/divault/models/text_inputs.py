"""Callers' texts: `{"text": "..."}` or `{"text": ["...", ...]}`, `inputs` for `text`, or a list of such objects."""

from __future__ import annotations

from typing import Any, NoReturn

from divault.errors import InputInvalid

MAX_TEXTS = 1024
MAX_CHARACTERS = 100_000
"""Of one text; models read at most 8192 tokens of it, the rest is cut off."""
EXAMPLE = {"text": ["The film was better than the book."]}
EXPECTED = f'{{"text": a text of 1 to {MAX_CHARACTERS} characters, or a list of 1 to {MAX_TEXTS} of them}}'
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_CHARACTERS},
                {"type": "array", "minItems": 1, "maxItems": MAX_TEXTS, "items": {"type": "string", "minLength": 1}},
            ]
        }
    },
}


def parse(data: Any) -> list[str]:
    """The texts of one caller. Raises InputInvalid."""
    if isinstance(data, list) and data:
        texts = [text for one in data[: MAX_TEXTS + 1] for text in _of_object(one)]
    else:
        texts = _of_object(data)
    if len(texts) > MAX_TEXTS:
        refuse("text", f"more than {MAX_TEXTS} texts")
    return texts


def _of_object(data: Any) -> list[str]:
    fields = [name for name in ("text", "inputs") if isinstance(data, dict) and name in data]
    if len(fields) != 1 or len(data) != 1:
        refuse("input_data", "one member, text, is needed")
    field = fields[0]
    value = data[field]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        refuse(field, f"it is not a text or a list of 1 to {MAX_TEXTS}")
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_CHARACTERS:
            refuse(field, f"a text of 1 to {MAX_CHARACTERS} characters is needed")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            refuse(field, "a text has half of a surrogate pair")
    return list(texts)


def refuse(field: str, problem: str) -> NoReturn:
    """Raises InputInvalid with what text models take."""
    raise InputInvalid(
        f"{field}: {problem}; this model takes {EXPECTED}", field=field, expected=EXPECTED, example=dict(EXAMPLE)
    )
