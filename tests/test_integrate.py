"""A head swapped into models of timm, torchvision, transformers and one's own; undone; folded."""

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import equiframe
from equiframe import InputError, MixedTargets, attach, detach, fold
from equiframe.integrate import _KEPT, AttachedHead, find_classifier
from equiframe.method import METHODS

K, COUNTS = 4, [40, 20, 10, 5]
TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])


# --- a zoo ------------------------------------------------------------------------------------------------------------


def images(size: int):
    return lambda: {"x": torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(1))}


def texts():
    ids = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(1))
    ids[0, 6:] = 0  # padding
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def from_timm(name: str, **options):
    def make():
        import timm

        return timm.create_model(name, **options)

    return make


def from_torchvision(name: str, **options):
    def make():
        from torchvision import models

        return getattr(models, name)(**options)

    return make


def from_transformers(kind: str, **options):
    def make():
        import transformers

        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = getattr(transformers, f"{kind.split('For')[0]}Config")(**small, **options)
        return getattr(transformers, kind)(config)

    return make


def own():
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


class Positional(nn.Module):
    """Classifies every position, returns the last: as decoders for text do."""

    def __init__(self):
        super().__init__()
        self.later = nn.Linear(16, 3)  # registered before what runs before it
        self.first = nn.Linear(5, 16)

    def forward(self, x):
        return self.later(self.first(x))[:, -1]


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
ZOO = {  # name → how to make it, its inputs, the place of its classifier
    "timm-vit": (from_timm("vit_tiny_patch16_224", **VIT), images(16), "head"),
    "timm-conv": (from_timm("dla46_c"), images(32), "fc"),  # a 1×1 convolution at the end
    "timm-nothing": (from_timm("resnet10t", num_classes=0), images(32), "fc"),
    "timm-container": (from_timm("shvit_s1"), images(64), "head.l"),  # BatchNorm and a linear layer
    "torchvision-resnet": (from_torchvision("resnet18", num_classes=7), images(32), "fc"),
    "torchvision-mobilenet": (from_torchvision("mobilenet_v3_small", dropout=0.0), images(32), "classifier.3"),
    "bert": (from_transformers("BertForSequenceClassification", vocab_size=50, **NO_DROPOUT), texts, "classifier"),
    "roberta": (
        from_transformers("RobertaForSequenceClassification", vocab_size=50, pad_token_id=0, **NO_DROPOUT), texts,
        "classifier.out_proj",
    ),
    "llama": (from_transformers("LlamaForSequenceClassification", vocab_size=50, pad_token_id=0), texts, "score"),
    "hf-vit": (
        from_transformers("ViTForImageClassification", image_size=16, patch_size=8), lambda: {"pixel_values": images(16)()["x"]},
        "classifier",
    ),
    "own": (own, lambda: {"input": torch.randn(6, 5, generator=torch.Generator().manual_seed(1))}, "2"),
}  # fmt: skip
LIGHT = [name for name in ZOO if name not in ("timm-conv", "timm-container", "torchvision-resnet")]
OF_TRANSFORMERS = ("bert", "roberta", "llama", "hf-vit")
_MADE: dict[str, nn.Module] = {}


def animal(name: str) -> tuple[nn.Module, dict]:
    make, inputs, _ = ZOO[name]
    if name not in _MADE:
        torch.manual_seed(0)
        _MADE[name] = make()
    return copy.deepcopy(_MADE[name]), inputs()


