"""Every geometry where it is used: mixed precision, compilation, two processes, state dicts, ranking in bounded memory, the command."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from equiframe import CrossEntropy, DotRegression, FrameHead, LogitAdjustedCrossEntropy, SampledCrossEntropy
from equiframe.cli import main
from equiframe.frames import TreeFrame, make_frame
from equiframe.frames import bases as bases_module

SIZES = {  # geometry → K, D
    "simplex": (9, 16), "orthoplex": (20, 16), "code": (40, 8), "kerdock": (250, 16), "gold": (130, 8), "embedded": (130, 20),
    "tree": (6, 16), "ordered": (130, 8), "reserved": (130, 8),
}  # fmt: skip


def head_of(name, seed=0, **options):
    k, d = SIZES[name]
    options = {"norm": "none", "logit_scale": 8.0, "seed": seed} | options
    if name == "tree":
        options["geometry"] = TreeFrame([0, 0, 1, 1, 2, 2], d, seed=seed)
    elif name == "ordered":
        options |= {
            "geometry": "gold",
            "order": torch.randperm(k, generator=torch.Generator().manual_seed(seed + 1)),
        }
    elif name == "reserved":
        return FrameHead(d, k - 20, geometry="gold", capacity=k, **options)
    else:
        options["geometry"] = name
    return FrameHead(d, k, **options)


def losses_of(k):
    counts = torch.arange(1, k + 1)
    return [
        DotRegression(), CrossEntropy(), LogitAdjustedCrossEntropy(class_counts=counts),
        SampledCrossEntropy(sampled_classes=10**6, tau=1.0, class_counts=counts),
    ]  # fmt: skip


def batch(name, size=6):
    generator = torch.Generator().manual_seed(0)
    k, d = head_of(name).num_classes, SIZES[name][1]
    return torch.randn(size, d, generator=generator), torch.randint(k, (size,), generator=generator)


@pytest.mark.parametrize("name", SIZES)
def test_autocast_changes_nothing(name):
    head, (x, y) = head_of(name), batch(name)
    for loss in losses_of(head.num_classes):
        x = x.detach().requires_grad_()
        plain = loss(head(x), y)
        (gradient,) = torch.autograd.grad(plain, x)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(head(x), y)
            top = head.ranked(head(x).features, 3)
        assert value.dtype == torch.float32
        assert torch.equal(value, plain)
        assert torch.equal(torch.autograd.grad(value, x)[0], gradient)
        assert all(map(torch.equal, top, head.ranked(head(x).features, 3)))


@pytest.mark.parametrize("name", ["kerdock", "ordered"])
def test_a_compiled_step_is_the_step(name):
    """Forward and backward are traced as one graph each (the C++ that usually follows takes a minute a size)."""
    head, (x, y) = head_of(name), batch(name)
    dr, ce = DotRegression(), CrossEntropy()

    def step(x):
        output = head(x)
        return dr(output, y) + ce(output, y)

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x = x.detach().requires_grad_()
        value = function(x)
        value.backward()
        results.append((value.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", SIZES)
def test_a_state_dict_is_the_frame_whatever_the_seed(name):
    head, other = head_of(name, seed=1), head_of(name, seed=2)
    x = batch(name)[0]
    assert not torch.equal(other(x).logits, head(x).logits)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x).logits, head(x).logits)
    saved = sum(v.numel() for v in head.state_dict().values())
    assert saved <= {"kerdock": 16, "gold": 8, "embedded": 16 + 16 * 20, "ordered": 8 + 130, "reserved": 8 + 1}.get(
        name, head.frame.dense().numel()
    )


def loss_on_a_rank(world):
    """Gradients of the sum of all losses, for every frame, from this rank's half of the batch; ranks draw different frames and weights."""
    found = {}
    for name in SIZES:
        torch.manual_seed(5 + world.rank)
        model = nn.Sequential(nn.Linear(SIZES[name][1], SIZES[name][1]), head_of(name, seed=5 + world.rank))
        parallel = DistributedDataParallel(model)  # rank 0's parameters and buffers go to all
        x, y = (part[world.rank :: 2] for part in batch(name))
        output = parallel(x)
        sum(loss(output, y) for loss in losses_of(model[1].num_classes)).backward()
        found[name] = (model[0].weight.grad.clone(), model[1].class_vectors().clone())
        every = [torch.empty_like(found[name][1]) for _ in range(2)]
        dist.all_gather(every, found[name][1])
        assert torch.equal(*every), name
    return found


