"""The tokenizer of a Hugging Face folder: `tokenizer.json`, and what `tokenizer_config.json` changes about it.

The classes of the library make one tokenizer of both files: tokens that only the second names are added, flags that it
has otherwise count, and so do lower case of BERT, a blank before the first word and special tokens that are to be
split. So it is done here; a text would become other tokens without. One thing is not: newer versions of the library
build the tokenizer of Llama 2 anew, without the normalizer of its file, which counts here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.files import Folder
from divault.models.huggingface_files import MAX_NUMBER

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PretrainedConfig

MAX_TOKENIZER_BYTES = 64 << 20
_LONGEST_TOKEN = 100
_MOST_ADDED, _LONGEST_ADDED = 4096, 512
_MAX_TOKENS = 8192
_DEFAULT_TOKENS = 512
_SENTENCE_TYPES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_WITHOUT_TABLE = {"bloom": 2048}
"""Texts that models of these types were trained on; their positions have no table that would say it."""
_OFFSET_BY_PADDING = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})
"""Positions of these start behind the padding id, so that many of the table's rows can't be used."""
_ENDS = ("", "Fast")
_NAMING = frozenset(
    f"{name}Tokenizer{end}" for name in ("Cohere", "GPT2", "GPTNeoX", "Gemma", "Qwen2") for end in ("", "Fast")
)
"""Classes that name special tokens where a file doesn't; the library passes those of Llama and Bloom over."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OF_BERT = frozenset(
    {
        f"{name}Tokenizer{end}"
        for name in ("Bert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MPNet", "MobileBert", "SqueezeBert")
        for end in _ENDS
    }
    | {"bert", "distilbert", "electra", "ernie", "mobilebert", "mpnet", "squeezebert", "convbert", "megatron-bert"}
)
"""Classes that make their own normalizer, and model types that have one of them where no class is named."""
_OF_BYTES = frozenset(
    {f"{name}Tokenizer{end}" for name in ("GPT2", "Roberta") for end in _ENDS} | {"gpt2", "gpt_neo", "opt", "roberta"}
)
"""The same of classes that say by themselves whether a blank stands before the first word."""


def special_tokens(folder: Folder) -> dict[str, str]:
    """Texts of the special tokens that the tokenizer's files name, by their names: `bos_token`, `mask_token`, ...

    Folders that older libraries wrote have them in a file of their own; some classes have names of their own.
    """
    told = folder.json_object("tokenizer_config.json")
    more = told.get("extra_special_tokens")
    named = _of_class(told.get("tokenizer_class"))
    named |= {name: value for name, value in told.items() if name.endswith("_token")}
    named |= more if isinstance(more, dict) else {}
    if "added_tokens_decoder" not in told:
        named |= folder.json_object("special_tokens_map.json")
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and len(text) <= _LONGEST_TOKEN}


def _of_class(name: Any) -> dict[str, Any]:
    if name not in _NAMING:
        return {}
    import transformers

    parameters = signature(getattr(transformers, name).__init__).parameters
    texts = {known: str(parameter.default) for known, parameter in parameters.items() if known.endswith("_token")}
    return {known: text for known, text in texts.items() if text != "None"}


def sentence_config(folder: Folder) -> dict[str, Any]:
    """What sentence-transformers says of texts: the first of its files that says something, by the types of old."""
    names = (f"sentence_{kind}_config.json" for kind in _SENTENCE_TYPES)
    return next(filter(None, map(folder.json_object, names)), {})


def max_tokens(folder: Folder, config: PretrainedConfig) -> int:
    """Most tokens of one text, special ones included: the least of what model, tokenizer and sentence config say."""
    positions = getattr(config, "max_position_embeddings", _WITHOUT_TABLE.get(config.model_type, _DEFAULT_TOKENS))
    if config.model_type in _OFFSET_BY_PADDING:
        positions -= (config.pad_token_id if config.pad_token_id is not None else 1) + 1
    told = [
        folder.json_object("tokenizer_config.json").get("model_max_length"),
        sentence_config(folder).get("max_seq_length"),
    ]
    # Tokenizers without a limit say 10^30.
    limits = [int(limit) for limit in told if isinstance(limit, int | float) and 1 <= limit <= MAX_NUMBER]
    return max(1, min([positions, _MAX_TOKENS, *limits]))


