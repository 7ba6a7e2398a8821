"""The scikit-learn classifier: scikit-learn's own checks, its tools around it, and what its parameters promise."""

import copy
import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from equiframe import EquiframeClassifier, InputError, SimplexFrame
from equiframe.method import METHODS

QUICK = {"hidden_layer_sizes": (8,), "max_iter": 12, "learning_rate_init": 0.03, "random_state": 0}


def quick(**changes) -> EquiframeClassifier:
    return EquiframeClassifier(**(QUICK | changes))


@pytest.fixture(scope="module")
def table():
    """Three classes of 300, 80 and 20 rows, of which the rare one overlaps the others; then 300 balanced rows."""
    draw = {"n_features": 8, "n_informative": 5, "n_classes": 3, "class_sep": 0.8, "random_state": 1, "flip_y": 0}
    X, y = make_classification(3000, **draw)
    rows = np.concatenate([np.flatnonzero(y == k)[:n] for k, n in enumerate((300, 80, 20))])
    test = np.concatenate([np.flatnonzero(y == k)[300:400] for k in range(3)])
    return X[rows], y[rows], X[test], y[test]


@parametrize_with_checks([EquiframeClassifier(hidden_layer_sizes=(), max_iter=15, learning_rate_init=0.1)])
def test_scikit_learns_checks(estimator, check, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")  # without, scikit-learn skips a check
    check(estimator)


# --- as scikit-learn's other classifiers ------------------------------------------------------------------------------


def test_in_a_pipeline_a_grid_search_and_calibration(table):
    X, y, X_test, _ = table
    names = np.array(["common", "less", "rare"])[y]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), quick(standardise=False)),
        {"equiframeclassifier__method": ["etf-la", "etf-ce"], "equiframeclassifier__method_options": [None, {"norm": "batch"}]},
        scoring="balanced_accuracy",
        cv=2,
    ).fit(X, names)  # fmt: skip
    assert set(search.predict(X_test)) <= {"common", "less", "rare"}
    assert search.best_score_ > 0.5
    calibrated = CalibratedClassifierCV(quick(), cv=2).fit(X, names)
    np.testing.assert_allclose(calibrated.predict_proba(X_test).sum(1), 1)
    # calibrated on rows as frequent as the training's, and balanced without: the common class is more probable
    assert (
        calibrated.predict_proba(X_test)[:, 0].mean() > quick().fit(X, names).predict_proba(X_test)[:, 0].mean() + 0.1
    )
    assert cross_val_score(quick(), X, y, cv=2, scoring="balanced_accuracy").min() > 0.4


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_data_frames_name_their_columns(kind, table):
    X, y, _, _ = table
    frame = importlib.import_module(kind).DataFrame({f"c{i}": column for i, column in enumerate(X.T)})
    labels = importlib.import_module(kind).Series(np.array(["a", "b", "c"])[y])
    model = quick().fit(frame, labels)
    assert model.feature_names_in_.tolist() == [f"c{i}" for i in range(8)]
    assert model.n_features_in_ == 8
    plain = quick().fit(X, y)
    np.testing.assert_allclose(model.predict_proba(frame), plain.predict_proba(X), rtol=1e-9)
    np.testing.assert_array_equal(model.classes_[plain.predict(X)], model.predict(frame))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[[*frame.columns[1:], "c0"]])


def test_sparse_rows_are_dense_ones_a_batch_at_a_time(table, monkeypatch):
    X, y, X_test, _ = table
    X, X_test = np.where(X > 0.5, X, 0), np.where(X_test > 0.5, X_test, 0)
    largest = []
    toarray = scipy.sparse.csr_matrix.toarray
    monkeypatch.setattr(
        scipy.sparse.csr_matrix, "toarray", lambda self, *a: (largest.append(self.shape[0]), toarray(self, *a))[1]
    )
    sparse = quick(batch_size=64).fit(scipy.sparse.csr_matrix(X), y)
    assert max(largest) <= 64
    dense = quick(batch_size=64).fit(X, y)
    np.testing.assert_allclose(
        sparse.predict_proba(scipy.sparse.csr_matrix(X_test)), dense.predict_proba(X_test), rtol=1e-6
    )