def test_two_processes_train_on_one_frame(processes):
    found = processes(loss_on_a_rank)[0]
    for name, (gradient, _) in found.items():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(SIZES[name][1], SIZES[name][1]), head_of(name, seed=5))
        x, y = batch(name)
        output = model(x)
        sum(loss(output, y) for loss in losses_of(model[1].num_classes)).backward()
        torch.testing.assert_close(gradient, model[0].weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("chunk", [10, 10**6])
def test_ranking_is_softmax_and_topk(name, chunk, monkeypatch):
    monkeypatch.setitem(bases_module._CHUNK, "cpu", chunk)
    head = head_of(name, e_w=2.0).double()
    features = head(batch(name)[0].double()).features
    expected = F.softmax(head.logits(features) / 1.7, dim=1).topk(5, dim=1)
    values, classes = head.ranked(features, 5, temperature=1.7)
    torch.testing.assert_close(values.float(), expected.values.float())
    torch.testing.assert_close(F.softmax(head.logits(features) / 1.7, dim=1).gather(1, classes), expected.values)
    assert torch.equal(
        head.logits(features).amax(1), head.logits(features).gather(1, head.decide(features)[:, None])[:, 0]
    )


def test_ranking_never_makes_a_logit_for_each_class(monkeypatch):
    head = FrameHead(64, 4224, norm="none", logit_scale=16.0)
    monkeypatch.setitem(bases_module._CHUNK, "cpu", 1024)
    sizes = [piece.numel() for piece in head.frame.pieces(torch.randn(4, 64))]
    assert max(sizes) <= 2 * 1024 < 4 * 4224 == sum(sizes)
    monkeypatch.setattr(head.frame, "logits", None)
    head.ranked(torch.randn(4, 64), 5)


def test_probabilities_over_a_million_classes():
    head = FrameHead(1024, 1_000_000, norm="none", logit_scale=64.0)
    vectors = head.frame.vectors(torch.tensor([123_456, 999_999]))
    probabilities, classes = head.ranked(vectors, 2)
    assert classes[:, 0].tolist() == [123_456, 999_999]
    # its own basis: itself, its negative, 2,046 orthogonal ones; all others at ±1/32
    rest = torch.tensor([123_456, 999_999]) // 2048 != 488  # the last basis has fewer
    others = (1_000_000 - 2048) / 2 * (torch.tensor(2.0).exp() + torch.tensor(-2.0).exp())
    expected = torch.tensor(64.0).exp() / (torch.tensor(64.0).exp() + others + 2046)
    assert rest[0]
    torch.testing.assert_close(probabilities[0, 0], expected, rtol=1e-4, atol=0)


REASONS = {  # K, D → what the command must say
    (10, 16): ("simplex frame: 10 unit vectors in R^16, largest cosine -0.111111 (no smaller one is possible)", "K <= D+1 = 17"),
    (20, 16): ("orthoplex frame: 20 unit vectors in R^16, largest cosine 0 (no smaller one is possible)", "K <= 2D = 32"),
    (40, 16): ("code frame", "by Levenshtein's bound", "optimised from a seed"),
    (288, 16): ("kerdock frame", "largest cosine 0.25 (no frame goes below 0.241", "no 144 lines in R^16 have a larger angle"),
    (200, 16): ("kerdock frame", "7 orthonormal bases of R^16 and their negatives"),
    (130, 8): ("gold frame", "largest cosine 0.5 (no frame goes below", "9 orthonormal bases of R^8"),
    (600, 20): ("code frame", "coherence measured"),
    (1100, 40): ("embedded frame", "orthonormal bases of R^32", "turned into R^40, which is no power of two"),
}  # fmt: skip


@pytest.mark.parametrize(("k", "d"), REASONS)
def test_the_command_tells_coherence_bound_and_reason(k, d, capsys):
    assert main(["frame", str(k), str(d)]) == 0
    text = capsys.readouterr().out
    for part in REASONS[k, d]:
        assert part in text
    frame = make_frame(k, d, dtype=torch.float64)
    gram = (frame.dense() @ frame.dense().T).fill_diagonal_(-2)
    assert float(gram.max()) == pytest.approx(frame.coherence, abs=1e-9)


# --- cross-entropy on sampled classes ---------------------------------------------------------------------------------


def test_the_sampled_partition_function_is_right_on_average():
    """Over all K^n draws of n = 2 of K = 4 classes, all alike, the estimate's mean is Σ exp z, whichever class is the target."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    for target in range(4):
        y, total, losses = torch.tensor([target]), 0.0, []
        for draw in itertools.product(range(4), repeat=2):
            classes = torch.tensor(draw)
            loss = SampledCrossEntropyAt(classes)(logits, y)
            total += float((loss + logits[0, target]).exp()) / 16
            losses.append(float(loss))
        assert total == pytest.approx(float(logits.exp().sum()), rel=1e-12)
        full = float(F.cross_entropy(logits, y))
        assert sum(losses) / 16 < full  # Jensen


def SampledCrossEntropyAt(classes):
    from equiframe import sampled_cross_entropy

    return lambda logits, y: sampled_cross_entropy(logits[0, y], logits[:, classes], y, classes, 4)


@pytest.mark.parametrize("name", SIZES)
def test_sampled_losses_approach_cross_entropy(name):
    head, (x, y) = head_of(name), batch(name)
    k = head.num_classes
    counts = torch.arange(1, k + 1)
    for tau, full in ((0.0, CrossEntropy()), (1.0, LogitAdjustedCrossEntropy(class_counts=counts))):
        expected = full(head(x), y)
        some = SampledCrossEntropy(sampled_classes=max(2, k // 2), tau=tau, class_counts=counts)
        torch.manual_seed(0)
        drawn = torch.stack([some(head(x), y) for _ in range(200)])
        assert drawn.std() > 0
        mean, error = float(drawn.mean()), float(drawn.std()) / 200**0.5
        assert 0.7 * float(expected) < mean < float(expected) + 5 * error
        assert torch.equal(some.eval()(head(x), y), expected)  # nothing is drawn
        every = SampledCrossEntropy(sampled_classes=k, tau=tau, class_counts=counts)
        assert torch.equal(every(head(x), y), expected)


def test_sampling_makes_no_logit_of_the_other_classes(monkeypatch):
    head = FrameHead(1024, 1_000_000, norm="none", logit_scale=16.0)
    monkeypatch.setattr(head, "products", None)
    x = torch.randn(4, 1024, requires_grad=True)
    SampledCrossEntropy(sampled_classes=64)(head(x), torch.tensor([0, 1, 2, 999_999])).backward()
    assert float(x.grad.abs().sum()) > 0
