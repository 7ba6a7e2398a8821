"""What several processes say to each other, which images of a step each makes, and what travels between them."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch._dynamo  # DistributedDataParallel imports it; here it is done once, before processes are forked
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import caught, encoded, picture, tiny_fields, write_class
from equiframe.data.batches import Loader
from equiframe.data.sources import ImageSet
from equiframe.errors import InputError
from equiframe.heads import FrameHead, LinearHead
from equiframe.losses import CrossEntropy, MixedTargets, rows_of
from equiframe.parallel import ALONE, World, _name_of_start, joined
from equiframe.recipe import Recipe
from equiframe.train import train

# --- what processes say to each other ---------------------------------------------------------------------------------


def test_a_process_alone_asks_nobody():
    x = torch.randn(3, 2)
    assert ALONE.rows(x) is ALONE.batch(x) is ALONE.add_(x) is x
    assert (ALONE.sum(2.5), ALONE.any(True), ALONE.gather("a"), list(ALONE.steps([1, 2]))) == (2.5, True, ["a"], [1, 2])
    module = nn.BatchNorm1d(2)
    assert ALONE.data_parallel(module) is ALONE.synchronise_batch_norm(module) is module
    with joined() as world:
        assert world is ALONE
    with pytest.raises(InputError, match="as it was"):
        ALONE.first(lambda: failing("as it was"))


def failing(text):
    raise InputError(text)


def test_words_between_processes(processes):
    def say(world):
        x = torch.arange(2.0 * (world.rank + 1)).reshape(-1, 2) + 10 * world.rank
        return {
            "first": world.first(lambda: os.getpid()),
            "first fails": caught(lambda: world.first(lambda: failing("full"))),
            "each": caught(lambda: world.each(lambda: world.rank)),
            "one fails": caught(lambda: world.each(lambda: failing("bad image") if world.rank == 2 else 0)),
            "in turn": world.each(lambda: world.rank, in_turn=True),
            "steps": caught(lambda: [x for x in world.steps(failing("late") if i == 2 and world.rank else i for i in range(4))]),
            "any": (world.any(world.rank == 1), world.any(False)),
            "sum": world.sum(0.5 + world.rank),
            "rows": world.rows(x).tolist(),
            "gather": world.gather(world.rank),
            "share": list(world.share(range(7))),
        }  # fmt: skip

    one, two, three = processes(say, 3)
    assert one["first"] == two["first"] == three["first"]
    assert [p["each"] for p in (one, two, three)] == [p["in turn"] for p in (one, two, three)] == [0, 1, 2]
    assert one["share"] + two["share"] + three["share"] == list(range(7))
    for said in (one, two, three):
        assert said["first fails"] == "InputError full"
        assert said["one fails"] == "InputError bad image"
        assert said["steps"] == "InputError late"
        assert said["any"] == (True, False)
        assert said["sum"] == 4.5
        assert said["gather"] == [0, 1, 2]
        assert said["rows"] == [[0, 1], [10, 11], [12, 13], [20, 21], [22, 23], [24, 25]]


def test_the_gradient_through_a_batch_of_all(processes):
    """A loss of all rows that is no sum over them; the mean over processes of share-weighted gradients is its gradient."""
    whole = torch.randn(7, 3, dtype=torch.float64)

    def gradient(world):
        own = whole[world.rank :: 2].clone().requires_grad_()
        loss = torch.logdet(world.batch(own).T @ world.batch(own))
        (world.size * len(own) / 7 * loss).backward()
        return own.grad / world.size

    one, two = processes(gradient)
    x = whole.clone().requires_grad_()
    torch.logdet(x.T @ x).backward()
    torch.testing.assert_close(one, x.grad[::2])
    torch.testing.assert_close(two, x.grad[1::2])


def test_a_start_has_a_name_of_its_own():
    """Three starts in one store, as torchrun keeps it: of the second, the first process comes last and the third never."""
    store, starts = dist.HashStore(), []

    def names(*ranks):
        with ThreadPoolExecutor() as pool:
            found = []
            for rank in ranks:
                found.append(pool.submit(_name_of_start, store, World(rank, 3)))
                time.sleep(0.05)
            starts.append({one.result(timeout=20) for one in found})

    names(0, 1, 2)
    store.set("equiframe/first", "of one that died before anybody called")
    store.set("equiframe/of one that died before anybody called/1", "of another")
    names(2, 1, 0)
    names(1, 0, 2)
    assert [len(start) for start in starts] == [1, 1, 1]
    assert len(set.union(*starts)) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5, 4)])
def test_batch_norm_sees_the_batch_of_all(processes, shape, dtype):
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    norm = kind(3, momentum=0.2).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    nn.init.normal_(norm.weight)
    x, up = (2 * torch.randn(shape) + 5).to(dtype), torch.randn(shape).to(dtype)
    batch = x.clone().requires_grad_()

    def share(world):
        rows = slice(0, 3) if world.rank == 0 else slice(3, 7)
        mine = world.synchronise_batch_norm(nn.Sequential(norm))
        assert {"0." + name for name in norm.state_dict()} == set(mine.state_dict())
        part = x[rows].clone().requires_grad_()
        y = mine(part)
        y.backward(up[rows])
        grads = [world.add_(p.grad) for p in mine.parameters()]
        return y.detach(), part.grad, grads, list(mine.buffers()), mine.eval()(part).detach()

    one, two = processes(share)
    y = norm(batch)
    y.backward(up)
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(torch.cat([one[0], two[0]]), y.detach(), **loose)
    torch.testing.assert_close(torch.cat([one[1], two[1]]), batch.grad, **loose)
    for process in (one, two):
        torch.testing.assert_close(process[2], [p.grad for p in norm.parameters()], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(process[3], list(norm.buffers()))
    torch.testing.assert_close(torch.cat([one[4], two[4]]), norm.eval()(x).detach(), **loose)


class ActNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_what_timm_does_after_a_norm_is_done(processes):
    x = torch.randn(4, 3, 2, 2)
    norm = ActNorm(3)
    one, two = processes(lambda world: world.synchronise_batch_norm(norm)(x[world.rank :: 2]).detach())
    expected = norm(x).detach()
    torch.testing.assert_close((one, two), (expected[::2], expected[1::2]))
    assert one.min() == 0


# --- the same images --------------------------------------------------------------------------------------------------


def image_set(count, *, stream=False, size=(8, 8)):
    labels, names = np.arange(count) % 5, [str(i) for i in range(count)]
    if stream:
        return ImageSet(labels, names, sources=[encoded(picture(i % 5, i, (11, 9))) for i in range(count)])
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, *size), dtype=np.uint8)
    return ImageSet(labels, names, torch.from_numpy(pixels))


def loader(images, **options):
    settings = {"batch_size": 11, "image_size": 8, "mean": [0.5] * 3, "std": [0.2] * 3, "device": torch.device("cpu")}
    return Loader(images, **settings | options)


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup": 1.0, "augmentation": "crop-flip+cutout"},
        {"mixup": 1.0, "cutmix": 1.0, "remix": True, "augmentation": "crop+randaugment", "sampler": "class-balanced"},
        {"cutmix": 1.0, "augmentation": "resized-crop-flip+color-jitter", "stream": True},
    ],
    ids=["plain", "mixup", "cutmix+remix", "streamed"],
)
def test_parts_are_the_batch_of_one_process(options, size, accumulate):
    """Part p of P is every P-th image of the step, to the bit: pixels, targets, and shares that add up."""
    stream = options.get("stream", False)
    images = image_set(35, stream=stream)
    options = {name: value for name, value in options.items() if name != "stream"}
    whole = list(loader(images, **options).epoch(3, 1))
    pieces = size * accumulate
    steps = [
        list(loader(images, world=World(rank, size), accumulate=accumulate, **options).parts(3, 1))
        for rank in range(size)
    ]
    for step, batch in enumerate(whole):
        share = 0.0
        for rank in range(size):
            for i, part in enumerate(steps[rank][step]):
                rows = torch.arange(11)[rank + i * size :: pieces]
                assert torch.equal(part.images, batch.images[rows])
                assert same_targets(part.targets, rows_of(batch.targets, rows))
                assert same_targets(part.together, batch.targets)
                share += part.share
        assert share == pytest.approx(1)
        assert len(steps[0][step]) == accumulate


def same_targets(one, two):
    if isinstance(one, MixedTargets):
        return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, two, strict=True))
    return torch.equal(one, two)


def test_streamed_processes_decode_their_own_images_only(monkeypatch):
    images, decoded = image_set(22, stream=True), []
    monkeypatch.setattr(ImageSet, "image", lambda self, i, image=ImageSet.image: (decoded.append(i), image(self, i))[1])
    list(loader(images, world=World(1, 2)).epoch(0))
    assert len(decoded) == len(set(decoded)) == 2 * 5
    decoded.clear()
    list(loader(images, world=World(1, 2)).ordered(4))
    assert sorted(decoded) == list(range(12, 22))  # the last three batches of six


def test_a_step_that_is_too_small_to_share(processes, tmp_path):
    with pytest.raises(InputError, match=r"a step of 11 images cannot be shared by 3 processes in 2 parts"):
        loader(image_set(20), world=World(0, 3), accumulate=2).check_parts()
    loader(image_set(20), world=World(0, 2), accumulate=2).check_parts()
    write_class(tmp_path / "pets" / "cat", 0, 5)
    write_class(tmp_path / "pets" / "dog", 1, 5)
    recipe = Recipe(**tiny_fields(data=str(tmp_path / "pets"), augmentation="none", batch_size=2))
    said = processes(lambda world: caught(lambda: train(recipe, tmp_path / "run")))
    assert (
        said == ["InputError a step of 2 images cannot be shared by 2 processes in 1 part each: it needs 4 or more"] * 2
    )
    assert not (tmp_path / "run").exists()


# --- what travels -----------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes of the tensors in them."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls += 1
            tensors = [x for x in torch.utils._pytree.tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return function(*args, **(kwargs or {}))


def test_a_frame_head_sends_nothing(processes):
    """Of a step: the gradients of the backbone, and of a learnable head 4·K·(D + 1) bytes more; of a frame nothing, for any K."""
    dim, few, many = 16, 10, 32
    backbone = nn.Linear(8, dim)

    def traffic(world):
        def of(head):
            parallel, classifier = world.data_parallel(backbone), world.data_parallel(head)
            criterion = CrossEntropy()
            for counted in (Traffic(), Traffic(), Traffic()):  # the first two also settle the order of parameters
                with counted:
                    targets = torch.arange(4) % head.num_classes
                    criterion(classifier(parallel(torch.randn(4, 8))), targets).backward()
            return counted.calls, counted.bytes

        frame = [
            FrameHead(dim, k, logit_scale=1.0, norm="none", geometry=g)
            for k, g in ((few, "simplex"), (many, "orthoplex"))
        ]
        return [of(frame[0]), of(frame[1]), of(LinearHead(dim, few)), of(LinearHead(dim, many)), of(FrameHead(dim, few, logit_scale=1.0))]  # fmt: skip

    one, two = processes(traffic)
    assert one == two
    of_backbone = 4 * (8 * dim + dim)
    assert one[0] == one[1] == (1, of_backbone)
    assert one[2] == (2, of_backbone + 4 * few * (dim + 1))
    assert one[3] == (2, of_backbone + 4 * many * (dim + 1))
    assert one[4] == (2, of_backbone + 4 * 2 * dim)  # BatchNorm before the frame: a weight and a bias a feature
