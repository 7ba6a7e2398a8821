"""Swap the classifier of a model that another library made: timm, torchvision, transformers, or your own.

    model, loss, parameters = attach(model, num_classes=10, class_counts=counts, method="etf-la")
    loss(model(images), targets)              # two steps, as every training script does
    model(images, labels=targets)             # the loss in one step; dot regression then forms nothing of size B×K
    fold(model)                               # an ordinary model with an ordinary nn.Linear;  detach(model): as it was

The last linear layer is replaced by an `AttachedHead`. When the model is called, that layer lets the features pass, the
model does to them what it does to logits (nothing, or a choice of one position of a text), and at the door, a forward
hook of the model, the head meets them: so the head sees one feature a sample, whatever the model, also under
DistributedDataParallel and `torch.compile`. The model returns what it returned before: logits, or its own output record.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from equiframe.errors import InputError, unknown
from equiframe.heads import Head, HeadOutput, LogitsOutput, affine_map
from equiframe.losses import Loss, MixedTargets, Targets
from equiframe.method import build_head, build_loss, resolve_method

INTO = ("linear", "argmax", "unit")
_KEPT: Mapping[Tensor, tuple[Head, Tensor, Tensor]] = WeakTensorKeyDictionary()
"""Logits that a model returned → their head, features and raw features, for as long as the logits live, no longer."""


@dataclass(frozen=True, repr=False)
class Attached:
    """What `attach` returns; unpacks as ``model, loss, parameters``.

    Attributes:
        model: the model that was given, with its new head.
        loss: ``loss(what the model returned, targets) -> scalar``.
        parameters: those of the model that train: all that require gradients, the head's own included.
    """

    model: nn.Module
    loss: AttachedLoss
    parameters: list[nn.Parameter]

    @property
    def head(self) -> Head:
        return self.loss.head

    def __iter__(self) -> Iterator[object]:
        return iter((self.model, self.loss, self.parameters))

    def __repr__(self) -> str:
        swap = _attached(self.model)
        own = sum(p.numel() for p in swap.parameters() if p.requires_grad)
        return (
            f"{type(swap.head).__name__} {swap.head.dim} → {swap.head.num_classes} with {type(self.loss.loss).__name__} in place "
            f"of {swap.place!r}: {sum(p.numel() for p in self.parameters):,} parameters train, {own:,} of them the head's"
        )


# --- the three verbs --------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    num_classes: int | None = None,
    *,
    class_counts: Sequence[int] | Tensor | None = None,
    method: str = "etf-la",
    place: str | None = None,
    example: object = None,
    seed: int = 0,
    logits_with_loss: bool = True,
    **fields: object,
) -> Attached:
    """Give a model the head of a method, in place.

    Args:
        model: features come from whatever it has before its last linear layer (or 1×1 convolution). Attach first, then
            compile it or wrap it for several processes.
        num_classes: K; left out, as many as ``class_counts``.
        class_counts: training samples of each class; needed by methods with n_k in their formula.
        method: a name of ``equiframe methods`` without a second stage; ``fields`` override its fields (``logit_scale=8.0``).
        place: the name of the layer to replace, as in ``named_modules()``. Left out, it is found: by timm's
            ``get_classifier()``; in transformers' models as the linear layer outside the base model; elsewhere as the
            last ``nn.Linear``.
        example: inputs (a tensor, a tuple, or a dict of keyword arguments): the model runs once, the layer is the linear
            layer that ran last, and the swap is checked at once rather than in the first call.
        seed: of the frame.
        logits_with_loss: whether a transformers model in training gives logits beside its loss when it gets labels;
            without, dot regression forms nothing of size B×K there either.

    Called with ``labels=`` (also soft, or `MixedTargets`), a transformers model returns its record with ``.loss`` by this
    loss, any other model the loss alone. Called without, both return what they always did, and ``loss(outputs, targets)``
    follows; the features wait in a weak dictionary that forgets them with the logits.

    Returns:
        `Attached`, which unpacks as ``model, loss, parameters``.

    Raises:
        InputError: if the layer cannot be found or is one of several; if something follows it that changes its values
            (said in the first call); for methods with a second stage; for what head and loss refuse.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod"):
        raise InputError(f"attach the head first, then wrap or compile the model: this is a {type(model).__name__}")
    if any(isinstance(module, AttachedHead) for module in model.modules()):
        raise InputError("this model has a head attached already: detach(model) first")
    chosen = resolve_method(method, fields)
    if chosen["second_stage"] != "none":
        raise InputError(
            f"method {method!r} has a second stage ({chosen['second_stage']}), which needs the features of all training "
            "samples: attach a method without one"
        )
    if chosen["sampler"] != "instance" and fields.get("sampler") is None:
        raise InputError(
            f"method {method!r} draws its images by {chosen['sampler']} sampling, and here your loader draws them: say "
            f"sampler={chosen['sampler']!r} where it does so too (equiframe.samplers), or sampler='instance'"
        )
    if chosen["mixup"] or chosen["cutmix"]:
        raise InputError(
            f"method {method!r} mixes images as it trains, and here your loop makes the batches: attach it with mixup=0, cutmix=0, and "
            "mix as you like (the loss takes mixed targets)"
        )
    if num_classes is None:
        if class_counts is None:
            raise InputError("attach needs num_classes, or class_counts (training samples of each class)")
        num_classes = len(class_counts)
    elif class_counts is not None and len(class_counts) != num_classes:
        raise InputError(f"{len(class_counts)} class counts were given for num_classes={num_classes}")
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise InputError(f"one label for a sample: the model's config says problem_type={problem!r}")
    place = place or find_classifier(model, example)
    if not place:
        raise InputError(
            "this model is a single layer, its own classifier: attach to nn.Sequential(…) with layers before it"
        )
    original = _get(model, place)
    head = build_head(chosen, _width(model, original, place), num_classes, seed=seed)
    like = _like(model, original)
    head.to(device=like.device, dtype=torch.float64 if like.dtype == torch.float64 else None)
    loss = AttachedLoss(build_loss(chosen, class_counts), head)
    swap = AttachedHead(model, place, head, loss, logits_with_loss).train(original.training)
    swap.records = _set_classes(model, num_classes)
    swap.handles = (
        model.register_forward_pre_hook(swap.enter, with_kwargs=True),
        model.register_forward_hook(swap.leave, always_call=True),
    )
    _put(model, place, swap)
    if example is not None:
        try:
            _run(model, example)
        except Exception:
            detach(model)
            raise
    return Attached(model, loss, [p for p in model.parameters() if p.requires_grad])


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`, in place: the very layer that was there, its values untouched, and the model's own record of classes.

    The layer follows the model to its present device, and to its dtype where that was changed meanwhile.
    """
    swap = _attached(model)
    _close(model, swap, swap.move(swap.original))
    for owner, name, value in swap.records:
        setattr(model if owner == "model" else model.config, name, value)
    return model


@torch.no_grad()
def fold(model: nn.Module, *, into: str = "linear") -> nn.Module:
    r"""Replace the head by what any server knows, in place; neither hooks nor anything of Equiframe stays (but see ``unit``).

    A head computes :math:`z = s W u + b` of :math:`u = \mathrm{BN}(x)`, or with unit length
    :math:`z = s\sqrt{E_H}\, W u / \lVert u\rVert`. Running statistics are BatchNorm's; the product is taken in float64.

    Args:
        into: ``linear``: one ``nn.Linear`` with the same logits (to rounding: 1e-5 of their size in float32). Possible for
            heads that are affine in x: all with ``length="free"``, and the linear ones.
            ``argmax``: one ``nn.Linear`` for unit length too: each sample's logits are multiplied by the positive
            :math:`\lVert u\rVert/\ell`, so their order is the same, and probabilities are not. ℓ is the root mean square
            of ‖u‖ that BatchNorm's weights imply (1 without BatchNorm).
            ``unit``: ``nn.Sequential(UnitLength, nn.Linear)`` with the same logits for unit length; for other heads as
            ``linear``.

    A 1×1 convolution is folded into one. A layer that had no bias gets one only where BatchNorm needs it.

    Raises:
        InputError: for a unit-length head and ``into="linear"``.
    """
    if into not in INTO:
        raise unknown("into", into, INTO)
    swap = _attached(model)
    head, original = swap.head, swap.original
    projection = _projection(head)
    scale, shift, typical = _batch_norm(head)
    weight, bias = (x.double() for x in affine_map(head))
    length = math.sqrt(head.e_h) if getattr(head, "length", "free") == "unit" else None
    if length is None or into == "argmax":
        if length is not None:
            weight = weight * (length / typical)
        folded = weight * scale
        new = _linear(original, folded if projection is None else folded @ projection, bias + weight @ shift)
        if getattr(original, "bias", new.bias) is None and new.bias is not None and swap.labels_at is not None:
            warnings.warn(
                f"{swap.place!r} had no bias and BatchNorm needs one, which from_pretrained() would leave out: keep this model "
                "by its state dict, or attach with norm='none'",
                stacklevel=3,
            )
    elif into == "unit":
        flat = [nn.Flatten()] if isinstance(original, nn.Conv2d) else []
        plain = nn.Linear(1, 1, bias=False)
        before = [] if projection is None else [_linear(plain, projection, projection.new_zeros(len(projection)))]
        new = nn.Sequential(*flat, *before, UnitLength(length, scale, shift), _linear(plain, weight, bias))
    else:
        raise InputError(
            "this head divides each sample by its length (length='unit'), which no linear layer does: into='argmax' keeps "
            "the order of the logits, into='unit' the logits, with a small module before the linear layer"
        )
    _close(model, swap, swap.move(new).train(model.training))
    return model


def _close(model: nn.Module, swap: AttachedHead, layer: nn.Module) -> None:
    for handle in swap.handles:
        handle.remove()
    _put(model, swap.place, layer)


def _set_classes(model: nn.Module, num_classes: int) -> list[tuple[str, str, object]]:
    """Let the model know its number of classes where its library keeps it; returns what stood there."""
    before: list[tuple[str, str, object]] = []
    config = getattr(model, "config", None)
    if hasattr(config, "num_labels"):
        before += [
            ("config", name, getattr(config, name)) for name in ("id2label", "label2id") if hasattr(config, name)
        ]
        config.num_labels = num_classes
    for name in ("num_classes", "num_labels"):
        if isinstance(getattr(model, name, None), int):
            before.append(("model", name, getattr(model, name)))
            setattr(model, name, num_classes)
    return before


# --- the parts --------------------------------------------------------------------------------------------------------


class AttachedLoss(nn.Module):
    """``loss(outputs, targets) -> scalar`` of what an attached model returned: logits, a record with ``.logits``, a tuple.

    It finds the features of these very logits. Where a wrapper has replaced the logits by a copy, they must do: they do
    for all losses of logits and for dot regression, else `InputError` says what would.

    With ``num_items_in_batch`` (transformers' Trainer: the samples of all batches that one step accumulates) the sum over
    this batch is divided by that, instead of the mean. So it is a ``compute_loss_func`` as it stands.
    """

    def __init__(self, loss: Loss, head: Head) -> None:
        super().__init__()
        self.loss = loss
        self._beside = (head,)  # in a tuple: the head belongs to the model

    @property
    def head(self) -> Head:
        return self._beside[0]

    def at(self, done: float) -> None:
        """Say that a share ``done`` in [0, 1] of the run is done (for ``reweight_from``)."""
        self.loss.at(done)

    def forward(self, outputs: object, targets: Targets, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        output = outputs if isinstance(outputs, HeadOutput) else self._found(_logits_of(outputs))
        counts, device = self.loss.class_counts, _device(output.head)
        if counts is not None and counts.device != device:
            self.loss.to(device)
        loss = self.loss(output, targets)
        if num_items_in_batch is None:
            return loss
        return loss * len(targets.first if isinstance(targets, MixedTargets) else targets) / num_items_in_batch

    def _found(self, logits: Tensor) -> HeadOutput:
        if torch.compiler.is_compiling() or logits not in _KEPT:
            return LogitsOutput(self.head, logits)
        head, features, raw = _KEPT[logits]
        output = HeadOutput(head, features, raw)
        if not (head.observes and head.training):  # such a head's frame will have moved, and its logits with it
            output._logits = logits
        return output


class AttachedHead(nn.Module):
    """The layer in the classifier's place, and the model's door.

    Called within the model it lets features pass; called by itself (timm's ``forward_head``, a slice of a Sequential) it
    gives logits, ``(…, D) → (…, K)``.
    """

    def __init__(self, model: nn.Module, place: str, head: Head, loss: AttachedLoss, logits_with_loss: bool) -> None:
        super().__init__()
        self.place, self.head, self.logits_with_loss = place, head, logits_with_loss
        original = _get(model, place)
        self._beside = (original, loss)  # in a tuple: not among the model's parameters and state
        names = list(inspect.signature(model.forward).parameters)
        self.labels_at = names.index("labels") if "labels" in names else None
        self._dtypes = (head.dtype, _like(model, original).dtype)
        self.within = self.passed = self.checked = False
        self.arrived: Tensor | None = None
        self.labels: Targets | None = None
        self.num_items: Tensor | float | None = None

    @property
    def original(self) -> nn.Module:
        return self._beside[0]

    def move(self, layer: nn.Module) -> nn.Module:
        """``layer`` on the device and in the dtype that belong in this place by now."""
        of_head, of_model = self._dtypes
        dtype = of_model if self.head.dtype == of_head else self.head.dtype
        return layer.to(device=_device(self.head), dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        if self.within:
            self.passed = True
            if not self.checked and not torch.compiler.is_compiling():
                self.arrived = features
            return features
        if isinstance(self.original, nn.Conv2d):
            return self.logits(features.flatten(1))[:, :, None, None]
        if features.ndim == 2:
            return self.logits(features)
        return self.logits(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def logits(self, raw: Tensor) -> Tensor:
        """Logits ``(B, K)``, whose features the loss will find."""
        output = self.head(raw)
        logits = output.logits
        if not torch.compiler.is_compiling():
            _KEPT[logits] = (self.head, output.features, output.raw)
        return logits

    def enter(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before the model runs: take the labels away, so that only this loss sees them."""
        self.within, self.passed = True, False
        kwargs = dict(kwargs)
        self.labels = kwargs.pop("labels", None)
        if self.labels_at is not None and len(args) > self.labels_at:
            self.labels = args[self.labels_at]
            args = (*args[: self.labels_at], None, *args[self.labels_at + 1 :])
        if self.labels is not None:
            self.num_items = kwargs.pop("num_items_in_batch", None)
        return args, kwargs

    def leave(self, model: nn.Module, args: tuple, outputs: object) -> object:
        """After the model ran: features are where it returns logits."""
        labels, num_items, arrived = self.labels, self.num_items, self.arrived
        self.within, self.labels, self.num_items, self.arrived = False, None, None, None
        if outputs is None or not self.passed:  # an exception is on its way; or another layer stands in this place now
            return None
        raw = _logits_of(outputs)
        if arrived is not None:
            _check_untouched(arrived, raw, self.place)
            self.checked = True
        if labels is None:
            return _with(outputs, self.logits(raw))
        output = self.head(raw)
        loss = self._beside[1](output, labels, num_items)
        if self.labels_at is None:
            return loss
        return _with(outputs, output.logits if self.logits_with_loss or not self.training else None, loss)


class UnitLength(nn.Module):
    r"""``x → length · u/‖u‖`` with ``u = scale·x + shift``, ``(…, D) → (…, D)``: what of a head no linear layer can do."""

    def __init__(self, length: float, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, features: Tensor) -> Tensor:
        return self.length * F.normalize(features * self.scale + self.shift, dim=-1, eps=1e-8)


# --- which layer ------------------------------------------------------------------------------------------------------


def find_classifier(model: nn.Module, example: object = None) -> str:
    """The name of the model's classifier, as in ``named_modules()``.

    In this order: the linear layer that runs last on ``example``; timm's ``get_classifier()``; in a model with
    ``config.num_labels`` the layer outside its ``base_model`` that has so many outputs; the last ``nn.Linear`` registered.

    Raises:
        InputError: if there is none, or two classifiers whose answers the model combines.
    """
    if example is not None:
        return _last_to_run(model, example)
    if callable(getattr(model, "get_classifier", None)):
        return _by_get_classifier(model)
    if isinstance(getattr(getattr(model, "config", None), "num_labels", None), int):
        return _outside_base_model(model)
    linear = _linear_layers(model)
    if not linear:
        raise InputError(
            f"{type(model).__name__} has no nn.Linear to replace: name the layer by place=, or give it one at its end"
        )
    return linear[-1]


def _linear_layers(module: nn.Module, prefix: str = "") -> list[str]:
    return [name for name, layer in module.named_modules(prefix=prefix) if isinstance(layer, nn.Linear)]


def _by_get_classifier(model: nn.Module) -> str:
    """timm: a layer, a block that ends in one, or the ``nn.Identity`` of a model made with ``num_classes=0``."""
    found = model.get_classifier()
    name = next((name for name, module in model.named_modules() if module is found), None)
    named = (getattr(model, "pretrained_cfg", None) or {}).get(
        "classifier"
    )  # by timm's convention a tuple where several
    if name is None or isinstance(named, tuple) or isinstance(found, nn.ModuleList):
        raise InputError(
            f"{type(model).__name__} combines several classifiers; attach needs one: name it by place=, if the others go unused"
        )
    if _stands_alone(found) or isinstance(found, nn.Identity):
        return name
    linear = _linear_layers(found, name)
    if not linear:
        raise InputError(f"the classifier {name!r} of {type(model).__name__} has no nn.Linear; name a layer by place=")
    return linear[-1]


def _outside_base_model(model: nn.Module) -> str:
    """transformers: what comes on top of ``base_model`` is the classification head; its last layer has num_labels outputs."""
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()} if base is not model else set()
    names = [name for name in _linear_layers(model) if id(_get(model, name)) not in inside] or _linear_layers(model)
    fits = [name for name in names if _get(model, name).out_features == model.config.num_labels]
    shapes = [_get(model, name).weight.shape for name in fits]
    if len(fits) > 1 and shapes[-1] == shapes[-2]:
        raise InputError(
            f"{type(model).__name__} has several classifiers ({', '.join(fits)}); attach needs one: name it by place="
        )
    if not names:
        raise InputError(f"{type(model).__name__} has no nn.Linear to replace; name a layer by place=")
    return (fits or names)[-1]


def _last_to_run(model: nn.Module, example: object) -> str:
    ran: list[str] = []
    layers = [(name, module) for name, module in model.named_modules() if _stands_alone(module)]
    handles = [m.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, m in layers]
    try:
        _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    linear = [name for name in ran if isinstance(_get(model, name), nn.Linear)]
    if not ran:
        raise InputError(f"no linear layer of {type(model).__name__} ran on the example; name one by place=")
    return (linear or ran)[-1]


@torch.no_grad()
def _run(model: nn.Module, example: object) -> None:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        if isinstance(example, Mapping):
            model(**example)
        else:
            model(*(example if isinstance(example, (tuple, list)) else [example]))
    finally:
        for module in training:
            module.training = True


def _stands_alone(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def _width(model: nn.Module, layer: nn.Module, place: str) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d) and _stands_alone(layer):
        return layer.in_channels
    if isinstance(layer, nn.Identity):
        for name in ("head_hidden_size", "num_features"):
            if isinstance(getattr(model, name, None), int):
                return getattr(model, name)
    raise InputError(f"{place!r} is a {type(layer).__name__}; attach replaces an nn.Linear or a 1x1 convolution")


def _get(model: nn.Module, place: str) -> nn.Module:
    try:
        return model.get_submodule(place)
    except AttributeError:
        raise InputError(f"{type(model).__name__} has no layer {place!r}") from None


def _put(model: nn.Module, place: str, layer: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _attached(model: nn.Module) -> AttachedHead:
    found = [module for module in model.modules() if isinstance(module, AttachedHead)]
    if not found:
        raise InputError(f"{type(model).__name__} has no head attached")
    if dict(model.named_modules()).get(found[0].place) is not found[0]:
        raise InputError("give the model that attach was given, not what wraps it")
    return found[0]


# --- the model's outputs ----------------------------------------------------------------------------------------------


def _logits_of(outputs: object) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return outputs.logits
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise InputError(f"found no logits in the {type(outputs).__name__} that the model returned")


def _with(outputs: object, logits: Tensor | None, loss: Tensor | None = None) -> object:
    """The same outputs with these logits, and the loss where transformers puts it."""
    if isinstance(outputs, Tensor):
        return logits
    if is_dataclass(outputs):
        return replace(outputs, logits=logits) if loss is None else replace(outputs, logits=logits, loss=loss)
    if hasattr(outputs, "_replace"):
        return outputs._replace(logits=logits)
    rest = tuple(outputs[1:]) if logits is None else (logits, *outputs[1:])
    return rest if loss is None else (loss, *rest)


def _check_untouched(arrived: Tensor, raw: Tensor, place: str) -> None:
    """What the model returned must be what came to its last layer, or one position of it for each sample."""
    positions = arrived.flatten(2).mT if arrived.ndim == 4 else arrived.reshape(len(arrived), -1, arrived.shape[-1])
    if raw.ndim == 2 and raw.shape == positions[:, 0].shape:
        same = (positions == raw[:, None]) | (positions.isnan() & raw[:, None].isnan())
        if bool(same.all(2).any(1).all()):
            return
    raise InputError(
        f"after {place!r} the model changes what it returns ({tuple(arrived.shape)} became {tuple(raw.shape)}); attach needs a "
        "last layer with nothing behind it but a choice of one position: name another by place=, or take away what follows"
    )


# --- closed forms -----------------------------------------------------------------------------------------------------


def _linear(like: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A linear layer with these values, of the kind that stood there, with a bias where it had one or needs one."""
    num_classes, dim = weight.shape
    needs = bool(bias.any()) or getattr(like, "bias", None) is not None
    if isinstance(like, nn.Conv2d):
        layer: nn.Module = nn.Conv2d(dim, num_classes, 1, bias=needs, device=weight.device, dtype=weight.dtype)
        weight = weight[:, :, None, None]
    else:
        layer = nn.Linear(dim, num_classes, bias=needs, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if needs:
        layer.bias.copy_(bias)
    return layer


def _batch_norm(head: Head) -> tuple[Tensor, Tensor, float]:
    """BatchNorm as ``scale·x + shift`` in float64, and the root mean square of its outputs' length; identity without one."""
    norm = getattr(head, "batch_norm", None)
    if not isinstance(norm, nn.BatchNorm1d):
        one = torch.ones(head.inner_dim, dtype=torch.float64, device=_device(head))
        return one, torch.zeros_like(one), 1.0
    weight, bias, mean, variance = (x.double() for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = weight / (variance + norm.eps).sqrt()
    return scale, bias - scale * mean, float((weight**2 + bias**2).sum().sqrt())


def _projection(head: Head) -> Tensor | None:
    """The matrix ``(P, D)`` of a head that projects features first, in float64."""
    projection = getattr(head, "projection", None)
    return projection.weight.detach().double() if isinstance(projection, nn.Linear) else None


def _like(model: nn.Module, layer: nn.Module) -> Tensor:
    """A tensor whose device and dtype are those of the layer, or of the model where the layer has none."""
    tensors = [*layer.parameters(), *model.parameters(), torch.zeros(())]
    return next(t for t in tensors if t.is_floating_point())


def _device(head: Head) -> torch.device:
    return next(t.device for t in (*head.buffers(), *head.parameters()))
