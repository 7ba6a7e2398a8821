"""Statistics over seeds: mean and sd, and paired differences with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of a measure over n seeds; None where the measure does not exist."""

    mean: float | None
    sd: float | None
    n: int

    @staticmethod
    def of(values: Sequence[float | None]) -> Summary:
        known = [v for v in values if v is not None and not math.isnan(v)]
        if not known:
            return Summary(None, None, 0)
        return Summary(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))

    def percent(self) -> str:
        """``71.3 ± 0.4``, in percent; a dash where there is nothing."""
        if self.mean is None:
            return "–"
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.sd:.1f}" if self.sd is not None else "")


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a − b over n shared seeds with its 95 % interval; without an interval for a single seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], *, level: float = 0.95
) -> PairedDifference | None:
    r"""Student's interval of the mean difference, paired by seed: :math:`\bar d \pm t_{n-1}\, s_d/\sqrt n`.

    Args:
        a, b: seed → value.

    Returns:
        None where no seed is shared.
    """
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    if n == 0:
        return None
    mean = statistics.fmean(differences)
    if n == 1:
        return PairedDifference(mean, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return PairedDifference(mean, mean - half, mean + half, n)
