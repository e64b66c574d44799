"""Entities, masks and images: what transformers itself gives, and every other input refused."""

from __future__ import annotations

import base64
import importlib
import io
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from divault.errors import InputInvalid, SealedFileDamaged, UnsupportedModel
from divault.models import text_encoder
from divault.models.base import Inputs, LoadedModel
from divault.models.files import Folder
from divault.models.huggingface import HuggingFace
from divault.models.huggingface_files import VISION
from divault.models.images import Preparation, _decoded
from divault.models.text_heads import _entities
from divault.workers.pool import WorkerPool
from tests.memory_models import as_json, folder_content, json_of, load, memory_files, tiny_classifier
from tests.worker_models import call, hold, opened

Content = dict[str, bytes]
TEXTS = ["the film was good", "a very bad book", "the book"]


def tiny(folder: Path, kind: str, **config: Any) -> Content:
    """A BERT of another head over the same words."""
    import transformers

    tiny_classifier(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[MASK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = json_of((folder / "config.json").read_bytes())
    kept = {name: sizes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    kept |= {"intermediate_size": 32, "max_position_embeddings": 32, "vocab_size": tokenizer.get_vocab_size()}
    torch.manual_seed(11)
    model = getattr(transformers, kind)(transformers.BertConfig(**kept, **config))
    model.save_pretrained(folder)
    return folder_content(folder)


def said(model: LoadedModel, data: Any, **parameters: Any) -> Any:
    return model.predict([Inputs(data, parameters)])[0].result


# --- entities ---------------------------------------------------------------------------------------------------------

NAMES = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2, "LOC": 3}}


@pytest.fixture(scope="module")
def token_files(tmp_path_factory: pytest.TempPathFactory) -> Content:
    return tiny(tmp_path_factory.mktemp("tokens"), "BertForTokenClassification", **NAMES)


def test_entities_are_those_of_the_library(token_files: Content, tmp_path: Path) -> None:
    from transformers import BertForTokenClassification, PreTrainedTokenizerFast

    for name, data in token_files.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]")
    theirs = BertForTokenClassification.from_pretrained(tmp_path).eval()
    result = said(load(HuggingFace(), token_files), {"text": TEXTS})

    assert result["tokens"] == [len(ids) for ids in tokenizer(TEXTS).input_ids]
    for text, entities in zip(TEXTS, result["entities"], strict=True):
        encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            shares = theirs(input_ids=encoded["input_ids"]).logits.softmax(-1)[0]
        labels = [theirs.config.id2label[int(row.argmax())] for row in shares]
        covered = {place for entity in entities for place in range(entity["start"], entity["end"])}
        for (start, end), label in zip(offsets[1:-1], labels[1:-1], strict=True):
            assert (start in covered) is (label != "O")
            if label != "O":
                mine = next(entity for entity in entities if entity["start"] <= start < entity["end"])
                assert mine["label"] == label.removeprefix("B-").removeprefix("I-")
                assert mine["text"] == text[mine["start"] : mine["end"]]
                assert end <= mine["end"]


TAGS = {"[PAD]": 0, "[UNK]": 0, "[CLS]": 0, "[SEP]": 0, "和": 0, "-": 0, "东": 1, "大": 1, "Pa": 1, "Rome": 1}
TAGS |= {"京": 2, "阪": 2, "##ris": 2, "Ly": 1, "##on": 1}


def tagging(folder: Path) -> Content:
    """A network that gives each token the tag above: its embeddings are all that it has."""
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForTokenClassification

    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(TAGS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    sizes = {"vocab_size": len(TAGS), "hidden_size": len(TAGS), "num_hidden_layers": 0, "num_attention_heads": 1}
    names = {"id2label": {0: "O", 1: "B-LOC", 2: "I-LOC"}, "label2id": {"O": 0, "B-LOC": 1, "I-LOC": 2}}
    model = BertForTokenClassification(BertConfig(**sizes, **names, max_position_embeddings=32))
    with torch.no_grad():
        for parameter in model.bert.embeddings.parameters():
            parameter.zero_()
        model.bert.embeddings.LayerNorm.weight.fill_(1)
        model.bert.embeddings.word_embeddings.weight.copy_(torch.eye(len(TAGS)))
        model.classifier.weight.copy_(torch.nn.functional.one_hot(torch.tensor(list(TAGS.values()))).float().T)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder_content(folder)


@pytest.mark.parametrize("text", ["东京大阪", "东京和大阪", "大阪大阪东京", "Paris-Rome", "Paris Rome", "RomeParis"])
def test_entities_side_by_side_are_those_of_the_library_s_pipeline(text: str, tmp_path: Path) -> None:
    from transformers import BertForTokenClassification, PreTrainedTokenizerFast, pipeline

    model = load(HuggingFace(), tagging(tmp_path))
    theirs = pipeline(
        "token-classification",
        model=BertForTokenClassification.from_pretrained(tmp_path),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]"),
        aggregation_strategy="simple",
    )
    expected = [(one["entity_group"], text[one["start"] : one["end"]]) for one in theirs(text)]

    assert [(one["label"], one["text"]) for one in said(model, {"text": text})["entities"][0]] == expected


