import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from equiframe.evaluate import (
    accuracy_measures,
    calibration_measures,
    class_recall,
    class_table,
    expected_calibration_error,
    fit_temperature,
)


def random_case(seed=0, n=200, k=7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=generator)
    logits = torch.randn(n, k, generator=generator) + 2 * F.one_hot(labels, k)
    return logits, labels


@given(st.integers(0, 500))
def test_accuracy_against_loops(seed):
    logits, labels = random_case(seed)
    predictions = logits.argmax(1)
    counts = [500, 200, 100, 50, 20, 10, 5]
    got = accuracy_measures(predictions, labels, counts)
    recall = []
    for k in range(7):
        of_class = [int(p == y) for p, y in zip(predictions, labels, strict=True) if y == k]
        recall.append(sum(of_class) / len(of_class))
    assert got["top1"] == pytest.approx(
        sum(int(p == y) for p, y in zip(predictions, labels, strict=True)) / len(labels)
    )
    assert got["macro"] == pytest.approx(np.mean(recall))
    assert got["many"] == pytest.approx(np.mean(recall[:2]))
    assert got["medium"] == pytest.approx(np.mean(recall[2:5]))
    assert got["few"] == pytest.approx(np.mean(recall[5:]))
    assert got["head"] == pytest.approx(np.mean(recall[:3]))
    assert got["worst"] == pytest.approx(min(recall))


def test_classes_without_images_are_left_out():
    predictions, labels = torch.tensor([0, 0, 2]), torch.tensor([0, 0, 2])
    got = accuracy_measures(predictions, labels, [200, 150, 3])
    assert got["macro"] == 1.0
    assert got["many"] == 1.0
    assert got["medium"] is None
    assert np.isnan(class_recall(predictions, labels, 3)[1])
    table = class_table(predictions, labels, ["a", "b", "c"], [200, 150, 3])
    assert table[1] == {"name": "b", "num_train": 150, "num_test": 0, "accuracy": None}


def test_ece_against_loops_and_known_cases():
    logits, labels = random_case()
    p = F.softmax(logits.double(), dim=1)
    total = 0.0
    for b in range(15):
        rows = [i for i in range(len(p)) if b / 15 < p[i].max() <= (b + 1) / 15]
        if rows:
            accuracy = np.mean([float(p[i].argmax() == labels[i]) for i in rows])
            total += len(rows) / len(p) * abs(accuracy - np.mean([float(p[i].max()) for i in rows]))
    assert expected_calibration_error(p, labels) == pytest.approx(total, abs=1e-12)
    sure = F.one_hot(labels, 7).double()
    assert expected_calibration_error(sure, labels) == 0
    assert expected_calibration_error(sure.roll(1, 1), labels) == 1


@pytest.mark.parametrize("true_temperature", [0.1, 1.0, 5.0, 40.0])
def test_temperature_is_found(true_temperature):
    """Labels drawn from softmax(z) and logits multiplied by T: the fit finds T, up to sampling error."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(F.softmax(z, dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(true_temperature * z, labels) == pytest.approx(true_temperature, rel=0.05)


def test_temperature_is_the_minimum_of_the_macro_loss():
    logits, labels = random_case(3)
    t = fit_temperature(logits, labels)

    def macro_nll(t):
        nll = F.cross_entropy(logits.double() / t, labels, reduction="none")
        return torch.stack([nll[labels == k].mean() for k in range(7)]).mean().item()

    assert macro_nll(t) <= min(macro_nll(t * 1.01), macro_nll(t / 1.01))


def test_calibration_measures():
    logits, labels = random_case()
    got = calibration_measures(logits, labels, 2.0)
    assert got["nll"] == pytest.approx(F.cross_entropy(logits.double() / 2, labels).item())
    assert got["ece"] == expected_calibration_error(F.softmax(logits.double() / 2, dim=1), labels)
