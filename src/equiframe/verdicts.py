"""Which method is better: macro accuracies held against each other, over seeds and over test images.

Two things make a difference uncertain: another training would end elsewhere, and other test images would score
otherwise. Student's interval over seeds leaves out the second, the bootstrap over images the first; the interval over both
decides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from equiframe.bootstrap import bootstrap_macro, percentile_interval
from equiframe.errors import unknown
from equiframe.summaries import holm, paired_difference, student_quantile, student_tail
from equiframe.words import counted

LEVEL = 0.95
LEAST_SEEDS = 3  # two differences may agree by chance, and their sd then says nothing

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """A method held against another: ``difference`` is the mean over shared seeds of its macro accuracy minus the other's.

    Intervals cover 95 %, each for itself: ``over_seeds`` Student's on these test images, ``over_images`` the paired
    bootstrap for these trainings (it does not cover the variation between trainings), ``over_both`` covers both and is
    never narrower than ``over_seeds``. ``p`` is that of ``over_both`` (of ``over_seeds`` where runs keep no predictions),
    ``p_holm`` corrected for all comparisons of the family. ``call`` is better, worse, exactly equal or cannot be told yet: the
    first two only where ``p_holm`` is below 5 %, the third where no seed differs and at least three are shared.
    """

    method: str
    against: str
    difference: float | None
    num_seeds: int
    over_seeds: Interval | None
    over_images: Interval | None
    over_both: Interval | None
    p: float | None
    p_holm: float | None
    call: str


@dataclass(frozen=True)
class Verdicts:
    """All methods against the one with the highest mean macro accuracy, and against a reference.

    The best is known only from these same test images, so its comparisons are corrected for all pairs of methods;
    those with the reference, which was named before, for as many as there are. The best against the reference is one of
    the latter, wherever it is shown: a pair has one verdict.
    """

    best: str
    reference: str | None
    to_best: list[Comparison]
    to_reference: list[Comparison]
    over_images: dict[str, Interval]  # of each method's own mean macro accuracy, for these trainings
    num_pairs: int


def judge(
    macro: Mapping[str, Mapping[int, float]],
    correct: Mapping[str, Mapping[int, np.ndarray]] | None = None,
    labels: np.ndarray | None = None,
    *,
    reference: str | None = None,
) -> Verdicts:
    """Hold every method against the best and against the reference.

    Args:
        macro: method → seed → macro accuracy; methods without seeds are left out.
        correct: method → seed → which test images were classified right, bool ``(N,)``; may lack runs.
        labels: classes of the test images ``(N,)``, needed with ``correct``.
        reference: a method's name.

    Raises:
        InputError: for an unknown reference.
    """
    macro = {method: by_seed for method, by_seed in macro.items() if by_seed}
    if reference is not None and reference not in macro:
        raise unknown("reference", reference, macro)
    draws = _draws(correct or {}, labels)
    best = max(macro, key=lambda method: statistics.fmean(macro[method].values()))
    others = [method for method in macro if method != best]
    pairs = {frozenset(pair): _hold(*pair, macro, draws) for pair in combinations(macro, 2)}
    pairs = dict(zip(pairs, _called(list(pairs.values())), strict=True))
    to_best = [_seen_from(method, pairs[frozenset((method, best))]) for method in others]
    to_reference = []
    if reference is not None:
        to_reference = _called([_hold(m, reference, macro, draws) for m in macro if m != reference])
        of_best = [c for c in to_reference if c.method == best]
        to_best = [_seen_from(reference, of_best[0]) if of_best and c.method == reference else c for c in to_best]
    over_images = {
        method: percentile_interval(np.mean([draws[method, s] for s in by_seed], axis=0), level=LEVEL)
        for method, by_seed in macro.items()
        if all((method, s) in draws for s in by_seed)
    }
    return Verdicts(best, reference, to_best, to_reference, over_images, len(pairs))


def _draws(
    correct: Mapping[str, Mapping[int, np.ndarray]], labels: np.ndarray | None
) -> dict[tuple[str, int], np.ndarray]:
    """(method, seed) → macro accuracies ``(B,)`` on images that are resampled alike for all runs."""
    rows = {(method, seed): right for method, by_seed in correct.items() for seed, right in by_seed.items()}
    if not rows:
        return {}
    return dict(zip(rows, bootstrap_macro(np.stack(list(rows.values())), labels).T, strict=True))


def _hold(
    method: str,
    against: str,
    macro: Mapping[str, Mapping[int, float]],
    draws: Mapping[tuple[str, int], np.ndarray],
) -> Comparison:
    found = paired_difference(macro[method], macro[against], level=LEVEL)
    empty = Comparison(method, against, None, 0, None, None, None, None, None, "")
    if found is None:
        return empty
    seeds = sorted(macro[method].keys() & macro[against].keys())
    over_seeds = None if found.low is None else (found.low, found.high)
    over_images = over_both = None
    variance_images = 0.0
    if all((m, s) in draws for m in (method, against) for s in seeds):
        differences = np.stack([draws[method, s] - draws[against, s] for s in seeds])  # (n, B)
        over_images = percentile_interval(differences.mean(0), level=LEVEL)
        variance_images = shared_variance(differences)
    p = None
    if len(seeds) > 1:
        of_seeds = statistics.variance([macro[method][s] - macro[against][s] for s in seeds]) / len(seeds)
        # never surer than over seeds alone: with few seeds, degrees of freedom that come from chance could make it so
        tests = [student(found.mean, of_seeds, len(seeds) - 1, v) for v in (0.0, variance_images)]
        p = max(p for _, p in tests)
        if over_images is not None:
            over_both = max((interval for interval, _ in tests), key=lambda ends: ends[1] - ends[0])
    return replace(
        empty, difference=found.mean, num_seeds=len(seeds), over_seeds=over_seeds, over_images=over_images,
        over_both=over_both, p=p,
    )  # fmt: skip


def shared_variance(differences: np.ndarray) -> float:
    """The part of the variance over test images that more seeds do not average away: the mean covariance between the
    seeds' bootstrap differences ``(n, B)``, at least 0; for a single seed 0, since there it cannot be told apart."""
    num = len(differences)
    if num < 2:
        return 0.0
    covariance = np.cov(differences)
    return max(0.0, float((covariance.sum() - covariance.trace()) / (num * (num - 1))))