def logits_of(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def warmed(name: str, **options):
    """An attached model whose BatchNorm has seen something, and has weights of its own; in evaluation mode."""
    model, inputs = animal(name)
    attached = attach(model, K, class_counts=COUNTS, **options)
    norm = getattr(attached.head, "batch_norm", None)
    if isinstance(norm, nn.BatchNorm1d):
        torch.manual_seed(2)
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
    return model.eval(), inputs, attached


# --- attach -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_the_place_is_found_by_convention(name):
    model, _ = animal(name)
    assert find_classifier(model) == ZOO[name][2]


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("method", ["etf-dr", "etf-la"])
def test_it_trains_in_one_step_and_in_two(name, method):
    model, inputs = animal(name)
    same, loss, parameters = attach(model, K, class_counts=COUNTS, method=method)
    assert same is model
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    model.eval()  # nothing random; BatchNorm in training is for the next test
    outputs = model(**inputs)
    assert logits_of(outputs).shape == (6, K)
    in_two = loss(outputs, TARGETS)
    labelled = model(**inputs, labels=TARGETS)
    in_one = labelled.loss if name in OF_TRANSFORMERS else labelled
    assert in_one.item() == pytest.approx(in_two.item(), rel=1e-6)
    in_one.backward()
    first = next(p for p in parameters if p.requires_grad)
    assert first.grad is not None
    assert bool(first.grad.any())
    if name in OF_TRANSFORMERS:
        assert type(labelled) is type(outputs)
        assert list(labelled)[:2] == ["loss", "logits"]
        assert torch.equal(labelled.logits, outputs.logits)
        assert model.config.num_labels == model.num_labels == K
        assert len(model.config.id2label) == K
        as_tuple = model(**inputs, labels=TARGETS, return_dict=False)
        assert torch.equal(as_tuple[0], labelled.loss)
        assert torch.equal(as_tuple[1], outputs.logits)


def test_the_head_sees_one_feature_a_sample():
    """BatchNorm of a decoder's head sees the chosen positions, not the padding: its mean is that of B features."""
    model, inputs = animal("llama")
    attached = attach(model, K, method="etf-dr")
    model.train()
    raw = []
    handle = attached.head.register_forward_hook(lambda _, args, __: raw.append(args[0]))
    model(**inputs, labels=TARGETS)
    handle.remove()
    assert raw[0].shape == (6, 16)
    torch.testing.assert_close(attached.head.batch_norm.running_mean, 0.1 * raw[0].mean(0))


@pytest.mark.parametrize(
    "method", [name for name, m in METHODS.items() if not {"second_stage", "sampler"} & set(m.fields)]
)
def test_every_method_gives_the_loss_of_its_head(method):
    """Against the head and the loss called by hand."""
    model, inputs = animal("own")
    model, loss, _ = attach(model, K, class_counts=COUNTS, method=method)
    swap = model[2]
    with torch.no_grad():
        expected = copy.deepcopy(loss.loss)(copy.deepcopy(swap.head)(model[:2](inputs["input"])), TARGETS)
        fresh = copy.deepcopy(model)
        assert float(model(**inputs, labels=TARGETS)) == pytest.approx(float(expected), rel=1e-6)
        assert float(loss(fresh(**inputs), TARGETS)) == pytest.approx(float(expected), rel=1e-6)


def test_a_method_that_draws_its_images_needs_a_loader_that_does():
    with pytest.raises(InputError, match="draws its images by square-root sampling, and here your loader draws them"):
        attach(animal("own")[0], K, class_counts=COUNTS, method="etf-sqrt-la")
    attached = attach(animal("own")[0], K, class_counts=COUNTS, method="etf-sqrt-la", sampler="square-root")
    assert attached.loss.loss.tau == 1
    with pytest.raises(
        InputError, match="mixes images as it trains, and here your loop makes the batches: attach it with mixup=0"
    ):
        attach(animal("own")[0], K, class_counts=COUNTS, method="etf-mix-la", sampler="square-root")
    attach(animal("own")[0], K, class_counts=COUNTS, method="etf-mix-la", sampler="square-root", mixup=0, cutmix=0)


def test_mixed_and_soft_targets():
    model, inputs = animal("own")
    model, loss, _ = attach(model, K, method="etf-dr")
    model.eval()
    mixed = MixedTargets(TARGETS, TARGETS.flip(0), 0.3)
    soft = 0.3 * nn.functional.one_hot(TARGETS, K) + 0.7 * nn.functional.one_hot(TARGETS.flip(0), K)
    expected = 0.3 * model(**inputs, labels=TARGETS) + 0.7 * model(**inputs, labels=TARGETS.flip(0))
    for targets in (mixed, soft):
        torch.testing.assert_close(model(**inputs, labels=targets), expected)
        torch.testing.assert_close(loss(model(**inputs), targets), expected)


def test_labels_given_by_position():
    model, inputs = animal("bert")
    attach(model, K, method="etf-dr")
    by_name = model.eval()(**inputs, labels=TARGETS)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    by_position = model(ids, mask, None, None, None, TARGETS)
    assert torch.equal(by_name.loss, by_position.loss)


def test_accumulated_batches_count_by_their_samples():
    model, inputs = animal("bert")
    _, loss, _ = attach(model, K, method="etf-dr")
    model.eval()
    whole = model(**inputs, labels=TARGETS).loss
    parts = [({name: x[rows] for name, x in inputs.items()}, TARGETS[rows]) for rows in (slice(0, 4), slice(4, 6))]
    in_one = sum(model(**x, labels=y, num_items_in_batch=torch.tensor(6)).loss for x, y in parts)
    in_two = sum(loss(model(**x), y, num_items_in_batch=torch.tensor(6)) for x, y in parts)
    torch.testing.assert_close(in_one, whole)
    torch.testing.assert_close(in_two, whole)


def test_the_head_by_itself_gives_logits():
    model, inputs = animal("timm-vit")
    attach(model, K, method="etf-dr")
    model.eval()
    assert torch.equal(model.forward_head(model.forward_features(inputs["x"])), model(**inputs))
    model, inputs = animal("timm-conv")
    attach(model, K, method="etf-dr")
    model.eval()
    assert torch.equal(model.forward_head(model.forward_features(inputs["x"])), model(**inputs))


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return result


@pytest.mark.parametrize("name", ["own", "bert", "llama"])
def test_dot_regression_never_forms_logits(name):
    model, inputs = animal(name)
    attach(model, 31, method="etf-dr", geometry="orthoplex", logits_with_loss=False)
    model.train()

    def run(**labels) -> set:
        with Shapes() as shapes:
            outputs = model(**inputs, **labels)
            if labels:
                (outputs if name == "own" else outputs.loss).backward()
        return {shape for shape in shapes.seen if shape and shape[-1] == 31}

    assert run(labels=TARGETS) == set()
    assert run() != set()  # the check can fail
    if name != "own":
        assert model(**inputs, labels=TARGETS).logits is None
        assert model.eval()(**inputs, labels=TARGETS).logits.shape == (6, 31)


def test_nothing_is_kept_longer_than_the_logits():
    model, inputs = animal("own")
    _, loss, _ = attach(model, K, method="etf-dr")
    gc.collect()
    before = len(_KEPT)
    outputs = [model(**inputs) for _ in range(3)]
    assert len(_KEPT) == before + 3
    features = [weakref.ref(_KEPT[z][1]) for z in outputs]
    loss(outputs[1], TARGETS).backward()
    del outputs
    assert len(_KEPT) == before
    assert all(ref() is None for ref in features)
    model(**inputs, labels=TARGETS)
    swap = model[2]
    assert (swap.labels, swap.arrived, swap.within) == (None, None, False)


def test_several_forwards_before_their_losses():
    model, inputs = animal("own")
    _, loss, _ = attach(model, K, method="etf-angular")
    model.eval()
    other = {"input": 2 * inputs["input"].flip(0)}
    z, z_other = model(**inputs), model(**other)
    assert torch.equal(loss(z, TARGETS), model(**inputs, labels=TARGETS))
    assert torch.equal(loss(z_other, TARGETS), model(**other, labels=TARGETS))


def test_copied_logits_do_where_logits_are_enough():
    model, inputs = animal("own")
    _, loss, _ = attach(model, K, method="etf-dr-balanced")
    model.eval()
    expected = model(**inputs, labels=TARGETS)
    soft = nn.functional.one_hot(TARGETS, K).float()
    torch.testing.assert_close(loss(model(**inputs).clone(), TARGETS), expected)
    torch.testing.assert_close(loss(model(**inputs).clone(), soft), expected)
    _, loss, _ = attach(detach(model), K, method="etf-angular")
    with pytest.raises(InputError, match=r"needs the features.*model\(inputs, labels=targets\)"):
        loss(model(**inputs).clone(), TARGETS)


def test_an_exception_in_the_model_leaves_the_door_shut():
    model, _ = animal("own")
    attach(model, K, method="etf-dr")
    with pytest.raises(RuntimeError):
        model(torch.zeros(6, 4), labels=TARGETS)
    swap = model[2]
    assert not swap.within
    assert swap.labels is None
    assert swap(torch.zeros(2, 16)).shape == (2, K)


def test_the_example_finds_the_layer_that_runs_last():
    model, x = Positional(), torch.randn(6, 7, 5)
    assert find_classifier(model) == "first"
    with pytest.raises(InputError, match="has no head attached"):
        detach(model)
    attach(model, K, method="etf-dr", example=x)
    assert isinstance(model.later, AttachedHead)
    assert model.training
    assert model.later.checked
    assert model(x).shape == (6, K)


def test_what_is_refused():
    softmax = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3), nn.LogSoftmax(1))
    attach(softmax, K, method="etf-dr")
    with pytest.raises(InputError, match="after '1' the model changes what it returns"):
        softmax(torch.randn(6, 5))
    untouched = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3), nn.LogSoftmax(1))
    with pytest.raises(InputError, match="after '1'"):
        attach(untouched, K, method="etf-dr", example=torch.randn(6, 5))
    assert isinstance(untouched[1], nn.Linear)
    cases = [
        (own(), {"num_classes": K}, "needs class_counts"),
        (own(), {"method": "etf-dr"}, "needs num_classes, or class_counts"),
        (own(), {"num_classes": 3, "class_counts": COUNTS}, "4 class counts were given for num_classes=3"),
        (own(), {"class_counts": COUNTS, "method": "crt"}, "'crt' has a second stage"),
        (own(), {"num_classes": K, "method": "etf-rd"}, "did you mean 'etf-dr'"),
        (own(), {"num_classes": K, "method": "etf-dr", "tau": 2.0}, "'tau' does not belong"),
        (own(), {"num_classes": K, "method": "etf-dr", "place": "head"}, "Sequential has no layer 'head'"),
        (own(), {"num_classes": K, "method": "etf-dr", "place": "1"}, "'1' is a ReLU"),
        (
            own(),
            {"num_classes": 40, "method": "etf-dr", "geometry": "simplex"},
            "simplex frame with K=40 needs D >= 39",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {"num_classes": K, "method": "etf-dr"}, "has no nn.Linear"),
        (nn.Linear(4, 3), {"num_classes": K, "method": "etf-dr"}, "a single layer"),
        (torch.compile(own()), {"num_classes": K, "method": "etf-dr"}, "attach the head first"),
    ]
    for model, options, message in cases:
        with pytest.raises(InputError, match=message):
            attach(model, **options)
    model = own()
    attach(model, K, method="etf-dr")
    with pytest.raises(InputError, match="attached already"):
        attach(model, K, method="etf-dr")
    with pytest.raises(InputError, match="not what wraps it"):
        detach(nn.Sequential(model))


