"""Second stages: each formula against a loop or another solver, and what becomes of a run."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_fields
from equiframe import second_stage
from equiframe.cli import main
from equiframe.data.prepare import prepare_data
from equiframe.errors import InputError
from equiframe.evaluate import fit_temperature
from equiframe.heads import AffineHead, CosineHead, FrameHead, LinearHead
from equiframe.measure import evaluate_run
from equiframe.method import METHODS, SECOND_STAGES, build_head, resolve_method
from equiframe.model import load_classifier
from equiframe.numerics import choose_numerics
from equiframe.recipe import Recipe
from equiframe.report.runs import find_runs, group_runs
from equiframe.runs import RunFolder
from equiframe.second_stage import (
    POST_HOC_GRID,
    Features,
    affine_map,
    choose_tau,
    class_means,
    collect_features,
    cross_fitted_temperature,
    fit_classifier,
    fit_scales,
    folds_of,
    label_aware_losses,
    macro_accuracy,
    run_second_stage,
    smoothing_of_classes,
    tau_normalise,
)
from equiframe.tracking import make_loader
from equiframe.train import apply_second_stage, train
from test_train import TIMING, assert_same_run, metrics_of, stop_at

pytestmark = pytest.mark.usefixtures("plain_pages")

COUNTS = [30, 12, 4]


@pytest.fixture
def cloud():
    """Features of three classes that overlap, their labels and counts, in float64."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), COUNTS)
    features = random.normal(size=(3, 5))[labels] + random.normal(size=(len(labels), 5))
    return torch.from_numpy(features), torch.from_numpy(labels), torch.tensor(COUNTS, dtype=torch.float64)


def log_softmax(row):
    top = max(row)
    return [v - top - math.log(sum(math.exp(u - top) for u in row)) for v in row]


def balanced_risk(logits, labels, smoothing=(0.0, 0.0, 0.0)):
    """Mean over classes of the mean label-aware loss of a class, by loops."""
    losses = {k: [] for k in range(3)}
    for row, y in zip(logits, labels, strict=True):
        log_p = log_softmax(row)
        shares = [smoothing[y] / 3] * 3
        shares[y] += 1 - smoothing[y]
        losses[y].append(-sum(s * v for s, v in zip(shares, log_p, strict=True)))
    return sum(sum(of) / len(of) for of in losses.values()) / 3


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_the_classifier_anew_is_the_one_that_scikit_learn_finds(cloud):
    from sklearn.linear_model import LogisticRegression

    features, labels, counts = cloud
    weight, bias = fit_classifier(features, labels, counts, weight_decay=0.01)
    with_one = np.hstack([features.numpy(), np.ones((len(labels), 1))])  # the bias decays, too
    other = LogisticRegression(
        C=1 / (0.01 * len(labels)), class_weight="balanced", fit_intercept=False, solver="newton-cg", tol=1e-10,
        max_iter=1000,
    )  # fmt: skip
    other.fit(with_one, labels.numpy())
    found = torch.cat([weight, bias[:, None]], 1).numpy()
    np.testing.assert_allclose(found, other.coef_, atol=1e-4)
    unbalanced = other.set_params(class_weight=None).fit(with_one, labels.numpy()).coef_
    assert np.abs(found - unbalanced).max() > 0.05


def test_more_of_the_same_images_change_nothing(cloud):
    """Class-balanced: each class counts once, however often its images are there."""
    features, labels, counts = cloud
    again = torch.cat([torch.arange(len(labels)), torch.nonzero(labels == 0)[:, 0].repeat(5)])
    one = fit_classifier(features, labels, counts)
    two = fit_classifier(features[again], labels[again], torch.bincount(labels[again]).double())
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_weights_and_adjustment_share_the_work(cloud, balance):
    """The classifier found is where no small step lowers the risk, as summed by loops from its formula."""
    features, labels, counts = cloud
    decay, n = 0.01, COUNTS

    def risk(weight, bias):
        total = decay / 2 * float((weight**2).sum() + (bias**2).sum())
        for h, y in zip(features.tolist(), labels.tolist(), strict=True):
            row = [
                sum(w * x for w, x in zip(weight[k].tolist(), h, strict=True))
                + float(bias[k])
                + (1 - balance) * math.log(n[k] / sum(n))
                for k in range(3)
            ]
            total -= n[y] ** -balance / sum(m ** (1 - balance) for m in n) * log_softmax(row)[y]
        return total

    weight, bias = fit_classifier(features, labels, counts, weight_decay=decay, balance=balance)
    least = risk(weight, bias)
    for seed in range(6):
        step = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 6)) * 1e-2)
        assert risk(weight + step[:, :5], bias + step[:, 5]) > least
        assert abs(risk(weight + 1e-2 * step[:, :5], bias + 1e-2 * step[:, 5]) - least) < 1e-7  # flat: a minimum
    if balance == 1:
        torch.testing.assert_close((weight, bias), fit_classifier(features, labels, counts, weight_decay=decay))


