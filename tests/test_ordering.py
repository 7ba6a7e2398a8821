"""Frame orders, class trees and reserved vectors as fields of a recipe."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from equiframe import FrameHead, InputError
from equiframe.compare import compare
from equiframe.frames import OrderedFrame, TreeFrame, mistake_severity
from equiframe.frames.assign import order_cost
from equiframe.measure import evaluate_run
from equiframe.method import build_head, resolve_method
from equiframe.model import load_classifier
from equiframe.ordering import order_epoch, order_frame
from equiframe.parallel import ALONE
from equiframe.train import Interrupted, train

SILENT = {"track": "none", "validation": 0.0}
TREE = (0, 1, 2, 2, 1, 2, 0, 1, 3, 3)


class Batches:
    """A loader of six classes whose images come in three similar pairs; the features make other pairs."""

    image_size, world = 4, ALONE

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.pairs = torch.rand(3, 3, 4, 4, generator=generator)

    def ordered(self, batch_size):
        labels = torch.arange(6).repeat(5)
        noise = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        yield self.pairs[labels // 2] + 0.01 * noise, labels


class Halves(nn.Module):
    """Features by the class's remainder: classes k and k + 3 are alike."""

    num_features = 3

    def forward(self, images):
        return torch.eye(3)[torch.arange(len(images)) % 3] + 0.01 * images.mean((1, 2, 3))[:, None]


class Numerics:
    device = torch.device("cpu")

    @staticmethod
    def autocast():
        return torch.autocast("cpu", enabled=False)


@pytest.fixture
def ordered(tiny):
    def make(by_features, **fields):
        fields = resolve_method("etf-dr", {"norm": "none", "frame_order": "apart", "geometry": "orthoplex"} | fields)
        model = nn.Module()
        model.backbone, model.head = Halves(), build_head(fields, 3, 6)
        recipe = tiny(**{name: fields[name] for name in ("frame_order", "class_tree")})
        said = order_frame(model.train(), Batches(), Numerics, recipe, by_features=by_features)
        assert model.training
        vectors = model.head.class_vectors()
        return vectors @ vectors.T, said

    return make


@pytest.mark.parametrize(("by_features", "mates"), [(False, [1, 0, 3, 2, 5, 4]), (True, [3, 4, 5, 0, 1, 2])])
def test_similar_classes_get_antipodes(ordered, by_features, mates):
    cosines, said = ordered(by_features)
    torch.testing.assert_close(cosines[range(6), mates], -torch.ones(6))
    assert said.endswith("features" if by_features else "images")
    cosines, _ = ordered(by_features, frame_order="together")
    torch.testing.assert_close(cosines[range(6), mates], torch.zeros(6), atol=1e-6, rtol=0)


def test_a_class_tree_may_decide(ordered):
    cosines, said = ordered(False, class_tree=(0, 1, 2, 2, 1, 0))
    torch.testing.assert_close(cosines[range(6), [5, 4, 3, 2, 1, 0]], -torch.ones(6))
    assert said.endswith("the class tree")


