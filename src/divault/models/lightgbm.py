"""LightGBM models out of the text file that `save_model` writes.

Answers equal `Booster.predict`. A file without an objective, as of a model trained with one of its own, gives the plain
sums of its trees.

Source: https://lightgbm.readthedocs.io/en/stable/pythonapi/lightgbm.Booster.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from divault.errors import ModelFailed, SealedFileDamaged, UnsupportedModel
from divault.models import lightgbm_file
from divault.models.base import LoadedModel, Place, words_of
from divault.models.boosters import Boosted, Boosting, Kind
from divault.models.files import Folder, only_file, the_file
from divault.models.labels import labels_of
from divault.models.runtimes import seed, threads
from divault.values import MemoryFile

if TYPE_CHECKING:
    from lightgbm import Booster
    from numpy.typing import NDArray

_REGRESSIONS = (
    *("regression", "regression_l1", "huber", "fair", "poisson", "quantile", "mape", "gamma", "tweedie"),
    *("cross_entropy", "cross_entropy_lambda"),
)
_KINDS = {
    "": Kind("prediction"),
    **dict.fromkeys(("lambdarank", "rank_xendcg"), Kind("ranking")),
    **dict.fromkeys(_REGRESSIONS, Kind("regression")),
    "binary": Kind("classification", 2, probabilities=True),
}


class LightgbmModelFile:
    """The format: one text file of `save_model`."""

    template = "lightgbm"

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether the model is one file and that starts as LightGBM's do."""
        file = only_file(files)
        return file is not None and lightgbm_file.is_lightgbm(file)

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedModel:  # noqa: ARG002 - it runs on the CPU alone
        """The booster. Raises UnsupportedModel (categories, linear trees, an unknown objective), SealedFileDamaged."""
        file = the_file(files, "a LightGBM model")
        found = lightgbm_file.read(file)
        kind = _kind(found)
        seed()
        boosting = Boosting(
            format="lightgbm",
            library="lightgbm",
            dtype="float64",
            features=found.features,
            outputs=found.outputs,
            kind=kind,
            run=_runner(_loaded(found.text)),
        )
        return Boosted(boosting, labels_of(Folder(files).json_object("divault.json")))


def _kind(model: lightgbm_file.LightgbmModel) -> Kind:
    if model.objective in {"multiclass", "multiclassova"}:
        return Kind("classification", model.outputs, probabilities=True)
    kind = _KINDS.get(model.objective)
    if kind is None:
        known = ", ".join(sorted([*filter(None, _KINDS), "multiclass", "multiclassova"]))
        seen = f"a LightGBM model with the objective {model.objective}"
        supported = f"{lightgbm_file.SUPPORTED}; the objectives are {known}"
        raise UnsupportedModel(f"{seen}; this node loads {supported}", seen=seen, supported=supported)
    return kind


def _loaded(text: str) -> Booster:
    import lightgbm as lgb

    try:
        return lgb.Booster(model_str=text)
    except (lgb.basic.LightGBMError, ValueError) as err:
        raise SealedFileDamaged(f"LightGBM does not take the file: {words_of(err)}", stage="payload") from None


def _runner(booster: Booster) -> Callable[[NDArray[Any]], NDArray[Any]]:
    import lightgbm as lgb
    import numpy as np

    def run(rows: NDArray[Any]) -> NDArray[Any]:
        try:
            return np.asarray(booster.predict(rows, validate_features=False, num_threads=threads()))
        except lgb.basic.LightGBMError as err:
            raise ModelFailed(f"LightGBM: {words_of(err)}", kind="raised") from None

    return run
