"""How parameters move: the optimiser and its groups, sharpness-aware steps, the moving average of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from equiframe.errors import InputError, unknown
from equiframe.parallel import ALONE, World, own

OPTIMIZERS = ("sgd", "adamw")


def build_optimizer(
    backbone: nn.Module,
    head: nn.Module,
    *,
    kind: str = "sgd",
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD or AdamW (Loshchilov & Hutter, ICLR 2019) over all parameters that train.

    Args:
        kind: a name in `OPTIMIZERS`.
        momentum: of SGD; β₁ of AdamW (β₂ is 0.999).
        weight_decay: on all parameters; AdamW's is decoupled from the gradient.
        layer_decay: the backbone's groups of layers learn at ``lr · layer_decay^distance``, see `layer_groups`.

    Each parameter group has an ``lr_scale``; `set_learning_rate` multiplies with it.

    Raises:
        InputError: for an unknown optimiser, or a backbone without groups of layers where ``layer_decay`` is not 1.
    """
    if kind not in OPTIMIZERS:
        raise unknown("optimizer", kind, OPTIMIZERS)
    of_backbone, of_head = (
        {"params": [p for p in module.parameters() if p.requires_grad], "lr_scale": 1.0} for module in (backbone, head)
    )  # apart, because one of them may be sharded
    layers = [of_backbone] if layer_decay == 1 else layer_groups(backbone, layer_decay)
    groups = layers + ([of_head] if of_head["params"] else [])
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay, foreach=True)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)


def layer_groups(backbone: nn.Module, decay: float) -> list[dict[str, object]]:
    """Parameter groups of a timm backbone, with ``lr_scale`` = decay^distance: 1 group of layers away from the head has
    decay¹, the next decay², down to the stem.

    timm says which parameters make a group (``group_matcher``); the scales are those that timm's own
    ``param_groups_layer_decay`` gives the whole model with its classifier (times one more decay where timm counts the
    last norm to the classifier, as in ConvNeXt). Source: BEiT (Bao et al., ICLR 2022).

    Raises:
        InputError: if the backbone has no ``group_matcher``.
    """
    if not hasattr(backbone, "group_matcher"):
        raise InputError(
            f"layer_decay {decay:g} needs a backbone of timm that groups its layers; {type(backbone).__name__} does not: "
            "leave layer_decay at 1"
        )
    from timm.models import group_parameters

    group_of = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    members: dict[int, list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            members.setdefault(group_of[name], []).append(parameter)
    num_groups = max(group_of.values()) + 1
    return [{"params": members[i], "lr_scale": decay ** (num_groups - i)} for i in sorted(members)]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each parameter group ``lr`` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # a checkpoint of an earlier version has none


# --- sharpness-aware minimisation -------------------------------------------------------------------------------------


@contextmanager
def at_sharpest_point(parameters: Iterable[Tensor], rho: float, world: World = ALONE) -> Iterator[None]:
    r"""Inside, the parameters stand at the worst point nearby, to first order; after it, where they were, to the bit.

    .. math:: \theta + \rho\, g/\lVert g\rVert, \qquad g = \nabla L(\theta)

    g is what lies in ``.grad`` on entry, over all parameters together (and over the ``world`` that shares sharded ones). The gradient that a backward pass inside leaves
    is then that of sharpness-aware minimisation. Source: Foret et al., ICLR 2021.
    """
    parameters = [p for p in parameters if p.grad is not None]
    moved, gradients = [own(p) for p in parameters], [own(p.grad) for p in parameters]
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        scale = rho / world.norm([p.grad for p in parameters]).clamp_min(1e-12)
        torch._foreach_add_(moved, torch._foreach_mul(gradients, scale))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, before)


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, running statistics stay: BatchNorm layers in training mode normalise by the batch as ever, and a head that
    follows the class means does not move."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    followers = [m for m in model.modules() if getattr(m, "observes", False)]
    for norm in norms:
        norm.track_running_stats = False
    for follower in followers:
        follower.observes = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for follower in followers:
            follower.observes = True


# --- the average of weights -------------------------------------------------------------------------------------------


def _batch_norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class WeightAverage:
    r"""The exponential moving average of a model's parameters and buffers, as a model of its own in evaluation mode.

    .. math:: \bar\theta_t = \frac{1-d}{1-d^t} \sum_{i=1}^{t} d^{\,t-i}\, \theta_i

    with decay d in (0, 1) and θ_i the weights after step i. The factor makes the shares sum to 1 from the first step on
    (as in Adam), so that the random start never counts. Parameters and BatchNorm's running statistics are averaged; every
    other buffer is copied: the mean of two frames is no frame.

    Attributes:
        model: the averaged model.
        num_steps: t.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"the decay of a weight average must be between 0 and 1, got {decay!r}")
        self.decay, self.num_steps = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.num_steps += 1
        share = (1 - self.decay) / (1 - self.decay**self.num_steps)
        averages = {name for name, _ in self.model.named_parameters()}
        averages |= {f"{name}.{of}" for name in _batch_norms(self.model) for of in ("running_mean", "running_var")}
        mine, new = self.model.state_dict(), model.state_dict()
        averaged = [name for name in mine if name in averages]
        get_ema_multi_avg_fn(1 - share)([mine[n] for n in averaged], [new[n] for n in averaged], None)
        for name in mine.keys() - averages:
            mine[name].copy_(new[name])

    def state(self) -> dict[str, object]:
        return {"num_steps": self.num_steps, "model": self.model.state_dict()}

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.num_steps = state["num_steps"]