def test_a_word_of_several_tokens_is_no_two_entities(tmp_path: Path) -> None:
    found = said(load(HuggingFace(), tagging(tmp_path)), {"text": "Lyon Rome"})["entities"][0]

    assert [one["text"] for one in found] == ["Lyon", "Rome"], "although the model begins an entity with both halves"


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        ("Elodie", ["Elodie"]),
        ("Élodie", ["Élodie"]),
        ("né à Ørsted 👋", ["né", "à", "Ørsted", "👋"]),
        ("北京", ["北", "京"]),
    ],
)
def test_pieces_of_one_character_are_one_entity(text: str, entities: list[str]) -> None:
    """A tokenizer of bytes has several for a letter with an accent, with the same offsets."""
    from tokenizers import models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = tokenizer.encode(text)
    always = _entities(["O", "B-PER", "I-PER"], text, tokens, [[0.0, 0.8, 0.2]] * len(tokens))
    mixed = [[0.1, 0.8, 0.1] if place % 2 else [0.8, 0.1, 0.1] for place in range(len(tokens))]
    found = _entities(["O", "B-PER", "LOC"], text, tokens, mixed)

    assert [one["text"] for one in always] == entities
    assert all(abs(one["score"] - 0.8) < 1e-9 for one in always)
    ends = [0, *(one["end"] for one in found)]
    assert all(one["start"] >= end for one, end in zip(found, ends, strict=False)), "none lies within another"


