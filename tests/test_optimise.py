"""Optimisers, groups of layers, sharpness-aware steps and the average of weights, against closed forms and NumPy."""

import functools

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equiframe.backbones import MLP, make_backbone
from equiframe.errors import InputError
from equiframe.heads import CosineHead, LinearHead, NearestFrameHead
from equiframe.losses import CrossEntropy
from equiframe.model import Classifier
from equiframe.optimise import (
    WeightAverage,
    at_sharpest_point,
    build_optimizer,
    fixed_statistics,
    layer_groups,
    set_learning_rate,
)

# --- the optimiser ----------------------------------------------------------------------------------------------------


def one_parameter(value=(3.0, -2.0)):
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(value, dtype=torch.float64))
    return module


def test_sgd_with_momentum_and_weight_decay_against_a_loop():
    module = one_parameter()
    optimizer = build_optimizer(module, nn.Identity(), lr=0.1, momentum=0.8, weight_decay=0.01)
    theta, velocity = np.array([3.0, -2.0]), 0.0
    for step in range(5):
        optimizer.zero_grad()
        (module.weight**2).sum().backward()
        set_learning_rate(optimizer, 0.1 / (step + 1))
        optimizer.step()
        velocity = 0.8 * velocity + 2 * theta + 0.01 * theta
        theta = theta - 0.1 / (step + 1) * velocity
    np.testing.assert_allclose(module.weight.detach().numpy(), theta, rtol=1e-12)


def test_adamw_against_a_loop():
    module = one_parameter()
    optimizer = build_optimizer(module, nn.Identity(), kind="adamw", lr=0.1, momentum=0.8, weight_decay=0.01)
    theta, first, second = np.array([3.0, -2.0]), 0.0, 0.0
    for step in range(1, 6):
        optimizer.zero_grad()
        (module.weight**2).sum().backward()
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        gradient = 2 * theta
        theta = theta * (1 - 0.1 * 0.01)  # decoupled
        first, second = 0.8 * first + 0.2 * gradient, 0.999 * second + 0.001 * gradient**2
        theta = theta - 0.1 * (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(module.weight.detach().numpy(), theta, rtol=1e-10)


def test_what_is_frozen_does_not_move():
    backbone, head = MLP(4, width=3), LinearHead(3, 2, frozen=True)
    groups = build_optimizer(backbone, head, lr=0.1).param_groups
    assert [p is q for p, q in zip(groups[0]["params"], backbone.parameters(), strict=True)] == [True] * 6


@pytest.mark.parametrize(
    ("name", "factor"),
    [("test_resnet", 1), ("test_vit", 1), ("test_efficientnet", 1), ("test_convnext", 0.6)],
)
def test_layer_scales_are_those_that_timm_gives_the_whole_model(name, factor):
    """timm counts a ConvNeXt's last norm to the classifier, so there all of the backbone is one group closer to it."""
    from timm.optim import param_groups_layer_decay

    whole = timm.create_model(name, num_classes=10)
    names = {id(p): n for n, p in whole.named_parameters()}
    expected = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(whole, layer_decay=0.6)
        for p in group["params"]
    }
    backbone = make_backbone(f"timm:{name}", image_size=64)
    own = {id(p): n for n, p in backbone.named_parameters()}
    found = {own[id(p)]: group["lr_scale"] for group in layer_groups(backbone, 0.6) for p in group["params"]}
    assert set(found) == set(own.values())
    assert found == pytest.approx({n: factor * expected[n] for n in found})
    assert len(set(found.values())) > 3
    assert expected[next(n for n, p in whole.named_parameters() if p is whole.get_classifier().weight)] == 1


def test_layers_learn_at_their_own_rates():
    backbone, head = make_backbone("timm:test_resnet", image_size=32), LinearHead(96, 3)
    optimizer = build_optimizer(backbone, head, lr=0.1, layer_decay=0.5, momentum=0.0)
    set_learning_rate(optimizer, 0.2)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len([*backbone.parameters(), *head.parameters()])
    assert rates[id(head.linear.weight)] == 0.2
    assert rates[id(next(backbone.parameters()))] == pytest.approx(0.2 * 0.5**5)
    assert {round(r, 8) for r in rates.values()} == {0.2 * 0.5**i for i in range(6)}


def test_layers_without_groups_are_refused():
    with pytest.raises(
        InputError, match=r"layer_decay 0.5 needs a backbone of timm that groups its layers; MLP does not"
    ):
        build_optimizer(MLP(4), LinearHead(256, 2), lr=0.1, layer_decay=0.5)
    with pytest.raises(InputError, match="did you mean 'adamw'"):
        build_optimizer(MLP(4), LinearHead(256, 2), kind="adam", lr=0.1)


