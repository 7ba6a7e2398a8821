"""EquiframeClassifier beside scikit-learn's classifiers and imbalanced-learn's resamplers, on imbalanced tables and image embeddings.

    python benchmarks/tabular.py tables                              # digits, wine, breast_cancer, two generated tables
    python benchmarks/tabular.py embeddings --run RUN --data ../shared/data/cifar10
    python benchmarks/tabular.py million                             # 1,000,000 × 128 rows, 100 classes: time and memory of one fit
    python benchmarks/tabular.py tune                                # how the defaults were chosen
    python benchmarks/tabular.py report                              # the tables of docs/scikit-learn.md from the result file

Needs imbalanced-learn beside Equiframe's development tools (pip install imbalanced-learn): only this program uses it.

A seed draws the test rows and the cut to a long tail (tables) or the images of the cut (embeddings), and is every classifier's
random_state. Every classifier has its library's settings, except more iterations for those that warn; LR and MLPClassifier get
standardised columns. Equiframe's defaults were chosen by cross-validation on the training rows of two other seeds (``tune``; of the
real tables some of these are test rows here; the settings tried and their scores: results/tabular_tuning.txt). SMOTE takes
min(5, n_min − 1) neighbours; with a class of one row it does not apply. Measured on test rows as they come (tables: as frequent as
in the source; embeddings: balanced): balanced accuracy, macro-F1; seconds of fit by processor time of all threads, which other
programs disturb least, and by the clock. OMP_NUM_THREADS=1 keeps small fits from waiting for each other's threads. ``--out`` is brought up
to date, table by table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import sklearn
import torch
from frames_speed import cpu_name
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_classification
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from equiframe import EquiframeClassifier, class_profile, long_tail_indices, subset_indices

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
OUT = Path(__file__).parent / "results" / "tabular.json"


# --- the classifiers --------------------------------------------------------------------------------------------------


def logistic(**options: object) -> LogisticRegression:
    return LogisticRegression(max_iter=2000, **options)


def resampled(kind: str, seed: int, smallest: int):
    """LR behind one of imbalanced-learn's resamplers; None where it does not apply."""
    from imblearn.over_sampling import SMOTE, RandomOverSampler
    from imblearn.pipeline import make_pipeline as make_resampling_pipeline

    if kind == "smote" and smallest < 2:
        return None
    sampler = (
        SMOTE(k_neighbors=min(5, smallest - 1), random_state=seed)
        if kind == "smote"
        else RandomOverSampler(random_state=seed)
    )
    return make_resampling_pipeline(StandardScaler(), sampler, logistic())


CLASSIFIERS: dict[str, Callable] = {  # name → (seed, rows of the smallest class) → classifier
    "Equiframe": lambda seed, _: EquiframeClassifier(random_state=seed),
    "Equiframe, no hidden layer": lambda seed, _: EquiframeClassifier(hidden_layer_sizes=(), random_state=seed),
    "Equiframe, method logit-adjusted": lambda seed, _: EquiframeClassifier("logit-adjusted", random_state=seed),
    "Equiframe, method etf-ce": lambda seed, _: EquiframeClassifier("etf-ce", random_state=seed),
    "LR": lambda seed, _: make_pipeline(StandardScaler(), logistic()),
    "LR, balanced": lambda seed, _: make_pipeline(StandardScaler(), logistic(class_weight="balanced")),
    "RandomOverSampler + LR": lambda seed, smallest: resampled("random", seed, smallest),
    "SMOTE + LR": lambda seed, smallest: resampled("smote", seed, smallest),
    "MLPClassifier": lambda seed, _: make_pipeline(StandardScaler(), MLPClassifier(max_iter=3000, random_state=seed)),
    "HistGradientBoosting": lambda seed, _: HistGradientBoostingClassifier(random_state=seed),
    "HistGradientBoosting, balanced": lambda seed, _: HistGradientBoostingClassifier(
        class_weight="balanced", random_state=seed
    ),
}


# --- the tables -------------------------------------------------------------------------------------------------------


def cut(X: np.ndarray, y: np.ndarray, ratio: float, seed: int) -> Split:
    """Two fifths of the rows for test, the rest cut to a long tail."""
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.4, stratify=y, random_state=seed)
    rows = long_tail_indices(y, y.max() + 1, ratio, seed=seed)
    return X[rows], y[rows], X_test, y_test


def generated(seed: int, **options: object) -> Split:
    X, y = make_classification(random_state=seed, flip_y=0.01, **options)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=seed)
    return X, y, X_test, y_test


TAIL = 100.0 ** (-np.arange(10) / 9)
TABLES: dict[str, Callable[[int], Split]] = {
    "digits, ratio 50": lambda seed: cut(*load_digits(return_X_y=True), 50, seed),
    "wine, ratio 10": lambda seed: cut(*load_wine(return_X_y=True), 10, seed),
    "breast_cancer, ratio 20": lambda seed: cut(*load_breast_cancer(return_X_y=True), 20, seed),
    "generated, 2 classes, 1 %": lambda seed: generated(
        seed, n_samples=6_000, n_features=20, n_informative=8, weights=[0.99], class_sep=0.8
    ),
    "generated, 10 classes, ratio 100": lambda seed: generated(
        seed, n_samples=6_000, n_features=30, n_informative=12, n_classes=10, n_clusters_per_class=2,
        weights=list(TAIL / TAIL.sum()), class_sep=1.5,
    ),
}  # fmt: skip