def test_precision_is_that_of_the_rows(table):
    X, y, _, _ = table
    for dtype in (np.float32, np.float64):
        model = quick().fit(X.astype(dtype), y)
        assert model.predict_proba(X.astype(dtype)).dtype == dtype
        assert {p.dtype for p in model.network_.parameters()} == {getattr(torch, dtype.__name__)}
    assert quick().fit((10 * X).astype(int), y).predict_proba(X).dtype == np.float64


def test_pickles_clones_and_copies_predict_alike(table):
    X, y, X_test, _ = table
    model = quick(class_weight={2: 3.0}).fit(X, y)
    wanted = model.predict_proba(X_test)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), clone(model).fit(X, y)):
        np.testing.assert_array_equal(other.predict_proba(X_test), wanted)
    assert not hasattr(clone(model), "network_")


def test_outputs_agree(table):
    X, y, X_test, _ = table
    model = quick().fit(X, y)
    scores, shares = model.decision_function(X_test), model.predict_proba(X_test)
    assert scores.shape == shares.shape == (300, 3)
    np.testing.assert_allclose(shares, np.exp(scores) / np.exp(scores).sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(model.predict(X_test), scores.argmax(1))
    two = quick().fit(X, y == 2)
    assert two.decision_function(X_test).shape == (300,)
    np.testing.assert_array_equal(two.predict(X_test), two.decision_function(X_test) > 0)
    np.testing.assert_allclose(two.predict_proba(X_test)[:, 1], 1 / (1 + np.exp(-two.decision_function(X_test))), rtol=1e-6)  # fmt: skip


# --- what it computes -------------------------------------------------------------------------------------------------


def test_without_hidden_layers_it_is_logistic_regression():
    """etf-ce on a simplex in K−1 dimensions has the optimum of multinomial logistic regression."""
    X, y = make_classification(400, 5, n_informative=3, n_classes=3, class_sep=0.6, flip_y=0.1, random_state=3)
    model = quick(method="etf-ce", hidden_layer_sizes=(), alpha=0, max_iter=250, learning_rate_init=0.1, batch_size=400)  # fmt: skip
    ours = model.fit(X, y).predict_proba(X)
    theirs = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    cosines = model.network_.head.class_vectors() @ model.network_.head.class_vectors().T
    torch.testing.assert_close(cosines, 1.5 * torch.eye(3).double() - 0.5, atol=1e-6, rtol=0)
    assert isinstance(model.network_.head.frame, SimplexFrame)


def test_only_the_frame_stays(table):
    X, y, _, _ = table
    model = quick()
    model.partial_fit(X, y, classes=[0, 1, 2])
    before = {name: value.clone() for name, value in model.network_.state_dict().items()}
    model.partial_fit(X, y)
    same = {name for name, value in model.network_.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in before if name.startswith("head.")} == {n for n in same if n.startswith("head.")} != set()
    assert not any(name.startswith("body.") for name in same)


@pytest.mark.parametrize(
    "method", [name for name, m in METHODS.items() if not {"second_stage", "sampler"} & set(m.fields)]
)
def test_every_method_trains(method, table):
    X, y, X_test, _ = table
    model = quick(method=method, max_iter=30).fit(X, y)
    assert model.loss_curve_[-1] < model.loss_curve_[0]
    assert balanced_accuracy_score(y, model.predict(X)) > 0.35  # methods that ignore class counts miss the rare class
    assert np.isfinite(model.predict_proba(X_test)).all()


def test_a_logit_adjusted_method_finds_the_rare_class(table):
    X, y, X_test, y_test = table
    la, ce = (quick(method=m, max_iter=40).fit(X, y).predict(X_test) for m in ("etf-la", "etf-ce"))
    assert (
        recall_score(y_test, la, labels=[2], average="macro")
        > recall_score(y_test, ce, labels=[2], average="macro") + 0.1
    )
    assert balanced_accuracy_score(y_test, la) > balanced_accuracy_score(y_test, ce) + 0.05


def test_many_classes_take_a_frame_of_fewer_dimensions():
    X = np.random.default_rng(0).normal(size=(1100, 4)).astype(np.float32)
    model = quick(max_iter=1).fit(np.repeat(X, 2, 0), np.repeat(np.arange(1100), 2))
    assert model.network_.head.dim == 1024
    assert model.decision_function(X[:2]).shape == (2, 1100)


# --- weights ----------------------------------------------------------------------------------------------------------


def converged(X, y, sample_weight=None, **changes):
    settings = {"hidden_layer_sizes": (), "alpha": 0, "max_iter": 150, "learning_rate_init": 0.1, "batch_size": 10**6}
    return quick(**(settings | changes)).fit(X, y, sample_weight)  # fmt: skip


@pytest.fixture(scope="module")
def two():
    """One column, two normal classes of 400 and 40 rows, one standard deviation apart."""
    random = np.random.default_rng(0)
    return np.concatenate([random.normal(0, 1, 400), random.normal(1, 1, 40)])[:, None], np.repeat([0, 1], [400, 40])


def test_class_weight_and_logit_adjustment(two):
    """A dict multiplies what the adjusted loss makes equal; "balanced" takes the adjustment's place, never beside it."""
    X, y = two
    at = np.array([[0.5]])  # halfway, where balanced classes are equally probable
    plain, balanced = converged(X, y), converged(X, y, class_weight="balanced")
    weighted_ce = converged(X, y, method="etf-ce", class_weight="balanced")
    np.testing.assert_allclose(balanced.predict_proba(X), weighted_ce.predict_proba(X), atol=1e-9)
    theirs = LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-8).fit(X, y)
    np.testing.assert_allclose(balanced.predict_proba(X), theirs.predict_proba(X), atol=2e-3)
    np.testing.assert_allclose(plain.decision_function(at), balanced.decision_function(at), atol=0.25)
    # a weight of w moves the log odds by log w, with and without adjustment
    for method in ("etf-la", "etf-ce"):
        one = converged(X, y, method=method).decision_function(at)
        ten = converged(X, y, method=method, class_weight={1: 10.0}).decision_function(at)
        np.testing.assert_allclose(ten - one, np.log(10), atol=0.25)
    # the class counts that are reported know of neither
    np.testing.assert_array_equal(balanced.class_counts_, [400, 40])


