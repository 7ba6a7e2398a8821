r"""Class statistics in one streaming, mergeable pass: all that the collapse measures need to know about the features.

Every class k keeps an origin c_k (its first sample) and sums of residuals r = x − c_k. Residuals are as small as the
scatter within the class, so nothing cancels however far from 0 the features lie and however deep they have collapsed:

.. math:: \bar x_k = c_k + s_k/n_k, \qquad N S_W = \sum_i r_i r_i^\top - \sum_k s_k s_k^\top / n_k .

Moving an origin is exact algebra, and so is merging. All sums are float64. The products of the D×D scatter are made in
the dtype of the features, in blocks that are added in float64: float64 features are exact to rounding, float32 features
cost about 1e-7 of NC1, relatively (``benchmarks/collapse_speed.py`` measures it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributed as dist

from equiframe.collapse.nearest import NearestMean
from equiframe.errors import InputError, unknown
from equiframe.frames import check_size
from equiframe.parallel import World

WITHIN = ("full", "sketch", "none")
_CHUNK = 1 << 18  # numbers that are in work at a time: they stay in the cache, and one huge batch needs no more memory


def _layout(num_classes: int, dim: int, within: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parts of the state, in order."""
    per_class = (num_classes,)
    parts = {
        "wide": (),  # 1 once an origin came from float64 features; float32 residuals would then be inexact
        "counts": per_class,
        "squares": per_class,  # Σ‖r‖²
        "norm_origin": per_class,  # ‖c_k‖, about which the norms ‖x‖ are summed
        "norm_sums": per_class,
        "norm_squares": per_class,
        "decided": per_class,  # samples with a prediction, and those that the nearest class mean agrees with
        "agreed": per_class,
        "origin": (num_classes, dim),
        "sums": (num_classes, dim),
    }
    if within == "full":
        parts["gram"] = (dim, dim)  # Σ r rᵀ
    elif within == "sketch":
        parts["signs"] = per_class  # Σ ε and Σ ε r, ε = ±1
        parts["signed"] = (num_classes, dim)
    return parts


def state_size(num_classes: int, dim: int, within: str = "full") -> int:
    """Length of the flat state vector: about 2KD + D² float64 numbers (``full``), 3KD (``sketch``), 2KD (``none``)."""
    return sum(math.prod(shape) for shape in _layout(num_classes, dim, within).values())