def test_several_classifiers_are_refused():
    distilled = from_timm("deit_tiny_distilled_patch16_224", **VIT)()
    with pytest.raises(InputError, match="combines several classifiers"):
        attach(distilled, K, method="etf-dr")
    teacher = from_transformers("DeiTForImageClassificationWithTeacher", image_size=16, patch_size=8)()
    with pytest.raises(InputError, match="several classifiers"):
        attach(teacher, K, method="etf-dr")
    model, _ = animal("bert")
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(InputError, match="one label for a sample"):
        attach(model, K, method="etf-dr")


# --- detach, state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_detach_gives_back_the_model_to_the_bit(name):
    model, inputs = animal(name)
    model.eval()
    before, state, layer = logits_of(model(**inputs)), model.state_dict(), model.get_submodule(ZOO[name][2])
    config = copy.deepcopy(model.config.to_dict()) if name in OF_TRANSFORMERS else None
    attach(model, K, method="etf-dr")
    model(**inputs)
    assert detach(model) is model
    assert model.get_submodule(ZOO[name][2]) is layer
    assert torch.equal(logits_of(model(**inputs)), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    if config is not None:
        assert model.config.to_dict() == config
        assert model.num_labels == 2


def test_the_original_follows_the_dtype():
    model, _ = animal("own")
    attach(model, K, method="etf-dr")
    detach(model.half())
    assert model[2].weight.dtype == torch.float16
    model = own().bfloat16()
    attached = attach(model, K, method="etf-dr")
    assert attached.head.dtype == torch.float32  # cosines in bfloat16 have two digits
    assert model(torch.randn(6, 5).bfloat16()).dtype == torch.float32
    assert detach(model)[2].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["own", "llama", "timm-vit"])