@pytest.mark.parametrize("method", ["etf-la", "etf-dr-balanced", "nearest-frame-la", "ldam-drw", "class-weighted"])
def test_a_weight_is_so_many_rows(method, table):
    X, y, X_test, _ = table
    weights = np.random.default_rng(0).integers(0, 4, len(y))
    settings = {"method": method, "batch_size": 10**6}
    weighted = quick(**settings).fit(X, y, sample_weight=weights)
    repeated = quick(**settings).fit(np.repeat(X, weights, 0), np.repeat(y, weights))
    np.testing.assert_allclose(weighted.predict_proba(X_test), repeated.predict_proba(X_test), atol=5e-4)
    np.testing.assert_array_equal(weighted.class_counts_, repeated.class_counts_)
    if method == "ldam-drw":  # effective numbers are of counts, not of shares
        return
    scaled = quick(**settings).fit(X, y, sample_weight=weights / 1000)
    np.testing.assert_allclose(scaled.predict_proba(X_test), weighted.predict_proba(X_test), atol=5e-4)
    plain = quick(**settings).fit(X, y)
    assert not np.allclose(plain.predict_proba(X_test), weighted.predict_proba(X_test), atol=5e-2)


# --- how it trains ----------------------------------------------------------------------------------------------------


def test_parts_of_the_data_one_after_another(table):
    X, y, X_test, y_test = table
    model = quick(method_options={"tau": 1.0})
    order = np.random.default_rng(0).permutation(len(y))
    with pytest.raises(ValueError, match="classes must be passed"):
        quick().partial_fit(X, y)
    for _ in range(5):
        for part in np.array_split(order, 8):
            model.partial_fit(X[part], y[part], classes=[0, 1, 2])
    np.testing.assert_array_equal(model.class_counts_, 5 * np.bincount(y))
    np.testing.assert_allclose(model.network_.mean.numpy(), X.mean(0), rtol=1e-9)
    assert model.n_iter_ == len(model.loss_curve_) == 40
    assert balanced_accuracy_score(y_test, model.predict(X_test)) > 0.5
    with pytest.raises(InputError, match="label 3 is none of the classes 0, 1, 2"):
        model.partial_fit(X[:2], [0, 3])
    one = quick().partial_fit(X[:1], y[:1], classes=[0, 1, 2])  # one row, of one class
    assert one.predict(X).shape == y.shape


