"""The torchmetrics classes: a collection with one state, and two processes that give one answer."""

import copy

import pytest
import torch
from torch import distributed as dist
from torchmetrics import MetricCollection

from equiframe import collapse
from equiframe.collapse import ClassStatistics, collapse_measures
from equiframe.collapse.metrics import CDNV, NC1, NC3, NC4, Collapse, NC2Angle, NC2Norm
from equiframe.errors import InputError

K, D = 4, 5


def data(num=90):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(K, (num,), generator=g)
    w = torch.randn(K, D, generator=g, dtype=torch.float64)
    x = w[y] + torch.randn(num, D, generator=g, dtype=torch.float64) + 100
    return x, y, (x - 100) @ w.T, w


def collection(w, means):
    return MetricCollection(
        {
            "nc1": NC1(K, D),
            "nc1_quotient": NC1(K, D, method="quotient"),
            "cdnv": CDNV(K, D),
            "nc2_angle": NC2Angle(K, D),
            "nc2_norm": NC2Norm(K, D),
            "nc3": NC3(K, D, class_vectors=w),
            "nc4": NC4(K, D, class_means=means),
        }
    )


def test_a_collection_is_one_pass_over_one_state():
    x, y, logits, w = data()
    s = ClassStatistics(K, D).update(x, y)
    metrics = collection(w, s.class_means)
    for rows in torch.arange(len(x)).split(32):
        metrics.update(x[rows], y[rows], predictions=logits[rows].argmax(1))
    assert sorted(map(len, metrics.compute_groups.values())) == [1, 6]  # NC4 alone counts decisions
    got = {name: float(value) for name, value in metrics.compute().items()}
    expected = {k: v for k, v in collapse_measures(s, w, full=True).items() if k in got}
    expected["nc4"] = collapse.nc4_agreement(x, logits, s.class_means)
    assert got == pytest.approx(expected, rel=1e-12)
    metrics.reset()
    metrics.update(x, y, logits.argmax(1))
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(expected, rel=1e-12)
    again = metrics.clone()
    again.update(x, y, logits.argmax(1))
    assert again["cdnv"].statistics().num_samples == 2 * len(x)
    assert metrics["cdnv"].statistics().num_samples == len(x)


def test_forward_gives_the_batch_and_keeps_the_rest():
    x, y, _, _ = data()
    metric = NC1(K, D)
    for rows in torch.arange(len(x)).split(30):
        assert float(metric(x[rows], y[rows])) == pytest.approx(
            collapse.nc1(ClassStatistics(K, D).update(x[rows], y[rows])), rel=1e-10
        )
    assert float(metric.compute()) == pytest.approx(collapse.nc1(ClassStatistics(K, D).update(x, y)), rel=1e-12)
    half, rest = NC1(K, D), NC1(K, D)
    half.update(x[:50], y[:50])
    rest.update(x[50:], y[50:])
    half.merge_state(rest)
    assert float(half.compute()) == pytest.approx(float(metric.compute()), rel=1e-12)


def test_all_measures_as_one_metric():
    x, y, logits, w = data()
    s = ClassStatistics(K, D, class_means=w + 100).update(x, y, logits.argmax(1))
    few = torch.tensor([False, False, True, True])
    metric = Collapse(K, D, class_vectors=lambda: w, class_means=w + 100, few=few, full=True)
    metric.update(x, y, logits.argmax(1))
    expected = collapse_measures(s, w, few=few, full=True)
    got = {k: float(v) for k, v in metric.compute().items()}
    assert got.keys() == expected.keys()
    assert got == pytest.approx(expected, rel=1e-12)
    named = MetricCollection([Collapse(K, D)], prefix="train/")
    named.update(x, y)
    assert {"train/nc1", "train/nc2_angle", "train/nc2_norm"} <= set(named.compute())


def test_trained_vectors_stay_current():
    head = torch.nn.Linear(D, K)
    x, y, _, _ = data()
    metric = NC3(K, D, class_vectors=lambda: head.weight)
    twin = copy.deepcopy(metric)
    metric.update(x, y)
    twin.update(x, y)
    with torch.no_grad():
        head.weight.mul_(-1)
    assert metric.compute() == twin.compute()
    assert list(metric.parameters()) == []
    with pytest.raises(InputError, match="predictions"):
        NC4(K, D, class_means=head.weight).update(x, y)
    with pytest.raises(InputError, match="sketch"):
        NC1(K, D, within="sketchy")


def part_of(rank):
    """Uneven shares, and a class that only one rank has seen."""
    x, y, logits, w = data()
    mine = (y == 3) if rank == 0 else (y != 3)
    mine[:7] = rank == 0
    return x[mine], y[mine], logits[mine].argmax(1), w


def on_a_rank(world):
    x, y, predictions, w = part_of(world.rank)
    metrics = collection(w, w + 100)
    for a, b, c in zip(x.split(16), y.split(16), predictions.split(16), strict=True):
        metrics.update(a, b, c)
    synced = {name: float(value) for name, value in metrics.compute().items()}
    statistics = ClassStatistics(K, D, class_means=w + 100).update(x, y, predictions)
    together = statistics.merge_over_ranks()
    states = [torch.empty_like(together.state) for _ in range(2)]
    dist.all_gather(states, together.state)
    assert torch.equal(*states)
    assert statistics.num_samples == len(x)
    return synced, together


def test_two_processes_give_one_answer(processes):
    synced, together = processes(on_a_rank)[0]
    x, y, logits, w = data()
    s = ClassStatistics(K, D, class_means=w + 100).update(x, y, logits.argmax(1))
    expected = {k: v for k, v in collapse_measures(s, w, full=True).items() if k in synced}
    assert synced == pytest.approx(expected, rel=1e-12)
    assert collapse_measures(together, w, full=True) == pytest.approx(collapse_measures(s, w, full=True), rel=1e-11)
    alone = ClassStatistics(K, D).update(*part_of(0)[:2])
    assert collapse.nc1(alone) != pytest.approx(collapse.nc1(s), rel=1e-3)  # that the check can fail
