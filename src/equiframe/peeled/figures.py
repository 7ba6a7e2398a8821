"""Figures of the peeled laboratory. Matplotlib is imported on the first call; no global state of it is touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equiframe.frames import simplex_vectors
from equiframe.peeled.claims import cosine_matrix
from equiframe.peeled.model import PeeledModel
from equiframe.peeled.solve import Solution, solve_features

# Okabe & Ito's colours, told apart by colour-blind eyes.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)
FORMATS = ("svg", "pdf", "png")
LOSS_COLOURS = {"ce": RED, "dr": BLUE, "angular": GREEN, "cosine": PURPLE}
LOSS_NAMES = {"ce": "cross-entropy", "dr": "dot regression", "angular": "angular regression", "cosine": "1 − cos θ"}


def _figure(width: float, height: float, **kwargs: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> Path:
    """In each of `FORMATS`, beside each other; returns the PNG, the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()  # lays out, once for all
    figure.set_layout_engine("none")
    for ending in FORMATS:
        path = path.with_suffix(f".{ending}")
        figure.savefig(path, dpi=130)
    return path


def cosines(path: Path, panels: dict[str, Tensor], title: str, *, num_major: int | None = None) -> Path:
    """Cosine matrices of several sets of rows ``(K, D)`` side by side; a line parts major from minor classes."""
    figure = _figure(3.5 * len(panels) + 0.9, 3.9)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, rows) in zip(grid, panels.items(), strict=True):
        image = axes.imshow(cosine_matrix(rows).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("class")
        size = len(rows)
        ticks = range(size) if size <= 12 else None
        if ticks is not None:
            axes.set_xticks(ticks)
            axes.set_yticks(ticks)
        if num_major is not None and 0 < num_major < size:
            axes.axhline(num_major - 0.5, color="black", linewidth=0.8)
            axes.axvline(num_major - 0.5, color="black", linewidth=0.8)
    grid[0].set_ylabel("class (major first)" if num_major else "class")
    figure.colorbar(image, ax=list(grid), label="cosine", shrink=0.85, ticks=[-1, -0.5, 0, 0.5, 1])
    figure.suptitle(title, fontsize=12)
    return _save(figure, path)


def angle_ratio(path: Path, curves: dict[str, Any], simplex: float, found: list[dict[str, Any]], title: str) -> Path:
    """Angle between minor class vectors against R; thresholds are marked, certified solutions are rings."""
    figure = _figure(9.4, 4.3)
    axes = figure.subplots()
    names = {
        "average": ("class-averaged budget", BLUE),
        "vector": ("budget per vector", RED),
        "penalty": ("penalty", GREEN),
    }
    axes.axhline(simplex, color="black", linewidth=2, label=f"fixed frame: {simplex:.1f}°")
    last = max(float(c["ratio"][-1]) for c in curves.values())
    for name, curve in curves.items():
        label, colour = names[name]
        threshold, vanishing = curve["threshold"], curve["vanishing"]
        text = f": R* = {threshold:.3g}" if math.isfinite(threshold) else ": no collapse"
        axes.plot(curve["ratio"], curve["degrees"], color=colour, linewidth=1.8, label=f"learned, {label}{text}")
        if threshold <= last:
            axes.plot(threshold, 0, "v", color=colour, markersize=9, clip_on=False, zorder=5)
        if vanishing <= last:
            axes.plot(vanishing, 0, "x", color=colour, markersize=9, markeredgewidth=2.2, clip_on=False, zorder=5)
            axes.plot(
                [],
                [],
                "x",
                color=colour,
                markeredgewidth=2.2,
                label=f"   its vectors are zero from R = {vanishing:.3g}",
            )
        dots = [r for r in found if r["constraint"] == name and math.isfinite(r.get("degrees_found", math.nan))]
        places = [r["ratio"] for r in dots], [r["degrees_found"] for r in dots]
        axes.plot(*places, "o", color=colour, markerfacecolor="white", markersize=6, zorder=6)
    axes.set_xscale("log")
    axes.set_ylim(-2, 1.12 * simplex)
    axes.set_xlim(1, last)
    axes.set_xlabel("imbalance ratio R")
    axes.set_ylabel("angle between minor class vectors (°)")
    axes.set_title(title, fontsize=11)
    _plain(axes)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def push_pull(path: Path, tracks: dict[str, dict[str, list[float]]], ratio: float, num_classes: int) -> Path:
    """Push over pull on class vectors and on features, major and minor classes, along gradient descent."""
    figure = _figure(9, 3.9)
    for axes, of, title in zip(
        figure.subplots(1, 2), ("ratio", "feature_ratio"), ("on class vectors (learned W)", "on features"), strict=True
    ):
        track = tracks["learned"]
        steps = torch.tensor(track["iteration"]) + 1
        axes.plot(steps, track[f"{of}_major"], color=BLUE, linewidth=1.8, label="major classes, learned W")
        axes.plot(steps, track[f"{of}_minor"], color=RED, linewidth=1.8, label="minor classes, learned W")
        if of == "feature_ratio":
            axes.plot(steps, tracks["frame"][f"{of}_major"], color=BLUE, linestyle="--", label="major, fixed frame")
            axes.plot(steps, tracks["frame"][f"{of}_minor"], color=RED, linestyle="--", label="minor, fixed frame")
        axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("step of gradient descent (+1)")
        axes.set_ylabel("‖push‖ / ‖pull‖")
        axes.set_title(title, fontsize=11)
        _plain(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle(f"Cross-entropy's gradient, K = {num_classes}, R = {ratio:g}", fontsize=12)
    return _save(figure, path)


def convergence(path: Path, paths: dict[str, Any], scales: Tensor, num_classes: int) -> Path:
    """Angle to the class vector against iterations on log axes, a panel for each s."""
    figure = _figure(3.1 * len(scales) + 0.4, 3.7)
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for i, (axes, scale) in enumerate(zip(panels, scales.tolist(), strict=True)):
        for loss, run in paths.items():
            dashed = "--" if loss == "cosine" else "-"
            steps, theta = run["iteration"][1:], run["theta"][1:, i].clamp(min=1e-30)
            axes.plot(steps, theta, dashed, color=LOSS_COLOURS[loss], linewidth=1.8, label=LOSS_NAMES[loss])
        steps = paths["dr"]["iteration"][1:].to(torch.float64)
        late = steps >= 30
        anchor = paths["dr"]["theta"][-1, i] * (steps / steps[-1]) ** -0.5
        axes.plot(steps[late], 0.45 * anchor[late], ":", color=GREY, linewidth=1.3, label="slope −1/2")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1e-8, 4)
        axes.set_title(f"s = {scale:g}", fontsize=11)
        axes.set_xlabel("iteration")
        _plain(axes)
    panels[0].set_ylabel("angle to the class vector (rad)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"Riemannian gradient descent, step 0.1/s, from a wrong vertex (K = {num_classes})", fontsize=12)
    return _save(figure, path)


def race_map(path: Path, maps: dict[bool, Tensor], scales: Tensor, targets: Tensor, num_classes: int) -> Path:
    """Where dot regression reaches a target angle first (blue) and where cross-entropy does (red)."""
    figure = _figure(9.4, 4.1)
    panels = figure.subplots(1, 2, sharey=True)
    scales, targets = scales.numpy(), targets.numpy()
    titles = {False: "same step for both", True: "each at 1/(largest curvature)"}
    for axes, own in zip(panels, (False, True), strict=True):
        table = maps[own].clamp(-4, 4).T.numpy()
        image = axes.pcolormesh(
            scales, targets, table, cmap="RdBu", vmin=-4, vmax=4, shading="gouraud", rasterized=True
        )
        axes.contour(scales, targets, table, levels=[0.0], colors="black", linewidths=1.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([0.5, 1, 2, 4, 8, 16, 32], labels=["0.5", "1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.set_xlabel(r"$s = \sqrt{E_W E_H}$")
        axes.set_title(titles[own], fontsize=11)
        axes.text(0.6, 2.5e-4, "cross-entropy first", color="white", fontsize=10)
        axes.text(25, 5e-3, "dot regression first", color="white", fontsize=10, rotation=90, ha="center")
    panels[0].set_ylabel("target angle (rad)")
    figure.colorbar(image, ax=list(panels), label="log₁₀ (time of CE / time of DR)")
    figure.suptitle(f"Which loss reaches the angle first, from a wrong vertex (K = {num_classes})", fontsize=12)
    figure.get_layout_engine().set(wspace=0.06)
    return _save(figure, path)


def gap(path: Path, runs: dict[str, Solution], title: str) -> Path:
    """Certified gap against iterations for several solvers, log axes."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for (name, run), colour in zip(runs.items(), (GREY, ORANGE, BLUE, PURPLE), strict=False):
        steps = torch.tensor(run.history["iteration"], dtype=torch.float64) + 1
        axes.plot(steps, torch.tensor(run.history["gap"]).clamp(min=1e-18), color=colour, linewidth=1.8, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("iteration (+1)")
    axes.set_ylabel("certified gap to the optimum")
    axes.set_title(title, fontsize=11)
    _plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, path)


def features_gif(path: Path, *, loss: str = "dr", frames: int = 36, seed: int = 0) -> Path:
    """Features of 4 classes (60, 60, 10 and 10 samples) on the sphere moving to the vertices of the frame, as a GIF."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = torch.tensor([60.0, 60.0, 10.0, 10.0])
    model = PeeledModel(counts, 3, 4.0, 1.0, loss=loss, samples="all")
    vectors = 2.0 * simplex_vectors(4, 3, seed=1)
    seen: list[Tensor] = []
    solve_features(
        model,
        vectors,
        method="riemannian",
        seed=seed,
        max_iterations=400,
        every=1,
        callback=lambda _, h: seen.append(h.clone()),
    )
    times = torch.logspace(0, math.log10(len(seen)), frames).long() - 1
    figure = Figure(figsize=(4.6, 4.8), layout="none")  # whatever the user's settings are
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 0.94), projection="3d")
    axes.set_axis_off()
    axes.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), zlim=(-0.8, 0.8), box_aspect=(1, 1, 1))
    u, v = torch.linspace(0, 2 * math.pi, 25), torch.linspace(0, math.pi, 13)
    sphere = (
        torch.outer(torch.cos(u), torch.sin(v)),
        torch.outer(torch.sin(u), torch.sin(v)),
        torch.ones(25, 1) * v.cos(),
    )
    axes.plot_wireframe(*(x.numpy() for x in sphere), color="#dddddd", linewidth=0.5)
    clouds = []
    for k, colour in enumerate((BLUE, ORANGE, GREEN, RED)):
        x, y, z = (0.5 * vectors[k]).tolist()
        axes.plot([0, x], [0, y], [0, z], color=colour, linewidth=1.6)
        axes.plot([x], [y], [z], "*", color=colour, markersize=14, markeredgecolor="black", markeredgewidth=0.6)
        clouds += axes.plot([], [], [], "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.3)
    title = figure.suptitle("", fontsize=11)

    def draw(index: int) -> list[Any]:
        points = seen[int(times[index])]
        for k, cloud in enumerate(clouds):
            cloud.set_data_3d(*points[model.targets == k].T.numpy())
        axes.view_init(elev=18, azim=30 + 1.5 * index)
        title.set_text(f"{LOSS_NAMES.get(loss, loss)}, fixed frame: step {int(times[index])}")
        return []

    path.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, draw, frames=frames).save(path, writer=PillowWriter(fps=8), dpi=75)
    return path