def test_early_stopping_keeps_the_best(table):
    X, y, _, _ = table
    y = y.copy()
    y[np.flatnonzero(y == 2)[1:]] = 1  # a class of one row stays in training
    model = quick(early_stopping=True, max_iter=100, n_iter_no_change=3, learning_rate_init=0.1).fit(X, y)
    assert model.n_iter_ == len(model.validation_scores_) < 100
    assert max(model.validation_scores_) > max(model.validation_scores_[-3:]) - model.tol
    assert model.class_counts_.tolist() == [270, 89, 1]
    best = int(np.argmax(model.validation_scores_))
    again = quick(early_stopping=True, max_iter=100, n_iter_no_change=3, learning_rate_init=0.1, tol=1e9).fit(X, y)
    assert again.n_iter_ == 4  # nothing rises by that much
    assert best < model.n_iter_


def test_columns_are_standardised_a_chunk_at_a_time(table, monkeypatch):
    X, y, _, _ = table
    weights = np.random.default_rng(0).random(len(y))
    monkeypatch.setattr("equiframe.estimator.CHUNK", 100 * X.shape[1])
    for rows in (X, scipy.sparse.csr_matrix(X)):
        network = quick(max_iter=1).fit(rows, y, weights).network_
        mean = np.average(X, axis=0, weights=weights)
        np.testing.assert_allclose(network.mean, mean, rtol=1e-9)
        np.testing.assert_allclose(network.scale**2, np.average((X - mean) ** 2, axis=0, weights=weights), rtol=1e-9)


def test_automatic_sizes():
    sizes = {100: 100, 5_000: 200, 20_000: 400, 1_000_000: 4096}
    assert {num: quick()._batch_size(num) for num in sizes} == sizes
    assert quick(batch_size=64)._batch_size(1000) == 64


def test_warm_start_goes_on(table):
    X, y, _, _ = table
    model = quick(warm_start=True).fit(X, y)
    first, means = model.loss_, model.network_.mean.clone()
    model.fit(X[:390], y[:390])
    assert model.n_iter_ == 24
    assert model.loss_ < first
    assert torch.equal(model.network_.mean, means)
    with pytest.raises(InputError, match="warm_start goes on with the classes 0, 1, 2; these rows have 0, 1"):
        model.fit(X[:300], y[:300] % 2 + (np.arange(300) % 2))
    assert quick().fit(X, y).fit(X, y).n_iter_ == 12


