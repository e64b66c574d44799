"""The demo's model: logistic regression on scikit-learn's bundled breast-cancer set (569 tumours, 30 measurements).

Real data, a real split and a real score; nothing is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model on disk, and the part of the data that it never saw."""

    path: Path
    """joblib file of a scikit-learn pipeline."""
    rows: list[list[float]]
    """Test rows, 30 features each."""
    labels: list[int]
    """True classes of the test rows: 0 malignant, 1 benign."""
    accuracy: float
    """Share of test rows that the model gets right here, before it is sealed."""
    classes: tuple[str, ...]


def train(folder: Path) -> Trained:
    """Train on 80 % of the set and keep 20 % for the test; the split is fixed by a seed."""
    import joblib
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_breast_cancer()
    train_x, test_x, train_y, test_y = train_test_split(
        data.data, data.target, test_size=0.2, random_state=20, stratify=data.target
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train_x, train_y)
    path = folder / "breast-cancer.joblib"
    joblib.dump(model, path)
    return Trained(
        path=path,
        rows=test_x.tolist(),
        labels=test_y.tolist(),
        accuracy=float(model.score(test_x, test_y)),
        classes=tuple(str(name) for name in data.target_names),
    )