def tokenizer_of(folder: Folder, config: PretrainedConfig) -> Tokenizer:
    """The tokenizer, set to cut at the model's limit. Raises UnsupportedModel, SealedFileDamaged."""
    from tokenizers import Tokenizer

    text = folder.text("tokenizer.json", MAX_TOKENIZER_BYTES)
    if text is None:
        raise UnsupportedModel(
            "a Hugging Face folder needs tokenizer.json: save the tokenizer with a fast class",
            seen="a Hugging Face folder without tokenizer.json",
            supported="tokenizer.json of the tokenizers library",
        )
    try:
        tokenizer = Tokenizer.from_str(text.decode())
        tokenizer.no_padding()
        told = folder.json_object("tokenizer_config.json")
        side = told.get("truncation_side")
        side = (tokenizer.truncation or {}).get("direction", "right") if side is None else side
        tokenizer.enable_truncation(max_tokens(folder, config), direction=side)
        _set_parts(tokenizer, told, str(told.get("tokenizer_class") or config.model_type))
        _add_tokens(tokenizer, _added(tokenizer, told, special_tokens(folder).values()), config.vocab_size)
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as err:  # noqa: BLE001 - the library raises bare Exception for every broken file
        raise SealedFileDamaged(f"tokenizer.json doesn't hold: {str(err)[:200]}", stage="payload") from None
    if not 0 <= highest < config.vocab_size:
        raise SealedFileDamaged(
            f"tokenizer.json has ids up to {highest}, the model {config.vocab_size} embeddings", stage="payload"
        )
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: Iterable[AddedToken], most: int) -> None:
    """Have it these; one that the model of so many words has no number for stays what it is made of."""
    room, fresh = most - tokenizer.get_vocab_size(), []
    for token in tokens:
        new = tokenizer.token_to_id(token.content) is None
        if not new or room > 0:
            fresh.append(token)
            room -= new
    tokenizer.add_tokens(fresh)  # at once: each time takes as long as all


def _set_parts(tokenizer: Tokenizer, told: Mapping[str, Any], kind: str) -> None:
    """What `tokenizer_config.json` says otherwise, and the class that it names; `kind`: that, or the model type."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import ByteLevel

    old = tokenizer.normalizer
    if isinstance(old, BertNormalizer) and kind in _OF_BERT:
        # Where no class is named, its defaults are nobody's word against what the file says.
        accents, lower = (None, True) if "tokenizer_class" in told else (old.strip_accents, old.lowercase)
        tokenizer.normalizer = BertNormalizer(
            clean_text=True,
            handle_chinese_chars=told.get("tokenize_chinese_chars", True),
            strip_accents=told.get("strip_accents", accents),
            lowercase=told.get("do_lower_case", lower),
        )
    tokenizer.encode_special_tokens = told.get("split_special_tokens") is True
    prefix = told.get("add_prefix_space")
    if isinstance(tokenizer.pre_tokenizer, ByteLevel) and kind in _OF_BYTES and isinstance(prefix, bool):
        tokenizer.pre_tokenizer.add_prefix_space = prefix


def _added(tokenizer: Tokenizer, told: Mapping[str, Any], special: Iterable[str]) -> Iterator[AddedToken]:
    """Tokens that it lacks, or has with other flags, in the order in which they get their numbers."""
    from tokenizers import AddedToken

    listed = told.get("added_tokens_decoder")
    texts = list(special)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        texts += [text for text in _listed(told.get(name)) if isinstance(text, str)]
    if len(texts) > _MOST_ADDED or (isinstance(listed, dict) and len(listed) > _MOST_ADDED):
        raise ValueError(f"over {_MOST_ADDED} tokens beside the vocabulary")
    have = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    if isinstance(listed, dict):
        for _, flags in sorted(listed.items(), key=lambda item: int(item[0])):
            token = AddedToken(flags["content"], **{name: flags[name] for name in _FLAGS if name in flags})
            if len(token.content) > _LONGEST_ADDED:
                raise ValueError(f"a token of over {_LONGEST_ADDED} characters")
            if repr(have.get(token.content)) != repr(token):
                yield token
            have[token.content] = token
    for text in texts:
        if text not in have and len(text) <= _LONGEST_ADDED:
            have[text] = AddedToken(text, special=True)
            yield have[text]


def _listed(value: Any) -> list[Any]:
    found = value if isinstance(value, list) else []
    return [one.get("content") if isinstance(one, dict) else one for one in found]
