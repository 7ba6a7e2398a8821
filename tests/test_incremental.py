"""Sessions of new classes: memory, training, measures."""

import numpy as np
import pytest
import torch
from torch import nn

from equiframe import CrossEntropy, FrameHead, InputError, LinearHead
from equiframe.incremental import Memory, fit_session, incremental_measures, mean_features

D = 12


def clusters(classes, per_class, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, D, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor(classes).repeat_interleave(per_class)
    return centres[labels] + noise * torch.randn(len(labels), D, generator=generator), labels


def make_projection(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 16))


def test_mean_features_are_those_of_a_loop():
    x, y = clusters([4, 1, 7], 5)
    memory = mean_features(x, y)
    assert memory.classes.tolist() == [1, 4, 7]
    for mean, k in zip(memory.means.numpy(), [1, 4, 7], strict=True):
        own = [x[i].numpy() for i in range(15) if y[i] == k]
        np.testing.assert_allclose(mean, sum(own) / 5, rtol=1e-5, atol=1e-6)
    both = memory.joined(mean_features(*clusters([2], 3)))
    assert both.classes.tolist() == [1, 4, 7, 2]
    assert both.means.shape == (4, D)
    with pytest.raises(InputError, match="a class is in both memories"):
        both.joined(memory)


def test_new_classes_are_learned_and_old_ones_kept():
    """Base of 6 classes, two sessions of 2 with 5 images each: everything is told apart in the end."""
    projection, head = make_projection(), FrameHead(16, 6, capacity=10, norm="none", logit_scale=1.0)
    vectors = head.frame.dense().clone()
    x, y = clusters(range(6), 30)
    fit_session(projection, head, x, y, Memory(torch.zeros(0, D), torch.zeros(0, dtype=torch.long)), steps=80)
    memory = mean_features(x, y)
    predictions, labels = [], []
    for session in range(3):
        if session:
            head.add_classes(2)
            new_x, new_y = clusters(range(4 + 2 * session, 6 + 2 * session), 5, seed=session)
            losses = fit_session(projection, head, new_x, new_y, memory, steps=80)
            assert losses[-1] < 0.2 * losses[0]
            memory = memory.joined(mean_features(new_x, new_y))
        test_x, test_y = clusters(range(head.num_classes), 20, seed=50)
        predictions.append(head(projection(test_x)).logits.argmax(1))
        labels.append(test_y)
    measures = incremental_measures(predictions, labels, [6, 8, 10])
    assert min(measures["accuracy"]) > 0.95
    assert torch.equal(head.frame.dense(), vectors)


def test_a_session_is_gradient_descent_on_memory_and_images_by_class():
    """One step by hand: each class counts the same, and BatchNorm keeps its statistics."""
    projection, head = make_projection(), FrameHead(16, 4, capacity=5, norm="batch", logit_scale=1.0)
    twin, twin_head = make_projection(), FrameHead(16, 4, capacity=5, norm="batch", logit_scale=1.0)
    memory = mean_features(*clusters([0, 1], 10))
    x, y = clusters([2, 3], 3)
    (value,) = fit_session(projection, head, x, y, memory, steps=1, lr=0.5)
    inputs, targets = torch.cat([memory.means, x]), torch.tensor([0, 1, 2, 2, 2, 3, 3, 3])
    cosines = (twin_head.eval()(twin(inputs)).features * twin_head.frame.dense()[targets]).sum(1)
    share = torch.tensor([1.0, 1.0] + [1 / 3] * 6) / 4
    expected = (share * 0.5 * (1 - cosines) ** 2).sum()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    for now, before in zip(projection.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(now, before - 0.5 * before.grad)
    assert torch.equal(head.batch_norm.running_mean, torch.zeros(16))


def test_learnable_heads_learn_too():
    projection, head = make_projection(), LinearHead(16, 4)
    before = head.class_vectors().clone()
    x, y = clusters([2, 3], 3)
    losses = fit_session(projection, head, x, y, mean_features(*clusters([0, 1], 9)), loss=CrossEntropy(), steps=50)
    assert losses[-1] < 0.1 * losses[0]
    assert not torch.equal(head.class_vectors(), before)


def test_measures_by_hand():
    labels = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])]
    predictions = [
        torch.tensor([0, 0, 1, 0]),  # base 3/4
        torch.tensor([0, 0, 1, 1, 2, 0]),  # base 1, session 1 1/2
        torch.tensor([0, 3, 1, 2, 2, 2, 3, 0]),  # base 1/2, session 1 1, session 2 1/2
    ]
    found = incremental_measures(predictions, labels, [2, 3, 4])
    assert found["accuracy"] == pytest.approx([3 / 4, 5 / 6, 5 / 8])
    assert found["average"] == pytest.approx((3 / 4 + 5 / 6 + 5 / 8) / 3)
    assert found["drop"] == pytest.approx(1 / 8)
    assert found["base"] == pytest.approx([3 / 4, 1, 1 / 2])
    assert found["new"][0] is None
    assert found["new"][1:] == pytest.approx([1 / 2, 3 / 4])
    assert found["harmonic"][1:] == pytest.approx([2 / 3, 2 * 0.5 * 0.75 / 1.25])
    assert found["forgetting"] == pytest.approx(((1 - 1 / 2) + (1 / 2 - 1)) / 2)
    alone = incremental_measures(predictions[:1], labels[:1], [2])
    assert (alone["drop"], alone["forgetting"]) == (0, None)
    nothing = incremental_measures([labels[0], torch.full((6,), 9)], labels[:2], [2, 3])
    assert nothing["harmonic"] == [None, 0.0]


@pytest.mark.parametrize(
    ("predictions", "labels", "num_seen", "message"),
    [
        ([[0]], [[0]], [1, 2], "one entry for each session"),
        ([[0], [0]], [[0], [0]], [2, 2], "num_seen must grow"),
        ([[0]], [[2]], [2], "a label of session 0 is outside the 2 classes seen"),
        ([[0], [0]], [[0], [0]], [1, 2], "after session 1 a session's classes have no test image"),
    ],
)
def test_wrong_measures(predictions, labels, num_seen, message):
    with pytest.raises(InputError, match=message):
        incremental_measures([*map(torch.tensor, predictions)], [*map(torch.tensor, labels)], num_seen)


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ([0, 2], {}, "class 0 is in the memory already"),
        ([2, 4], {}, "class 4 is not in use: the head has 4"),
        ([2, 3], {"steps": 0}, "steps >= 1"),
        ([2, 3], {"lr": float("nan")}, "lr > 0"),
        ([2, 3], {"momentum": 1.0}, r"momentum in \[0, 1\)"),
    ],
)
def test_wrong_sessions(classes, options, message):
    head = FrameHead(16, 4, capacity=6, norm="none", logit_scale=1.0)
    with pytest.raises(InputError, match=message):
        fit_session(make_projection(), head, *clusters(classes, 2), mean_features(*clusters([0, 1], 3)), **options)