class ClassStatistics:
    r"""Counts, means and scatter of N features of K classes in R^D, from one pass in any order and any split.

    ``within`` says what is kept of the scatter inside the classes, beside its trace per class:

    ``full``    the pooled S_W (D, D): NC1 exact. O(KD + D²) memory, N·D² flops on the CPU (a symmetric product).
    ``sketch``  one random-sign sum per class, :math:`z_k = \sum_i \varepsilon_i (x_i - \bar x_k)`, with
                :math:`E\, z_k z_k^\top = \sum_i (x_i - \bar x_k)(x_i - \bar x_k)^\top`: NC1 unbiased, with relative sd
                about √(2/(K(K−1))) for isotropic scatter (0.14 % at K = 1,000; `nc1_standard_error` estimates it).
                O(KD) memory, N·D work. The signs are a hash of the sample, so order and split do not matter; every
                sample should come once, as copies of a sample share its sign.
    ``none``    nothing: everything except NC1's ``pinv`` and ``svd``.

    NC4 compares two decisions for each sample: the classifier's, and that of the nearest class mean. The means of this
    pass are not known before it ends, so there are two honest ways, and no third: pass ``class_means`` known beforehand
    (the training set's when measuring the test set; the last epoch's while training) and give ``predictions`` to
    `update`; or keep the features and call `nc4_agreement` afterwards with this object's own ``class_means``.

    Args:
        num_classes: K.
        dim: D.
        within: ``full``, ``sketch`` or ``none``.
        class_means: ``(K, D)`` means of NC4's nearest-mean decision; rows of NaN are classes without a mean.
        device: where the sums live (an Apple GPU has no float64: then on the CPU). Features are moved there.
    """

    wide: Tensor
    counts: Tensor
    squares: Tensor
    norm_origin: Tensor
    norm_sums: Tensor
    norm_squares: Tensor
    decided: Tensor
    agreed: Tensor
    origin: Tensor
    sums: Tensor
    gram: Tensor
    _gram: Tensor
    signs: Tensor
    signed: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        within: str = "full",
        class_means: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        num_classes, dim = check_size(num_classes, dim)
        if within not in WITHIN:
            raise unknown("within", within, WITHIN)
        where = torch.device(device)
        state = torch.zeros(
            state_size(num_classes, dim, within),
            dtype=torch.float64,
            device="cpu" if where.type == "mps" else where,
        )
        self._attach(state, num_classes, dim, within)
        self._nearest = None if class_means is None else self._nearest_mean(class_means)
        # Rows wait here until they fill a block: D×D products of few rows waste most of their time on the D×D sum.
        self._block_rows = min(max(4 * dim, 1024), 8192)

    @classmethod
    def from_state(cls, state: Tensor, num_classes: int, dim: int, *, within: str = "full") -> ClassStatistics:
        """Statistics over a given flat state, which later updates change in place (and at once, without a block)."""
        new = cls.__new__(cls)
        new._attach(state, num_classes, dim, within)
        new._nearest, new._block_rows = None, 0
        return new

    def _attach(self, state: Tensor, num_classes: int, dim: int, within: str) -> None:
        self.num_classes, self.dim, self.within, self._state = num_classes, dim, within, state
        self._block: Tensor | None = None
        self._narrow_origin: Tensor | None = None
        self._filled = 0
        layout = _layout(num_classes, dim, within)
        for (name, shape), part in zip(
            layout.items(), state.split([math.prod(s) for s in layout.values()]), strict=True
        ):
            setattr(self, f"_{name}" if name == "gram" else name, part.view(shape))

    def _nearest_mean(self, class_means: Tensor) -> NearestMean:
        if class_means.shape != (self.num_classes, self.dim):
            raise InputError(f"class_means must be ({self.num_classes}, {self.dim}), got {tuple(class_means.shape)}")
        return NearestMean(class_means.to(self.device))

    @property
    def knows_means(self) -> bool:
        """Whether `update` can count NC4, having been given class means."""
        return self._nearest is not None

    @property
    def device(self) -> torch.device:
        return self._state.device

    @property
    def state(self) -> Tensor:
        """The flat float64 vector that is everything this object knows; see `from_state` and `merge_states`."""
        self._flush()
        return self._state

    # --- one pass -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, features: Tensor, targets: Tensor, predictions: Tensor | None = None) -> ClassStatistics:
        """Add a batch: ``features (B, D)``, integer ``targets (B,)``, the classifier's ``predictions (B,)`` for NC4.

        Raises:
            InputError: if shapes, classes or numbers are wrong; the statistics are then as before.
        """
        x, y, p = self._checked(features, targets, predictions)
        rows = max(64, min(_CHUNK // self.dim, self._block_rows or len(y)))
        for start in range(0, len(y), rows):
            part = slice(start, start + rows)
            self._add(x[part], y[part])
            if p is not None:
                agrees = self._nearest.agrees(x[part], p[part])  # type: ignore[union-attr]
                self.decided.index_add_(0, y[part], torch.ones_like(agrees, dtype=torch.float64))
                self.agreed.index_add_(0, y[part], agrees.double())
        return self

    def _checked(
        self, features: Tensor, targets: Tensor, predictions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise InputError(
                f"features must be a floating tensor (B, {self.dim}), got {tuple(features.shape)} {features.dtype}"
            )
        for name, labels in (("targets", targets), ("predictions", predictions)):
            if labels is None:
                continue
            if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
                raise InputError(
                    f"{name} must be {features.shape[0]} whole numbers, got {tuple(labels.shape)} {labels.dtype}"
                )
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise InputError(
                    f"{name} must lie in 0 … {self.num_classes - 1}, got {int(labels.min())} … {int(labels.max())}"
                )
        if predictions is not None and self._nearest is None:
            raise InputError(
                "predictions need class_means to agree with: ClassStatistics(…, class_means=…), or nc4_agreement"
            )
        x = features.detach().to(self.device)
        if x.dtype != torch.float64:
            x = x.double() if self.wide.item() else x.float()
        if not torch.isfinite(torch.linalg.vector_norm(x, dim=1).sum()):
            raise InputError("features hold NaN or infinite values, or such that their squares overflow")
        y = targets.to(self.device, torch.long)
        return x, y, None if predictions is None else predictions.to(self.device, torch.long)

    def _add(self, x: Tensor, y: Tensor) -> None:
        self._set_origins(x, y)
        origin = self._origins_of(y, x.dtype)
        if self.within == "full" and self._block_rows:
            residuals = torch.sub(x, origin, out=self._block_part(len(y), x.dtype))
        else:
            residuals = x - origin
        if self.within == "full" and not self._block_rows:
            _add_gram(self._gram, residuals)
        wide = residuals.double()
        squares = torch.linalg.vector_norm(residuals, dim=1).double().square_()
        # ‖x‖² − ‖c‖² = 2c·r + ‖r‖² loses nothing however far from 0 the features lie, in any precision.
        norm = self.norm_origin[y]
        gap = origin.mul_(residuals).sum(1).double().mul_(2).add_(squares)
        norms = gap / (norm + (norm.square() + gap).clamp_min_(0).sqrt_()).clamp_min_(torch.finfo(gap.dtype).tiny)
        self.counts.index_add_(0, y, torch.ones_like(norms))
        self.squares.index_add_(0, y, squares)
        self.sums.index_add_(0, y, wide)
        self.norm_sums.index_add_(0, y, norms)
        self.norm_squares.index_add_(0, y, norms.square())
        if self.within == "sketch":
            signs = _content_signs(x)
            self.signs.index_add_(0, y, signs)
            self.signed.index_add_(0, y, wide.mul_(signs[:, None]))

    def _set_origins(self, x: Tensor, y: Tensor) -> None:
        """Give each class that is met for the first time the first of its samples as origin."""
        if bool((self.counts[y] > 0).all()):
            return
        rows = torch.arange(len(y), device=y.device)
        first = torch.full_like(self.counts, len(y), dtype=torch.long).scatter_reduce_(0, y, rows, "amin")
        new = (first < len(y)) & (self.counts == 0)
        self.origin[new] = x[first[new]].double()
        self.norm_origin[new] = torch.linalg.vector_norm(self.origin[new], dim=1)
        self._narrow_origin = None
        if x.dtype == torch.float64:
            self.wide.fill_(1.0)

    def _origins_of(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Each sample's origin, in the dtype of the features. Float32 ones, which are exact, are kept for long passes."""
        if dtype == torch.float64 or not self._block_rows:
            return self.origin.index_select(0, y).to(dtype)
        if self._narrow_origin is None:
            self._narrow_origin = self.origin.float()
        return self._narrow_origin.index_select(0, y)

    def _block_part(self, rows: int, dtype: torch.dtype) -> Tensor:
        """The next rows of the block, to be filled; makes room first."""
        if self._filled + rows > self._block_rows or (self._block is not None and self._block.dtype != dtype):
            self._flush()
        if self._block is None or self._block.dtype != dtype:
            self._block = torch.empty(self._block_rows, self.dim, dtype=dtype, device=self.device)
        self._filled += rows
        return self._block[self._filled - rows : self._filled]

    def _flush(self) -> None:
        if self._filled:
            assert self._block is not None
            _add_gram(self._gram, self._block[: self._filled])
            self._filled = 0

    # --- merging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, other: ClassStatistics) -> ClassStatistics:
        r"""Add what another pass has seen. Exact: its sums are moved to our origins, :math:`\delta_k = c_k' - c_k`, by

        .. math:: \sum (r+\delta)(r+\delta)^\top
                  = G' + \sum_k (\delta_k s_k'^\top + s_k'\delta_k^\top + n_k'\delta_k\delta_k^\top)
        """
        same = (other.num_classes, other.dim, other.within) == (self.num_classes, self.dim, self.within)
        if not same:
            raise InputError(
                f"cannot merge statistics of K={other.num_classes}, D={other.dim}, within={other.within!r} "
                f"into K={self.num_classes}, D={self.dim}, within={self.within!r}"
            )
        self._flush()
        state = other.state.to(self.device)
        theirs = ClassStatistics.from_state(
            state.clone() if other is self else state, self.num_classes, self.dim, within=self.within
        )
        new = (self.counts == 0) & (theirs.counts > 0)
        self.origin[new] = theirs.origin[new]
        self._narrow_origin = None
        self.norm_origin[new] = theirs.norm_origin[new]
        n = theirs.counts
        shift = (theirs.origin - self.origin).masked_fill_((n == 0)[:, None], 0.0)
        norm_shift = (theirs.norm_origin - self.norm_origin).masked_fill_(n == 0, 0.0)
        middle = theirs.sums + shift * (n / 2)[:, None]
        if self.within == "full":
            cross = shift.T @ middle
            self._gram.add_(theirs._gram).add_(cross).add_(cross.T)
        elif self.within == "sketch":
            self.signed += theirs.signed + theirs.signs[:, None] * shift
            self.signs += theirs.signs
        self.squares += theirs.squares + 2 * (shift * middle).sum(1)
        self.norm_squares += theirs.norm_squares + 2 * norm_shift * theirs.norm_sums + n * norm_shift.square()
        self.norm_sums += theirs.norm_sums + n * norm_shift
        self.sums += theirs.sums + n[:, None] * shift
        self.counts += n
        self.decided += theirs.decided
        self.agreed += theirs.agreed
        torch.maximum(self.wide, theirs.wide, out=self.wide)
        return self

    def merge_over_ranks(self, group: dist.ProcessGroup | None = None) -> ClassStatistics:
        """The statistics of all ranks together, the same to the bit on each. Holds one other rank's state at a time."""
        total = ClassStatistics.from_state(torch.zeros_like(self.state), self.num_classes, self.dim, within=self.within)
        for rank in range(dist.get_world_size(group)):
            source = rank if group is None else dist.get_global_rank(group, rank)
            state = self.state.clone() if rank == dist.get_rank(group) else torch.empty_like(self.state)
            dist.broadcast(state, src=source, group=group)
            total.merge(ClassStatistics.from_state(state, self.num_classes, self.dim, within=self.within))
        return total

    def unite(self, world: World) -> None:
        """Become the statistics of all processes together, in place."""
        if world.size > 1:
            self.state.copy_(self.merge_over_ranks().state)

    # --- what it knows ------------------------------------------------------------------------------------------------

    @property
    def present(self) -> Tensor:
        """``(K,)`` mask of the classes that have samples; the others count in no measure."""
        return self.counts > 0

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum().item())

    @property
    def class_means(self) -> Tensor:
        """Means of the classes, ``(K, D)``; NaN for classes without samples."""
        return self.origin + self.sums / self.counts[:, None]  # 0/0 is NaN

    @property
    def sample_mean(self) -> Tensor:
        """Mean of all samples, ``(D,)``: each class counts by its number of samples."""
        weights = self.counts[self.present] / self.counts.sum()
        return weights @ self.class_means[self.present]

    @property
    def within_variance(self) -> Tensor:
        r"""Trace of each class's covariance, :math:`v_k = \frac1{n_k}\sum_{i\in k}\|x_i-\bar x_k\|^2`, ``(K,)``; biased
        (divided by n_k), NaN for classes without samples."""
        n = self.counts
        return ((self.squares - self.sums.square().sum(1) / n) / n).clamp_min(0.0)

    @property
    def within_trace(self) -> float:
        """tr S_W, the mean squared distance of a sample from its class mean."""
        there = self.present
        return float((self.counts * self.within_variance)[there].sum() / self.counts.sum())

    @property
    def within_scatter(self) -> Tensor:
        r"""Pooled covariance within the classes, :math:`S_W = \frac1N\sum_i (x_i-\bar x_{y_i})(x_i-\bar x_{y_i})^\top`,
        ``(D, D)``; needs ``within="full"``."""
        if self.within != "full":
            raise InputError(f'the scatter (D, D) needs within="full", these statistics have within={self.within!r}')
        self._flush()
        scaled = self.sums / self.counts.clamp_min(1).sqrt()[:, None]
        return (self._gram - scaled.T @ scaled) / self.counts.sum()

    def within_along(self, directions: Tensor) -> Tensor:
        r"""Variance within the classes along unit vectors, :math:`v^\top S_W v` for columns of ``(D, r)``: ``(r,)``.

        Exact with ``within="full"``; an unbiased estimate with ``"sketch"``.
        """
        if self.within == "full":
            return ((self.within_scatter @ directions) * directions).sum(0).clamp_min(0.0)
        return (self.sketched_scatter @ directions).square().sum(0) / self.counts.sum()

    @property
    def sketched_scatter(self) -> Tensor:
        """The random-sign sums z_k, ``(K, D)``, one row a class that is present; needs ``within="sketch"``."""
        if self.within != "sketch":
            raise InputError('NC1 by "pinv" or "svd" needs within="full" or "sketch"; "quotient" needs neither')
        share = (self.signs / self.counts.clamp_min(1))[:, None]
        return (self.signed - share * self.sums)[self.present]

    @property
    def norm_mean(self) -> Tensor:
        """Mean feature norm of each class, ``(K,)``; NaN for classes without samples."""
        return self.norm_origin + self.norm_sums / self.counts

    @property
    def norm_variance(self) -> Tensor:
        """Variance (divided by n_k) of the feature norm in each class, ``(K,)``; NaN for classes without samples."""
        n = self.counts
        return ((self.norm_squares - self.norm_sums.square() / n) / n).clamp_min(0.0)

    # Copies and pickles carry the state alone and cut it into its parts again.
    def __getstate__(self) -> dict[str, object]:
        return {
            "sizes": (self.num_classes, self.dim, self.within),
            "state": self.state,
            "nearest": self._nearest,
            "block_rows": self._block_rows,
        }

    def __setstate__(self, saved: dict[str, object]) -> None:
        self._attach(saved["state"], *saved["sizes"])  # type: ignore[arg-type, misc]
        self._nearest, self._block_rows = saved["nearest"], saved["block_rows"]  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"ClassStatistics(num_classes={self.num_classes}, dim={self.dim}, within={self.within!r}, "
            f"num_samples={self.num_samples}, present={int(self.present.sum())})"
        )


def merge_states(states: Tensor, num_classes: int, dim: int, within: str = "full") -> Tensor:
    """Merge flat states ``(R, L)`` of R passes into one ``(L,)``: the reduction for torchmetrics."""
    total = ClassStatistics.from_state(states[0].clone(), num_classes, dim, within=within)
    for state in states[1:]:
        total.merge(ClassStatistics.from_state(state, num_classes, dim, within=within))
    return total.state


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """``total += rowsᵀ rows``. Wide ones on the CPU through NumPy, which knows the product of a matrix with its own
    transpose to be symmetric and does half the work (BLAS syrk); torch has no such product."""
    if rows.device.type == "cpu" and rows.shape[1] >= 256:
        array = rows.numpy()
        total += torch.from_numpy(array.T @ array)
    else:
        total += rows.T @ rows


def _content_signs(x: Tensor) -> Tensor:
    """±1 for each row, a hash of its bits: the same wherever and whenever the sample comes. ``(B,)`` float64."""
    bits = x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64).sum(1)
    bits = bits * -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio of 2^64; wraps
    bits = (bits ^ (bits >> 29)) * -4658895280553007687  # 0xBF58476D1CE4E5B9 (splitmix64)
    return 1.0 - 2.0 * ((bits >> 40) & 1).double()