@pytest.mark.parametrize("text", ["Alice Bob met Alice", "met Alice", "Alice"])
def test_the_blank_before_a_word_is_no_part_of_an_entity(text: str) -> None:
    from tokenizers import models, pre_tokenizers

    words: list[tuple[str, float]] = [("<unk>", 0.0), *((f"▁{word}", -1.0) for word in ("Alice", "Bob", "met"))]
    tokenizer = Tokenizer(models.Unigram(words, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokens = tokenizer.encode(text)
    rows = [[0.0, 1.0, 0.0] if token != "▁met" else [1.0, 0.0, 0.0] for token in tokens.tokens]
    found = _entities(["O", "B-PER", "I-PER"], text, tokens, rows)

    assert [one["text"] for one in found] == [word for word in text.split() if word != "met"]
    assert all(text[one["start"] : one["end"]] == one["text"] for one in found)


@pytest.mark.parametrize(("pieces", "entities"), [(["▁东京", "大阪"], 2), (["▁Ly", "on"], 1)])
def test_words_that_a_tokenizer_does_not_tell_apart_are_two_in_chinese(pieces: list[str], entities: int) -> None:
    from tokenizers import models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    text = "".join(pieces)[1:]
    found = _entities(["O", "B-LOC", "I-LOC"], text, tokenizer.encode(text), [[0.0, 1.0, 0.0]] * 2)

    assert tokenizer.encode(text).word_ids == [0, 0]
    assert len(found) == entities


def test_a_blank_alone_does_not_end_an_entity() -> None:
    from tokenizers import models, pre_tokenizers

    pieces = ["<unk>", "▁in", "▁New", "▁", "Y", "ork"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 if piece != "<unk>" else 0.0) for piece in pieces], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokens = tokenizer.encode("in New York")
    chosen = {"▁in": 0, "▁New": 1, "▁": 2, "Y": 2, "ork": 2}
    rows = [[float(place == chosen[token]) for place in range(3)] for token in tokens.tokens]

    assert tokens.tokens == pieces[1:]
    assert [one["text"] for one in _entities(["O", "B-LOC", "I-LOC"], "in New York", tokens, rows)] == ["New York"]


def test_masks_score_as_few_tokens_at_once_as_their_words_ask_for(
    mask_files: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"the film was {word} [MASK]" for word in ("good", "bad", "very good", "not", "a")]
    whole = said(load(HuggingFace(), mask_files), {"text": texts})
    monkeypatch.setattr(text_encoder, "SCORES_PER_PASS", 8)
    model: Any = load(HuggingFace(), mask_files)
    passes = []
    original = model._encoder._pass
    monkeypatch.setattr(model._encoder, "_pass", lambda ids, scores: passes.append(len(ids)) or original(ids, scores))
    apart = said(model, {"text": texts})

    assert passes == [1] * len(texts)
    assert close(whole, apart, 1e-4)


def test_labels_are_joined_to_entities() -> None:
    from tokenizers import models, pre_tokenizers

    words = ["[UNK]", "Ada", "Lovelace", "met", "Charles", "in", "London"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = "Ada Lovelace met Charles in London"
    labels = ["O", "B-PER", "I-PER", "LOC"]
    chosen = [1, 2, 0, 1, 0, 3]
    rows = [[0.9 if place == best else 0.02 for place in range(4)] for best in chosen]
    found = _entities(labels, text, tokenizer.encode(text), rows)

    assert [(one["label"], one["text"]) for one in found] == [
        ("PER", "Ada Lovelace"), ("PER", "Charles"), ("LOC", "London")
    ]  # fmt: skip
    assert found[0]["score"] == pytest.approx(0.9)
    apart = _entities(labels, "Ada Charles", tokenizer.encode("Ada Charles"), [rows[0], rows[0]])
    assert [one["text"] for one in apart] == ["Ada", "Charles"], "two that begin are two"


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mask_files(tmp_path_factory: pytest.TempPathFactory) -> Content:
    return tiny(tmp_path_factory.mktemp("masks"), "BertForMaskedLM")


def test_masks_are_filled_as_the_library_does(mask_files: Content, tmp_path: Path) -> None:
    from transformers import BertForMaskedLM, PreTrainedTokenizerFast

    for name, data in mask_files.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), mask_token="[MASK]")
    theirs = BertForMaskedLM.from_pretrained(tmp_path).eval()
    model = load(HuggingFace(), mask_files)
    texts = ["the film was [MASK]", "a very bad [MASK] it is"]
    result = said(model, {"text": texts}, top_k=3)

    for text, fills in zip(texts, result["fills"], strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            shares = theirs(input_ids=ids).logits[0, (ids[0] == tokenizer.mask_token_id).nonzero()[0, 0]].softmax(-1)
        best = shares.topk(3)
        assert [fill["token"] for fill in fills] == [tokenizer.decode([int(i)]) for i in best.indices]
        assert [fill["score"] for fill in fills] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert fills[0]["text"] == text.replace("[MASK]", fills[0]["token"])
    assert len(said(model, {"text": texts[0]})["fills"][0]) == 5


def test_a_mask_token_that_an_older_file_names_is_found(mask_files: Content) -> None:
    files = mask_files | {"special_tokens_map.json": as_json({"mask_token": {"content": "book"}})}
    model = load(HuggingFace(), files)

    assert model.description.example == {"text": "The film was book."}


@pytest.mark.parametrize(
    ("data", "parameters"),
    [
        ({"text": "no mask"}, {}), ({"text": "[MASK] [MASK]"}, {}), ({"text": "[MASK]"}, {"top_k": 0}),
        ({"text": "[MASK]"}, {"top_k": 101}), ({"text": "[MASK]"}, {"top_k": True}), ({"text": "[MASK]"}, {"k": 1}),
        ({"text": []}, {}),
    ],
)  # fmt: skip
def test_other_masks_are_refused(mask_files: Content, data: Any, parameters: dict[str, Any]) -> None:
    model = load(HuggingFace(), mask_files)
    with pytest.raises(InputInvalid):
        said(model, data, **parameters)


# --- images -----------------------------------------------------------------------------------------------------------

SIZE = {"height": 32, "width": 32}
HOW = {"size": SIZE, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_resize": True}
CROPPED = HOW | {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": SIZE}
CROPPED |= {"image_processor_type": "ViTImageProcessor"}


def tiny_network(folder: Path, kind: str, how: dict[str, Any], **told: Any) -> Content:
    from transformers import AutoConfig, AutoModelForImageClassification

    sizes: dict[str, dict[str, Any]] = {
        "vit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        | {"image_size": 32, "patch_size": 8},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"},
    }
    labels = {"id2label": {0: "cat", 1: "dog", 2: "bird"}, "label2id": {"cat": 0, "dog": 1, "bird": 2}}
    torch.manual_seed(5)
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **sizes[kind], **labels | told))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes(as_json(how))
    return folder_content(folder)


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> Content:
    return tiny_network(tmp_path_factory.mktemp("vit"), "vit", HOW)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    random = np.random.default_rng(3)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8), "RGB")