def test_the_unit_of_the_features_does_not_matter(cloud):
    """`crt-adjusted` says the same of features that are a thousand times as long; with one weight decay for all it would not."""
    features, labels, counts = cloud

    def logits(unit, stage):
        of = second_stage.Features(unit * features, labels)
        weight, bias, chosen = stage(second_stage.Stage(features[:3], counts, of, of, counts))
        return of.features @ weight.T + bias, chosen

    (short, said), (long, said_of_long) = (logits(unit, second_stage._crt_adjusted) for unit in (0.1, 100.0))
    torch.testing.assert_close(short, long, atol=1e-3, rtol=1e-3)
    assert said.keys() == said_of_long.keys()
    assert float((logits(0.1, second_stage._crt)[0] - logits(100.0, second_stage._crt)[0]).abs().max()) > 1


def test_a_blend_gives_the_new_classifier_what_the_trained_one_has_wrong(cloud):
    """q is the balanced error on training images; knowing all of them by heart leaves the trained classifier as it is."""
    features, labels, counts = cloud
    known = Features(features, labels)
    anew = second_stage._crt_adjusted(second_stage.Stage(features[:3], counts, known, known, counts))
    for weight, bias in ((features[[0, 5, 9]], torch.zeros(3).double()), (fit_classifier(features, labels, counts))):
        stage = second_stage.Stage(weight, bias, known, None, counts)
        wrong = stage.logits(known).argmax(1) != labels
        share = sum(float(wrong[labels == k].double().mean()) for k in range(3)) / 3
        blended, its_bias, chosen = second_stage._crt_blend(stage)
        assert chosen["share"] == pytest.approx(share)
        assert ("temperature" in chosen) == (share > 0.5)
        torch.testing.assert_close(blended, (1 - share) * weight + share * anew[0])
        torch.testing.assert_close(its_bias, (1 - share) * bias + share * anew[1])
    by_heart = torch.eye(3).double()
    stage = second_stage.Stage(by_heart, torch.zeros(3).double(), Features(by_heart, torch.arange(3)), None, counts)
    torch.testing.assert_close(second_stage._crt_blend(stage)[0], by_heart)


def test_a_blend_needs_a_classifier_that_accounts_for_class_counts():
    assert resolve_method("etf-sqrt-blend", {})["second_stage"] == "crt-blend"
    with pytest.raises(
        InputError, match="that of loss 'ce' takes no account of class counts; take loss logit-adjusted"
    ):
        resolve_method("ce", {"second_stage": "crt-blend"})


def test_spread_by_loops(cloud):
    features, labels, counts = cloud
    classes = [features[labels == k].numpy() for k in range(3)]
    middle = sum(rows.mean(0) for rows in classes) / 3
    total = sum(sum(((row - middle) ** 2).sum() for row in rows) / len(rows) for rows in classes)
    assert second_stage.spread(features, labels, counts) == pytest.approx((total / 3) ** 0.5)
    assert second_stage.spread(torch.ones(3, 2), torch.arange(3), torch.ones(3)) == 0


@pytest.mark.parametrize("fit", [fit_classifier, lambda h, y, n: fit_scales(h[:, :3], y, n)])
def test_images_in_pieces_are_the_images(cloud, monkeypatch, fit):
    whole = fit(*cloud)
    monkeypatch.setattr(second_stage, "LOGITS_AT_ONCE", 3 * 7)  # 7 of 46 images at a time
    torch.testing.assert_close(fit(*cloud), whole, atol=1e-6, rtol=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(2, 6))
