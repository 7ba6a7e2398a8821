"""Whether a table's claim held: per column by the paired difference over seeds, and over all columns together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from equiframe.summaries import PairedDifference, paired_difference
from equiframe.verdicts import LEAST_SEEDS

HELD, NOT_HELD, UNTOLD = "held", "did not hold", "cannot be told yet"


@dataclass(frozen=True)
class Verdict:
    """A claim judged in one column: ``held`` / ``did not hold`` where the 95 % interval of the paired difference lies
    above / below 0 and at least `LEAST_SEEDS` seeds are shared, else ``cannot be told yet``.

    Attributes:
        difference: of the better row minus the worse one, in the unit of the values; None where no seed is shared.
        reason: what stands in the way where it cannot be told.
    """

    verdict: str
    difference: PairedDifference | None = None
    reason: str = ""


def judge(better: Mapping[int, float], worse: Mapping[int, float]) -> Verdict:
    """Judge "``better`` is larger than ``worse``" from seed → value of each."""
    difference = paired_difference(better, worse)
    if difference is None:
        return Verdict(UNTOLD, None, "the rows share no seed")
    if difference.n < LEAST_SEEDS:
        return Verdict(UNTOLD, difference, f"too few shared seeds, a verdict needs {LEAST_SEEDS}")
    if difference.low > 0:
        return Verdict(HELD, difference)
    if difference.high < 0:
        return Verdict(NOT_HELD, difference)
    return Verdict(UNTOLD, difference, f"the interval over {difference.n} seeds includes 0")


def judge_all(by_column: Mapping[str, Verdict]) -> Verdict:
    """A claim about each column: one column where it did not hold refutes it; it held once it held in all."""
    found = [v.verdict for v in by_column.values()]
    if NOT_HELD in found:
        where = ", ".join(name for name, v in by_column.items() if v.verdict == NOT_HELD)
        return Verdict(NOT_HELD, None, f"not in {where}")
    if found and set(found) == {HELD}:
        return Verdict(HELD)
    return Verdict(UNTOLD, None, f"held in {found.count(HELD)} of {len(found)} columns so far")
