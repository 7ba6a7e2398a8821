"""Scores of known classes, and the area under their ROC curve."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from equiframe import FrameHead, InputError, LinearHead
from equiframe.openset import auroc, open_set_scores

VALUES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(VALUES, VALUES)
def test_auroc_counts_pairs(known, unknown):
    pairs = [(s > u) + 0.5 * (s == u) for s in known for u in unknown]
    found = auroc(torch.tensor(known), torch.tensor(unknown))
    assert found == pytest.approx(sum(pairs) / len(pairs))
    labels = [1] * len(known) + [0] * len(unknown)
    assert found == pytest.approx(roc_auc_score(labels, known + unknown))
    assert found == pytest.approx(1 - auroc(torch.tensor(unknown), torch.tensor(known)))


@pytest.mark.parametrize(
    ("head", "classes"),
    [
        (FrameHead(6, 5, logit_scale=3.0, e_w=2.0, e_h=4.0, norm="none"), 5),
        (FrameHead(6, 20, logit_scale=3.0, norm="none"), 20),
        (FrameHead(6, 4, logit_scale=3.0, capacity=12, norm="none", length="free"), 4),
        (LinearHead(6, 5), 5),
    ],
)
def test_scores_are_those_of_a_loop(head, classes):
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    output = head.double()(x.double())
    scores = open_set_scores(output, temperature=2.0)
    vectors, logits = head.class_vectors().detach().numpy(), output.logits.detach().numpy()
    assert logits.shape == (7, classes)
    for i, h in enumerate(output.features.detach().numpy()):
        cosines = [w @ h / np.linalg.norm(w) / np.linalg.norm(h) for w in vectors]
        first, second = sorted(range(classes), key=lambda k: -cosines[k])[:2]
        u, v = vectors[first] / np.linalg.norm(vectors[first]), vectors[second] / np.linalg.norm(vectors[second])
        exps = [math.exp(z) for z in logits[i]]
        expected = {
            "cosine": cosines[first],
            "margin": (cosines[first] - cosines[second]) / (1 - u @ v),
            "max-softmax": max(exps) / sum(exps),
            "energy": 2 * math.log(sum(math.exp(z / 2) for z in logits[i])),
        }
        assert set(scores) == set(expected)
        for name, value in expected.items():
            assert float(scores[name][i]) == pytest.approx(value, abs=1e-9), name


def test_margin_is_1_at_a_class_vector_and_0_between_two():
    head = FrameHead(4, 8, logit_scale=1.0, norm="none").double()
    vectors = head.class_vectors()
    torch.testing.assert_close(open_set_scores(head(vectors))["margin"], torch.ones(8, dtype=torch.float64))
    between = vectors[:1] + vectors[1:2]
    assert float(open_set_scores(head(between))["margin"]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("known", "unknown"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0])])
def test_wrong_scores(known, unknown):
    with pytest.raises(InputError, match="at least one and none NaN"):
        auroc(torch.tensor(known), torch.tensor(unknown))


def test_wrong_temperature():
    with pytest.raises(InputError, match="temperature must be a positive number, got 0"):
        open_set_scores(LinearHead(3, 2)(torch.randn(2, 3)), temperature=0)
