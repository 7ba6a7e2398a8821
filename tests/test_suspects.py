"""Labels that may be wrong: found where they were made wrong, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import tiny_fields
from equiframe.cli import main
from equiframe.data.prepare import prepare_data
from equiframe.measure import open_run
from equiframe.recipe import Recipe
from equiframe.suspects import neighbour_shares, suggested_classes, suspects_of, thresholds
from equiframe.train import train


def plain_shares(features, labels, num_classes, m=10):
    """The docstring's formula, image by image."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares = np.zeros((len(labels), num_classes))
    for i in range(len(labels)):
        cosines = unit @ unit[i]
        cosines[i] = -np.inf
        size = min(m, sum(labels == labels[i]) - 1)
        for j in np.argsort(-cosines)[:size]:
            shares[i, labels[j]] += 1 / size
    return shares


def test_the_formula():
    generator = np.random.default_rng(0)
    labels = np.array([0] * 20 + [1] * 13 + [2] * 4 + [3])
    features = generator.normal(size=(len(labels), 6)).astype(np.float32)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    shares = neighbour_shares(x, y, x, y, 5, itself=torch.arange(len(y)))
    assert np.allclose(shares, plain_shares(features, labels, 5), atol=1e-6)
    assert not shares[-1].any(), "a class of one image cannot be judged"
    at_least = thresholds(shares, y, 5)
    assert at_least[:4].tolist() == pytest.approx([shares[y == k, k].mean().item() for k in range(4)])
    assert at_least[4] == torch.inf
    suggested = suggested_classes(shares, y, at_least)
    for i in range(len(y)):
        able = [k for k in range(5) if shares[i, k] >= at_least[k] and shares[i, k] > max(0, shares[i, y[i]])]
        assert int(suggested[i]) == (max(able, key=lambda k: shares[i, k]) if able else int(y[i]))
    elsewhere = neighbour_shares(x[:3], y[:3], x, y, 5)
    assert torch.allclose(elsewhere.sum(1), torch.ones(3))
    assert (elsewhere.gather(1, y[:3, None])[:, 0] >= 0.1).all(), "who is not left out is its own neighbour"


def test_wrong_labels_of_digits(tmp_path):
    recipe = Recipe(**tiny_fields(width=64, epochs=12, method="etf-la", track="none"))
    data = prepare_data(recipe)
    generator = np.random.default_rng(0)
    wrong = generator.random(len(data.train)) < 0.1
    labels = np.where(wrong, (data.train.labels + generator.integers(1, 10, len(wrong))) % 10, data.train.labels)
    noisy = replace(data, train=replace(data.train, labels=labels))
    train(recipe, tmp_path / "run", data=noisy)
    model, card, _, numerics, recipe = open_run(tmp_path / "run", device="cpu")
    suspects, judged = suspects_of(model, card, noisy, numerics, recipe)
    assert judged == {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    assert [s.score for s in suspects] == sorted((s.score for s in suspects), reverse=True)
    found = np.isin(data.train.names, [s.image for s in suspects if s.split == "train"])
    assert (found & wrong).sum() > 0.6 * wrong.sum()
    assert (found & wrong).sum() > 0.8 * found.sum()
    known = dict(zip(data.train.names, (card.class_names[k] for k in data.train.labels), strict=True))
    right = [s.suggested == known[s.image] for s in suspects if s.split == "train" and s.score > 0.5]
    assert np.mean(right) > 0.8, "the surest suggestions are the true classes"


def test_the_list_of_a_run(finished_run, tmp_path, capsys):
    words = ["evaluate", str(finished_run), "--device", "cpu", "--label-noise"]
    assert main([*words, str(tmp_path / "noise.csv")]) == 0
    lines = (tmp_path / "noise.csv").read_text().splitlines()
    assert lines[0] == "split,image,label,suggested,score"
    out = capsys.readouterr().out
    assert "of 88 train" in out
    assert "images look like another class" in out
    assert main([*words, str(tmp_path / "none" / "noise.csv")]) == 2
    assert capsys.readouterr().err == f"equiframe: no such folder: {tmp_path / 'none'}\n"