def test_folds_spread_each_class_evenly(labels, num_folds):
    folds = folds_of(torch.tensor(labels), num_folds).tolist()
    for k in set(labels):
        of_class = [f for f, y in zip(folds, labels, strict=True) if y == k]
        if len(of_class) == 1:
            assert of_class == [-1]
            continue
        sizes = [of_class.count(f) for f in range(num_folds)]
        assert sum(sizes) == len(of_class)
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) < len(of_class)  # no fold takes all of a class


def test_a_cross_fitted_temperature_is_that_of_images_never_seen():
    """Classes that overlap, and so many dimensions that the fit is far too sure of its own images."""
    random = np.random.default_rng(0)
    counts = [120, 60, 30]
    means = random.normal(size=(3, 40)) * 0.4

    def images(counts):
        labels = np.repeat(np.arange(3), counts)
        return torch.from_numpy(means[labels] + random.normal(size=(len(labels), 40))), torch.from_numpy(labels)

    (features, labels), (unseen, their_labels) = images(counts), images([3000] * 3)
    sizes = torch.tensor(counts, dtype=torch.float64)
    weight, bias = fit_classifier(features, labels, sizes, balance=0.5)
    best = fit_temperature(unseen @ weight.T + bias, their_labels)
    own = fit_temperature(features @ weight.T + bias, labels)
    cross = cross_fitted_temperature(features, labels, sizes, balance=0.5)
    assert own < 1 < best / 2  # what it says of its own images is no guide
    assert abs(math.log(cross / best)) < 0.25