def test_random_orders_follow_the_seed():
    fields = resolve_method("etf-dr", {"frame_order": "random", "geometry": "orthoplex"})
    first, again, other = (build_head(fields, 5, 10, seed=seed).frame.order for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_orders_and_trees_that_make_no_sense_at_these_sizes(tiny):
    with pytest.raises(InputError, match=r"makes no sense on a simplex \(K=10 <= D\+1=17\): all its angles are equal"):
        build_head(resolve_method("etf-dr", {"frame_order": "apart"}), 16, 10)
    with pytest.raises(InputError, match="class_tree names the group of 3 classes, the data have 10"):
        build_head(resolve_method("ce", {"class_tree": (0, 0, 1)}), 16, 10)
    with pytest.raises(InputError, match="capacity must be at least num_classes=10, got 5"):
        build_head(resolve_method("etf-dr", {"capacity": 5}), 16, 10)
    recipe = tiny(method="etf-dr", frame_order="apart", frame_order_after=0.9, epochs=5)
    with pytest.raises(InputError, match="leaves none of 5 epochs"):
        order_epoch(recipe)
    assert [order_epoch(recipe.with_(frame_order_after=x)) for x in (None, 0.0, 0.1, 0.5)] == [0, 0, 1, 3]
    assert order_epoch(recipe.with_(frame_order=None)) is None


def test_a_run_finds_its_order_before_training_and_saves_it(tiny, tmp_path):
    lines = []
    recipe = tiny(method="etf-dr", geometry="orthoplex", width=6, frame_order="apart", class_tree=TREE, **SILENT)
    metrics = train(recipe, tmp_path / "run", say=lines.append)
    assert "frame order: similar classes apart, by the class tree" in lines
    model, card = load_classifier(tmp_path / "run")
    assert isinstance(model.head.frame, OrderedFrame)
    groups = torch.tensor(TREE)
    cosines = model.head.class_vectors() @ model.head.class_vectors().T
    similarity = (groups[:, None] == groups).double().fill_diagonal_(0)
    drawn = build_head(card.method_fields, 6, 10, seed=0).frame.frame.dense()
    found = order_cost(similarity, cosines.double(), torch.arange(10))
    assert found < order_cost(similarity, (drawn @ drawn.T).double(), torch.arange(10)) or found < -1.9
    assert 1 <= metrics["mistake_severity"] <= 2
    assert evaluate_run(tmp_path / "run", device="cpu")["mistake_severity"] == metrics["mistake_severity"]


def test_a_run_refits_its_order_once_and_resumes_to_the_same(tiny, tmp_path):
    recipe = tiny(
        method="etf-dr", geometry="orthoplex", width=6, epochs=3, frame_order="together", frame_order_after=0.3, **SILENT
    )  # fmt: skip
    lines = []
    whole = train(recipe, tmp_path / "whole", say=lines.append)
    assert [line for line in lines if line.startswith("frame order")] == [
        "frame order: similar classes together, by class means of the features"
    ]
    steps = iter(range(10**6))
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "parts", stop=lambda: next(steps) > 30)
    lines = []
    parts = train(recipe, tmp_path / "parts", resume=True, say=lines.append)
    assert not [line for line in lines if line.startswith("frame order")]  # it lies in the checkpoint
    first, second = (load_classifier(tmp_path / run)[0].state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole["macro"] == parts["macro"]
    order = first["head.frame.order"]
    assert order.tolist() != list(range(10))


def test_a_run_follows_a_tree_and_measures_severity(tiny, tmp_path):
    recipe = tiny(method="etf-dr", geometry="tree", class_tree=TREE, sibling_cosine=0.3, **SILENT)
    train(recipe, tmp_path / "tree")
    model, card = load_classifier(tmp_path / "tree")
    assert isinstance(model.head.frame, TreeFrame)
    cosines = model.head.class_vectors() @ model.head.class_vectors().T
    assert float(cosines[0, 6]) == pytest.approx(0.3, abs=1e-6)
    assert json.loads((tmp_path / "tree" / "model.json").read_text())["method_fields"]["class_tree"] == list(TREE)
    assert card.method_fields["sibling_cosine"] == 0.3


def test_severity_of_methods_without_a_frame(tiny, tmp_path):
    metrics = train(tiny(method="ce", class_tree=TREE, **SILENT), tmp_path / "ce")
    arrays = np.load(tmp_path / "ce" / "predictions.npz")
    predicted, labels = (torch.from_numpy(arrays[name].astype("int64")) for name in ("predicted", "labels"))
    assert metrics["mistake_severity"] == mistake_severity(predicted, labels, TREE)
    assert "mistake_severity" not in train(tiny(method="ce", **SILENT), tmp_path / "plain")


def test_a_run_reserves_vectors(tiny, tmp_path):
    recipe = tiny(method="etf-la", capacity=14, **SILENT)
    train(recipe, tmp_path / "run")
    head = load_classifier(tmp_path / "run")[0].head
    assert isinstance(head, FrameHead)
    assert (head.num_classes, head.capacity) == (10, 14)
    features = torch.randn(3, head.dim)
    before = head(features).logits
    head.add_classes(4)
    assert torch.equal(head(features).logits[:, :10], before)


def test_orders_are_rows_of_a_comparison(tiny, tmp_path):
    recipe = tiny(geometry="orthoplex", width=6, **SILENT)
    rows = ["etf-dr:frame_order=random", "etf-dr:frame_order=apart"]
    compare(recipe, rows, seeds=[0], out=tmp_path)
    assert sorted(path.parent.parent.name for path in tmp_path.glob("*/seed-0/metrics.json")) == sorted(
        row.replace(":", "+") for row in rows
    )
