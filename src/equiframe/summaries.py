"""Statistics over seeds: mean and sd, paired differences with an interval, several tests at once."""

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
    half = student_quantile((1 + level) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return PairedDifference(mean, mean - half, mean + half, n)


def student_quantile(p: float, degrees: float) -> float:
    """The value below which Student's t lies with probability ``p`` in (0, 1); infinite ``degrees`` are the normal distribution."""
    from scipy.special import ndtri, stdtrit  # scipy.stats takes a second to import

    return float(ndtri(p) if math.isinf(degrees) else stdtrit(degrees, p))


def student_tail(t: float, degrees: float) -> float:
    """The probability in [0, 1] that Student's t lies above ``t``."""
    from scipy.special import ndtr, stdtr

    return float(ndtr(-t) if math.isinf(degrees) else stdtr(degrees, -t))


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Holm's step-down correction: p-values that keep the chance of any false win below the level (family-wise error).

    The i-th smallest of m becomes :math:`\max_{j\le i} \min(1, (m-j+1)\,p_{(j)})` (Holm, Scand. J. Statist. 6, 1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