def embed(run: Path, data: str, seeds: range) -> dict[int, Split]:
    """The images of a data set, cut by each seed to 1,000 … 10 of a class, as the features that a finished run's network makes of them,
    float32; for test, its first 5,000 test images."""
    from equiframe.data.batches import Loader
    from equiframe.data.sources import load_dataset
    from equiframe.model import load_classifier

    model, card = load_classifier(run)
    dataset = load_dataset(data)
    labels = dataset.train.labels
    counts = class_profile(labels.max() + 1, 1000, 100)
    cuts = {seed: subset_indices(labels, counts, seed=seed) for seed in seeds}
    kept = np.unique(np.concatenate(list(cuts.values())))

    def features(images) -> np.ndarray:
        loader = Loader(
            images, batch_size=256, image_size=card.image_size, mean=card.mean, std=card.std, device=torch.device("cpu")
        )
        with torch.inference_mode():
            return torch.cat([model.backbone(batch.images) for batch in loader.ordered()]).numpy()

    X, X_test = features(dataset.train.subset(kept)), features(dataset.test.subset(np.arange(5000)))
    rows = {seed: np.searchsorted(kept, chosen) for seed, chosen in cuts.items()}
    return {seed: (X[rows[seed]], labels[cuts[seed]], X_test, dataset.test.labels[:5000]) for seed in seeds}


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(name: str, split: Callable[[int], Split], seeds: range) -> dict[str, object]:
    rows: dict[str, list[dict[str, float]]] = {label: [] for label in CLASSIFIERS}
    for seed in seeds:
        X, y, X_test, y_test = split(seed)
        counts = np.bincount(y)
        for label, make in CLASSIFIERS.items():
            model = make(seed, counts.min())
            if model is None:
                continue
            clock, processor = time.perf_counter(), time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("error", category=sklearn.exceptions.ConvergenceWarning)
                model.fit(X, y)
            processor, clock = time.process_time() - processor, time.perf_counter() - clock
            predicted = model.predict(X_test)
            rows[label].append(
                {
                    "balanced_accuracy": 100 * balanced_accuracy_score(y_test, predicted),
                    "macro_f1": 100 * f1_score(y_test, predicted, average="macro"),
                    "processor_seconds": processor,
                    "seconds": clock,
                }
            )
    results = {
        label: {
            "n": len(found),
            **{
                key: {"mean": statistics.mean(values), "sd": statistics.stdev(values), "each": values}
                for key in found[0]
                for values in [[row[key] for row in found]]
            },
        }
        for label, found in rows.items()
        if len(found) > 1
    }
    print(
        f"\n{name}: {X.shape[0]:,} × {X.shape[1]} training rows of the last seed, counts {counts.tolist()}, {len(seeds)} seeds"
    )
    for label, found in results.items():
        values = [f"{found[k]['mean']:6.1f} ± {found[k]['sd']:4.1f}" for k in ("balanced_accuracy", "macro_f1")]
        times = [f"{found[k]['mean']:7.2f} s" for k in ("processor_seconds", "seconds")]
        print(f"  {label:34}", *values, *times, f"n = {found['n']}", flush=True)
    return {
        "rows": X.shape[0],
        "columns": X.shape[1],
        "counts": counts.tolist(),
        "seeds": len(seeds),
        "results": results,
    }


def million() -> dict[str, object]:
    """One fit of 1,000,000 × 128 rows of 100 classes, float32, with every default; memory beyond what stood before it."""
    random = np.random.default_rng(0)
    counts = 100.0 ** (-np.arange(100) / 99)
    y = random.choice(100, 1_010_000, p=counts / counts.sum())
    X = random.standard_normal((len(y), 128), dtype=np.float32)
    X += 0.35 * random.standard_normal((100, 128), dtype=np.float32)[y]
    X, X_test, y, y_test = X[:1_000_000].copy(), X[1_000_000:], y[:1_000_000], y[1_000_000:]
    EquiframeClassifier(max_iter=1).fit(X[:200], y[:200] % 2)  # libraries load
    with memory_watch() as highest:
        model = EquiframeClassifier(random_state=0)
        clock, processor = time.perf_counter(), time.process_time()
        model.fit(X, y)
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
    start = time.perf_counter()
    predicted = model.predict(X_test)
    found = {
        "rows": len(X), "columns": X.shape[1], "classes": 100, "data_bytes": X.nbytes, "passes": model.n_iter_,
        "batch_size": model._batch_size(len(X)), "seconds": clock, "processor_seconds": processor,
        "extra_bytes": highest["bytes"], "predict_10_000_seconds": time.perf_counter() - start,
        "balanced_accuracy": 100 * balanced_accuracy_score(y_test, predicted),
    }  # fmt: skip
    start = time.perf_counter()
    nearest = (
        (X_test @ (means := np.stack([X[y == k].mean(0) for k in range(100)])).T) - (means**2).sum(1) / 2
    ).argmax(1)
    found["nearest_mean_balanced_accuracy"] = 100 * balanced_accuracy_score(
        y_test, nearest
    )  # near the best possible here
    print(json.dumps(found, indent=1))
    return found