def test_state_dict_round_trip(name):
    model, inputs, _ = warmed(name, method="etf-dr")
    other, _ = animal(name)
    attach(other, K, method="etf-dr", seed=7)
    other.eval()
    assert not torch.allclose(logits_of(other(**inputs)), logits_of(model(**inputs)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other(**inputs)), logits_of(model(**inputs)))


def test_a_copy_is_on_its_own():
    """As timm's average of weights makes one."""
    model, inputs, _ = warmed("own", method="etf-dr")
    before = model(**inputs)
    twin = copy.deepcopy(model)
    detach(model)
    assert torch.equal(twin(**inputs), before)
    assert isinstance(detach(twin)[2], nn.Linear)


# --- numerics and wrappers --------------------------------------------------------------------------------------------


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks, and hides the warning itself
@pytest.mark.parametrize("name", ["own", "bert"])
def test_compiled_without_a_break(name):
    model, inputs = animal(name)
    _, loss, _ = attach(model, K, method="etf-dr")
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    first = lambda outputs: outputs.loss if name in OF_TRANSFORMERS else outputs  # noqa: E731
    expected = gradients(first(model(**inputs, labels=TARGETS)), model)
    for made in (
        lambda: first(compiled(**inputs, labels=TARGETS)),
        lambda: loss(compiled(**inputs), TARGETS),
        lambda: first(compiled(**inputs, labels=TARGETS)),
    ):
        for grad, other in zip(gradients(made(), model), expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def test_distributed(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs = animal("bert")
        _, loss, _ = attach(model, K, method="etf-angular")
        model.train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        expected = gradients(model(**inputs, labels=TARGETS).loss, model)
        for made in (wrapped(**inputs, labels=TARGETS).loss, loss(wrapped(**inputs), TARGETS)):
            for grad, other in zip(gradients(made, model), expected, strict=True):
                torch.testing.assert_close(grad, other)
    finally:
        dist.destroy_process_group()


def test_autocast_half_and_checkpointing():
    model, inputs = animal("bert")
    _, loss, _ = attach(model, K, method="etf-dr")
    model.train()
    expected = gradients(model(**inputs, labels=TARGETS).loss, model)
    model.activation_checkpointing_enable()
    for grad, other in zip(gradients(model(**inputs, labels=TARGETS).loss, model), expected, strict=True):
        torch.testing.assert_close(grad, other)
    model.activation_checkpointing_disable()
    exact = model(**inputs, labels=TARGETS).loss
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
        assert outputs.logits.dtype == torch.float32
        assert loss(outputs, TARGETS).item() == pytest.approx(exact.item(), rel=0.02)
    model.half()
    assert model(**inputs, labels=TARGETS).loss.item() == pytest.approx(exact.item(), rel=0.02)


# --- fold -------------------------------------------------------------------------------------------------------------


def no_trace_of_equiframe(model: nn.Module) -> bool:
    hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    return not hooks and not any(type(m).__module__.startswith("equiframe") for m in model.modules())


@pytest.mark.filterwarnings("ignore:'score' had no bias")
@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("etf-la", name) for name in ZOO),
        *(("etf-dr", name) for name in LIGHT),
        ("ce", "bert"),
        ("cosine", "own"),
        ("etf-dr", "timm-conv"),
    ],
)
def test_fold(name, method):
    model, inputs, _ = warmed(name, method=method)
    with torch.no_grad():
        before = logits_of(model(**inputs))
        scale = float(before.abs().max())
        if method in ("etf-dr", "cosine"):
            with pytest.raises(InputError, match="divides each sample by its length"):
                fold(model)
            exact = fold(copy.deepcopy(model), into="unit")
            torch.testing.assert_close(logits_of(exact(**inputs)), before, rtol=0, atol=1e-5 * scale)
            fold(model, into="argmax")
            after = logits_of(model(**inputs))
            assert torch.equal(after.argmax(1), before.argmax(1))
            factors = after / before  # the same positive factor for all classes of a sample
            assert bool((factors > 0).all())
            torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-3, atol=0)
        else:
            assert fold(model) is model
            after = logits_of(model(**inputs))
            torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * scale)
            assert torch.equal(after.argmax(1), before.argmax(1))
    layer = model.get_submodule(ZOO[name][2])
    assert type(layer) is (nn.Conv2d if name == "timm-conv" else nn.Linear)
    assert no_trace_of_equiframe(model)
    with pytest.raises(InputError, match="has no head attached"):
        detach(model)