def in_base64(image: Image.Image, form: str = "PNG", **how: Any) -> str:
    out = io.BytesIO()
    image.save(out, form, **how)
    return base64.b64encode(out.getvalue()).decode()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("vit", HOW),
        ("resnet", CROPPED),
    ],
)
def test_images_are_prepared_and_told_as_the_library_does(tmp_path: Path, kind: str, how: dict[str, Any]) -> None:
    from transformers import AutoModelForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    files = tiny_network(tmp_path, kind, how)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = ViTImageProcessorPil(**{"do_rescale": True, "do_normalize": True} | how)
    images = [picture(), picture(50, 90)]
    with torch.no_grad():
        expected = [
            theirs(pixel_values=processor(image, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0].tolist()
            for image in images
        ]
    result = said(load(HuggingFace(), files), {"image": [in_base64(image) for image in images]})

    for one, row in zip(result["predictions"], expected, strict=True):
        assert list(one["scores"].values()) == pytest.approx(row, abs=2e-3)
        assert one["score"] == max(one["scores"].values())


ONE_LABEL = {"id2label": {0: "rude"}, "label2id": {"rude": 0}}


@pytest.mark.parametrize(
    "told",
    [
        {}, {"problem_type": "multi_label_classification"}, ONE_LABEL, ONE_LABEL | {"problem_type": "regression"},
        {"problem_type": "regression"},
    ],
)  # fmt: skip
def test_scores_of_images_are_those_that_the_library_s_pipeline_tells(told: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, pipeline
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model = load(HuggingFace(), tiny_network(tmp_path, "vit", HOW, **told))
    theirs = pipeline(
        "image-classification",
        model=AutoModelForImageClassification.from_pretrained(tmp_path),
        image_processor=ViTImageProcessorPil(**HOW),
    )
    expected = {one["label"]: one["score"] for one in theirs(picture())}
    found = said(model, {"image": in_base64(picture())})["predictions"][0]

    assert found["scores"] == pytest.approx(expected, abs=2e-3)
    assert found["label"] == max(expected, key=lambda label: expected[label])


EDGE = {"shortest_edge": 64}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "ConvNext, a number": ("convnext.image_processing_pil_convnext.ConvNext", {"size": 64, "crop_pct": 0.875}),
    "ConvNext, no crop_pct": ("convnext.image_processing_pil_convnext.ConvNext", {"size": EDGE}),
    "ConvNext, large": ("convnext.image_processing_pil_convnext.ConvNext", {"size": {"shortest_edge": 384}}),
    "ConvNext, 384 and null": ("convnext.image_processing_pil_convnext.ConvNext", {"size": 384, "crop_pct": None}),
    "MobileNet, a number": (
        "mobilenet_v2.image_processing_pil_mobilenet_v2.MobileNetV2",
        {"size": 80, "do_center_crop": True, "crop_size": 64},
    ),
    "Bit, an edge": (
        "bit.image_processing_pil_bit.Bit",
        {"size": EDGE, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}},
    ),
    "ViT, a number": ("vit.image_processing_pil_vit.ViT", {"size": 64}),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(70, 90), (200, 100)])
def test_sizes_mean_what_they_mean_to_each_image_processor(name: str, size: tuple[int, int]) -> None:
    where, told = PROCESSORS[name]
    module, _, kind = where.rpartition(".")
    even = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_resize": True}
    even |= {"do_rescale": True, "do_normalize": True}
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), f"{kind}ImageProcessorPil")
    image = picture(*size)
    expected = processor(**even | told)(image, return_tensors="np")["pixel_values"][0]
    found = prepared(even | told | {"feature_extractor_type": f"{kind}FeatureExtractor"}, "vit").apply(image)

    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.05


