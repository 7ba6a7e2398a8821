"""The figures, each a function from groups of runs to a matplotlib figure, or None where there is nothing to draw.

Colours are Okabe and Ito's (distinguishable for colour-blind readers) with a marker and a dash of their own; matrices use a
diverging map. The page replaces the ink of text and axes and the colours by variables, so a figure suits light and dark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from equiframe.errors import InputError
from equiframe.frames import Frame
from equiframe.report.runs import Group

INK, FAINT = "#1b1f24", "#a0a7b0"  # the page turns these two into CSS variables
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a6d3b", "#7f5fc7")
MARKERS = "osD^vP*X"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
STYLE = {
    "text.parse_math": False,  # a class may be called $\\frac{$
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": INK, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT, "grid.alpha": 0.35,
    "grid.linewidth": 0.6, "font.size": 10, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 5, "font.family": "sans-serif",
    "svg.fonttype": "none", "svg.hashsalt": "equiframe",
}  # fmt: skip
PERCENT = FuncFormatter(lambda v, _: f"{100 * v:.3g}")
PLAIN = FuncFormatter(lambda v, _: f"{v:,.10g}")


def _look(i: int) -> dict:
    look = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "linestyle": DASHES[(i // 8) % 4]}
    return look | ({"markerfacecolor": "none"} if i >= 8 else {})  # the second eight are hollow


def _line(i: int) -> dict:
    """Neighbours differ in dash too, and the second eight from the first."""
    return {"color": COLOURS[i % 8], "linestyle": DASHES[(i // 2 + i // 8) % 4]}


def _legend(figure: Figure, axes, num: int) -> None:
    """One legend above everything, as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if num > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(num, 4), fontsize=9)