# --- sharpness-aware minimisation -------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.floats(1e-3, 2.0))
def test_a_sharpness_aware_step_on_a_quadratic_is_the_closed_form(seed, rho):
    """L = x'Ax/2: the step is x - lr A (x + rho Ax/|Ax|), over two tensors together."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(5, 5))
    a, x = root @ root.T, random.normal(size=5)
    matrix = torch.from_numpy(a)
    parts = [nn.Parameter(torch.from_numpy(x[:2].copy())), nn.Parameter(torch.from_numpy(x[2:].copy()))]
    unused = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*parts, unused], lr=0.1)

    def backward():
        optimizer.zero_grad()
        point = torch.cat(parts)
        (0.5 * point @ matrix @ point).backward()

    backward()
    with at_sharpest_point([*parts, unused], rho):
        inside = torch.cat(parts).detach().numpy()
        backward()
    assert np.array_equal(torch.cat(parts).detach().numpy(), x)  # back to the bit
    optimizer.step()
    gradient = a @ x
    sharpest = x + rho * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(inside, sharpest, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(torch.cat(parts).detach().numpy(), x - 0.1 * a @ sharpest, rtol=1e-10, atol=1e-10)
    assert torch.equal(unused, torch.ones(3))


def test_parameters_come_back_after_an_error_and_a_gradient_of_zero():
    module = one_parameter()
    (module.weight.sum() * 0).backward()
    standing = at_sharpest_point(module.parameters(), 0.5)
    standing.__enter__()
    assert module.weight.tolist() == [3.0, -2.0]
    module.weight.data += 1
    assert not standing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert module.weight.tolist() == [3.0, -2.0]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_second_pass_leaves_running_statistics(compiled):
    model = Classifier(MLP(4, width=8), CosineHead(8, 3, logit_scale=1.0)).train()
    run = torch.compile(model.backbone, backend="eager") if compiled else model.backbone
    forward = lambda x: model.head(run(x)).logits  # noqa: E731
    images = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    first = forward(images)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    assert any(name.startswith("head.") for name in statistics)
    with fixed_statistics(model):
        assert torch.equal(forward(images), first)  # by the batch, as in training
        assert all(torch.equal(statistics[name], value) for name, value in model.named_buffers())
    forward(images)
    assert not any(torch.equal(statistics[name], value) for name, value in model.named_buffers())


# --- the average of weights -------------------------------------------------------------------------------------------


def test_the_average_of_weights_against_a_loop():
    model = Classifier(MLP(4, width=3), LinearHead(3, 2))
    average = WeightAverage(model, 0.9)
    seen = []
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 8):
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
            else:
                value.fill_(t)
        average.update(model)
        seen.append({name: value.numpy().copy() for name, value in model.state_dict().items()})
        shares = np.array([0.9 ** (t - i) for i in range(1, t + 1)])
        shares /= shares.sum()
        for name, value in average.model.state_dict().items():
            expected = sum(s * w[name] for s, w in zip(shares, seen, strict=True))
            if name.endswith("num_batches_tracked"):
                expected = t
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())


def test_the_average_of_equal_weights_is_exact_and_its_state_continues():
    model = Classifier(MLP(4, width=3), LinearHead(3, 2))
    one, two = WeightAverage(model, 0.5), WeightAverage(model, 0.5)
    for _ in range(3):
        one.update(model)
    for name, value in model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], value)
    model.head.linear.weight.data += 1
    two.load_state(one.state())
    one.update(model)
    two.update(model)
    assert torch.equal(one.model.head.linear.weight, two.model.head.linear.weight)
    assert two.num_steps == 4


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_a_decay_out_of_range(decay):
    with pytest.raises(InputError, match="between 0 and 1"):
        WeightAverage(MLP(4), decay)


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny, tmp_path):
    """``trained(name, field=value, …)`` → the weights of a short run (its checkpoint and its saved model)."""
    from safetensors.torch import load_file

    from equiframe.runs import RunFolder
    from equiframe.train import train

    def run(name, **fields):
        train(tiny(imbalance=20, **fields), tmp_path / name)
        state = RunFolder(tmp_path / name).load_checkpoint()
        return state, load_file(tmp_path / name / "model.safetensors")

    return run


def distance(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_sharpness_aware_training(trained):
    plain, sharp, almost = (trained(f"sam-{rho}", sam=rho)[1] for rho in (0.0, 0.05, 1e-12))
    assert distance(plain, almost) < 1e-4
    assert distance(plain, sharp) > 1e-3
    steps = [value for name, value in sharp.items() if name.endswith("num_batches_tracked")]
    assert steps
    assert all(value == plain["backbone.layers.2.num_batches_tracked"] for value in steps)  # one pass a step counts


def test_sharpness_aware_training_compiled_with_an_average(trained, monkeypatch):
    eager = trained("eager", sam=0.05, ema=0.9)[1]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = trained("compiled", sam=0.05, ema=0.9, compile=True)[1]
    assert distance(eager, compiled) < 1e-4


def test_the_average_is_what_is_tracked_and_saved(trained, tmp_path):
    from equiframe.runs import RunFolder

    state, saved = trained("ema", ema=0.8)
    plain = trained("plain")[0]
    assert all(torch.equal(state["model"][name], plain["model"][name]) for name in saved)  # training itself is the same
    assert all(torch.equal(state["average"]["model"][name], saved[name]) for name in saved)
    assert distance(saved, state["model"]) > 1e-3
    history = {name: RunFolder(tmp_path / name).history()[-1] for name in ("ema", "plain")}
    assert history["ema"]["train_nc1"] != history["plain"]["train_nc1"]
    metrics = RunFolder(tmp_path / "ema").read_json("metrics.json")
    assert metrics["selected"] == "last epoch, average of weights"


def test_a_frame_that_follows_its_means_is_copied_and_moves_once_a_step():
    torch.manual_seed(0)
    head = NearestFrameHead(6, 4, logit_scale=8.0, frame_rate=0.5).train()
    average = WeightAverage(head, 0.9)
    for _ in range(3):
        shares = torch.nn.functional.one_hot(torch.arange(8) % 4, 4).float()
        head.observe(head.normalise(torch.randn(8, 6)), shares)
        average.update(head)
    assert torch.equal(average.model.frame.dense(), head.frame.dense())  # a mean of frames would be none
    features, targets = torch.randn(8, 6), torch.arange(8) % 4
    before = head.class_means.clone()
    with fixed_statistics(head):
        CrossEntropy()(head(features), targets)
    assert torch.equal(head.class_means, before)
    CrossEntropy()(head(features), targets)
    assert not torch.equal(head.class_means, before)
