"""Causal language models from memory files: the texts of transformers itself, in pieces or whole."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from divault.errors import DivaultError, InputInvalid, SealedFileDamaged, UnsupportedModel
from divault.models.base import Answer, Inputs, LoadedModel, Piece
from divault.models.chat_template import ChatTemplate
from divault.models.files import Folder
from divault.models.huggingface import HuggingFace
from divault.models.huggingface_files import DECODERS
from divault.models.text_generation import LoadedGenerator, Sampling, _Writer
from divault.workers.pool import WorkerPool
from tests.memory_models import as_json, json_of, load, memory_files, tiny_language_model
from tests.worker_models import call, hold, opened

Content = dict[str, bytes]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_language_model(path)
    return path


@pytest.fixture(scope="module")
def content(folder: Path) -> Content:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(content: Content) -> LoadedGenerator:
    loaded: Any = load(HuggingFace(), content)
    return loaded


def said(model: LoadedModel, data: Any, **parameters: Any) -> list[dict[str, Any]]:
    texts: list[dict[str, Any]] = model.predict([Inputs(data, parameters)])[0].result["texts"]
    return texts


def text_of(model: LoadedModel, prompt: str = PROMPT, **parameters: Any) -> str:
    return str(said(model, {"prompt": prompt}, **parameters)[0]["text"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_the_likeliest_text_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    files = tiny_language_model(tmp_path, kind)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=mask)[0, ids.shape[1] :]

    found = said(load(HuggingFace(), files), {"prompt": PROMPT}, max_tokens=20)[0]

    whole = tokenizer.decode(expected, skip_special_tokens=True)
    assert found["text"] == whole.rstrip("\ufffd")
    assert (found["prompt_tokens"], found["completion_tokens"]) == (len(PROMPT), 20)
    assert found["finish_reason"] == "length"


def test_the_pieces_make_up_the_whole(model: LoadedGenerator) -> None:
    asked = Inputs({"prompt": [PROMPT, "And then"]}, {"max_tokens": 30, "temperature": 1.0, "seed": 3})
    parts = list(model.stream(asked))

    assert isinstance(parts[-1], Answer)
    assert all(isinstance(part, Piece) and part.text for part in parts[:-1])
    for index, text in enumerate(parts[-1].result["texts"]):
        assert "".join(part.text for part in parts if isinstance(part, Piece) and part.index == index) == text["text"]
    assert parts[-1] == model.predict([asked])[0]
    assert len(parts) > 10


def test_the_same_seed_gives_the_same_text_and_another_another(model: LoadedGenerator) -> None:
    hot = {"temperature": 1.5, "max_tokens": 40}

    assert text_of(model, seed=1, **hot) == text_of(model, seed=1, **hot)
    assert text_of(model, seed=1, **hot) != text_of(model, seed=2, **hot)
    assert text_of(model, **hot) == text_of(model, seed=0, **hot), "without a seed it is 0"
    assert text_of(model, temperature=0.0, max_tokens=40) == text_of(model, max_tokens=40)


def test_a_text_is_the_same_beside_others(model: LoadedGenerator) -> None:
    hot = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    together = said(model, {"prompt": [PROMPT, "b", "c"]}, **hot)
    batch = model.predict([Inputs({"prompt": "x"}, hot), Inputs({"prompt": PROMPT}, hot)])

    assert together[0] == said(model, {"prompt": PROMPT}, **hot)[0] == batch[1].result["texts"][0]


def test_a_small_top_p_leaves_the_likeliest(model: LoadedGenerator) -> None:
    assert text_of(model, temperature=2.0, top_p=0.000001, seed=9) == text_of(model)


def test_a_stop_text_ends_it_and_is_not_shown(model: LoadedGenerator) -> None:
    whole = text_of(model, temperature=1.0, seed=4, max_tokens=60)
    stop = whole[10:13]
    first = whole.index(stop)
    asked = Inputs({"prompt": PROMPT}, {"temperature": 1.0, "seed": 4, "max_tokens": 60, "stop": [stop, "\x00never"]})
    *pieces, answer = model.stream(asked)

    assert isinstance(answer, Answer)
    assert answer.result["texts"][0]["text"] == whole[:first]
    assert answer.result["texts"][0]["finish_reason"] == "stop"
    assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == whole[:first]


def test_no_piece_ends_in_the_middle_of_a_character(model: LoadedGenerator) -> None:
    tokenizer = model._language.tokenizer
    text = "Grüße, 世界 👋🏽 und ein Ende"
    writer = _Writer(tokenizer, ("Ende", "nie"))
    shown = [writer.add(token) for token in tokenizer.encode(text).ids]

    assert "".join(shown) == text.removesuffix("Ende")
    assert "\ufffd" not in "".join(shown)
    assert writer.stopped
    assert writer.finish() == ""


def test_what_might_begin_a_stop_text_is_held_until_it_is_clear(model: LoadedGenerator) -> None:
    tokenizer = model._language.tokenizer
    writer = _Writer(tokenizer, ("abc",))
    shown = [writer.add(token) for token in tokenizer.encode("xababdab").ids]

    assert shown == ["x", "", "", "ab", "", "abd", "", ""]
    assert writer.finish() == "ab"


def pieces_of(pieces: list[bytes], told: list[bytes], stop: str) -> tuple[str, bool]:
    """What a writer shows of these tokens, over a vocabulary whose tokens end where they like."""
    from tokenizers import Tokenizer, decoders, models
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    names = ["".join(letters[byte] for byte in piece) for piece in pieces]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    writer, shown = _Writer(tokenizer, (stop,)), []
    for piece in told:
        shown.append(writer.add(pieces.index(piece)))
        if writer.stopped:
            break
    return "".join(shown) + writer.finish(), writer.stopped


HALVES = [b"a", b"b", b"EN", b"D\xf0", b"\x9f\x98\x80", b"\n\n\xe2", b"\x80\xa2"]


@pytest.mark.parametrize(
    ("told", "stop", "expected"),
    [
        ([b"a", b"EN", b"D\xf0"], "END", ("a", True)),
        ([b"a", b"\n\n\xe2"], "\n\n", ("a", True)),
        ([b"a", b"EN", b"D\xf0", b"\x9f\x98\x80", b"b"], "END", ("a", True)),
        ([b"a", b"EN", b"b"], "END", ("aENb", False)),
        ([b"a", b"EN"], "END", ("aEN", False)),
    ],
)
def test_a_stop_text_ends_it_though_half_a_character_follows(
    told: list[bytes], stop: str, expected: tuple[str, bool]
) -> None:
    assert pieces_of(HALVES, told, stop) == expected


def test_a_temperature_near_nothing_is_none(model: LoadedGenerator) -> None:
    for temperature in (1e-300, 1e-45, 1e-38, 1e-9, 1e-5):
        assert text_of(model, temperature=temperature, seed=3) == text_of(model)


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_every_decoder_gives_the_scores_of_the_last_token_alone(kind: str) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    network = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    assert "logits_to_keep" in inspect.signature(network.forward).parameters


ASCII = '{"a":"\\u00fc","b":1}'
HI = [{"role": "user", "content": "<Hi> & 'you'"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "<Hi> & 'you'!"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{{ '<|im|>' + (messages[0].content | tojson) }}", "<|im|>\"<Hi> & 'you'\""),
        ("{{ {'b': 1, 'a': 'ü'} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}", ASCII),
        ("{{ {'b': 1, 'a': 'ü'} | tojson(indent=1) }}", '{\n "b": 1,\n "a": "ü"\n}'),
    ],
)
def test_templates_find_what_transformers_gives_them(template: str, expected: str) -> None:
    assert ChatTemplate(template, {}).rendered(HI) == expected


NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token foo_token image_token"
SPOKEN = "".join(f"{{{{ {name} if {name} is defined else '-' }}}}|" for name in NAMES.split())
OLDER = {"bos_token": "<end>", "eos_token": {"content": "<end>", "lstrip": False}, "foo_token": "<foo>"}


@pytest.mark.parametrize(
    ("told", "older"),
    [
        ({}, OLDER), ({"bos_token": "<s>", "sep_token": None}, OLDER), ({"bos_token": "<s>"}, {"bos_token": None}),
        ({"cls_token": "<cls>", "mask_token": "<m>", "foo_token": "<foo>"}, None), ({}, None),
        ({"bos_token": "<s>", "added_tokens_decoder": {"0": {"content": "<end>", "special": True}}}, OLDER),
        ({"extra_special_tokens": {"image_token": "<i>"}, "unk_token": "<u>"}, None),
        ({"add_bos_token": True, "pad_token": {"content": "<end>", "__type": "AddedToken"}}, None),
    ],
)  # fmt: skip
def test_a_template_finds_every_special_token(
    content: Content, tmp_path: Path, told: dict[str, Any], older: dict[str, Any] | None
) -> None:
    from transformers import AutoTokenizer

    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": SPOKEN}
    files = content | {"tokenizer_config.json": as_json(kind | told)}
    files |= {} if older is None else {"special_tokens_map.json": as_json(older)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with memory_files(files) as opened_files:
        template = ChatTemplate.of(Folder(opened_files))

    assert template is not None
    assert template.rendered(HI) == AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(HI, tokenize=False)


def test_blocks_that_nest_too_deep_are_no_template() -> None:
    with pytest.raises(SealedFileDamaged):
        ChatTemplate("{% for a in messages %}" * 30 + "x" + "{% endfor %}" * 30, {})


def test_a_conversation_goes_through_the_folders_template(model: LoadedGenerator) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    rendered = "<user>Hi<end><assistant>"
    found = said(model, {"messages": messages}, max_tokens=8)[0]

    assert found["prompt_tokens"] == len("<user>Hi") + 1 + len("<assistant>"), "<end> is one token"
    assert found["text"] == text_of(model, rendered, max_tokens=8)


@pytest.mark.parametrize(
    "messages",
    [
        [], "hi", [{"role": "user"}], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 1}],
        [{"role": "user", "content": "x", "more": 1}], [{"role": ["user"], "content": "x"}],
        [{"role": {"user": 1}, "content": "x"}],
    ],
)  # fmt: skip
def test_other_messages_are_refused(model: LoadedGenerator, messages: Any) -> None:
    with pytest.raises(InputInvalid) as caught:
        said(model, {"messages": messages})
    assert caught.value.data["field"] == "messages"


def test_without_a_template_there_are_no_messages(content: Content) -> None:
    plain = load(HuggingFace(), {name: data for name, data in content.items() if name != "tokenizer_config.json"})
    with pytest.raises(InputInvalid):
        said(plain, {"messages": [{"role": "user", "content": "Hi"}]})
    assert "messages" not in plain.description.input_schema["properties"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{% for m in messages %}{{ m.content.nothing.here }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_reaches_out_is_refused_and_runs_nothing(content: Content, template: str) -> None:
    told = json_of(content["tokenizer_config.json"]) | {"chat_template": template}
    model = load(HuggingFace(), content | {"tokenizer_config.json": as_json(told)})
    with pytest.raises(InputInvalid) as caught:
        said(model, {"messages": [{"role": "user", "content": "Hi"}]})
    assert caught.value.data["field"] == "messages"


def test_a_broken_template_is_told_when_the_model_is_loaded(content: Content) -> None:
    told = json_of(content["tokenizer_config.json"]) | {"chat_template": "{% for %}"}
    with pytest.raises(SealedFileDamaged):
        load(HuggingFace(), content | {"tokenizer_config.json": as_json(told)})


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 5000}, "max_tokens"), ({"max_tokens": 2.0}, "max_tokens"),
        ({"temperature": -1}, "temperature"), ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"), ({"stop": ""}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"seed": -1}, "seed"),
        ({"seed": "1"}, "seed"), ({"beams": 3}, "beams"),
    ],
)  # fmt: skip
def test_parameters_out_of_bounds_are_named(model: LoadedGenerator, parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(InputInvalid) as caught:
        said(model, {"prompt": PROMPT}, **parameters)
    assert caught.value.data["field"] == f"parameters.{field}"


@pytest.mark.parametrize(
    "data", [{}, {"prompt": ""}, {"prompt": []}, {"prompt": [1]}, {"prompt": "a", "x": 1}, "a", []]
)
def test_other_input_is_refused_with_an_example(model: LoadedGenerator, data: Any) -> None:
    with pytest.raises(InputInvalid) as caught:
        said(model, data)
    assert caught.value.data["example"]


def test_a_prompt_without_room_for_an_answer_is_refused_with_what_there_is(model: LoadedGenerator) -> None:
    with pytest.raises(InputInvalid) as caught:
        said(model, {"prompt": "x" * 128})
    assert caught.value.data["expected"] == "1 to 127 tokens"
    assert "128 tokens" in caught.value.detail
    assert said(model, {"prompt": "x" * 127}, max_tokens=50)[0]["completion_tokens"] == 1, "as far as there is room"


def test_weights_that_lack_something_are_no_model(content: Content) -> None:
    from safetensors.torch import load as read
    from safetensors.torch import save

    whole = read(content["model.safetensors"])
    tensors = {name: tensor for name, tensor in whole.items() if "layers.1.mlp" not in name}
    with pytest.raises(SealedFileDamaged):
        load(HuggingFace(), content | {"model.safetensors": save(tensors)})


def test_code_of_a_folder_is_never_run(content: Content) -> None:
    odd = {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    told = json_of(content["config.json"]) | odd
    with pytest.raises(UnsupportedModel) as caught:
        load(HuggingFace(), content | {"config.json": as_json(told), "evil.py": b"raise SystemExit"})
    assert "evil.py" in caught.value.detail


def test_the_defaults_are_written_down() -> None:
    assert Sampling() == Sampling(64, 0.0, 1.0, (), 0)


async def test_a_confined_worker_streams_it(content: Content, model: LoadedGenerator) -> None:
    pool = WorkerPool(predict_timeout_s=30, load_timeout_s=60)
    held = opened(content)
    pieces: list[Piece] = []
    try:
        loaded = await pool.load(held)
        asked = call(held, {"messages": [{"role": "user", "content": "Hi"}]}, {"max_tokens": 12})
        output = await pool.run(held, hold(held), asked, pieces.append)
        with pytest.raises(DivaultError):
            await pool.run(held, hold(held), call(held, {"prompt": ""}), pieces.append)
    finally:
        await pool.close()

    expected = said(model, {"messages": [{"role": "user", "content": "Hi"}]}, max_tokens=12)
    assert json_of(output.result)["texts"] == expected
    assert "".join(piece.text for piece in pieces) == expected[0]["text"]
    assert loaded.sandbox == "standard"
    assert loaded.description.task == "text-generation"
