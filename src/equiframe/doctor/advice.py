"""Which method the evidence of this project recommends, and what is wrong with a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from equiframe.method import projected_dim, resolve_method
from equiframe.words import counted


@dataclass(frozen=True)
class Evidence:
    """A table of docs/results.md that compares methods: its macro accuracies in percent, of ``seeds`` or more."""

    data: str
    classes: int
    dim: int
    ratio: float
    seeds: int
    macro: dict[str, float]


_DIGITS = {
    "etf-mix-blend": 92.7,
    "etf-crt": 91.0,
    "cosine-la": 91.0,
    "crt-adjusted": 87.4,
    "balanced-softmax": 86.6,
    "ce": 75.9,
}
_TINY = {"etf-mix-blend": 22.8, "etf-crt": 21.7, "cosine-la": 21.2, "crt-adjusted": 20.6, "ce": 14.5}
EVIDENCE = (  # tests hold these against docs/results.md
    Evidence(
        "CIFAR-10, ratio 50",
        10,
        64,
        50,
        3,
        {"etf-mix-blend": 76.9, "cosine-la": 75.5, "crt-adjusted": 75.1, "ce": 67.4},
    ),
    Evidence(
        "CIFAR-10, ratio 100",
        10,
        64,
        100,
        3,
        {"etf-mix-blend": 75.1, "cosine-la": 72.8, "crt-adjusted": 70.8, "ce": 57.1},
    ),
    Evidence(
        "CIFAR-10, ratio 200",
        10,
        64,
        200,
        4,
        {"etf-mix-blend": 71.1, "cosine-la": 68.5, "crt-adjusted": 66.2, "ce": 51.5},
    ),
    Evidence("Handwritten digits, ratio 50", 10, 64, 50, 8, _DIGITS),
    Evidence("100 classes, ratio 100", 100, 64, 100, 3, _TINY),
    Evidence(
        "200 classes", 200, 64, 100, 3, {"etf-mix-blend": 23.3, "cosine-la": 22.5, "crt-adjusted": 20.9, "ce": 15.4}
    ),
)
FEW_CLASSES = 10  # what was measured apart from a hundred and more
MOST_CLASSES = 200  # the most that were measured
BALANCED = 2.0  # ratio: below, nothing was measured
SOURCE = "docs/results.md"


def advise(counts: Sequence[int], dim: int, data: str = "DATA") -> dict[str, object]:
    """Which method the evidence of `SOURCE` recommends for these class counts and D features.

    Returns:
        ``method``; ``decided``: whether the evidence decides; ``why``; ``evidence``: the tables it rests on; ``source``; ``commands``.
    """
    num_classes, ratio = len(counts), max(counts) / max(min(counts), 1)
    close = [e for e in EVIDENCE if (e.classes <= FEW_CLASSES) == (num_classes <= FEW_CLASSES)]
    if ratio < BALANCED:
        method, decided, close = "ce", False, []
        why = (
            f"The classes are nearly balanced (ratio {ratio:.3g}); nothing here was measured on such data, so the evidence does not decide. "
            "Plain cross-entropy is the usual start; compare before you trust either."
        )
    elif num_classes <= FEW_CLASSES:
        method, decided = "etf-mix-blend", True
        why = (
            "For up to 10 classes a fixed frame with logit adjustment, small classes drawn more often and mixing of what the network knows (etf-mix-blend) was "
            "ahead of the best tuned baseline, learnable unit vectors with an adjusted loss (cosine-la), on CIFAR-10, on digits on average, and far ahead of plain "
            "cross-entropy (small networks, short schedules). It is the parts together: whether fixed vectors are ahead of learnable ones in the same recipe is not decided."
        )
    else:
        projects = projected_dim(resolve_method("etf-mix-blend", {}), dim, num_classes) is not None
        method, decided = "etf-mix-blend", projects and num_classes <= MOST_CLASSES
        fits = "they fit in a simplex" if num_classes <= dim + 1 else f"more than a simplex holds (K > D+1 = {dim + 1})"
        fits += "; the default takes the features to K-1 dimensions first" if projects else ""
        why = (
            f"{num_classes:,} classes, {dim} features: {fits}. On 100 and 200 classes of one collection of images, with 64 features (a small network, "
            "short schedules), the default was ahead of a linear layer fitted anew to the features of plain cross-entropy (crt-adjusted), "
            "and, on 100 classes, of learnable unit vectors with an adjusted loss (cosine-la); on 200 it is ahead of these on average, which is not decided."
            + ("" if decided else " Nothing like your data was measured, so the evidence does not decide.")
        )
    others = "ce,crt-adjusted,balanced-softmax,cosine-la,sqrt-blend,etf-crt,etf-mix-la,etf-mix-blend"
    commands = [f"equiframe train {data} --method {method}"] if decided else []
    commands.append(f"equiframe compare {data} --methods {others} --seeds 0,1,2")
    return {
        "method": method, "decided": decided, "why": why, "evidence": [asdict(e) for e in close], "source": SOURCE,
        "commands": commands,
    }  # fmt: skip


def find_problems(facts: dict[str, object]) -> list[dict[str, str]]:
    """What the facts about data mean for a training: records of ``level`` (``error``: it would stop; ``warning``: results would mislead or
    suffer; ``note``) and ``text``, the worst first."""
    found: list[tuple[str, str]] = []

    def tell(level: str, text: str) -> None:
        found.append((level, text))

    def some(pairs: Sequence) -> str:
        return f"such as {pairs[0][1]} and {pairs[0][0]}"

    looked = facts["looked_at"]
    for split, reasons in facts["unreadable"].items():
        tell("error", f"{len(reasons):,} of {looked[split]:,} {split} images cannot be read: {reasons[0]}. "
                      "--on-bad-image skip leaves them out")  # fmt: skip
    duplicates = facts["duplicates"]
    if pairs := duplicates["two_classes"]:
        tell(
            "warning",
            f"{counted(len(pairs), 'training image is', 'training images are')} there twice, under two classes, {some(pairs)}: one label is wrong",
        )
    if pairs := duplicates["train_and_test"]:
        tell(
            "warning",
            f"{counted(len(pairs), 'test image is a training image', 'test images are training images')} to the byte, {some(pairs)}: the test would flatter",
        )
    if pairs := duplicates["same_class"]:
        tell(
            "note",
            f"{counted(len(pairs), 'training image is', 'training images are')} there twice in their class, {some(pairs)}",
        )
    counts, tested = facts["counts"], facts["test_counts"]
    names = facts["class_names"]
    if empty := [n for n, c in zip(names, counts, strict=True) if not c]:
        tell("error", f"{counted(len(empty), 'class has', 'classes have')} no training image: {', '.join(empty[:3])}")
    held = facts["validation_counts"] or [0] * len(counts)
    if single := [n for n, c, v in zip(names, counts, held, strict=True) if c == 1 and not v]:
        tell(
            "warning",
            f"{counted(len(single), 'class has', 'classes have')} a single training image, and none for validation: {', '.join(single[:3])}",
        )
    few = sum(1 < c < 20 for c in counts)
    if few:
        tell(
            "note",
            f"{few:,} of {len(counts):,} classes have 2 to 19 training images: their accuracy will vary most between seeds",
        )
    if tested is None:
        tell("note", "there are no test images: the final metrics would be those of the validation images")
    else:
        if untested := [n for n, c in zip(names, tested, strict=True) if not c]:
            tell(
                "warning",
                f"{counted(len(untested), 'class has no test image and would', 'classes have no test image and would')} not count: {', '.join(untested[:3])}",
            )
        thin = sum(0 < c < 20 for c in tested)
        if thin:
            tell(
                "note",
                f"{counted(thin, 'class has', 'classes have')} fewer than 20 test images: an accuracy there moves in steps of 5 points or more",
            )
    if facts["problem"]:
        tell("error", facts["problem"])
    if facts["sizes"].get("long"):
        tell(
            "note", f"{facts['sizes']['long']:,} images are longer than 2:1; the centre square is what is seen of them"
        )
    if any(mode.split()[0] not in ("RGB", "L") for mode in facts["modes"]):
        tell("note", "palette, alpha, CMYK or 16-bit images are turned to RGB (transparency shows white)")
    part = {split: n for split, n in looked.items() if n < facts["numbers"][split]}
    if part:
        told = ", ".join(f"{n:,} of {facts['numbers'][split]:,} {split} images" for split, n in part.items())
        tell("note", f"looked at {told}; duplicates with the others were not looked for (--images 0: all)")
    order = ("error", "warning", "note")
    return [{"level": level, "text": text} for level, text in sorted(found, key=lambda f: order.index(f[0]))]
