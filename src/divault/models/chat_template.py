"""Chat templates of Hugging Face folders: text of strangers, run by jinja2's immutable sandbox inside the worker."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from divault.errors import InputInvalid, SealedFileDamaged
from divault.models.files import Folder
from divault.models.huggingface_tokenizer import special_tokens
from divault.models.rows import MAX_TEXT_CHARS

if TYPE_CHECKING:
    from jinja2.ext import Extension
    from jinja2.parser import Parser

MAX_TEMPLATE_BYTES = 256 << 10
MAX_MESSAGES = 256
_no_day = datetime(2024, 7, 26)  # noqa: DTZ001 - no moment: where a template writes the date, it is always this one
"""The same messages make the same prompt on every day: an answer has to be found again."""
_FILE = "chat_template.jinja"
_ROLES = frozenset({"system", "user", "assistant"})


class ChatTemplate:
    """A conversation as the text that the model was trained on."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        """`special`: texts of the tokens that templates name. Raises SealedFileDamaged for a broken template."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation()],
            autoescape=False,
        )
        environment.globals |= {"raise_exception": _refuse_by_template, "strftime_now": _no_day.strftime}
        environment.filters["tojson"] = _as_json
        self._special = special
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError) as err:  # Python's own: of blocks that nest too deep
            raise SealedFileDamaged(f"the chat template doesn't hold: {str(err)[:200]}", stage="payload") from None

    @classmethod
    def of(cls, folder: Folder) -> ChatTemplate | None:
        """The folder's template, None if it has none. Raises SealedFileDamaged."""
        told = folder.json_object("tokenizer_config.json")
        raw = folder.text(_FILE, MAX_TEMPLATE_BYTES)
        source = raw.decode("utf-8", "replace") if raw is not None else told.get("chat_template")
        if isinstance(source, list):  # several by name: the default one
            named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
            source = named.get("default")
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
            return None
        return cls(source, special_tokens(folder))

    def rendered(self, messages: Any) -> str:
        """The prompt for the next answer. Raises InputInvalid."""
        from jinja2 import TemplateError

        _check(messages)
        try:
            return self._template.render(
                self._special, messages=messages, add_generation_prompt=True, tools=None, documents=None
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError, RecursionError) as err:
            raise _invalid(f"the model's chat template does not take these: {str(err)[:200]}") from None


def _check(messages: Any) -> None:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise _invalid(f"a list of 1 to {MAX_MESSAGES} of them is taken")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise _invalid(f"[{place}] has exactly role and content")
        if not isinstance(message["role"], str) or message["role"] not in _ROLES:
            raise _invalid(f"[{place}].role is one of {', '.join(sorted(_ROLES))}")
        if not isinstance(message["content"], str) or len(message["content"]) > MAX_TEXT_CHARS:
            raise _invalid(f"[{place}].content is a text of at most {MAX_TEXT_CHARS} characters")


def _invalid(what: str) -> InputInvalid:
    return InputInvalid(
        f"messages: {what}", field="messages", example={"messages": [{"role": "user", "content": "Good morning"}]}
    )


def _refuse_by_template(text: object) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(str(text)[:200])


def _generation() -> type[Extension]:
    """The tag by which templates mark what the model says; it stands for what is in it."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012 - where jinja2 looks for it

        def parse(self, parser: Parser) -> nodes.Node:
            """Part of jinja2's Extension."""
            line = next(parser.stream).lineno
            inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(inside).set_lineno(line)

    return Generation


def _as_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - the order and names that templates know
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """As transformers has it; jinja2's own writes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
