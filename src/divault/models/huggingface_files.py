"""A Hugging Face folder, read from memory files: which parts it has, and a configuration with nothing left to follow.

Rules:

1. `model_type` is one of `TYPES`; another one is refused by name, whatever `auto_map` or *.py files offer. Code of a
   folder is never run, and nothing is fetched.
2. Of `config.json` only members stay that the configuration class itself knows, by their names of today or of before,
   or that networks read although no class declares them, without those that name code, kernels, quantizers or dtypes
   (`auto_map`, `_attn_implementation_internal`, ...). What comes of them has to be what comes of all: a member that was
   left out and counts is no silent default.
3. Numbers are bounded, so that a configuration can't claim memory that the weights don't have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.containers import Container, container_of
from divault.models.files import Folder
from divault.values import MemoryFile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TYPE_NAMES = """
    albert bert camembert deberta deberta-v2 distilbert electra ernie mobilebert modernbert mpnet roberta rembert
    squeezebert convbert megatron-bert roformer xlm-roberta
"""
_DECODER_NAMES = """
    bloom cohere cohere2 falcon gemma gemma2 gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium llama mistral olmo
    olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2
"""
ENCODERS = frozenset(_TYPE_NAMES.split())
"""Encoders of text whose classes live in transformers itself."""
DECODERS = frozenset(_DECODER_NAMES.split())
"""Causal language models of the same kind."""
VISION = frozenset({"beit", "convnext", "convnextv2", "deit", "dinov2", "mobilenet_v2", "resnet", "swin", "vit"})
"""Networks of images of the same kind."""
TYPES_BY_HEAD = {
    "": ENCODERS,
    "ForSequenceClassification": ENCODERS,
    "ForTokenClassification": ENCODERS,
    "ForMaskedLM": ENCODERS,
    "ForCausalLM": DECODERS,
    "ForImageClassification": VISION,
}
"""Model types by the end of the architecture's name; without an end: an encoder for embeddings."""
TYPES = ENCODERS | DECODERS | VISION
SUPPORTED = (
    "text and token classification, masks and sentence embeddings with "
    f"{', '.join(sorted(ENCODERS))}; text generation with "
    f"{', '.join(sorted(DECODERS))}; image classification with {', '.join(sorted(VISION))}"
)

MAX_NUMBER = 1 << 20
"""Of any number in a configuration: vocabularies have up to 500,000 words."""
_BOUND_BY_NOTHING = frozenset({"rope_theta", "global_rope_theta", "local_rope_theta", "rotary_emb_base"})
"""Bases of angles, which take no memory; long contexts have millions."""
_OLDER_NAMES_TEXT = """
    global_attn_every_n_layers global_rope_theta local_rope_theta n_embed partial_rotary_factor rope_scaling rope_theta
    rotary_emb_base rotary_pct sliding_window_pattern
"""
_OLDER_NAMES = frozenset(_OLDER_NAMES_TEXT.split())
"""Members that classes still take, under names that they don't write any more."""
_SET_BY_PROPERTY = frozenset({"_remove_final_layer_norm", "num_labels", "out_features", "out_indices"}) | _OLDER_NAMES
"""Members that are data, although a class has them as properties, or by a name that is its own."""
_UNDECLARED_NAMES = """
    attention_head_size conv_act conv_groups conv_kernel_size embedding_size head_dim is_causal norm_rel_ebd
    position_buckets share_att_key talking_head
"""
_UNDECLARED = frozenset(_UNDECLARED_NAMES.split())
"""Members that networks look for, and no configuration class declares: sizes, switches and names of activations."""
_AS_DECODER = ("is_decoder", "add_cross_attention")
"""Members that make another network of an encoder: one that sees only what stands before a word."""
MAX_LAYERS = 256
MAX_LABELS = 32_768
"""Of a classifier; ImageNet-22k has 21,841."""
_MIXED_WITH_PADDING = frozenset({"convbert", "mobilebert"})
"""Networks whose convolutions, or windows of three tokens, mix padding into the words beside it."""
_DROPPED_NAMES = """
    _attn_implementation _attn_implementation_internal _experts_implementation_internal _name_or_path
    add_cross_attention architectures attn_implementation auto_map chunk_size_feed_forward dtype is_decoder
    is_encoder_decoder model_type output_attentions output_hidden_states quantization_config reference_compile
    return_dict torch_dtype transformers_version transformers_weights use_cache
"""
_DROPPED = frozenset(_DROPPED_NAMES.split())
_SHARD = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors", re.ASCII)


def is_one(folder: Folder) -> bool:
    """Whether the folder has a configuration with a model type and is more than a state dict. Never raises."""
    try:
        return isinstance(raw_config(folder).get("model_type"), str)
    except SealedFileDamaged:
        return False