@pytest.mark.parametrize("kind", ["Beit", "Bit", "CLIP", "ConvNext", "DeiT", "MobileNetV1", "MobileNetV2", "ViT"])
@pytest.mark.parametrize("ending", ["ImageProcessor", "ImageProcessorFast", "FeatureExtractor"])
def test_what_a_file_does_not_say_is_what_the_processor_s_class_says(kind: str, ending: str) -> None:
    import transformers

    processor, image = getattr(transformers, f"{kind}ImageProcessorPil")(), picture(300, 260)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    found = prepared({"image_processor_type": f"{kind}{ending}", "image_mean": None}, "vit").apply(image)

    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.05


@pytest.mark.parametrize("model_type", sorted(VISION))
def test_a_file_that_names_no_processor_means_that_of_the_model_s_type(model_type: str) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    kind = IMAGE_PROCESSOR_MAPPING[type(AutoConfig.for_model(model_type))]["pil"].__name__.removesuffix("Pil")

    assert prepared({}, model_type) == prepared({"image_processor_type": kind}, model_type)


@pytest.mark.parametrize(
    "told",
    [{"image_processor_type": "LevitImageProcessor"}, {"image_processor_type": "dict"}, {"size": {"longest_edge": 9}}],
)
def test_other_processors_and_sizes_are_refused_by_name(told: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"LevitImageProcessor|dict|longest_edge"):
        prepared(told, "vit")


def prepared(told: dict[str, Any], model_type: str) -> Preparation:
    with memory_files({"preprocessor_config.json": as_json(told)}) as files:
        return Preparation.of(Folder(files), model_type)


def test_a_crop_after_that_of_convnext_is_refused_by_name() -> None:
    told = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}}
    crop = {"do_center_crop": True, "crop_size": SIZE}

    assert prepared(told, "convnext").crop == (64, 64)
    with pytest.raises(UnsupportedModel, match="do_center_crop beside crop_pct"):
        prepared(told | crop, "convnext")


@pytest.mark.parametrize(
    ("changed", "words"),
    [(None, "no preprocessor_config.json"), (HOW | {"do_resize": False}, "do_resize")],
)
def test_what_is_not_told_of_images_is_asked_for(image_files: Content, changed: Any, words: str) -> None:
    files = {name: data for name, data in image_files.items() if name != "preprocessor_config.json"}
    with pytest.raises(UnsupportedModel, match=words):
        load(HuggingFace(), files if changed is None else files | {"preprocessor_config.json": as_json(changed)})


def long_png(width: int) -> str:
    """A few kilobytes of one row."""
    return in_base64(Image.new("RGB", (width, 1)), optimize=True)


