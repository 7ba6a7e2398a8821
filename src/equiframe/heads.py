"""Heads: from features to what a loss and a prediction need.

A head returns a `HeadOutput`: the features as they meet the class vectors, and the logits, which are computed only
when somebody asks for them. Dot regression never does, so a training step with it never forms a (B, K) tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiframe.errors import InputError, unknown
from equiframe.frames import Frame, OrderedFrame, make_frame, nearest_simplex
from equiframe.parallel import ALONE, World

NORMS = ("none", "batch")
LENGTHS = ("unit", "free")


def _own_dtype(features: Tensor) -> torch.autocast:
    """Heads compute in the dtype of their own parameters, also under autocast: cosines in bfloat16 have two digits, and
    a head is a negligible part of the work."""
    return torch.autocast(features.device.type, enabled=False)


class HeadOutput:
    """What a head made of a batch of features.

    Attributes:
        features: ``(B, D)``, normalised as the head says.
        logits: ``(B, K)``, made on first access and then kept.
        raw: ``(B, D)``, as the head got them; ``features`` where nothing was done to them.
    """

    def __init__(self, head: Head, features: Tensor, raw: Tensor | None = None) -> None:
        self.head, self.features = head, features
        self.raw = features if raw is None else raw
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            with _own_dtype(self.features):
                self._logits = self.head.logits(self.features)
        return self._logits

    def products(self) -> Tensor:
        """Inner products w_kᵀh with all class vectors of a frame head, ``(B, K)``."""
        return cast("FrameHead", self.head).products(self.features)

    def target_products(self, targets: Tensor) -> Tensor:
        """Inner products w_cᵀh with each sample's own class vector, ``(B,)``; nothing of size B×K is formed."""
        return (self.features * cast("FrameHead", self.head).vectors(targets)).sum(1)


class LogitsOutput(HeadOutput):
    """A `HeadOutput` of which only the logits are left, as when another library has handed them on.

    Losses of logits, and of inner products (dot regression), need no more; ``features`` and ``raw`` raise `InputError`.
    """

    def __init__(self, head: Head, logits: Tensor) -> None:
        self.head, self._logits = head, logits

    def _gone(self) -> Tensor:
        raise InputError("this loss needs the features, and only logits arrived: call model(inputs, labels=targets)")

    features = raw = property(_gone)

    @property
    def logits(self) -> Tensor:
        return cast(Tensor, self._logits)

    def products(self) -> Tensor:
        return self.logits / cast("FrameHead", self.head).logit_scale

    def target_products(self, targets: Tensor) -> Tensor:
        return self.logits.gather(1, targets[:, None])[:, 0] / cast("FrameHead", self.head).logit_scale


