"""XGBoost models out of the files that `save_model` writes, UBJSON (`.ubj`) or JSON.

Answers equal `Booster.predict` with all iterations; for a file that `XGBModel.save_model` wrote after early stopping
they equal `XGBModel.predict`, which stops at the best one. A model trained with an objective of one's own gives what
its file says: the sum of its trees, through the objective that stands there.

Source: https://xgboost.readthedocs.io/en/stable/tutorials/saving_model.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from divault.errors import ModelFailed, SealedFileDamaged, UnsupportedModel
from divault.models import xgboost_file
from divault.models.base import LoadedModel, Place, words_of
from divault.models.boosters import Boosted, Boosting, Kind
from divault.models.files import Folder, only_file, the_file
from divault.models.labels import labels_of
from divault.models.runtimes import seed, threads
from divault.values import MemoryFile

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from xgboost import Booster

_DISTRIBUTIONS = ("xgboost-cpu", "xgboost")
_KINDS = {
    **dict.fromkeys(("binary:logitraw",), Kind("prediction")),
    **dict.fromkeys(("rank:pairwise", "rank:ndcg", "rank:map"), Kind("ranking")),
    **dict.fromkeys(("count:poisson", "survival:cox", "survival:aft"), Kind("regression")),
    **{
        f"reg:{name}": Kind("regression")
        for name in (
            *("squarederror", "squaredlogerror", "logistic", "pseudohubererror", "absoluteerror"),
            *("quantileerror", "gamma", "tweedie"),
        )
    },
    "binary:logistic": Kind("classification", 2, probabilities=True),
    "binary:hinge": Kind("classification", 2),
}


class XgboostModelFile:
    """The format: one file of `save_model`."""

    template = "xgboost"

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether the model is one file and that starts as XGBoost's do."""
        file = only_file(files)
        return file is not None and xgboost_file.is_xgboost(file)

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedModel:  # noqa: ARG002 - it runs on the CPU alone
        """The booster. Raises UnsupportedModel (categories, an unknown objective, a newer file), SealedFileDamaged."""
        file = the_file(files, "an XGBoost model")
        found = xgboost_file.read(file)
        kind = _kind(found)
        seed()
        boosting = Boosting(
            format="xgboost",
            library=_distribution(),
            dtype="float32",
            features=found.features,
            outputs=max(found.classes, found.targets, 1),
            kind=kind,
            run=_runner(_loaded(found), found),
        )
        return Boosted(boosting, labels_of(Folder(files).json_object("divault.json")))


def _kind(model: xgboost_file.XgboostModel) -> Kind:
    if model.objective in {"multi:softprob", "multi:softmax"}:
        return Kind("classification", model.classes, probabilities=model.objective == "multi:softprob")
    kind = _KINDS.get(model.objective)
    if kind is None:
        raise _refused(f"an XGBoost model with the objective {model.objective[:80]}")
    if model.targets > 1 and kind.task != "regression":
        raise _refused(f"an XGBoost model with {model.targets} targets of the objective {model.objective}")
    return kind


def _refused(seen: str) -> UnsupportedModel:
    supported = f"{xgboost_file.SUPPORTED}; the objectives are {', '.join(sorted([*_KINDS, 'multi:softprob']))}"
    return UnsupportedModel(f"{seen}; this node loads {supported}", seen=seen, supported=supported)


def _distribution() -> str:
    """The distribution that brings the library: it has two names."""
    installed = (name for name in _DISTRIBUTIONS if any(metadata.distributions(name=name)))
    return next(installed, _DISTRIBUTIONS[0])


def _loaded(model: xgboost_file.XgboostModel) -> Booster:
    import xgboost as xgb

    ours = tuple(int(part) for part in xgb.__version__.split(".")[:2])
    if model.version > ours:
        raise _refused(f"a model of XGBoost {'.'.join(map(str, model.version))}, newer than {xgb.__version__} here")
    booster = xgb.Booster({"nthread": threads(), "device": "cpu"})
    try:
        # Advice about old versions, which nobody reads here.
        with xgb.config_context(verbosity=0):
            booster.load_model(model.content)
    except (xgb.core.XGBoostError, ValueError, TypeError) as err:
        raise SealedFileDamaged(f"XGBoost does not take the file: {words_of(err)}", stage="payload") from None
    return booster


def _runner(booster: Booster, model: xgboost_file.XgboostModel) -> Callable[[NDArray[Any]], NDArray[Any]]:
    import xgboost as xgb

    limits = (0, model.iterations)

    def run(rows: NDArray[Any]) -> NDArray[Any]:
        try:
            if model.booster == "gbtree":
                return booster.inplace_predict(rows, iteration_range=limits, validate_features=False)
            # In place, dart adds in another order, and gblinear can't at all.
            matrix = xgb.DMatrix(rows, nthread=threads())
            return booster.predict(matrix, iteration_range=limits, validate_features=False)
        except xgb.core.XGBoostError as err:
            raise ModelFailed(f"XGBoost: {words_of(err)}", kind="raised") from None

    return run