def test_what_would_grow_without_end_is_refused_before_it_does(tmp_path: Path) -> None:
    model = load(HuggingFace(), tiny_network(tmp_path, "resnet", CROPPED))
    tracemalloc.start()
    for data in (
        {"pixels": [[[1, 2, 3]] * 20_000]},
        {"image": long_png(100_000)},
        {"image": long_png(15_000_000)},
        {"pixels": [["a" * 100_000] + ["b"] * 2000]},
        {"pixels": [[["a" * 100_000, 1, 2]] * 100]},
        {"pixels": [[[2**70, 0, 0]]]},
        {"pixels": [[[True, 0, 0]]]},
    ):
        with pytest.raises(InputInvalid):
            said(model, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 100 << 20


def test_pixels_and_files_give_the_same(image_files: Content) -> None:
    model, image = load(HuggingFace(), image_files), picture()
    pixels = np.asarray(image).tolist()

    assert said(model, {"pixels": pixels}) == said(model, {"image": in_base64(image)})
    assert (
        said(model, {"pixels": [pixels, pixels]})["predictions"][1]
        == said(model, {"pixels": [pixels]})["predictions"][0]
    )
    assert len(said(model, {"image": [in_base64(image, "JPEG"), in_base64(image, "WEBP")]})["predictions"]) == 2


def turned(orientation: int, **more: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, value in more.items():
        exif[int(name.removeprefix("tag_"), 16)] = value
    return exif


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [*range(10)])
def test_a_picture_is_turned_as_its_camera_was(form: str, orientation: int) -> None:
    from transformers.image_utils import load_image

    file = in_base64(picture(), form, exif=turned(orientation))

    assert np.array_equal(np.asarray(_decoded(file)), np.asarray(load_image(file)))


def test_what_is_told_of_a_camera_hurts_nobody(image_files: Content) -> None:
    model = load(HuggingFace(), image_files)
    sound = turned(6, tag_829a=0.5, tag_010e="a lens").tobytes()
    expected = said(model, {"image": in_base64(picture(), "PNG", exif=turned(6))})

    assert said(model, {"image": in_base64(picture(), "PNG", exif=sound)}) == expected
    for wrong in (b"Exif\0\0nothing", sound[:9], sound[:12]):
        with pytest.raises(InputInvalid, match="damaged file"):
            said(model, {"image": in_base64(picture(), "PNG", exif=wrong)})


@pytest.mark.parametrize(
    "data",
    [
        {"image": "no base64!"}, {"image": base64.b64encode(b"GIF89a").decode()}, {"image": []}, {"image": 3}, {},
        {"image": in_base64(picture(), "GIF")}, {"image": in_base64(picture(), "BMP")}, {"pixels": [[1, 2, 3]]},
        {"image": in_base64(picture())[:200] + "="}, {"pixels": [[[1, 2]]]}, {"pixels": [[[0, 0, 256]]]},
        {"pixels": []},
        {"pixels": [[[0.5, 0, 0]]]}, {"pixels": [[[0, 0, -1]]]}, {"pixels": [[[0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]},
        {"image": in_base64(picture()), "pixels": [[[0, 0, 0]]]}, {"image": [in_base64(picture())] * 65},
    ],
)  # fmt: skip
def test_other_images_are_refused_with_an_example(image_files: Content, data: Any) -> None:
    model = load(HuggingFace(), image_files)
    with pytest.raises(InputInvalid) as caught:
        said(model, data)
    assert caught.value.data["example"]


def test_a_file_that_claims_to_be_huge_is_not_unpacked(image_files: Content) -> None:
    bomb = in_base64(Image.new("L", (20_000, 20_000)), optimize=True)
    with pytest.raises(InputInvalid):
        said(load(HuggingFace(), image_files), {"image": bomb})


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"size": 1_000_000}, {"resample": 9}, {"image_std": [0, 1, 1]}, {"image_mean": [1]}, {"size": "big"}],
)
def test_a_preparation_that_does_not_hold_is_no_model(image_files: Content, wrong: dict[str, Any]) -> None:
    with pytest.raises(SealedFileDamaged):
        load(HuggingFace(), image_files | {"preprocessor_config.json": as_json(HOW | wrong)})


def test_a_text_type_with_a_head_for_images_is_refused(image_files: Content) -> None:
    told = json_of(image_files["config.json"]) | {"model_type": "bert"}
    with pytest.raises(UnsupportedModel):
        load(HuggingFace(), image_files | {"config.json": as_json(told)})


# --- alone and together, and confined ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["token", "mask", "image"])
def test_an_answer_is_the_same_beside_others(
    task: str, token_files: Content, mask_files: Content, image_files: Content
) -> None:
    files = {"token": token_files, "mask": mask_files, "image": image_files}[task]
    model = load(HuggingFace(), files)
    ours: dict[str, Any] = {
        "token": [{"text": text} for text in TEXTS],
        "mask": [{"text": "the [MASK]"}, {"text": "a very very very bad [MASK] it is"}],
        "image": [{"image": in_base64(picture(w, 30))} for w in (30, 50, 70)],
    }
    together = model.predict([Inputs(data, {}) for data in ours[task]])

    for data, answer in zip(ours[task], together, strict=True):
        assert close(answer.result, said(model, data), model.description.tolerance)
    assert model.description.together > 1


def close(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, float):
        return abs(one - other) <= tolerance * max(1.0, abs(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_without_the_library_for_images_they_alone_are_refused(
    image_files: Content, mask_files: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnsupportedModel, match=r"Pillow is not installed here.*divault\[images\]") as caught:
        load(HuggingFace(), image_files)

    assert caught.value.data["seen"] == "an image classifier"
    assert load(HuggingFace(), mask_files).description.task == "fill-mask"


async def test_a_confined_worker_decodes_images(image_files: Content) -> None:
    pool, model = WorkerPool(predict_timeout_s=30, load_timeout_s=60), opened(image_files)
    try:
        loaded = await pool.load(model)
        output = await pool.run(model, hold(model), call(model, {"image": in_base64(picture(), "JPEG")}))
    finally:
        await pool.close()

    assert loaded.sandbox == "standard"
    assert loaded.description.task == "image-classification"
    assert json_of(output.result)["predictions"][0]["label"] in ("cat", "dog", "bird")