def test_a_seed_is_a_model_and_torch_is_left_as_found(table):
    X, y, X_test, _ = table
    generator, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            one = quick(method="etf-sampled-ce", method_options={"sampled_classes": 2}).fit(X, y).predict_proba(X_test)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            two = quick(method="etf-sampled-ce", method_options={"sampled_classes": 2}).fit(X, y).predict_proba(X_test)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(one, two)
    assert torch.equal(torch.get_rng_state(), generator)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert not np.array_equal(quick(random_state=1).fit(X, y).predict_proba(X_test), quick().fit(X, y).predict_proba(X_test))  # fmt: skip


def test_verbose_tells_each_pass(table, capsys):
    X, y, _, _ = table
    quick(verbose=True, max_iter=2).fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("pass 2/2: loss 0.")
    quick(verbose=True, max_iter=1, early_stopping=True).fit(X, y)
    assert "recall of held-out rows 0." in capsys.readouterr().out


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_iter": 0}, "max_iter must be a whole number above 0, or 'auto', got 0"),
        ({"batch_size": "all"}, "batch_size must be a whole number above 0, or 'auto', got 'all'"),
        ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes must be whole numbers above 0"),
        ({"hidden_layer_sizes": "8"}, "hidden_layer_sizes must be whole numbers above 0"),
        ({"learning_rate_init": 0}, "learning_rate_init must be above 0"),
        ({"alpha": -1}, "alpha must be at least 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be between 0 and 1"),
        ({"class_weight": "even"}, "class_weight must be a dict, 'balanced' or None, got 'even'"),
        ({"class_weight": {0: 0, 1: 0, 2: 0}}, "leave every row with weight 0"),
        ({"method": "etf-rd"}, "unknown method 'etf-rd'; did you mean 'etf-dr'"),
        ({"method": "crt"}, "method 'crt' has a second stage"),
        (
            {"method": "etf-mix-la", "method_options": {"sampler": "instance"}},
            r"'etf-mix-la' mixes images \(mixup, cutmix\), which belongs to runs on images",
        ),
        ({"method": "etf-sqrt-la"}, "sampler 'square-root' of method 'etf-sqrt-la' belongs to runs on images"),
        ({"method_options": {"momentum": 1}}, "field 'momentum' does not belong"),
        ({"method_options": "tau"}, "method_options must be a dict"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"learning_rate_init": 1e200, "max_iter": 50}, "the loss is nan after"),
    ],
)
def test_parameters_out_of_range(changes, message, table):
    X, y, _, _ = table
    with pytest.raises(ValueError, match=message):
        quick(**changes).fit(X, y)


def test_rows_that_cannot_be_classified(table):
    X, y, _, _ = table
    with pytest.raises(InputError, match="at least two classes; these rows have one class: 0"):
        quick().fit(X[:100], y[:100])
    with pytest.raises(ValueError, match=r"every sample_weight is 0|at least one non-zero"):
        quick().fit(X, y, sample_weight=np.zeros(len(y)))
    with pytest.raises(InputError, match="no class has two"):
        quick(early_stopping=True).fit(X[:3], [0, 1, 2])
    with pytest.raises(InputError, match="early_stopping=False"):
        quick(early_stopping=True).partial_fit(X, y, classes=[0, 1, 2])


def test_every_length_of_hidden_layers_is_taken(table):
    X, y, _, _ = table
    for sizes, layers in ((4, 2), ((), 1), ([5, 4], 3), (np.array([3]), 2)):
        network = quick(hidden_layer_sizes=sizes, max_iter=1).fit(X, y).network_
        assert sum(isinstance(m, torch.nn.Linear) for m in network.body) == layers


def test_the_tables_of_the_page_are_those_measured(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import tabular

    parts = json.loads((root / "benchmarks" / "results" / "tabular.json").read_text(encoding="utf-8"))["parts"]
    page = (root / "docs" / "scikit-learn.md").read_text(encoding="utf-8")
    assert (
        page.split("<!-- tables:begin -->\n")[1].split("\n<!-- tables:end -->")[0] == tabular.markdown(parts).rstrip()
    )