class Head(nn.Module):
    """``forward(features (B, D)) -> HeadOutput``. A subclass says how features are normalised and logits made.

    Attributes:
        dim: width D of the features that come in.
        inner_dim: width of the features as class vectors meet them: D, or P where the head projects.
        observes: whether the head wants to see the training batches (`observe`).
        cosine_scale: the logit of cosine 1, where the head's logits are cosines times a constant; else None.
        aligner: a frame head beside this one, whose frame the loss's ``alignment`` moves the features to; or None.
        world: the processes that train the head together; only what looks at a batch as a whole asks it.
    """

    num_classes: int
    dim: int
    observes = False
    world: World = ALONE

    def __init__(self) -> None:
        super().__init__()
        self.aligner: FrameHead | None = None

    @property
    def inner_dim(self) -> int:
        return self.dim

    @property
    def cosine_scale(self) -> float | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the head's own parameters or frame, in which it computes."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> HeadOutput:
        if features.shape[-1] != self.dim:
            raise InputError(f"the head takes features of width {self.dim}, got {features.shape[-1]}")
        with _own_dtype(features):
            features = features.to(self.dtype)
            return HeadOutput(self, self.normalise(features), features)

    def observe(self, features: Tensor, shares: Tensor) -> None:
        """See a training batch: ``features (B, D)`` as normalised, and how much of each class a sample is ``(B, K)``.

        A `Loss` calls it before it looks at the class vectors, for heads in training mode that have ``observes``."""

    def normalise(self, features: Tensor) -> Tensor:
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Logits ``(B, K)`` of features that went through `normalise`."""
        raise NotImplementedError

    def logits_of(self, features: Tensor, classes: Tensor) -> Tensor:
        """Logits ``(B, n)`` of some ``classes (n,)``."""
        return self.logits(features)[:, classes]

    def logits_of_own(self, features: Tensor, targets: Tensor) -> Tensor:
        """The logit of each sample's class ``targets (B,)``: ``(B,)``."""
        return self.logits(features).gather(1, targets[:, None])[:, 0]

    def ranked(self, features: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The k most probable classes and their softmax probabilities at a temperature, each ``(B, k)``, most probable first."""
        return F.softmax(self.logits(features).float() / temperature, dim=1).topk(k, dim=1)

    def decide(self, features: Tensor) -> Tensor:
        """The class of the largest logit, ``(B,)``."""
        return self.logits(features).argmax(1)

    def class_vectors(self) -> Tensor:
        """The class vectors w_k, ``(K, inner_dim)``, for measures and pictures."""
        raise NotImplementedError

    def class_bias(self) -> Tensor | None:
        """The ``(K,)`` bias, or None."""
        return None


class LinearHead(Head):
    """The learnable classifier: ``nn.Linear`` with Kaiming-normal weights (as in MiSLAS and the authors' code).

    With ``frozen=True`` neither weight nor bias trains. The authors' CIFAR models do that to their "learnable"
    baseline by mistake; here it is a method of its own (``frozen-random``).
    """

    def __init__(self, dim: int, num_classes: int, *, bias: bool = True, frozen: bool = False) -> None:
        super().__init__()
        self.dim, self.num_classes, self.frozen = dim, num_classes, frozen
        self.linear = nn.Linear(dim, num_classes, bias=bias)
        nn.init.kaiming_normal_(self.linear.weight)
        self.linear.requires_grad_(not frozen)

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.weight.dtype

    def logits(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def logits_of(self, features: Tensor, classes: Tensor) -> Tensor:
        bias = self.linear.bias
        return F.linear(features, self.linear.weight[classes], None if bias is None else bias[classes])

    def logits_of_own(self, features: Tensor, targets: Tensor) -> Tensor:
        own = (features * self.linear.weight[targets]).sum(1)
        return own if self.linear.bias is None else own + self.linear.bias[targets]

    def class_vectors(self) -> Tensor:
        return self.linear.weight

    def class_bias(self) -> Tensor | None:
        return self.linear.bias


class _NormalisedHead(Head):
    """The steps before class vectors of known length: an optional projection, an optional BatchNorm, then a length.

    ``projection=P`` is a learned linear map ``(D → P)`` without bias, for a P where a frame exists that D has no room for.
    ``norm="batch"`` is the authors' BatchNorm (affine) before normalisation. ``length="unit"`` gives every feature
    the length √E_H; ``"free"`` leaves its length to the network.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        norm: str,
        length: str,
        e_h: float,
        logit_scale: float,
        projection: int | None = None,
    ) -> None:
        super().__init__()
        if projection is not None and projection < 1:
            raise InputError(f"projection must be at least 1 dimension, got {projection!r}")
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        if length not in LENGTHS:
            raise unknown("length", length, LENGTHS)
        for name, value in (("e_h", e_h), ("logit_scale", logit_scale)):
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a positive number, got {value!r}")
        self.dim, self.num_classes = dim, num_classes
        self.norm, self.length = norm, length
        self.e_h, self.logit_scale = float(e_h), float(logit_scale)
        self.projection = nn.Identity() if projection is None else nn.Linear(dim, projection, bias=False)
        self.batch_norm = nn.BatchNorm1d(self.inner_dim) if norm == "batch" else nn.Identity()

    @property
    def inner_dim(self) -> int:
        return self.projection.out_features if isinstance(self.projection, nn.Linear) else self.dim

    def normalise(self, features: Tensor) -> Tensor:
        if self.training and self.norm == "batch" and len(features) == 1:
            raise InputError(
                "BatchNorm cannot normalise a training batch of one image; take two or more, or norm='none'"
            )
        features = self.batch_norm(self.projection(features))
        if self.length == "unit":
            features = math.sqrt(self.e_h) * F.normalize(features, dim=1, eps=1e-8)
        return features

    @property
    def cosine_scale(self) -> float | None:
        return self.logit_scale * math.sqrt(self.e_h) if self.length == "unit" else None


class FrameHead(_NormalisedHead):
    r"""A fixed frame as classifier: only the features learn (and the projection, where there is one).

    .. math:: h = \sqrt{E_H}\,x/\lVert x\rVert, \quad w_k = \sqrt{E_W}\,m_k, \quad z_k = \text{logit\_scale}\,w_k^\top h

    Args:
        dim: feature width D.
        num_classes: K, the classes in use.
        logit_scale: factor from inner products to logits. It has no default on purpose: with E_W = E_H = 1 inner
            products are cosines, and for K = 100 the softmax of raw cosines cannot exceed 0.027.
        geometry: ``auto`` (simplex if K ≤ D+1, orthoplex if K ≤ 2D, with P for D where features are projected; else as `choose_geometry` says), a name, or a `Frame`.
        norm: ``batch`` (the authors' BatchNorm before normalisation) or ``none``.
        length: ``unit`` (features of length √E_H) or ``free``.
        e_w: squared length E_W of class vectors.
        e_h: squared length E_H of features.
        seed: of the frame's rotation (a given `Frame` has its own). The drawn frame is a buffer in the state dict, so a
            reloaded head is the saved one whatever seed the new object had.
        projection: P: a learned linear map takes the features to P dimensions first, and the frame is drawn there. With P = K−1 it is
            a simplex for any D, for the parameters of a linear layer (`equiframe.method.projected_dim`).
        capacity: classes for which the frame is drawn, K or more; the vectors beyond K are reserved for `add_classes`.
        order: a permutation of the frame's vectors, such as `assign` finds: class k gets vector ``order[k]``. It is a
            buffer in the state dict too.

    With a capacity, K is in the state dict (``classes_in_use``), so a head of the same capacity takes over how many
    classes are in use; logits, class vectors, losses and measures are about those alone.

    Shapes: features ``(B, D)`` → `HeadOutput` with features ``(B, inner_dim)`` and logits ``(B, K)``.

    Raises:
        InputError: if no frame of that geometry exists for K and D, or an option is out of range.

    Source: Yang et al., NeurIPS 2022 (arXiv 2203.09081); reserved vectors: Yang et al., ICLR 2023 (NC-FSCIL).
    """

    classes_in_use: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        logit_scale: float,
        geometry: str | Frame = "auto",
        norm: str = "batch",
        length: str = "unit",
        e_w: float = 1.0,
        e_h: float = 1.0,
        seed: int = 0,
        projection: int | None = None,
        capacity: int | None = None,
        order: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(dim, num_classes, norm, length, e_h, logit_scale, projection)
        if not (e_w > 0 and math.isfinite(e_w)):
            raise InputError(f"e_w must be a positive number, got {e_w!r}")
        self.e_w = float(e_w)
        vectors = num_classes if capacity is None else capacity
        if vectors < num_classes:
            raise InputError(f"capacity must be at least num_classes={num_classes}, got {capacity!r}")
        within = self.inner_dim
        frame = geometry if isinstance(geometry, Frame) else make_frame(vectors, within, geometry=geometry, seed=seed)
        if (frame.num_classes, frame.dim) != (vectors, within):
            given = f"K={frame.num_classes} and D={frame.dim}"
            raise InputError(f"the given frame has {given}; the head needs K={vectors} and D={within}")
        self.frame = frame if order is None else OrderedFrame(frame, order)
        self.reserves = capacity is not None
        if self.reserves:
            self.register_buffer("classes_in_use", torch.tensor(num_classes))
            self.register_load_state_dict_post_hook(_take_over_classes)

    @property
    def dtype(self) -> torch.dtype:
        return self.frame.dtype

    @property
    def cosine_scale(self) -> float | None:
        scale = super().cosine_scale
        return None if scale is None else scale * math.sqrt(self.e_w)

    @property
    def capacity(self) -> int:
        """How many classes the frame has vectors for."""
        return self.frame.num_classes

    def add_classes(self, num_added: int) -> None:
        """Bring the next ``num_added`` reserved vectors into use. All earlier logits stay the same to the bit.

        A loss with class counts knows the earlier classes only: make a new one.

        Raises:
            InputError: if the head was made without ``capacity``, or has not that many vectors left.
        """
        if not self.reserves:
            raise InputError(
                "this head has no reserved vectors: make it with capacity=, the classes that may ever come"
            )
        left = self.capacity - self.num_classes
        if not 1 <= num_added <= left:
            raise InputError(
                f"{left} of {self.capacity} class vectors are reserved still; cannot add {num_added} classes"
            )
        self.num_classes += num_added
        self.classes_in_use.fill_(self.num_classes)

    def set_order(self, order: Sequence[int] | Tensor) -> None:
        """Give class k vector ``order[k]`` from now on, as after a warm-up.

        Raises:
            InputError: if the head was made without ``order``, or this is no permutation of all its vectors.
        """
        if not isinstance(self.frame, OrderedFrame):
            raise InputError(
                "this head keeps no order: make it with order=range(K), or range(capacity), to change it later"
            )
        self.frame.set_order(order)

    def vectors(self, targets: Tensor) -> Tensor:
        """Class vectors ``w_c = √E_W·m_c`` of integer targets, ``(B, inner_dim)``."""
        if self.reserves and len(targets) and int(targets.max()) >= self.num_classes:
            raise InputError(f"class {int(targets.max())} is not in use yet: call add_classes ({self.num_classes} are)")
        return math.sqrt(self.e_w) * self.frame.vectors(targets)

    def products(self, features: Tensor) -> Tensor:
        """Inner products ``w_kᵀh`` with the classes in use, ``(B, K)``."""
        with _own_dtype(features):  # all of the frame's: with fewer rows a product may round otherwise
            return math.sqrt(self.e_w) * self.frame.logits(features)[:, : self.num_classes]

    def logits(self, features: Tensor) -> Tensor:
        return self.logit_scale * self.products(features)

    def logits_of(self, features: Tensor, classes: Tensor) -> Tensor:
        with _own_dtype(features):
            return self.logit_scale * features @ self.vectors(classes).T

    def logits_of_own(self, features: Tensor, targets: Tensor) -> Tensor:
        with _own_dtype(features):
            return self.logit_scale * (features * self.vectors(targets)).sum(1)

    def ranked(self, features: Tensor, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As of every head; where all vectors of the frame are in use, in bounded memory for any K: `Frame.topk` names the classes, and the
        partition function is summed over `Frame.pieces`."""
        if self.num_classes < self.capacity:
            return super().ranked(features, k, temperature=temperature)
        scale = self.logit_scale * math.sqrt(self.e_w) / temperature
        with _own_dtype(features):
            values, classes = self.frame.topk(features, k)
            total = torch.full_like(values[:, :1], -math.inf)
            for piece in self.frame.pieces(features):
                total = torch.logaddexp(total, torch.logsumexp(scale * piece.float(), 1, keepdim=True))
            return torch.exp(scale * values - total).float(), classes

    def decide(self, features: Tensor) -> Tensor:
        if self.num_classes < self.capacity:
            return super().decide(features)
        with _own_dtype(features):
            return self.frame.topk(features, 1)[1][:, 0]

    def class_vectors(self) -> Tensor:
        return math.sqrt(self.e_w) * self.frame.dense()[: self.num_classes]

    def extra_repr(self) -> str:
        used = f"in use: {self.num_classes} of {self.capacity}, " if self.reserves else ""
        text = f"norm={self.norm}, length={self.length}, e_w={self.e_w}, e_h={self.e_h}, logit_scale={self.logit_scale}"
        return used + text


def _take_over_classes(head: FrameHead, _keys: object) -> None:
    """After a state dict was loaded: how many classes are in use is what it says."""
    used = int(head.classes_in_use)
    if not 2 <= used <= head.capacity:
        raise InputError(f"the state has {used} classes in use, this head has a capacity of {head.capacity}")
    head.num_classes = used


class NearestFrameHead(FrameHead):
    r"""The simplex frame nearest to the running class means: the classifier follows the features, and nothing trains.

    With each training batch, before the loss looks at the class vectors, the running mean of every class k in it moves,
    :math:`\mu_k \leftarrow (1-\rho)\mu_k + \rho\,\bar h_k`, and the frame becomes `nearest_simplex` of the means, held by
    the proximal term to the frame before. No gradient goes through the frame. The means start at the vectors of a
    Haar-random simplex, so a class that was not seen yet keeps its place. Mixed and soft targets count by their share:
    as far as features mix like images, that draws all class means to one point alike, which the nearest frame ignores.

    Args:
        frame_rate: ρ in (0, 1].
        **options: as for `FrameHead`; the geometry is the simplex, so D ≥ K−1.

    State: the buffers ``class_means (K, D)`` and the frame. Cost: one singular value decomposition of D × (K−1) a batch.

    Source: Markou et al., NeurIPS 2024 (arXiv 2411.01248). They differentiate through the frame, centre the features by
    the batch mean and let ρ fall from 1 to 1e-4; here ρ is a constant, and centring is BatchNorm's.
    """

    observes = True
    class_means: Tensor

    def __init__(self, dim: int, num_classes: int, *, frame_rate: float = 0.01, **options: Any) -> None:
        for name in ("capacity", "order"):
            if options.get(name) is not None:
                raise InputError(f"{name} does not belong to a frame that follows its class means: take a FrameHead")
        super().__init__(dim, num_classes, geometry="simplex", **options)
        if not 0 < frame_rate <= 1:
            raise InputError(f"frame_rate must be above 0 and at most 1, got {frame_rate!r}")
        self.frame_rate = float(frame_rate)
        self.register_buffer("class_means", math.sqrt(self.e_h) * self.frame.dense())

    @torch.no_grad()
    def observe(self, features: Tensor, shares: Tensor) -> None:
        with _own_dtype(features):
            shares = shares.to(features.dtype)
            counts = self.world.add_(shares.sum(0)[:, None])
            means = self.world.add_(shares.T @ features) / counts.clamp_min(1e-8)
            moved = torch.where(counts > 1e-8, torch.lerp(self.class_means, means, self.frame_rate), self.class_means)
            if not moved.isfinite().all():  # the run has diverged, and its loss will say so
                return
            self.class_means = moved  # new tensors: an earlier batch's graph may still need the old ones
            self.frame.class_vectors = nearest_simplex(moved, previous=cast(Tensor, self.frame.class_vectors))

    def extra_repr(self) -> str:
        return f"frame_rate={self.frame_rate}, {super().extra_repr()}"


class CosineHead(_NormalisedHead):
    """Learnable unit class vectors: ``z_k = logit_scale · √E_H · cos(h, w_k)`` (with ``length="unit"``).

    With a ``projection`` P they lie in the P dimensions that a learned linear map takes the features to, as those of a `FrameHead` do.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        logit_scale: float,
        norm: str = "batch",
        length: str = "unit",
        e_h: float = 1.0,
        projection: int | None = None,
    ) -> None:
        super().__init__(dim, num_classes, norm, length, e_h, logit_scale, projection)
        self.weight = nn.Parameter(torch.empty(num_classes, self.inner_dim))
        nn.init.kaiming_normal_(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def logits(self, features: Tensor) -> Tensor:
        return self.logit_scale * features @ self.class_vectors().T

    def class_vectors(self) -> Tensor:
        return F.normalize(self.weight, dim=1)


class AffineHead(_NormalisedHead):
    """``z = W h + b`` of features h that are normalised as an earlier head normalised them: what a second stage leaves.

    Without ``norm`` and ``projection`` and with free length it computes what `LinearHead` does.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        norm: str = "none",
        length: str = "free",
        e_h: float = 1.0,
        projection: int | None = None,
    ) -> None:
        super().__init__(dim, num_classes, norm, length, e_h, logit_scale=1.0, projection=projection)
        self.linear = nn.Linear(self.inner_dim, num_classes)

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.weight.dtype

    def logits(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def class_vectors(self) -> Tensor:
        return self.linear.weight

    def class_bias(self) -> Tensor | None:
        return self.linear.bias


def affine_map(head: Head) -> tuple[Tensor, Tensor]:
    """W ``(K, inner_dim)`` and b ``(K,)`` with ``head.logits(h) = W h + b``."""
    weight = getattr(head, "logit_scale", 1.0) * head.class_vectors().detach()
    bias = head.class_bias()
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()


def training_parameters(module: nn.Module) -> dict[str, int]:
    """Names and sizes of the parameters that train. Printed and recorded by every run.

    >>> training_parameters(FrameHead(8, 4, logit_scale=1.0, norm="none"))
    {}
    """
    return {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
