"""What each column of a row may hold, read off the fitted parts of a scikit-learn model that see it first.

Columns are followed through pipelines, unions, column transformers, searches and ensembles, past imputers, which keep
them, to the encoders, vectorizers and estimators that read them:

| read by | holds |
|---|---|
| an encoder | texts, numbers or truth values, as its categories are; no others where it refuses unknown ones |
| a vectorizer | texts |
| any other part | numbers |
| none | whatever it likes |

Names of columns are for callers: rows come without them, so the parts are told positions (`by_position`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from divault.errors import UnsupportedModel
from divault.models.native import FixedWidth
from divault.models.rows import EXAMPLE_TEXT, LARGEST, MAX_FEATURES, MAX_TEXT_CHARS, NUMBER, Column, RowSpec, TextSpec

_LEVELS = 16
"""Most parts within each other."""
_NAME_CHARS = 80
_WITHIN = ("best_estimator_", "regressor_", "estimator_")
_ANY_KIND = frozenset({"number", "string", "boolean"})
_TEXT = frozenset({"string"})
_Places = Sequence["int | None"]
"""What a part sees: columns of the row, None for what another part made of them."""


def by_position(parts: Iterable[Any]) -> None:
    """Have fitted parts take rows without names, and give none.

    Raises UnsupportedModel for a vectorizer that would read files.
    """
    import numpy as np
    from sklearn.compose import ColumnTransformer

    for part in parts:
        if _is_vectorizer(part) and part.input != "content":
            raise UnsupportedModel(
                f"a vectorizer with input={str(part.input)[:20]!r} reads files that callers name: fit it on texts",
                seen="a vectorizer that reads files",
                supported="vectorizers of texts themselves",
            )
        if isinstance(part, ColumnTransformer) and "transformers_" in vars(part):
            indices = part._transformer_to_input_indices  # noqa: SLF001 - the library says it nowhere else
            part.transformers_ = [
                (name, inner, indices[name][0] if np.isscalar(columns) else indices[name])
                for name, inner, columns in part.transformers_
            ]
        vars(part).pop("feature_names_in_", None)
        # Frames would have to be made with pandas or polars; arrays hold the same numbers.
        vars(part).pop("_sklearn_output_config", None)


def specification(estimator: Any) -> tuple[RowSpec | TextSpec, list[list[int]]]:
    """What the estimator takes, and its columns in groups that take null, or don't, together.

    To be asked before `by_position`, which forgets the names.
    """
    from sklearn.utils import get_tags

    # Isotonic regression has one feature, and no word for it.
    count = 1 if get_tags(estimator).input_tags.one_d_array else _first(estimator, "n_features_in_")
    width = int(count) if isinstance(count, int) and count > 0 else None
    if width is not None and width > MAX_FEATURES:
        raise UnsupportedModel(
            f"the model takes rows of {width} numbers, over {MAX_FEATURES}: select or combine features",
            seen=f"a model of {width} features",
            supported=f"models of up to {MAX_FEATURES} features",
        )
    trace = _Trace([_Seen() for _ in range(width or 0)])
    trace.follow(estimator, None if width is None else range(width))
    if trace.text:
        return TextSpec(), []
    if width is None:
        return RowSpec(None), []
    columns = [seen.column(name) for seen, name in zip(trace.columns, _names(estimator, width), strict=True)]
    groups: dict[Hashable, list[int]] = {}
    for place, seen in enumerate(trace.columns):
        groups.setdefault(frozenset(seen.marks), []).append(place)
    return RowSpec(width, tuple(columns)), list(groups.values())


@dataclass(slots=True)
class _Seen:
    """What is known of one column."""

    computed: bool = False
    """Some part computes with it."""
    read: bool = False
    """Some part reads it as a text."""
    learned: list[Any] | None = None
    """Categories, with None and NaN among them."""
    only: dict[Any, None] | None = None
    """The categories where others are refused."""
    replaced: list[Any] = field(default_factory=list)
    """What imputers take for missing, beside NaN."""
    objects: bool = False
    marks: set[Hashable] = field(default_factory=set)
    """Which parts see it, and how."""

    def column(self, name: str) -> Column:
        """The same for who checks rows."""
        values = [*(self.learned or ()), *self.replaced]
        kinds = self._kinds(values)
        taken = [value for value in values if kinds.intersection(_kinds(value))]
        known = None if self.only is None else dict.fromkeys(v for v in taken if v in self.only or v in self.replaced)
        learned = iter((taken if self.learned else ()) if known is None else known)
        first = next(learned, EXAMPLE_TEXT if kinds == _TEXT else None)
        none = None in values
        return Column(name, kinds, known, first, null=known == {}, none=none, objects=self.objects or none)

    def _kinds(self, values: list[Any]) -> frozenset[str]:
        if self.computed or self.read:
            return NUMBER if self.computed else _TEXT
        return _ANY_KIND if self.learned is None else frozenset(k for v in values for k in _kinds(v)) or NUMBER


class _Trace:
    """Follows columns through fitted parts."""

    def __init__(self, columns: list[_Seen]) -> None:
        self.columns = columns
        self.text = False

    def follow(self, part: Any, places: _Places | None, level: int = 0) -> _Places | None:
        """Note what a part does with the columns that it sees; those that it hands on as they are.

        `places` is None for the whole input where nobody says how many columns that has.
        """
        from sklearn.compose import ColumnTransformer
        from sklearn.impute import SimpleImputer
        from sklearn.pipeline import FeatureUnion, Pipeline

        if level > _LEVELS:
            raise ValueError(f"over {_LEVELS} parts within each other")
        if _keeps_all(part):
            return places
        if isinstance(part, Pipeline):
            return self._pipeline(part, places, level)
        if isinstance(part, ColumnTransformer):
            return self._columns(part, places or (), level)
        if isinstance(part, SimpleImputer):
            return self._imputer(part, places or ())
        if isinstance(part, FeatureUnion):
            self._union(part, places, level)
        else:
            self._reader(part, places, level)
        return ()

    def _reader(self, part: Any, places: _Places | None, level: int) -> None:
        """A part that hands on nothing as it is."""
        from sklearn.impute import MissingIndicator

        if _is_vectorizer(part):
            self.text = self.text or places is None
            self._note(places or (), part, read=True)
        elif _is_encoder(part):
            self._encoder(part, places or ())
        elif isinstance(part, MissingIndicator):
            for index, place in enumerate(places or ()):
                self._note([place], part, index in part.features_)
        else:
            self._estimator(part, places, level)

    def _note(self, places: _Places, part: Any, how: Any = None, *, computed: bool = False, read: bool = False) -> None:
        for column in self._of(places):
            column.marks.add((id(part), how))
            column.computed |= computed
            column.read |= read

    def _of(self, places: _Places) -> list[_Seen]:
        return [self.columns[place] for place in places if place is not None]

    def _pipeline(self, part: Any, places: _Places | None, level: int) -> _Places | None:
        for _, step in part.steps:
            places = self.follow(step, places, level + 1)
            if places is not None and not self._of(places):
                break
        return places

    def _union(self, part: Any, places: _Places | None, level: int) -> None:
        for _, inner in part.transformer_list:
            if inner != "drop":
                # Where they stand among the others, nobody says: they are taken for numbers, as they mostly are.
                self._note(self.follow(inner, places, level + 1) or (), part, computed=True)

    def _columns(self, part: Any, places: _Places, level: int) -> _Places:
        out: dict[int, int | None] = {}
        places = _padded(places, part.n_features_in_)
        for name, inner, _ in part.transformers_:
            indices = part._transformer_to_input_indices[name]  # noqa: SLF001 - the library says it nowhere else
            # What was given no columns was not fitted.
            if inner != "drop" and len(indices):
                kept = self.follow(inner, [places[index] for index in indices], level + 1) or ()
                where = part.output_indices_[name]
                out.update(zip(range(where.start, where.stop), kept, strict=False))
        return [out.get(index) for index in range(max(out, default=-1) + 1)]

    def _encoder(self, part: Any, places: _Places) -> None:
        for place, categories in zip(_padded(places, len(part.categories_)), part.categories_, strict=True):
            learned = [_plain(value) for value in categories.tolist()]
            missing = sum(value is None or _is_nan(value) for value in learned)
            for column in self._of([place]):
                column.marks.add((id(part), missing))
                column.learned = [*(column.learned or ()), *learned]
                column.objects |= categories.dtype.kind in "OUS"
                if getattr(part, "handle_unknown", "ignore") == "error":
                    column.only = dict.fromkeys(v for v in learned if column.only is None or v in column.only)

    def _imputer(self, part: Any, places: _Places) -> _Places:
        self._note(places, part, computed=part.strategy in ("mean", "median"))
        value = _plain(part.missing_values)
        for column in () if _is_nan(value) else self._of(places):
            column.replaced.append(value)
        kept = zip(_padded(places, len(part.statistics_)), part.statistics_.tolist(), strict=True)
        return [place for place, statistic in kept if part.keep_empty_features or not _is_nan(statistic)]

    def _estimator(self, part: Any, places: _Places | None, level: int) -> None:
        """An estimator: what it is made of, or else itself."""
        places = None if places is None else _padded(places, getattr(part, "n_features_in_", len(places)))
        inside = _inside(part, places)
        deep = [(inner, columns) for inner, columns in inside if _is_made_of_parts(inner)]
        for inner, columns in deep:
            self.follow(inner, columns, level + 1)
        if len(deep) < len(inside) or not inside:
            self._note(places or (), part, computed=True)


def _padded(places: _Places, width: int) -> list[int | None]:
    """What a part of so many columns sees: behind those that were handed on stand some that other parts made."""
    return [*places, *[None] * (width - len(places))]


def _keeps_all(part: Any) -> bool:
    from sklearn.preprocessing import FunctionTransformer

    return part is None or part == "passthrough" or (isinstance(part, FunctionTransformer) and part.func is None)


def _is_vectorizer(part: Any) -> bool:
    from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer

    return isinstance(part, CountVectorizer | HashingVectorizer)


def _is_encoder(part: Any) -> bool:
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder

    return isinstance(part, OneHotEncoder | OrdinalEncoder | TargetEncoder)


def _is_made_of_parts(part: Any) -> bool:
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import Pipeline

    return isinstance(part, Pipeline | ColumnTransformer) or bool(_inside(part, None))


def _inside(part: Any, places: _Places | None) -> list[tuple[Any, _Places | None]]:
    """The fitted estimators within an estimator that see its input, each with its columns."""
    from sklearn.calibration import _CalibratedClassifier
    from sklearn.compose import ColumnTransformer
    from sklearn.frozen import FrozenEstimator

    if isinstance(part, _CalibratedClassifier | FrozenEstimator):
        return [(part.estimator, places)]
    first = getattr(part, "_preprocessor", None)
    # Of histogram boosting with categories, whose trees see what that makes of the row.
    if isinstance(first, FixedWidth) and isinstance(first.inner, ColumnTransformer):
        return [(first.inner, places)]
    for name in ("calibrated_classifiers_", "estimators_"):
        if isinstance(found := getattr(part, name, None), list):
            some = getattr(part, "estimators_features_", None)
            columns = (
                [places] * len(found) if some is None or places is None else [[places[i] for i in s] for s in some]
            )
            return list(zip(found, columns, strict=True))
    found = [getattr(part, name, None) for name in _WITHIN]
    width = None if places is None else len(places)
    # One that selects columns gives its estimator only some.
    return [
        (one, places) for one in found if one is not None and width in (None, getattr(one, "n_features_in_", width))
    ]


def _first(part: Any, name: str) -> Any:
    """An attribute of an estimator, or of the first within it that has it."""
    from sklearn.pipeline import Pipeline

    found = getattr(part, name, None)
    if found is None and isinstance(part, Pipeline):
        steps = (step for _, step in part.steps if not _keeps_all(step))
        return _first(next(steps, None), name)
    inside = _inside(part, None)
    return _first(inside[0][0], name) if found is None and inside else found


def _names(estimator: Any, width: int) -> list[str]:
    found = _first(estimator, "feature_names_in_")
    if found is None or len(found) != width:
        return [""] * width
    cut = (str(name)[:_NAME_CHARS] for name in found)
    return [name if name.isprintable() else ascii(name)[1:-1] for name in cut]


def _plain(value: Any) -> Any:
    import numpy as np

    return value.item() if isinstance(value, np.generic) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _kinds(value: Any) -> tuple[str, ...]:
    """What JSON has for a category; nothing for a missing value, or one that callers can't send."""
    if isinstance(value, str):
        return ("string",) if len(value) <= MAX_TEXT_CHARS else ()
    if isinstance(value, bool):
        return ("boolean", "number")
    return ("number",) if isinstance(value, int | float) and -LARGEST <= value <= LARGEST else ()