def student(mean: float, of_seeds: float, degrees: int, of_images: float) -> tuple[Interval, float]:
    r"""Interval and two-sided p-value of a mean difference whose variance has two parts.

    :math:`\bar d \pm t_\nu \sqrt{s^2/n + v}` with :math:`\nu = (s^2/n + v)^2 / \frac{(s^2/n)^2}{n-1}`: crossed random
    effects, trainings by images, as readers by cases (Obuchowski and Rockette 1995 with Hillis's 2007 degrees of freedom).

    Args:
        of_seeds: :math:`s^2/n`, the variance of the mean over n seeds, with ``degrees`` = n − 1.
        of_images: :math:`v`, the variance that all seeds share (`shared_variance`).
    """
    variance = of_seeds + of_images
    if variance == 0:
        return (mean, mean), float(mean == 0)
    nu = degrees * (variance / of_seeds) ** 2 if of_seeds > 0 else math.inf
    half = student_quantile((1 + LEVEL) / 2, nu) * math.sqrt(variance)
    return (mean - half, mean + half), 2 * student_tail(abs(mean) / math.sqrt(variance), nu)


def _called(family: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with Holm's correction over this family, and what each says."""
    able = [c for c in family if c.p is not None and c.num_seeds >= LEAST_SEEDS]
    corrected = dict(zip(map(id, able), holm([c.p for c in able]), strict=True))
    return [replace(c, p_holm=corrected.get(id(c)), call=_call(c, corrected.get(id(c)))) for c in family]


def _call(comparison: Comparison, p_holm: float | None) -> str:
    if p_holm is not None and p_holm < 1 - LEVEL:
        return "better" if comparison.difference > 0 else "worse"
    num = comparison.num_seeds
    if num >= LEAST_SEEDS and comparison.over_seeds == (0, 0):
        return "exactly equal"
    return f"cannot be told yet ({counted(num, 'seed')})"


def _seen_from(method: str, comparison: Comparison) -> Comparison:
    """A comparison, turned round if need be, so that it is about ``method``."""
    if comparison.method == method:
        return comparison

    def turned(interval: Interval | None) -> Interval | None:
        return None if interval is None else (-interval[1], -interval[0])

    return replace(
        comparison, method=method, against=comparison.method,
        difference=None if comparison.difference is None else -comparison.difference,
        over_seeds=turned(comparison.over_seeds), over_images=turned(comparison.over_images),
        over_both=turned(comparison.over_both),
        call={"better": "worse", "worse": "better"}.get(comparison.call, comparison.call),
    )  # fmt: skip


def judge_runs(
    results: Mapping[str, Mapping[int, tuple[float, Mapping[str, np.ndarray] | None]]], *, reference: str | None = None
) -> Verdicts:
    """`judge` from method → seed → (macro accuracy, the arrays of ``predictions.npz`` or None where a run kept none).

    Runs that were tested on different images are not paired by image: then there is no interval over images.
    """
    macro = {m: {s: value for s, (value, _) in of.items()} for m, of in results.items()}
    kept = {m: {s: arrays for s, (_, arrays) in of.items() if arrays is not None} for m, of in results.items()}
    labels = [arrays["labels"] for of in kept.values() for arrays in of.values()]
    if not labels or any(not np.array_equal(labels[0], other) for other in labels[1:]):
        return judge(macro, reference=reference)
    correct = {m: {s: a["predicted"] == a["labels"] for s, a in of.items()} for m, of in kept.items()}
    return judge(macro, correct, labels[0], reference=reference)


# --- in words ---------------------------------------------------------------------------------------------------------


def signed(share: float) -> str:
    """A difference in percentage points, with a real minus sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\u2212")


def interval_text(interval: Interval | None) -> str:
    return "–" if interval is None else f"{signed(interval[0])} to {signed(interval[1])}"


DIFFERENCE_COLUMNS = ("points", "over seeds", "over images", "over both", "p", "verdict")


def difference_row(comparison: Comparison) -> list[str]:
    """The cells of `DIFFERENCE_COLUMNS`."""
    difference = "–" if comparison.difference is None else signed(comparison.difference)
    intervals = (comparison.over_seeds, comparison.over_images, comparison.over_both)
    p = "–" if comparison.p_holm is None else f"{comparison.p_holm:.2g}"
    return [difference, *map(interval_text, intervals), p, comparison.call]


def difference_note(family: Sequence[Comparison], *nums: int) -> str:
    """What the columns mean, for a person; ``nums``: how many comparisons belong to Holm's family, of each table."""
    text = "Points of macro accuracy. Intervals cover 95 %: over seeds by Student's t, over images by a paired bootstrap within classes"
    if any(c.num_seeds == 1 for c in family):
        text += " (for single seeds this does not cover the variation between trainings)"
    text += (
        ", over both as crossed random effects. A verdict needs "
        f"{LEAST_SEEDS} shared seeds and p < 5 % over both" + _corrected(nums) + "; it is never surer than over "
        "seeds alone."
    )
    if any(c.num_seeds and c.over_images is None for c in family):
        text += " Runs without predictions.npz, or with other test images, have no interval over images: over seeds decides."
    return text


def _corrected(nums: Sequence[int]) -> str:
    if max(nums) < 2:
        return ""
    return f" after Holm's correction for {' and '.join(map(str, nums))} comparisons"


def in_words(verdicts: Verdicts, best_macro: float) -> str:
    """Which method is best and by how much, in a few sentences."""
    text = f"{verdicts.best} has the highest macro accuracy (the mean over classes), {100 * best_macro:.1f}\u00a0%"
    level = [c.method for c in verdicts.to_best if c.difference == 0]
    text += f"; that of {_listed(level)} is exactly the same on the seeds they share." if level else "."
    worse = [c for c in verdicts.to_best if c.call == "worse"]
    if worse:
        text += " It is better than " + _listed([c.method + _margin(c, len(worse)) for c in worse]) + "."
    for c in verdicts.to_best:
        if c.call == "better":
            text += f" On the seeds they share, {c.method} is better than {verdicts.best}{_margin(c, 1)}."
    open_ = [c for c in verdicts.to_best if c.call.startswith("cannot")]
    for call in dict.fromkeys(c.call for c in open_):
        those = [c for c in open_ if c.call == call]
        others = _listed([c.method + _margin(c, len(those)) for c in those])
        text += f" Whether it is better than {others} {call}."
    if open_ and all(c.num_seeds == 1 for c in open_):
        text += " Intervals over images do not cover the variation between trainings."
    return text


def _margin(comparison: Comparison, among: int) -> str:
    """How much better the best (or this method) is; in a long list, names alone."""
    if among > 3 or comparison.difference is None:
        return ""
    side = 1 if comparison.call == "better" else -1
    text = f" ({signed(side * comparison.difference)} points"
    for interval, what in (
        (comparison.over_both, "seeds and images"),
        (comparison.over_seeds, "seeds"),
        (comparison.over_images, "images"),
    ):
        if interval is not None:
            low, high = sorted(side * end for end in interval)
            return f"{text}, 95\u00a0% interval {signed(low)} to {signed(high)} over {what})"
    return text + ")"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