HEADS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["etf-la", "etf-dr", "cosine", "nearest-frame-ce", "ce"]),
        "norm": st.sampled_from(["none", "batch"]),
        "length": st.sampled_from(["unit", "free"]),
        "seed": st.integers(0, 99),
        "dim": st.integers(3, 20),
    }
)


@given(HEADS)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_fold_against_a_loop(choice):
    """W and b entry by entry, in NumPy, from the head's formula."""
    method, norm, length, dim = choice["method"], choice["norm"], choice["length"], choice["dim"]
    fields = {} if method == "ce" else {"norm": norm, "length": length}
    torch.manual_seed(choice["seed"])
    model = nn.Sequential(nn.Identity(), nn.Linear(dim, 2))
    attached = attach(model, K, class_counts=COUNTS, method=method, seed=choice["seed"], **fields)
    head = attached.head
    batch = isinstance(getattr(head, "batch_norm", None), nn.BatchNorm1d)
    if batch:
        for values in (head.batch_norm.weight, head.batch_norm.bias, head.batch_norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(head.batch_norm.running_var, 0.1, 3.0)
    unit = fields.get("length") == "unit"
    vectors = head.class_vectors().detach().double().numpy() * getattr(head, "logit_scale", 1.0)
    bias = np.zeros(K) if head.class_bias() is None else head.class_bias().detach().double().numpy()
    weight, shift = np.zeros((K, dim)), bias.copy()
    for k in range(K):
        for d in range(dim):
            slope, offset = 1.0, 0.0
            if batch:
                n = head.batch_norm
                slope = float(n.weight[d]) / math.sqrt(float(n.running_var[d]) + n.eps)
                offset = float(n.bias[d]) - slope * float(n.running_mean[d])
            weight[k, d] = vectors[k, d] * slope
            shift[k] += vectors[k, d] * offset
    if unit and batch:
        typical = math.sqrt(sum(float(g) ** 2 + float(b) ** 2 for g, b in zip(n.weight, n.bias, strict=True)))
        weight, shift = weight / typical, shift / typical
    fold(model.eval(), into="argmax" if unit else "linear")
    np.testing.assert_allclose(model[1].weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model[1].bias.detach().numpy(), shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", ["free", "unit"])
@pytest.mark.parametrize("method", ["etf-la", "cosine-la"])
@torch.no_grad()
def test_fold_of_a_head_that_projects(method, length):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 3))
    attached = attach(model, K, class_counts=COUNTS, method=method, projection="auto", length=length)
    assert (attached.head.dim, attached.head.inner_dim) == (2, K - 1)
    x = torch.randn(64, 2)
    model.train()(x)  # moves BatchNorm's statistics
    before = model.eval()(x)
    if length == "unit":
        exact = fold(copy.deepcopy(model), into="unit")
        torch.testing.assert_close(exact(x), before)
        fold(model, into="argmax")
        assert torch.equal(model(x).argmax(1), before.argmax(1))
    else:
        fold(model)
        torch.testing.assert_close(model(x), before)
    assert type(model[1]) is nn.Linear
    assert model[1].weight.shape == (K, 2)


def test_a_classifier_without_bias_gets_one_only_if_needed():
    model, inputs, _ = warmed("llama", method="etf-la")
    with pytest.warns(UserWarning, match="'score' had no bias and BatchNorm needs one"):
        fold(model)
    assert model.score.bias is not None
    model, inputs, _ = warmed("llama", method="etf-la", norm="none")
    before = model(**inputs).logits
    fold(model)
    assert model.score.bias is None
    torch.testing.assert_close(model(**inputs).logits, before)


def test_a_folded_model_is_saved_and_loaded_by_its_library(tmp_path):
    from transformers import BertForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, inputs, _ = warmed("bert", method="etf-la")
    before = model(**inputs).logits
    fold(model).save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.num_labels == K
    torch.testing.assert_close(loaded(**inputs).logits, before, rtol=0, atol=1e-5)


def test_fold_wants_a_known_form():
    model, _, _ = warmed("own", method="etf-la")
    with pytest.raises(InputError, match="did you mean 'argmax'"):
        fold(model, into="argmin")


def test_imported_from_the_top():
    assert equiframe.attach is attach
    assert "FrameHead 16 → 4 with DotRegression in place of '2'" in repr(attach(own(), K, method="etf-dr"))
