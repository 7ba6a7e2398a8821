"""The measures as `torchmetrics.Metric`: for `MetricCollection`, Lightning and any number of ranks.

All of them hold one and the same flat state (`ClassStatistics.state`), whose reduction over ranks is the exact merge. A
`MetricCollection` therefore finds that they form one compute group, and updates one state for all. Ask for the same
``within`` in each if it is to stay one.

Import this module by its name: it is not part of ``equiframe.collapse``, because torchmetrics takes seconds to import.

>>> import torch
>>> from torchmetrics import MetricCollection
>>> from equiframe.collapse.metrics import NC1, NC2Angle
>>> metrics = MetricCollection([NC1(num_classes=3, dim=4), NC2Angle(num_classes=3, dim=4)])
>>> metrics.update(torch.randn(8, 4), torch.randint(3, (8,)))
>>> sorted(metrics.compute())
['NC1', 'NC2Angle']
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from equiframe.collapse import measures, vectors
from equiframe.collapse.nearest import NearestMean
from equiframe.collapse.statistics import ClassStatistics, merge_states, state_size
from equiframe.collapse.summary import collapse_measures
from equiframe.errors import InputError

Vectors = Tensor | Callable[[], Tensor]


class CollapseMetric(Metric):
    """What the metrics below share: the state, `update`, and the settings of the measures.

    Args:
        num_classes: K.
        dim: D.
        center: the global mean, ``class`` or ``sample``.
        within: what is kept of the scatter within the classes, see `ClassStatistics`.
        class_vectors: ``(K, D)`` for NC3; a function if they train: ``lambda: head.weight`` stays current in copies.
        class_means: ``(K, D)`` for NC4, see `ClassStatistics`.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False
    state: Tensor
    class_means: Tensor | None

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        center: str = "class",
        within: str = "full",
        class_vectors: Vectors | None = None,
        class_means: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        ClassStatistics(1 + (num_classes > 1), 1, within=within)  # says what is wrong with ``within``
        self.num_classes, self.dim, self.center, self.within = num_classes, dim, center, within
        self._class_vectors = class_vectors if callable(class_vectors) or class_vectors is None else (class_vectors,)
        self.register_buffer("class_means", class_means, persistent=False)
        self._nearest: NearestMean | None = None
        self.add_state(
            "state",
            default=torch.zeros(state_size(num_classes, dim, within), dtype=torch.float64),
            dist_reduce_fx=partial(merge_states, num_classes=num_classes, dim=dim, within=within),
        )

    def statistics(self) -> ClassStatistics:
        """The class statistics so far; changing them changes the metric."""
        return ClassStatistics.from_state(self.state, self.num_classes, self.dim, within=self.within)

    def class_vectors(self) -> Tensor | None:
        if callable(self._class_vectors):
            return self._class_vectors()
        return None if self._class_vectors is None else self._class_vectors[0]

    def update(self, features: Tensor, targets: Tensor, predictions: Tensor | None = None) -> None:
        """Add ``features (B, D)`` of ``targets (B,)``; the classifier's ``predictions (B,)`` are for NC4 alone."""
        statistics = self.statistics()
        if self.class_means is not None and predictions is not None:
            if self._nearest is None or self._nearest.classes.device != self.state.device:
                self._nearest = NearestMean(self.class_means.to(self.state.device))
            statistics._nearest = self._nearest
        statistics.update(features, targets, predictions if statistics._nearest is not None else None)

    def _value(self, statistics: ClassStatistics) -> float:
        raise NotImplementedError

    def compute(self) -> Any:
        """The measure as a float64 scalar; NaN while fewer than two classes have samples."""
        return torch.tensor(self._value(self.statistics()), dtype=torch.float64, device=self.state.device)


class NC1(CollapseMetric):
    """`equiframe.collapse.nc1`; ``method`` is ``pinv``, ``svd`` or ``quotient``."""

    def __init__(self, num_classes: int, dim: int, *, method: str = "pinv", **kwargs: Any) -> None:
        super().__init__(num_classes, dim, **kwargs)
        self.method = method

    def _value(self, statistics: ClassStatistics) -> float:
        return measures.nc1(statistics, method=self.method, center=self.center)


class CDNV(CollapseMetric):
    """`equiframe.collapse.cdnv`."""

    def _value(self, statistics: ClassStatistics) -> float:
        return measures.cdnv(statistics)


class NC2Angle(CollapseMetric):
    """`equiframe.collapse.nc2_equiangle` of the class means."""

    def _value(self, statistics: ClassStatistics) -> float:
        return vectors.nc2_equiangle(statistics, center=self.center)


class NC2Norm(CollapseMetric):
    """`equiframe.collapse.nc2_equinorm` of the class means."""

    def _value(self, statistics: ClassStatistics) -> float:
        return vectors.nc2_equinorm(statistics, center=self.center)


class NC3(CollapseMetric):
    """`equiframe.collapse.nc3_distance`; needs ``class_vectors``."""

    def __init__(self, num_classes: int, dim: int, *, class_vectors: Vectors, **kwargs: Any) -> None:
        super().__init__(num_classes, dim, class_vectors=class_vectors, **kwargs)

    def _value(self, statistics: ClassStatistics) -> float:
        return measures.nc3_distance(statistics, self.class_vectors(), center=self.center)  # type: ignore[arg-type]


class NC4(CollapseMetric):
    """`equiframe.collapse.nc4`; needs ``class_means`` from elsewhere, and ``predictions`` in every update."""

    higher_is_better = True

    def __init__(self, num_classes: int, dim: int, *, class_means: Tensor, **kwargs: Any) -> None:
        super().__init__(num_classes, dim, class_means=class_means, **kwargs)

    def update(self, features: Tensor, targets: Tensor, predictions: Tensor | None = None) -> None:
        if predictions is None:
            raise InputError("NC4 needs predictions (B,): update(features, targets, predictions)")
        super().update(features, targets, predictions)

    def _value(self, statistics: ClassStatistics) -> float:
        return measures.nc4(statistics)


class Collapse(CollapseMetric):
    """`equiframe.collapse.collapse_measures` as one metric: a dict of scalars. ``full=True`` for all of them."""

    higher_is_better = None

    def __init__(
        self, num_classes: int, dim: int, *, few: Tensor | None = None, full: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, dim, **kwargs)
        self.few, self.full = few, full

    def compute(self) -> dict[str, Tensor]:
        values = collapse_measures(
            self.statistics(), self.class_vectors(), center=self.center, few=self.few, full=self.full
        )
        return {k: torch.tensor(v, dtype=torch.float64, device=self.state.device) for k, v in values.items()}