class memory_watch:
    """The most resident memory inside beyond that at the start, looked at 50 times a second."""

    def __enter__(self) -> dict[str, int]:
        self.found, self.over = {"bytes": 0}, threading.Event()
        start = self.resident()

        def watch() -> None:
            while not self.over.wait(0.02):
                self.found["bytes"] = max(self.found["bytes"], self.resident() - start)

        self.thread = threading.Thread(target=watch)
        self.thread.start()
        return self.found

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @staticmethod
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def tune(tables: dict[str, Callable[[int], Split]], grid: Iterator[dict[str, object]]) -> None:
    """Mean balanced accuracy in 3-fold cross-validation on the training rows of two seeds that are not compared."""
    for options in grid:
        scores = []
        start = time.process_time()
        for split in tables.values():
            for seed in (100, 101):
                X, y, _, _ = split(seed)
                folds = StratifiedKFold(3, shuffle=True, random_state=seed)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a class of fewer rows than folds
                    for train, test in folds.split(X, y):
                        model = EquiframeClassifier(**options, random_state=seed).fit(X[train], y[train])
                        scores.append(balanced_accuracy_score(y[test], model.predict(X[test])))
        means = np.array(scores).reshape(len(tables), -1).mean(1)
        print(
            f"{means.mean():.4f}",
            np.round(means, 3).tolist(),
            f"{time.process_time() - start:.0f} s",
            options,
            flush=True,
        )


def markdown(parts: dict[str, dict]) -> str:
    """Tables for a page: balanced accuracy and macro-F1 by classifier and data, best mean of each in bold; then seconds of fit."""
    parts = {name: part for name, part in parts.items() if "results" in part}
    lines = []
    for key, title in (
        ("balanced_accuracy", "balanced accuracy"),
        ("macro_f1", "macro-F1"),
        ("processor_seconds", "seconds of fit"),
    ):
        lines += [f"| {title} | " + " | ".join(parts) + " |", "|---|" + "---|" * len(parts)]
        for label in CLASSIFIERS:
            cells = []
            for part in parts.values():
                found = {name: result[key] for name, result in part["results"].items()}
                if label not in found:
                    cells.append("–")
                elif key == "processor_seconds":
                    cells.append(f"{found[label]['mean']:.2f}")
                else:
                    best = max(result["mean"] for result in found.values())
                    text = f"{found[label]['mean']:.1f} ± {found[label]['sd']:.1f}"
                    cells.append(f"**{text}**" if found[label]["mean"] == best else text)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def record(out: Path, part: str, found: dict[str, object]) -> None:
    """Bring the part of a result file up to date, with when and on what it was measured."""
    result = json.loads(out.read_text()) if out.is_file() else {"what": __doc__.splitlines()[0], "parts": {}}
    found |= {
        "date": datetime.now(timezone.utc).date().isoformat(), "cpu": cpu_name(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "scikit_learn": sklearn.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    result["parts"][part] = found
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tables", "embeddings", "million", "tune", "report"))
    parser.add_argument("--only", nargs="*", help="tables by name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--run", type=Path, help="a finished run, whose network makes the embeddings")
    parser.add_argument("--data", help="images to embed")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    tables = {name: split for name, split in TABLES.items() if not arguments.only or name in arguments.only}
    if arguments.what == "report":
        print(markdown(json.loads(arguments.out.read_text())["parts"]))
    elif arguments.what == "million":
        record(arguments.out, "million", million())
    elif arguments.what == "tune":
        first = {"hidden_layer_sizes": (128,), "learning_rate_init": 3e-3, "alpha": 1e-2}
        changes: list[dict[str, object]] = [
            {}, {"learning_rate_init": 1e-3}, {"alpha": 1.0}, {"method_options": {"norm": "batch"}}, {"alpha": 5.0},
            {"alpha": 1.0, "learning_rate_init": 1e-2}, {"alpha": 1.0, "max_iter": 30},
            {"alpha": 1.0, "hidden_layer_sizes": ()}, {"alpha": 1.0, "hidden_layer_sizes": (256,)},
        ]  # fmt: skip
        grid = iter([first | change for change in changes])
        tune(tables, grid)
    elif arguments.what == "tables":
        for name, split in tables.items():
            record(arguments.out, name, compare(name, split, range(arguments.seeds)))
    else:
        if arguments.run is None or arguments.data is None:
            parser.error("embeddings need --run and --data")
        splits = embed(arguments.run, arguments.data, range(arguments.seeds))
        split = splits.__getitem__

        name = f"embeddings of {Path(arguments.data).name}, ratio 100"
        record(arguments.out, name, compare(name, split, range(arguments.seeds)))


if __name__ == "__main__":
    main()