@given(st.floats(0, 2), st.integers(0, 99))
def test_normalising_by_a_power_of_the_length(tau, seed):
    weight = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 6)))
    expected = [[v / math.sqrt(sum(u * u for u in row)) ** tau for v in row] for row in weight.tolist()]
    np.testing.assert_allclose(tau_normalise(weight, tau).numpy(), expected, rtol=1e-10)
    assert torch.equal(tau_normalise(weight, 0.0), weight)
    torch.testing.assert_close(tau_normalise(weight, 1.0).norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_smoothing_by_class_counts():
    counts = [500, 232, 50, 5]
    expected = [0.1 + 0.3 * math.sin(math.pi * (n - 5) / (2 * 495)) for n in counts]
    found = smoothing_of_classes(torch.tensor(counts, dtype=torch.float64), head=0.4, tail=0.1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert (float(found[0]), float(found[-1])) == pytest.approx((0.4, 0.1))
    assert smoothing_of_classes(torch.tensor([7.0, 7.0])).tolist() == [0, 0]


def test_label_aware_losses_against_a_loop(cloud):
    features, labels, _ = cloud
    logits = features[:, :3] * 2
    smoothing = torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64)
    found = label_aware_losses(logits, labels, smoothing)
    for i, (row, y) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        eps, log_p = float(smoothing[y]), log_softmax(row)
        expected = -(1 - eps + eps / 3) * log_p[y] - eps / 3 * sum(log_p[j] for j in range(3) if j != y)
        assert float(found[i]) == pytest.approx(expected, rel=1e-10)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(label_aware_losses(logits, labels, 0 * smoothing), plain)


@pytest.mark.parametrize("smoothing", [None, (0.3, 0.1, 0.0)])
def test_scales_are_at_the_minimum_of_the_balanced_risk(cloud, smoothing):
    features, labels, counts = cloud
    weight, bias = fit_classifier(features, labels, torch.ones_like(counts) * len(labels) / 3)  # not balanced
    logits = features @ weight.T + bias
    scales = fit_scales(
        logits, labels, counts, smoothing=None if smoothing is None else torch.tensor(smoothing, dtype=torch.float64)
    )

    def risk(f):
        return balanced_risk((logits * f).tolist(), labels.tolist(), smoothing or (0, 0, 0)) + 2.5e-4 * float(f @ f)

    best = risk(scales)
    assert best < risk(torch.ones(3, dtype=torch.float64)) - 1e-3
    for k in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[k] = 1e-4
        slope = (risk(scales + step) - risk(scales - step)) / 2e-4
        assert abs(slope) < 1e-4
    assert risk(scales * 1.05) > best < risk(scales * 0.95)


def test_class_means_against_a_loop(cloud):
    features, labels, counts = cloud
    expected = [
        np.mean([x for x, y in zip(features.tolist(), labels, strict=True) if y == k], axis=0) for k in range(3)
    ]
    np.testing.assert_allclose(class_means(features, labels, counts).numpy(), expected, rtol=1e-10)


def test_tau_by_macro_accuracy():
    labels = torch.tensor([0] * 8 + [1] * 2)
    logits = torch.zeros(10, 3)
    logits[:, 0] = torch.tensor([5.0] * 8 + [2.0, 4.0])  # class 1 wins from τ > 2, and wholly from τ > 4
    adjusted = lambda tau: logits + tau * torch.tensor([0.0, 1.0, 0.0])  # noqa: E731
    assert macro_accuracy(adjusted(0), labels) == 0.5  # class 2 has no images and does not count
    assert macro_accuracy(adjusted(3.0), labels) == 0.75
    assert choose_tau(adjusted, labels, [0, 1, 2, 3]) == 3
    assert choose_tau(adjusted, labels, [0, 3, 4.5, 4.9, 6]) == 4.5  # the first of equals
    assert choose_tau(lambda tau: logits, labels, POST_HOC_GRID) == 0


@pytest.mark.parametrize(
    "head",
    [
        LinearHead(6, 3),
        LinearHead(6, 3, bias=False),
        CosineHead(6, 3, logit_scale=4.0, e_h=2.0),
        FrameHead(6, 3, logit_scale=5.0, e_w=2.0, e_h=3.0),
        FrameHead(6, 9, logit_scale=1.0, length="free"),
    ],
    ids=["linear", "no bias", "cosine", "simplex", "orthoplex"],
)
def test_every_head_is_an_affine_map_of_its_features(head):
    output = head.train()(torch.randn(20, 6))
    weight, bias = affine_map(head)
    torch.testing.assert_close(output.features @ weight.T + bias, output.logits, atol=1e-5, rtol=1e-5)


def test_an_affine_head_is_a_linear_head_on_normalised_features():
    x = torch.randn(5, 6)
    affine, linear = AffineHead(6, 3), LinearHead(6, 3)
    affine.load_state_dict(linear.state_dict())
    assert torch.equal(affine(x).logits, linear(x).logits)
    assert torch.equal(affine.class_vectors(), linear.class_vectors())
    assert torch.equal(affine.class_bias(), linear.class_bias())
    unit = AffineHead(6, 3, norm="batch", length="unit", e_h=4.0)
    torch.testing.assert_close(unit(x).features.norm(dim=1), torch.full((5,), 2.0))


# --- what combines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "fields", "why"),
    [
        ("tau-norm", {"head": "frame"}, "those of head 'frame' all have equal length"),
        ("lws", {"head": "frame"}, "those of head 'frame' all have equal length"),
        ("label-aware-smoothing", {"head": "frame"}, "those of head 'frame' all have equal length"),
        ("tau-norm", {"head": "cosine"}, "those of head 'cosine' all have equal length"),
        ("tau-norm", {"head": "frozen-linear"}, "those of head 'frozen-linear' never learned their lengths"),
        ("post-hoc", {"loss": "balanced-softmax"}, "which loss 'balanced-softmax' does already"),
        ("post-hoc", {"loss": "logit-adjusted"}, "which loss 'logit-adjusted' does already"),
        ("tau", {}, "unknown second stage 'tau'; did you mean 'tau-norm'"),
    ],
)
def test_what_makes_no_sense_is_refused(stage, fields, why):
    with pytest.raises(InputError, match=why):
        resolve_method("ce", {"second_stage": stage, **fields})


@pytest.mark.parametrize("method", ["ce", "frozen-random", "cosine", "etf-ce", "etf-dr", "etf-angular"])
@pytest.mark.parametrize("stage", ["crt", "ncm", "ncm-euclidean", "post-hoc"])
def test_what_makes_sense_on_any_head(stage, method):
    fields = resolve_method(method, {"second_stage": stage})
    head = build_head(fields, 16, 5)
    assert isinstance(head, AffineHead)
    assert head.norm == (fields["norm"] or "none")
    assert head.length == ("unit" if stage == "ncm" else fields["length"] or "free")


def test_methods_have_no_second_stage_unless_they_say_so():
    with_stage = {name for name in METHODS if resolve_method(name, {})["second_stage"] != "none"}
    assert {"crt", "tau-norm", "lws", "label-aware-smoothing", "ncm", "post-hoc"} <= with_stage
    assert "ce" not in with_stage
    assert resolve_method("crt", {"second_stage": "none"})["second_stage"] == "none"


# --- runs -------------------------------------------------------------------------------------------------------------