def raw_config(folder: Folder) -> dict[str, Any]:
    """`config.json`, or the configuration inside `divault.json`; empty without either. Raises SealedFileDamaged."""
    told = folder.json_object("divault.json").get("architecture")
    if isinstance(told, dict) and told.get("type") == "huggingface":
        config = told.get("config")
        return {"model_type": "missing"} | config if isinstance(config, dict) else {"model_type": "missing"}
    return folder.json_object("config.json")


def weights_of(folder: Folder) -> list[MemoryFile]:
    """Files with weights: safetensors, all shards of it, or else pytorch_model.bin. Raises UnsupportedModel."""
    safe = [file for name in folder.names if _SHARD.fullmatch(name) and (file := folder.find(name))]
    if safe:
        return safe
    single = folder.find("pytorch_model.bin")
    if single is not None:
        return [single]
    others = {container_of(file) for file in folder.files} - {Container.OTHER}
    seen = f"a Hugging Face folder with {min(others).value}" if others else "a Hugging Face folder without weights"
    raise UnsupportedModel(
        f"{seen}: put model.safetensors beside config.json", seen=seen, supported="model.safetensors, pytorch_model.bin"
    )


def model_type_of(folder: Folder, types: frozenset[str] = TYPES) -> str:
    """The model type. Raises UnsupportedModel for one that isn't in `types`."""
    kind = str(raw_config(folder).get("model_type"))[:60]
    if kind in types:
        return kind
    own_code = sorted(name for name in folder.names if name.endswith(".py"))
    code = f" that brings its own code ({own_code[0]}), which is never run" if own_code else ""
    seen = f"a Hugging Face model of type {kind!a}"
    raise UnsupportedModel(f"{seen}{code}; this node loads {SUPPORTED}", seen=seen + code, supported=SUPPORTED)


def config_of(folder: Folder, tensors: int) -> PretrainedConfig:
    """A configuration object without anything that names code. `tensors`: how many the weights have.

    Raises UnsupportedModel, SealedFileDamaged.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind, raw = model_type_of(folder), raw_config(folder)
    _check_network(kind, raw)
    try:
        plain = AutoConfig.for_model(kind)
        undeclared = {name for name in _UNDECLARED if _is_data(type(plain), name)}
        known = plain.to_dict().keys() | type(plain).attribute_map.keys() | _SET_BY_PROPERTY | undeclared
        kept = {name: value for name, value in raw.items() if name in known and name not in _DROPPED}
        _check_numbers(kept)
        config = AutoConfig.for_model(kind, **deepcopy(kept))  # classes move parts of what they are given
        lost = _lost(config, type(config).from_dict({n: v for n, v in raw.items() if _is_data(type(config), n)}))
    # Configuration classes check their arguments each in its own way.
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as err:
        raise SealedFileDamaged(f"config.json doesn't hold: {str(err)[:200]}", stage="payload") from None
    if lost:
        raise SealedFileDamaged(f"config.json has {', '.join(lost[:4])} in a form that is not read", stage="payload")
    depths = getattr(config, "depths", None)
    layers = sum(depths) if isinstance(depths, list) else getattr(config, "num_hidden_layers", 0)
    shared = kind == "albert"  # one set of weights, used again by every layer
    if layers > MAX_LAYERS or (layers > tensors and not shared):
        raise SealedFileDamaged(f"config.json has {layers} layers, the weights {tensors} tensors", stage="payload")
    return config


def _check_network(kind: str, raw: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel for members that ask for another network than the one of this type."""
    asked = [name for name in _AS_DECODER if kind in ENCODERS and raw.get(name)]
    asked += ["per_layer_config"] if raw.get("per_layer_config") else []
    if asked:
        seen = f"a Hugging Face model of type {kind} with {asked[0]}"
        raise UnsupportedModel(f"{seen}; this node loads {SUPPORTED}", seen=seen, supported=SUPPORTED)


def _is_data(kind: type, name: str) -> bool:
    """Whether a member can be given to the class as it is: no code, and nothing that it does itself."""
    does = callable(getattr(kind, name, None)) or isinstance(getattr_static(kind, name, None), property)
    plain = name.isidentifier() and not name.startswith("_") and not does
    return name not in _DROPPED and (plain or name in _SET_BY_PROPERTY)


def _lost(config: PretrainedConfig, whole: PretrainedConfig) -> list[str]:
    """Members that are others where all of `config.json` counts."""
    ours, theirs = config.to_dict(), whole.to_dict()
    return sorted(name for name in ours if name not in _DROPPED and ours[name] != theirs.get(name))


def _check_numbers(value: Any) -> None:
    if isinstance(value, Mapping | list):
        if len(value) > MAX_LABELS:
            raise ValueError(f"a list of over {MAX_LABELS}")
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, item in named:
            if name not in _BOUND_BY_NOTHING:
                _check_numbers(item)
    elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"a number over {MAX_NUMBER}")


def padding_of(config: PretrainedConfig) -> int | None:
    """The token that fills up a text; None where texts of several lengths can't share a pass."""
    if config.model_type in _MIXED_WITH_PADDING:
        return None
    told = config.pad_token_id or 0
    return told if 0 <= told < config.vocab_size else 0