def _log_axis(axes) -> None:
    """Plain numbers: matplotlib's own would be formulas, which are not read here. With few decades, 2 and 5 have labels too."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high > 30 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=6))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _legend_rows(groups: Sequence[Group]) -> int:
    return -(-len(groups) // 4) if len(groups) > 1 else 0


def groups_figure(groups: Sequence[Group]) -> Figure | None:
    """Accuracy by group of classes: a dot per method with its sd over seeds."""
    keys = [
        k
        for k in ("top1", "macro", "many", "medium", "few", "head", "middle", "tail", "worst")
        if groups[0].mean(k) is not None
    ]
    figure, axes = plt.subplots(figsize=(8, 0.9 + len(keys) * (0.2 + 0.045 * len(groups))), layout="constrained")
    step = 0.72 / max(len(groups), 1)
    for i, group in enumerate(groups):
        at = np.arange(len(keys)) + (i - (len(groups) - 1) / 2) * step
        means = [group.mean(k) if group.mean(k) is not None else np.nan for k in keys]
        errors = [group.sd(k) or 0 for k in keys]
        look = _look(i) | {"linestyle": "none", "markersize": 5 if len(groups) <= 6 else 4}
        axes.errorbar(means, at, xerr=errors, label=group.name, elinewidth=1.4, capsize=2, **look)
    axes.set(yticks=range(len(keys)), yticklabels=keys, xlabel="accuracy, %", ylim=(len(keys) - 0.4, -0.6))
    left, right = axes.get_xlim()
    right = min(1.0, max(right, 0.1))
    left = max(0.0, left) if left > right / 3 else 0.0  # near 0 the axis shows it
    room = 0.015 * (right - left)
    axes.set_xlim(left - room, right + room)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="y", visible=False)
    for edge in np.arange(0.5, len(keys) - 0.5):
        axes.axhline(edge, color=FAINT, linewidth=0.5, alpha=0.5)
    _legend(figure, axes, len(groups))
    return figure


def classes_figure(groups: Sequence[Group]) -> Figure | None:
    """Accuracy of each class, most training images first; beneath, how many there are."""
    classes = groups[0].runs[0].classes
    num = len(classes)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 4.4), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [3, 1]}
    )
    window = max(1, num // 25)
    for i, group in enumerate(groups):
        accuracy = np.array([np.nan if a is None else a for a in group.class_accuracy()])
        if num <= 30:
            top.plot(range(num), accuracy, label=group.name, **_look(i))
        else:  # a running mean over neighbours in count; the points behind it
            kernel = np.ones(window)
            known = ~np.isnan(accuracy)
            smooth = np.convolve(np.nan_to_num(accuracy), kernel, "same") / np.maximum(
                np.convolve(known, kernel, "same"), 1
            )
            if num <= 300:
                top.plot(range(num), accuracy, ".", color=COLOURS[i % 8], alpha=0.25, markersize=3)
            top.plot(range(num), smooth, label=group.name, **_line(i))
    top.set(ylabel="accuracy, %" + (f" (mean of {window})" if num > 30 else ""), ylim=(-0.03, 1.03))
    top.yaxis.set_major_formatter(PERCENT)
    counts = [c["num_train"] for c in classes]
    bottom.bar(range(num), counts, color=FAINT, width=0.8 if num <= 100 else 1.0)
    bottom.set(ylabel="training\nimages")
    _log_axis(bottom)
    if num <= 30:
        labels = [_short(c["name"], 14) for c in classes]
        long = max(map(len, labels)) * num > 90
        bottom.set_xticks(range(num), labels, rotation=40 if long else 0, ha="right" if long else "center")
    else:
        bottom.set_xlabel(f"{num:,} classes, most training images first")
    bottom.grid(axis="x", visible=False)
    _legend(figure, top, len(groups))
    return figure


def reliability_figure(groups: Sequence[Group]) -> Figure | None:
    """Reliability diagram: accuracy against confidence of the predicted class, pooled over the seeds."""
    drawn = [g for g in groups if any(r.details.get("reliability") for r in g.runs)]
    if not drawn:
        return None
    figure, axes = plt.subplots(figsize=(4.6, 4.6 + 0.2 * (len(drawn) // 2)), layout="constrained")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for i, group in enumerate(groups):
        bins = [b for r in group.runs for b in r.details.get("reliability", [])]
        if not bins:
            continue
        edges = np.linspace(0, 1, 16)
        place = np.clip(np.digitize([b["confidence"] for b in bins], edges) - 1, 0, 14)
        weight = np.bincount(place, [b["count"] for b in bins], 15)
        with np.errstate(invalid="ignore"):
            confidence = np.bincount(place, [b["count"] * b["confidence"] for b in bins], 15) / weight
            accuracy = np.bincount(place, [b["count"] * b["accuracy"] for b in bins], 15) / weight
        enough = weight >= 0.002 * weight.sum()
        axes.plot(confidence[enough], accuracy[enough], label=group.name, clip_on=False, **_look(i))
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence, %", ylabel="accuracy, %", aspect="equal")
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.text(0.97, 0.03, "below the line: too confident", ha="right", fontsize=8.5, color=INK, alpha=0.8)
    if len(drawn) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8.5)
    return figure


CURVES = (  # history key, title, log axis
    ("nc1", "NC1", True),
    ("nc2_angle", "NC2 angle", False),
    ("nc2_norm", "NC2 length", False),
    ("nc3", "NC3", False),
    ("nc4", "NC4", False),
    ("few_angle_means", "tail angle, °", False),
)
SPLITS = {"train": "training images", "test": "test images", "val": "validation images"}


def collapse_figure(groups: Sequence[Group]) -> Figure | None:
    """Neural-collapse measures by epoch: a column each, a row for training and one for test (or validation) images."""

    def tracked(split: str) -> bool:
        return any(g.curve(f"{split}_nc1")[0] for g in groups)

    rows = [s for s in ("train", "test" if tracked("test") else "val") if tracked(s)]
    if not rows:
        return None
    curves = [c for c in CURVES if any(g.curve(f"{s}_{c[0]}")[0] for g in groups for s in rows)]
    size = 1.4 * max(len(curves), 5), 0.4 + 1.5 * len(rows) + 0.18 * _legend_rows(groups)
    figure, axes = plt.subplots(
        len(rows), len(curves), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey="col"
    )
    for row, split in enumerate(rows):
        for (key, title, log), ax in zip(curves, axes[row], strict=True):
            for i, group in enumerate(groups):
                epochs, values = group.curve(f"{split}_{key}")
                mark = "o" if len(epochs) == 1 else None
                ax.plot(epochs, values, label=group.name, marker=mark, linewidth=1.5, **_line(i))
            if log:
                _log_axis(ax)
            ax.tick_params(labelsize=8)
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            if row == 0:
                ax.set_title(title, fontsize=9)
            if row == len(rows) - 1:
                ax.set_xlabel("epoch", fontsize=9)
        axes[row, 0].set_ylabel(SPLITS[split], fontsize=9)
    for (_, _, log), ax in zip(curves, axes[0], strict=True):
        if not log:
            ax.set_ylim(bottom=0)
    _legend(figure, axes[0, 0], len(groups))
    return figure


def cosines_figure(groups: Sequence[Group]) -> Figure | None:
    """Cosines between class means, and between class vectors, most training images first, of one seed of each method."""
    drawn = [
        (g.name, m)
        for g in groups
        if (m := next((r.details["cosines"] for r in g.runs if r.details.get("cosines")), None))
    ]
    drawn = drawn[:12]
    if not drawn:
        return None
    kinds = (("means", "class means"), ("vectors", "class vectors"))
    if len(drawn) == 1:  # side by side
        figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.2), layout="constrained")
        places = [((0, kind), axes[kind], label) for kind, (_, label) in enumerate(kinds)]
    else:
        bands = -(-len(drawn) // 6)  # each of two rows: means, vectors
        columns = -(-len(drawn) // bands)
        cell = min(8 / columns, 2.6)
        figure = plt.figure(figsize=(cell * columns + 0.3, (2 * cell + 0.35) * bands + 0.6), layout="constrained")
        grid = figure.add_gridspec(2 * bands, columns)
        places = [
            (
                (i, kind),
                figure.add_subplot(grid[2 * (i // columns) + kind, i % columns]),
                "" if kind else _short(name, 90 // columns),
            )
            for i, (name, _) in enumerate(drawn)
            for kind in range(2)
        ]
    image = None
    for (i, kind), ax, title in places:
        key, label = kinds[kind]
        image = ax.imshow(np.array(drawn[i][1][key]), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.grid(visible=False)
        if title:
            ax.set_title(title, fontsize=9)
        if len(drawn) > 1 and ax.get_subplotspec().is_first_col():
            ax.set_ylabel(label, fontsize=9)
    bar = figure.colorbar(
        image,
        ax=[ax for _, ax, _ in places],
        location="bottom",
        shrink=0.4,
        aspect=30,
        pad=0.02,
        ticks=[-1, -0.5, 0, 0.5, 1],
    )
    bar.set_label("cosine", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def training_figure(groups: Sequence[Group]) -> Figure | None:
    """Loss, validation accuracy, learning rate and speed by epoch."""
    panels = [
        ("loss", "training loss", None),
        ("val_macro", "validation macro, %", PERCENT),
        ("test_macro", "test macro, %", PERCENT),
        ("lr", "learning rate", None),
        ("images_per_second", "images a second", None),
    ]
    panels = [p for p in panels if any(g.curve(p[0])[0] for g in groups)]
    if not panels:
        return None
    size = max(2.0 * len(panels), 6.4), 2.3 + 0.18 * _legend_rows(groups)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for (key, title, formatter), ax in zip(panels, np.atleast_1d(axes), strict=True):
        for i, group in enumerate(groups):
            epochs, values = group.curve(key)
            ax.plot(epochs, values, label=group.name, marker="o" if len(epochs) == 1 else None, **_line(i))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("epoch", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if formatter:
            ax.yaxis.set_major_formatter(formatter)
        if key == "images_per_second":
            ax.set_ylim(bottom=0)
    _legend(figure, np.atleast_1d(axes)[0], len(groups))
    return figure


def gradients_figure(groups: Sequence[Group]) -> Figure | None:
    """‖push‖/‖pull‖ by epoch on class vectors and on features, head and tail (``--track gradients``)."""
    if not any(g.curve("vector_push_over_pull_tail")[0] for g in groups):
        return None
    panels = [(of, part) for of in ("vector", "feature") for part in ("head", "tail")]
    size = 8, 2.3 + 0.18 * _legend_rows(groups)
    figure, axes = plt.subplots(1, 4, figsize=size, layout="constrained", sharey=True)
    for (of, part), ax in zip(panels, axes, strict=True):
        for i, group in enumerate(groups):
            epochs, values = group.curve(f"{of}_push_over_pull_{part}")
            mark = "o" if len(epochs) == 1 else None
            ax.plot(epochs, values, label=group.name if epochs else None, marker=mark, **_line(i))
        ax.set_xlabel("epoch", fontsize=9)
        ax.set_title(f"on {of}s, {part}".replace("vectors", "class vectors"), fontsize=9)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _log_axis(axes[0])
    axes[0].set_ylabel("push over pull", fontsize=9)
    _legend(figure, axes[0], len(groups))
    return figure


FIGURES: dict[str, Callable[[Sequence[Group]], Figure | None]] = {
    "groups": groups_figure,
    "classes": classes_figure,
    "reliability": reliability_figure,
    "collapse": collapse_figure,
    "cosines": cosines_figure,
    "training": training_figure,
    "gradients": gradients_figure,
}


def draw(name: str, groups: Sequence[Group]) -> Figure | None:
    """A figure by name, in the house style. The caller closes it."""
    with plt.rc_context(STYLE):
        return FIGURES[name](groups)


def frame_figure(frame: Frame, *, at_most: int = 400) -> Figure:
    """A frame: its vectors as arrows in the ball for D = 3, else the matrix of their cosines."""
    shown = frame.vectors(torch.arange(min(at_most, frame.num_classes))).double().numpy()
    coherence = f"{frame.coherence:.4g}".replace("-", "−")
    title = f"{frame.geometry}: {frame.num_classes:,} vectors in {frame.dim} dimensions, largest cosine {coherence}"
    with plt.rc_context(STYLE):
        if frame.dim == 3:
            figure = plt.figure(figsize=(5.2, 5.4), layout="constrained")
            axes = figure.add_subplot(projection="3d")
            theta, phi = np.meshgrid(np.linspace(0, np.pi, 13), np.linspace(0, 2 * np.pi, 25))
            ball = np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)
            axes.plot_wireframe(*ball, color=FAINT, linewidth=0.4, alpha=0.5)
            for k, v in enumerate(shown):
                axes.quiver(0, 0, 0, *v, color=COLOURS[k % 8], linewidth=2, arrow_length_ratio=0.12)
                axes.text(*(1.12 * v), str(k), ha="center", va="center")
            axes.set_box_aspect((1, 1, 1), zoom=1.45)
            axes.set_axis_off()
        else:
            figure, axes = plt.subplots(figsize=(5.4, 4.8), layout="constrained")
            image = axes.imshow(shown @ shown.T, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.grid(visible=False)
            axes.set(xlabel="class" + (f" (first {at_most})" if frame.num_classes > at_most else ""), ylabel="class")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            figure.colorbar(image, ax=axes, shrink=0.8, label="cosine", ticks=[-1, -0.5, 0, 0.5, 1])
        figure.suptitle(title, fontsize=9.5)
    return figure


def counts_figure(names: Sequence[str], counts: Sequence[int], *, named: int = 40) -> Figure:
    """Training images of each class, the largest first, coloured by group (many, medium, few); a logarithmic axis where the ratio is
    above 20. Up to ``named`` classes have their names below."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    sizes = np.asarray(counts)[order]
    groups = {"many, > 100": sizes > 100, "medium, 20 to 100": (sizes >= 20) & (sizes <= 100), "few, < 20": sizes < 20}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        for (label, mask), colour in zip(groups.items(), (COLOURS[0], COLOURS[5], COLOURS[3]), strict=True):
            if mask.any():
                wide = 0.8 if len(sizes) <= 200 else 1.0
                axes.bar(
                    np.flatnonzero(mask),
                    sizes[mask],
                    width=wide,
                    color=colour,
                    label=f"{label}: {mask.sum():,} classes",
                )
        axes.set(ylabel="training images", xlim=(-0.7, len(sizes) - 0.3))
        ratio = sizes[0] / max(sizes[-1], 1)
        if ratio > 20:
            axes.set(yscale="log", ylabel="training images, logarithmic")
            axes.set_ylim(bottom=max(0.8, 0.7 * max(sizes[-1], 1)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.grid(axis="x", visible=False)
        if len(sizes) <= named:
            short = [n if len(n) <= 18 else n[:17] + "…" for n in (names[k] for k in order)]
            turned = len(short) * max(map(len, short)) > 80
            how = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if turned else {}
            axes.set_xticks(range(len(sizes)), short, **how)
        else:
            axes.set_xlabel("class, by size")
        axes.legend(loc="upper right", fontsize=9)
        axes.set_title(f"{len(sizes):,} classes, {sizes.sum():,} training images, imbalance ratio {ratio:,.4g}")
    return figure


def save_frame_figure(frame: Frame, path: str) -> None:
    """Write `frame_figure` as the kind of file that the ending names."""
    save_figure(lambda: frame_figure(frame), path)


def save_figure(draw_it: Callable[[], Figure], path: str) -> None:
    """Write a figure as the kind of file that the ending names, which is looked at first."""
    kinds = plt.gcf().canvas.get_supported_filetypes()
    plt.close()
    if path.rsplit(".", 1)[-1].lower() not in kinds or "." not in path:
        raise InputError(f"cannot draw {path}: its ending must be one of {', '.join(sorted(kinds))}")
    figure = draw_it()
    try:
        figure.savefig(path, dpi=160, facecolor="white")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        plt.close(figure)