def fields(**changes):
    return tiny_fields(imbalance=30, epochs=4, batch_size=32, mixup=0.0, second_stage=None) | changes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``runs(method)`` → a small finished run on long-tailed digits without a second stage."""
    root, made = tmp_path_factory.mktemp("runs"), set()

    def run(method, **changes):
        path = root / "-".join([method, *map(str, changes.values())])
        if path not in made:
            with torch.enable_grad():
                train(Recipe(**fields(method=method, **changes)), path)
            made.add(path)
        return path

    return run


def opened(run):
    """Features and labels of training, validation and test images of a run, and its model and card."""
    model, card = load_classifier(run)
    recipe = RunFolder(run).recipe()
    data = prepare_data(recipe)
    numerics = choose_numerics(model, 8, 8, device="cpu", precision="float32", memory_format="contiguous")
    parts = []
    for images in (data.train, data.val, data.test):
        loader = make_loader(images, card, numerics, recipe)
        parts.append(None if images is None else collect_features(model, loader, numerics))
    return model, card, data, numerics, recipe, parts


def logits_of(run, features):
    """Logits of a run on features that its own head has normalised (in evaluation mode)."""
    model, _ = load_classifier(run)
    return model.head.logits(features).detach()


@pytest.mark.parametrize("method", ["ce", "etf-dr"])
@torch.no_grad()
def test_post_hoc_adjusts_by_the_tau_that_validation_chose(runs, tmp_path, method):
    metrics = apply_second_stage(runs(method), "post-hoc", tmp_path / "new")
    _, card, _, _, _, (_, val, test) = opened(runs(method))
    prior = torch.log(torch.tensor(card.train_counts) / sum(card.train_counts))
    scores = [macro_accuracy(logits_of(runs(method), val.features) - t * prior, val.labels) for t in POST_HOC_GRID]
    tau = POST_HOC_GRID[int(np.argmax(scores))]
    assert (metrics["second_stage_tau"], metrics["second_stage_tau_from"]) == (tau, "validation")
    assert metrics["second_stage_val_macro"] == pytest.approx(max(scores))
    assert tau > 0
    new = logits_of(tmp_path / "new", test.features)
    torch.testing.assert_close(new, logits_of(runs(method), test.features) - tau * prior, atol=1e-4, rtol=1e-4)
    assert metrics["top1"] == pytest.approx(float((new.argmax(1) == test.labels).double().mean()))
    if method == "ce":
        assert metrics["macro"] > RunFolder(runs(method)).read_json("metrics.json")["macro"]


@pytest.mark.parametrize("method", ["ce", "cosine", "etf-ce", "etf-dr"])
@torch.no_grad()
def test_nearest_class_means(runs, tmp_path, method):
    apply_second_stage(runs(method), "ncm", tmp_path / "cosine")
    apply_second_stage(runs(method), "ncm-euclidean", tmp_path / "distance")
    _, card, _, _, _, (training, _, test) = opened(runs(method))
    x = test.features.double().numpy()
    means = np.stack(
        [training.features[training.labels == k].double().mean(0).numpy() for k in range(len(card.class_names))]
    )
    cosines = x @ means.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    distances = ((x[:, None] - means) ** 2).sum(2)
    *_, (_, _, same) = opened(tmp_path / "cosine")  # its own features are unit vectors
    scale = math.sqrt(card.method_fields["e_h"] or 1.0)
    found = logits_of(tmp_path / "cosine", same.features) / scale
    np.testing.assert_allclose(found.numpy(), cosines, atol=1e-4)
    found = logits_of(tmp_path / "distance", test.features).double().numpy()
    half = -distances / 2
    np.testing.assert_allclose(found - found.mean(1)[:, None], half - half.mean(1)[:, None], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_tau_norm_and_scales_of_a_run(runs, tmp_path):
    old = load_classifier(runs("ce"))[0].head
    metrics = apply_second_stage(runs("ce"), "tau-norm", tmp_path / "tau")
    new = load_classifier(tmp_path / "tau")[0].head
    assert 0 <= metrics["second_stage_tau"] <= 1
    torch.testing.assert_close(new.class_vectors(), tau_normalise(old.class_vectors(), metrics["second_stage_tau"]))
    assert not new.class_bias().any()
    _, card, _, _, _, (training, _, _) = opened(runs("ce"))
    counts = torch.tensor(card.train_counts, dtype=torch.float32)
    for stage, smoothing in (("lws", None), ("label-aware-smoothing", smoothing_of_classes(counts))):
        apply_second_stage(runs("ce"), stage, tmp_path / stage)
        new = load_classifier(tmp_path / stage)[0].head
        scales = fit_scales(logits_of(runs("ce"), training.features), training.labels, counts, smoothing=smoothing)
        torch.testing.assert_close(new.class_vectors(), scales[:, None] * old.class_vectors(), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(new.class_bias(), scales * old.class_bias(), atol=1e-3, rtol=1e-3)
        assert float(scales.std()) > 0.01


@pytest.mark.parametrize(("method", "named", "shown"), [("ce", "crt", "crt"), ("etf-dr", "etf-dr", "etf-dr+crt")])
def test_a_run_goes_by_the_method_that_it_is(runs, tmp_path, method, named, shown):
    """What a named method is, however it came about, has its name; a stage without one is said."""
    apply_second_stage(runs(method), "crt", tmp_path / "new")
    assert RunFolder(tmp_path / "new").recipe().method == named
    assert load_classifier(tmp_path / "new")[1].method == named
    assert [group.name for group in group_runs(find_runs([tmp_path / "new"]))] == [shown]


@pytest.mark.parametrize("method", ["ce", "etf-dr"])
def test_a_classifier_anew_beats_the_one_of_long_tailed_training(runs, tmp_path, method):
    metrics = apply_second_stage(runs(method), "crt", tmp_path / "new")
    assert metrics["macro"] > RunFolder(runs(method)).read_json("metrics.json")["macro"] + 0.05
    model, card = load_classifier(tmp_path / "new")
    assert card.method_fields["second_stage"] == "crt"
    old = load_classifier(runs(method))[0]
    for name, value in old.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    if method == "etf-dr":
        assert torch.equal(model.head.batch_norm.running_var, old.head.batch_norm.running_var)


@pytest.mark.parametrize(
    ("first", "changes"),
    [("ce", {"method": "crt"}), ("etf-dr", {"method": "etf-dr", "second_stage": "post-hoc", "ema": 0.8})],
)
def test_a_second_stage_afterwards_is_that_of_training(tmp_path, first, changes):
    stage = changes.get("second_stage", "crt")
    train(Recipe(**fields(**changes) | {"method": first, "second_stage": None}), tmp_path / "first")
    train(Recipe(**fields(**changes)), tmp_path / "whole")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")}
    apply_second_stage(tmp_path / "first", stage, tmp_path / "after", method=changes["method"])
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "first").rglob("*")}
    assert_same_run(tmp_path / "whole", tmp_path / "after")
    assert RunFolder(tmp_path / "after").recipe().to_dict() == RunFolder(tmp_path / "whole").recipe().to_dict()
    assert RunFolder(tmp_path / "after").agree(Recipe(**fields(**changes)))  # a comparison may take it for its cell
    again = evaluate_run(tmp_path / "after", device="cpu")
    saved = metrics_of(tmp_path / "after")
    assert again == {name: saved[name] for name in again}


def test_a_run_with_a_second_stage_continues_to_the_bit(tmp_path):
    from equiframe.train import Interrupted

    recipe = Recipe(**fields(method="lws"))
    train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "run", progress=stop_at(1, 10))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(InputError, match="second_stage was 'lws', now 'crt'"):
        train(recipe.with_(second_stage="crt"), tmp_path / "run", resume=True)


@pytest.mark.parametrize("stage", [name for name in SECOND_STAGES if name != "none"])
def test_no_stage_sees_the_test_images(runs, stage):
    """Nor does it change the model that it starts from."""
    model, card, data, numerics, recipe, _ = opened(runs("etf-la" if stage == "crt-blend" else "ce"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    new, new_card, chosen = run_second_stage(stage, model, card, replace(data, test=None), numerics, recipe)
    assert chosen["second_stage"] == new_card.method_fields["second_stage"] == stage
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert card.method_fields["second_stage"] == "none"
    assert not new.training


def test_a_method_brings_its_sampler_and_its_blend(tmp_path):
    """The images are drawn as the method says, unless the recipe says otherwise; the run tells what share the new classifier got."""
    said = []
    metrics = train(Recipe(**fields(method="etf-sqrt-blend", epochs=1)), tmp_path / "run", say=said.append)
    assert RunFolder(tmp_path / "run").recipe().sampler == "square-root"
    assert sum(line.endswith("; classes drawn by square-root sampling") for line in said) == 1
    assert 0 < metrics["second_stage_share"] < 1
    share = f"{100 * metrics['second_stage_share']:.0f} % of the logits are the new classifier's"
    assert any(line.startswith("second stage: crt-blend") and share in line for line in said)
    plain = train(Recipe(**fields(method="etf-sqrt-blend", epochs=1, sampler="instance")), tmp_path / "plain")
    again = train(Recipe(**fields(method="etf-la", epochs=1, second_stage="crt-blend")), tmp_path / "again")
    assert plain["macro"] == again["macro"]
    assert plain["second_stage_share"] == again["second_stage_share"] != metrics["second_stage_share"]


def test_a_method_brings_its_mixing(tmp_path):
    said = []
    mixed = train(Recipe(**fields(method="etf-mix-blend", epochs=3, mixup=None)), tmp_path / "run", say=said.append)
    recipe = RunFolder(tmp_path / "run").recipe()
    assert (recipe.mixup, recipe.mix_share, recipe.mix_until, recipe.sampler) == (1.0, "known", 0.8, "square-root")
    assert (
        sum(line.endswith("square-root sampling; mixup 1 (share: known, until 80 % of the run)") for line in said) == 1
    )
    spelled = {"mixup": 1.0, "mix_share": "known", "mix_until": 0.8}
    again = train(Recipe(**fields(method="etf-sqrt-blend", epochs=3, **spelled)), tmp_path / "again")
    assert again["macro"] == mixed["macro"]
    off = train(Recipe(**fields(method="etf-mix-blend", epochs=3, mixup=0.0)), tmp_path / "off")
    plain = train(Recipe(**fields(method="etf-sqrt-blend", epochs=3, mixup=None)), tmp_path / "plain")
    assert off["macro"] == plain["macro"]
    assert off["ece"] == plain["ece"] != mixed["ece"]


@pytest.mark.parametrize(("stage", "source"), [("crt-adjusted", "cross-fit"), ("ncm", "train")])
def test_without_validation_images_a_refitted_classifier_is_calibrated_by_cross_fitting(tmp_path, stage, source):
    recipe = Recipe(**fields(method="etf-ce", second_stage=stage, validation=0.0, epochs=1))
    metrics = train(recipe, tmp_path / "run")
    assert metrics["temperature_from"] == source
    card = load_classifier(tmp_path / "run")[1]
    assert (card.temperature, card.temperature_from) == (metrics["temperature"], source)
    again = evaluate_run(tmp_path / "run")
    assert (again["temperature"], again["ece"]) == (metrics["temperature"], pytest.approx(metrics["ece"]))


def test_validation_images_that_are_all_right_never_sharpen(cloud):
    """They do not tell how sure a classifier may be: one that is fitted anew is cross-fitted then."""
    features, labels, counts = cloud
    known = Features(features, labels)
    weight, bias = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    fitted, found, _ = second_stage._crt(second_stage.Stage(weight, bias, known, known, counts))
    easy = Features(fitted, torch.arange(3))  # each class vector itself: surely right
    assert macro_accuracy(easy.features @ fitted.T + found, easy.labels) == 1
    told = [
        second_stage._crt(second_stage.Stage(weight, bias, known, validation, counts))[2].get("temperature")
        for validation in (known, easy, None)
    ]
    assert told[0] is None
    assert told[1] == told[2] == cross_fitted_temperature(features, labels, counts)


@pytest.mark.parametrize(("stage", "tau"), [("post-hoc", 1.0), ("tau-norm", 0.7)])
def test_tau_without_validation_images_is_the_usual_one_and_said(tmp_path, stage, tau):
    said = []
    recipe = Recipe(**fields(method="ce", second_stage=stage, validation=0.0, epochs=1))
    metrics = train(recipe, tmp_path / "run", say=said.append)
    assert (metrics["second_stage_tau"], metrics["second_stage_tau_from"]) == (tau, "default")
    assert "second_stage_val_macro" not in metrics
    line = next(s for s in said if s.startswith("second stage: "))
    assert line.startswith(f"second stage: {stage}, τ = {tau:g}, the usual one: there are no validation images")


def test_the_command(runs, tmp_path, capsys):
    out = str(tmp_path / "new")
    assert main(["second-stage", str(runs("ce")), "--stage", "post-hoc", "--out", out, "--json"]) == 0
    told = capsys.readouterr()
    metrics = json.loads(told.out)
    assert {k: v for k, v in metrics.items() if k not in TIMING} == metrics_of(tmp_path / "new")
    assert "τ = " in told.err
    assert (tmp_path / "new" / "report.html").is_file()
    for name in ("split.json", "history.jsonl"):
        assert (tmp_path / "new" / name).read_bytes() == (runs("ce") / name).read_bytes()
    assert RunFolder(out).read_json("environment.json")["second_stage_of"] == str(runs("ce"))
    shutil.copytree(runs("ce"), tmp_path / "first")
    assert main(["second-stage", str(tmp_path / "first"), "--stage", "post-hoc", "--quiet"]) == 0
    assert metrics_of(tmp_path / "first-post-hoc") == metrics_of(tmp_path / "new"), "beside the run, if not told where"
    capsys.readouterr()

    def refused(*arguments):
        assert main(["second-stage", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    there = sorted(p.name for p in tmp_path.iterdir())
    assert "already holds a finished run; choose another --out" in refused(runs("ce"), "--stage", "crt", "--out", out)
    assert "has a second stage already (post-hoc)" in refused(out, "--stage", "crt", "--out", tmp_path / "x")
    assert "second stage 'none' changes nothing" in refused(runs("ce"), "--stage", "none", "--out", tmp_path / "x")
    assert "did you mean 'crt'?" in refused(runs("ce"), "--stage", "crtt", "--out", tmp_path / "x")
    assert "unknown second stage 'a/b'" in refused(runs("ce"), "--stage", "a/b")
    assert "equal length by construction" in refused(runs("etf-ce"), "--stage", "lws", "--out", tmp_path / "x")
    assert "is not a run folder" in refused(tmp_path, "--stage", "crt", "--out", tmp_path / "x")
    assert "required: --stage" in refused(runs("ce"), "--out", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == there


@pytest.mark.parametrize("head", ["frame", "cosine"])
def test_a_projection_outlives_the_second_stage(head, runs, tmp_path):
    """Four features for ten classes: the refitted classifier meets them as the trained one did, in nine dimensions, also after it was saved."""
    first = runs("etf-sqrt-la", width=4, head=head)
    model, _, _, _, _, (training, _, test) = opened(first)
    assert (model.head.dim, training.features.shape[1]) == (4, 9)
    metrics = apply_second_stage(first, "crt-blend", tmp_path / "blend")
    blended, _, _, _, _, (again, _, _) = opened(tmp_path / "blend")
    assert torch.equal(again.features, training.features)
    assert float(macro_accuracy(blended.head.logits(test.features), test.labels)) == pytest.approx(metrics["macro"])
    assert metrics["nc3"] is not None  # class means and class vectors have one width


def test_an_interrupted_second_stage_leaves_no_folder(runs, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("equiframe.train.run_second_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_second_stage(runs("ce"), "crt", tmp_path / "a" / "new")
    assert list(tmp_path.iterdir()) == []


def test_features_are_collected_in_order_and_in_evaluation_mode(runs):
    model, card, data, numerics, recipe, (training, _, _) = opened(runs("etf-ce"))
    assert isinstance(training, Features)
    assert training.labels.tolist() == data.train.labels.tolist()
    batch = next(make_loader(data.train, card, numerics, recipe).ordered(len(data.train)))
    with torch.no_grad():
        expected = model.eval()(batch.images).features
    torch.testing.assert_close(training.features, expected, atol=1e-5, rtol=1e-5)


def test_a_given_tau_is_taken(tmp_path):
    words = "train digits --imbalance 20 --method post-hoc --backbone mlp --epochs 1 --batch-size 64 --quiet --stage-tau 0.7"
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["second_stage_tau"], metrics["second_stage_tau_from"]) == (0.7, "recipe")
    with pytest.raises(InputError, match="'stage_tau' belongs to the second stages tau-norm and post-hoc"):
        resolve_method("crt", {"stage_tau": 1.0})


@pytest.mark.parametrize("verb", ["train", "second-stage"])
def test_the_help_names_every_stage(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # no name is wrapped
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    told = set(re.findall(r"[a-z-]+", " ".join(capsys.readouterr().out.split())))
    assert {name for name in SECOND_STAGES if name != "none"} <= told
