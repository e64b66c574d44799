"""Hugging Face folders from memory files: the answers of transformers itself, and nothing that a folder's code says."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as read_safetensors
from safetensors.torch import save

from divault import models
from divault.errors import DivaultError, InputInvalid, SealedFileDamaged, UnsupportedModel
from divault.models.base import Inputs, LoadedModel
from divault.models.huggingface import HuggingFace
from divault.models.torch_state import TorchState
from tests.memory_models import answer, as_json, json_of, load, memory_files, mini_lm, state_dict_file, tiny_classifier
from tests.schemas import mismatch

TEXTS = ["the film was good", "the book was very very bad a bad book it is not good", "a"]
Content = dict[str, bytes]


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    tiny_classifier(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_files(classifier_folder: Path) -> Content:
    return {path.name: path.read_bytes() for path in classifier_folder.iterdir()}


@pytest.fixture(scope="module")
def classifier(classifier_files: Content) -> LoadedModel:
    return load(HuggingFace(), classifier_files)


@pytest.fixture(scope="module")
def mini_lm_files() -> Content:
    return mini_lm()


@pytest.fixture(scope="module")
def embedder(mini_lm_files: Content) -> LoadedModel:
    return load(HuggingFace(), {f"all-MiniLM-L6-v2/{name}": data for name, data in mini_lm_files.items()})


def scores(result: Any) -> np.ndarray:
    return np.array([list(one["scores"].values()) for one in result["predictions"]])


def changed(files: Content, name: str, **members: Any) -> Content:
    """The folder with members of one JSON file set anew."""
    return files | {name: as_json(json_of(files.get(name, b"{}")) | members)}


def refusal(content: Content, kind: type[DivaultError] = UnsupportedModel) -> DivaultError:
    with pytest.raises(kind) as caught:
        load(HuggingFace(), content)
    return caught.value


def test_a_classifier_gives_the_probabilities_of_transformers(classifier: LoadedModel, classifier_folder: Path) -> None:
    from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(classifier_folder / "tokenizer.json"), pad_token="[PAD]")
    theirs = BertForSequenceClassification.from_pretrained(classifier_folder).eval()
    with torch.no_grad():
        encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
        expected = theirs(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits.softmax(-1)

    result = answer(classifier, {"text": TEXTS})

    assert np.abs(scores(result) - expected.numpy()).max() < 1e-5
    for one in result["predictions"]:
        assert list(one["scores"]) == ["bad", "fine", "good"]
        assert one["score"] == max(one["scores"].values()) == one["scores"][one["label"]]


def test_texts_of_a_batch_get_the_answers_that_they_get_alone(classifier: LoadedModel) -> None:
    together = scores(answer(classifier, {"text": TEXTS}))
    alone = np.concatenate([scores(answer(classifier, {"text": text})) for text in TEXTS])
    callers = classifier.predict([Inputs({"text": text}, {}) for text in TEXTS])
    listed = scores(answer(classifier, [{"text": text} for text in TEXTS]))

    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(np.concatenate([scores(one.result) for one in callers]) - alone).max() < 1e-5
    assert [one.rows for one in callers] == [1, 1, 1]
    assert (listed == together).all()


def test_a_long_text_is_cut_at_the_model_s_limit(classifier: LoadedModel) -> None:
    thirty, thousand = ("very " * count for count in (30, 1000))

    assert answer(classifier, {"text": thirty}) == answer(classifier, {"text": thousand})
    assert answer(classifier, {"text": thirty}) != answer(classifier, {"text": "very"})


@pytest.mark.parametrize("in_tokenizer", ["left", "right", None])
@pytest.mark.parametrize("in_config", ["left", "right", None])
def test_a_long_text_is_cut_at_the_end_that_the_library_cuts(
    in_tokenizer: str | None, in_config: str | None, classifier_files: Content, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, "pad_token": "[PAD]"}
    told |= {} if in_config is None else {"truncation_side": in_config}
    files = classifier_files | {"tokenizer_config.json": as_json(told)}
    if in_tokenizer is not None:
        cut = {"max_length": 9, "direction": in_tokenizer.capitalize(), "stride": 0, "strategy": "LongestFirst"}
        files = changed(files, "tokenizer.json", truncation=cut)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    text = "good " * 40 + "bad " * 40
    tokens = AutoTokenizer.from_pretrained(tmp_path)(text, truncation=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(tokens.input_ids, tokens.attention_mask).logits.softmax(-1)

    assert np.abs(scores(answer(load(HuggingFace(), files), {"text": text})) - expected.numpy()).max() < 1e-6


def test_a_text_has_two_ends(classifier_files: Content) -> None:
    refusal(changed(classifier_files, "tokenizer_config.json", truncation_side="middle"), SealedFileDamaged)


ONE_LABEL = {"id2label": {0: "rude"}, "label2id": {"rude": 0}}
HEADS: list[dict[str, Any]] = [
    {}, {"problem_type": "single_label_classification"}, {"problem_type": "multi_label_classification"}, ONE_LABEL,
    {"problem_type": "regression"}, ONE_LABEL | {"problem_type": "regression"},
]  # fmt: skip


@pytest.mark.parametrize("told", HEADS)
def test_scores_are_those_that_the_library_s_pipeline_tells(told: dict[str, Any], tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification, PreTrainedTokenizerFast, pipeline

    model = load(HuggingFace(), tiny_classifier(tmp_path, **told))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]")
    theirs = pipeline(
        "text-classification",
        model=BertForSequenceClassification.from_pretrained(tmp_path),
        tokenizer=tokenizer,
    )
    expected = {one["label"]: one["score"] for one in theirs("the film was good", top_k=None)}
    found = answer(model, {"text": "the film was good"})["predictions"][0]
    bounds = model.description.output_schema["properties"]["predictions"]["items"]["properties"]["score"]

    assert found["scores"] == pytest.approx(expected, abs=1e-6)
    assert ("minimum" in bounds) is (told.get("problem_type") != "regression"), "only shares lie between 0 and 1"


def test_mini_lm_puts_paraphrases_near_and_other_things_far(embedder: LoadedModel) -> None:
    texts = ["A man is eating food.", "A person eats a meal.", "The stock market fell sharply today."]

    result = answer(embedder, {"text": texts})

    vectors = np.array(result["embeddings"])
    assert vectors.shape == (3, 384)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert vectors[0] @ vectors[1] > 0.6
    assert vectors[0] @ vectors[2] < 0.2


def test_mini_lm_gives_the_vectors_of_transformers(embedder: LoadedModel, mini_lm_files: Content) -> None:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    texts = [*TEXTS, "Ein Satz mit Ümläuten, 数字 und 🙂.", "word " * 600]
    theirs = BertModel(BertConfig(**json_of(mini_lm_files["config.json"]))).eval()
    theirs.load_state_dict(read_safetensors(mini_lm_files["model.safetensors"]), strict=False)
    tokenizer = Tokenizer.from_str(mini_lm_files["tokenizer.json"].decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    expected = []
    with torch.no_grad():
        for text in texts:
            hidden = theirs(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            expected.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())

    result = answer(embedder, {"text": texts})

    assert np.abs(np.array(result["embeddings"]) - np.array(expected)).max() < 1e-5


def test_mean_max_and_first_token_pooling_differ_and_hold(classifier_files: Content) -> None:
    encoder = pooled(classifier_files, "mean")
    for mode in ("cls", "max", "mean"):
        row = np.array(answer(load(HuggingFace(), pooled(classifier_files, mode)), {"text": TEXTS})["embeddings"])
        alone = [
            answer(load(HuggingFace(), pooled(classifier_files, mode)), {"text": t})["embeddings"][0] for t in TEXTS
        ]
        assert np.abs(row - np.array(alone)).max() < 1e-5
    mean, first = (answer(load(HuggingFace(), pooled(classifier_files, m)), {"text": "a"}) for m in ("mean", "cls"))
    assert mean != first
    refusal(encoder | {"1_Pooling/config.json": as_json({"pooling_mode": "lasttoken"})})
    refusal(encoder | {"modules.json": as_json([{"type": "custom.Module", "path": ""}])})
    refusal(encoder | {"modules.json": as_json("x")})


def test_vectors_are_cut_where_the_folder_says_so(classifier_files: Content) -> None:
    """Matryoshka: the first numbers of a vector stand for it."""
    encoder = pooled(classifier_files, "mean")
    whole = answer(load(HuggingFace(), encoder), {"text": TEXTS})["embeddings"]

    def cut(width: Any) -> Content:
        return encoder | {"config_sentence_transformers.json": as_json({"truncate_dim": width})}

    loaded = load(HuggingFace(), cut(5))
    result = answer(loaded, {"text": TEXTS})
    assert result["embeddings"] == [vector[:5] for vector in whole]
    assert mismatch(result, loaded.description.output_schema) == ""
    assert answer(load(HuggingFace(), cut(None)), {"text": TEXTS})["embeddings"] == whole
    for wrong in (0, "5", 2.5, True):
        assert "truncate_dim" in refusal(cut(wrong)).detail


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_what_is_said_of_texts_may_stand_in_a_file_of_another_type(classifier_files: Content, kind: str) -> None:
    encoder = pooled(classifier_files, "mean")
    said = {f"sentence_{kind}_config.json": as_json({"max_seq_length": 4})}

    assert answer(load(HuggingFace(), encoder | said), {"text": "the film was good"})["tokens"] == [4]
    first = {"sentence_bert_config.json": as_json({"max_seq_length": 3})}
    assert answer(load(HuggingFace(), encoder | said | first), {"text": "the film was good"})["tokens"] == [3]
    assert answer(load(HuggingFace(), encoder), {"text": "the film was good"})["tokens"] == [6]


def pooled(files: Content, mode: str) -> Content:
    """The classifier's encoder in sentence-transformers' layout."""
    kind = "sentence_transformers.models."
    modules = [{"type": f"{kind}Transformer", "path": ""}, {"type": f"{kind}Pooling", "path": "1_Pooling"}]
    added = {"modules.json": as_json(modules), "1_Pooling/config.json": as_json({"pooling_mode": mode})}
    return changed(files, "config.json", architectures=["BertModel"]) | added


def test_an_old_checkpoint_and_a_configuration_in_divault_json_load_alike(
    classifier: LoadedModel, classifier_files: Content
) -> None:
    weights = state_dict_file(read_safetensors(classifier_files["model.safetensors"]))
    config = json_of(classifier_files["config.json"])
    told = {"architecture": {"type": "huggingface", "config": config}}
    content = {
        "pytorch_model.bin": weights,
        "tokenizer.json": classifier_files["tokenizer.json"],
        "divault.json": as_json(told),
    }

    assert answer(load(HuggingFace(), content), {"text": TEXTS}) == answer(classifier, {"text": TEXTS})


def test_recognition_goes_by_content_and_by_one_format(classifier_files: Content) -> None:
    state = {"w": save({"a": torch.zeros(1)})}
    for content, mine, theirs in ((classifier_files, True, False), (state, False, True), ({"x": b"abc"}, False, False)):
        with memory_files(content) as files:
            assert (HuggingFace().recognises(files), TorchState().recognises(files)) == (mine, theirs)
    with memory_files(classifier_files) as files:
        assert models.load(files).description.format == "huggingface"


def test_the_description_says_what_is_taken(classifier: LoadedModel, embedder: LoadedModel) -> None:
    assert (classifier.description.task, embedder.description.task) == ("text-classification", "embeddings")
    for loaded in (classifier, embedder):
        about = loaded.description
        assert loaded.predict([Inputs(about.example, {})])[0].rows == 1
        assert {"transformers", "tokenizers", "torch", "numpy", "divault", "python"} <= about.runtime[
            "libraries"
        ].keys()


BAD_INPUTS = {
    "nothing": {},
    "a bare text": "good",
    "a number": {"text": 1},
    "no text": {"text": []},
    "an empty text": {"text": ""},
    "an empty text in a list": {"text": ["a", ""]},
    "null": {"text": [None]},
    "nested lists": {"text": [["a"]]},
    "features": {"features": [1]},
    "a member too many": {"text": "a", "x": 1},
    "too many texts": {"text": ["a"] * 1025},
    "too many inputs": [{"text": "a"}] * 1025,
    "a text of a million characters": {"text": "a" * 1_000_000},
    "no object in a list": [1],
}


@pytest.mark.parametrize("data", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_an_input_that_does_not_fit_says_what_fits(classifier: LoadedModel, data: Any) -> None:
    with pytest.raises(InputInvalid) as caught:
        classifier.predict([Inputs(data, {})])

    assert {"field", "expected", "example"} == caught.value.data.keys()
    assert classifier.predict([Inputs(caught.value.data["example"], {})])[0].rows == 1


def test_unknown_parameters_are_refused(classifier: LoadedModel) -> None:
    with pytest.raises(InputInvalid):
        classifier.predict([Inputs({"text": "a"}, {"top_k": 1})])


def test_code_of_a_folder_is_never_followed(classifier_files: Content, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    code = f"open({str(touched)!r}, 'w')\n".encode()
    named = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    own = changed(classifier_files, "config.json", auto_map=named, _attn_implementation_internal="hub/kernel")
    foreign = changed(classifier_files, "config.json", model_type="evil", auto_map=named)

    same = answer(load(HuggingFace(), own | {"evil.py": code}), {"text": TEXTS})
    error = refusal(foreign | {"evil.py": code})

    assert same == answer(load(HuggingFace(), classifier_files), {"text": TEXTS})
    assert "'evil'" in error.data["seen"]
    assert "evil.py" in error.detail
    assert not touched.exists()


def test_members_that_name_kernels_or_quantizers_do_nothing(classifier: LoadedModel, classifier_files: Content) -> None:
    odd = changed(
        classifier_files,
        "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        attn_implementation="kernels-community/evil",
        _attn_implementation="kernels-community/evil",
        dtype="float16",
        output_hidden_states=True,
        fusion_config={"x": 1},
    )

    assert answer(load(HuggingFace(), odd), {"text": TEXTS}) == answer(classifier, {"text": TEXTS})


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "a hidden size of gigabytes": {"hidden_size": 1 << 19, "intermediate_size": 1 << 19},
    "a number over the bound": {"hidden_size": 1 << 40},
    "a million layers": {"num_hidden_layers": 1_000_000},
    "more layers than tensors": {"num_hidden_layers": 200},
    "another width": {"hidden_size": 32},
    "another vocabulary": {"vocab_size": 1000},
    "no width": {"hidden_size": 0},
    "a width that is text": {"hidden_size": "16"},
    "heads that don't divide": {"num_attention_heads": 3},
    "an unknown activation": {"hidden_act": "os.system"},
    "labels that are no object": {"id2label": 3},
    "a label too many": {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}},
    "one label twice": {"id2label": {"0": "a", "1": "a", "2": "b"}},
    "no position": {"max_position_embeddings": 0},
    "a padding id outside": {"pad_token_id": 5000},
}


@pytest.mark.parametrize("members", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_configuration_that_does_not_fit_the_weights_is_damaged(
    classifier_files: Content, members: dict[str, Any]
) -> None:
    refusal(changed(classifier_files, "config.json", **members), SealedFileDamaged)


def test_missing_parts_are_named(classifier_files: Content) -> None:
    without = {name: data for name, data in classifier_files.items() if name != "tokenizer.json"}
    assert "tokenizer.json" in refusal(without).detail
    bare = {name: data for name, data in classifier_files.items() if name != "model.safetensors"}
    assert "model.safetensors" in refusal(bare).detail
    masked = changed(classifier_files, "config.json", architectures=["BertForQuestionAnswering"])
    assert "BertForQuestionAnswering" in refusal(masked).detail
    assert "modules.json" in refusal(changed(classifier_files, "config.json", architectures=["BertModel"])).detail
    tensors = read_safetensors(classifier_files["model.safetensors"])
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    assert "classifier" in refusal(classifier_files | {"model.safetensors": save(headless)}, SealedFileDamaged).detail


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_broken_parts_are_damage_and_nothing_untyped(classifier_files: Content, name: str) -> None:
    whole = classifier_files[name]
    for broken in (whole[:-30], whole[: len(whole) // 2], b"[" * 2000, b"{}", b"\xff" * 100):
        with (
            memory_files(classifier_files | {name: broken}) as files,
            pytest.raises((SealedFileDamaged, UnsupportedModel)),
        ):
            models.load(files)


def test_a_pickled_model_in_the_folder_is_refused_by_name(classifier_files: Content) -> None:
    out = io.BytesIO()
    torch.save(torch.nn.Linear(1, 1), out)
    bare = {name: data for name, data in classifier_files.items() if name != "model.safetensors"}

    error = refusal(bare | {"pytorch_model.bin": out.getvalue()})

    assert "torch.nn.modules.linear.Linear" in error.data["seen"]
