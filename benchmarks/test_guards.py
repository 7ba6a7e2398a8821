"""Guards of the hot paths: each is held against the usual way, in turn in one process, by the ratio of processor times.

    make bench                      # or: python -m pytest benchmarks/test_guards.py

Ratios hold on a busy machine where times do not. The floors lie well below what docs/performance.md measures: they catch a path that
has lost its speed, not a noisy minute. pytest-benchmark's table and JSON (``--benchmark-json``) keep our times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from equiframe import DotRegression, FrameHead, LogitAdjustedCrossEntropy, walsh_hadamard
from equiframe.collapse import ClassStatistics
from equiframe.data.augment import augment, parse_augmentation
from equiframe.data.batches import normalise


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hold(benchmark):
    """``hold(usual, ours, at_least=…)``: the median over rounds of usual / ours must not be less."""

    def spent(function: Callable[[], object], calls: int) -> float:
        started = time.process_time()
        for _ in range(calls):
            function()
        return (time.process_time() - started) / calls

    def hold(usual: Callable[[], object], ours: Callable[[], object], *, at_least: float, rounds: int = 7) -> None:
        usual(), ours()
        calls = max(1, round(0.02 / max(spent(ours, 1), 1e-5)))
        ratios = [spent(usual, 1 + calls // 20) / spent(ours, calls) for _ in range(rounds)]
        benchmark.extra_info |= {"ratio": round(statistics.median(ratios), 2), "at_least": at_least}
        benchmark.pedantic(ours, rounds=3, iterations=1)
        print(
            f"usual / ours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), floor {at_least}"
        )
        assert statistics.median(ratios) >= at_least, [round(r, 2) for r in ratios]

    return hold


@pytest.mark.parametrize(("classes", "floor"), [(1_000, 1.5), (10_000, 12)])
def test_head_and_loss(hold, classes, floor):
    """Dot regression on a frame against a linear layer with cross-entropy."""
    features, targets = torch.randn(256, 512, requires_grad=True), torch.randint(classes, (256,))
    head, loss, layer = FrameHead(512, classes, logit_scale=1.0, norm="none"), DotRegression(), nn.Linear(512, classes)

    def ours():
        features.grad = None
        loss(head(features), targets).backward()

    def usual():
        features.grad = layer.weight.grad = None
        F.cross_entropy(layer(features), targets).backward()

    hold(usual, ours, at_least=floor)


def test_logit_adjustment_costs_little(hold):
    """Cross-entropy adjusted by class counts against plain cross-entropy, both on a frame of 1,000 classes."""
    targets = torch.randint(1_000, (256,))
    head = FrameHead(1_023, 1_000, norm="none", length="free", logit_scale=1.0)
    features = torch.randn(256, 1_023, requires_grad=True)
    loss = LogitAdjustedCrossEntropy(class_counts=list(range(1, 1_001)))
    hold(lambda: F.cross_entropy(head(features).logits, targets).backward(),
         lambda: loss(head(features), targets).backward(), at_least=0.6)  # fmt: skip


def test_batches(hold):
    """A batch of 128 augmented at once against torchvision's transforms on PIL images one by one."""
    from PIL import Image
    from torchvision import transforms

    pixels = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25])
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
             transforms.Normalize(mean.tolist(), std.tolist())]  # fmt: skip
    transform, arrays, plan = (
        transforms.Compose(steps),
        pixels.permute(0, 2, 3, 1).numpy(),
        parse_augmentation("crop-flip"),
    )

    def ours():
        return normalise(augment(pixels, plan, np.random.default_rng(0)), mean, std, torch.channels_last)

    hold(lambda: torch.stack([transform(Image.fromarray(a)) for a in arrays]), ours, at_least=2.5)


def test_class_statistics(hold):
    """One pass against three: class means, covariance, and the two decisions."""
    classes, dim, samples = 200, 512, 4_000
    x, y = torch.randn(samples, dim), torch.arange(samples) % classes
    vectors = torch.randn(classes, dim)

    def usual():
        one_hot = F.one_hot(y, classes).float()
        means = one_hot.T @ x / one_hot.sum(0)[:, None]
        gaps = x - means[y]
        scatter = gaps.T @ gaps / samples
        nearest = (means.square().sum(1) - 2 * x @ means.T).argmin(1)
        return scatter, ((x @ vectors.T).argmax(1) == nearest).float().mean()

    hold(usual, lambda: ClassStatistics(classes, dim).update(x, y).within_trace, at_least=0.8)


def test_walsh_hadamard(hold):
    """Blocked products against butterflies in plain torch."""
    x = torch.randn(256, 1024)

    def butterflies():
        y = x
        for _ in range(10):
            even, odd = y[:, 0::2], y[:, 1::2]
            y = torch.cat([even + odd, even - odd], 1)
        return y

    assert torch.allclose(butterflies(), walsh_hadamard(x), atol=1e-3)
    hold(butterflies, lambda: walsh_hadamard(x), at_least=1.2)


def test_exact_best_classes(hold):
    """The exact five best of 20,000 classes on a frame against a dense product and topk."""
    unit = F.normalize(torch.randn(128, 256), dim=1)
    frame = FrameHead(256, 20_000, logit_scale=1.0, norm="none").frame
    vectors = frame.dense()

    with torch.no_grad():
        hold(lambda: (unit @ vectors.T).topk(5, dim=1), lambda: frame.topk(unit, 5), at_least=1.3)
