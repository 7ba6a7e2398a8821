"""The page: figures as inline SVG in a Jinja template; nothing is fetched, everything is escaped."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from equiframe.compare import COLUMNS, families
from equiframe.errors import InputError
from equiframe.modelcard import FITTED_ON
from equiframe.report.runs import Group, RunData, group_runs
from equiframe.runs import CHECKSUMS, announce, atomic_write
from equiframe.summaries import Summary
from equiframe.tracking import TRACKED_IMAGES
from equiframe.verdicts import DIFFERENCE_COLUMNS, Verdicts, difference_note, difference_row, in_words, judge_runs

FORMATS = ("png", "svg", "pdf")


def _svg(name: str, groups: Sequence[Group]) -> str | None:
    """A figure as inline SVG whose ink and lines follow the page's colours, light or dark."""
    import matplotlib.pyplot as plt

    from equiframe.report.figures import COLOURS, FAINT, INK, STYLE, draw

    figure = draw(name, groups)
    if figure is None:
        return None
    file = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in {INK: "ink", FAINT: "faint", **{c: f"c{i}" for i, c in enumerate(COLOURS)}}.items():
        svg = svg.replace(colour.lower(), f"var(--{variable})")
    svg = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", svg)  # equal pictures would share one
    # ids are made unique: several figures share one page
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # a figure of 8 inches is as wide as the page
    return re.sub(
        r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"',
        lambda found: f'<svg {found[1]}style="max-width:{1.24 * float(found[2]):.0f}pt"',
        svg,
        count=1,
    )


def _columns(groups: Sequence[Group]) -> list[str]:
    """The measures that any of the methods has (no class may be few)."""
    return [c for c in COLUMNS if any(g.values(c) for g in groups)]


def _rows(groups: Sequence[Group]) -> list[dict]:
    return [
        {
            "name": group.name,
            "n": len(group.runs),
            "cells": [Summary.of([r.metrics.get(c) for r in group.runs]).percent() for c in _columns(groups)],
        }
        for group in groups
    ]


def _verdicts(groups: Sequence[Group], reference: str | None) -> Verdicts:
    results = {g.name: {r.recipe.seed: (r.metrics["macro"], r.predictions) for r in g.runs} for g in groups}
    return judge_runs(results, reference=reference)


def _verdict(groups: Sequence[Group], verdicts: Verdicts) -> str:
    """The first question, answered in a sentence or two."""
    best = groups[0]
    if len(groups) > 1:
        return in_words(verdicts, best.mean("macro"))
    text = (
        f"{best.name} reaches {100 * best.mean('macro'):.1f}\u00a0% macro accuracy (the mean over classes) and "
        f"{100 * best.mean('top1'):.1f} % over all images."
    )
    if best.name in verdicts.over_images:
        low, high = verdicts.over_images[best.name]
        text += (
            f" Other test images would give {100 * low:.1f} to {100 * high:.1f}\u00a0% (95\u00a0% bootstrap interval of the "
            "macro accuracy); that does not cover the variation between trainings."
        )
    return text


def _differences(verdicts: Verdicts) -> list[dict]:
    """A table for each method that the others are held against."""
    return [
        {
            "against": against,
            "rows": [(c.method, difference_row(c)) for c in family],
            "note": difference_note(family, num),
        }
        for against, family, num in families(verdicts)
    ]


def _collapse_columns(groups: Sequence[Group]) -> list[tuple[str, str, list[str]]]:
    """Name, meaning and the methods' values of each measure that any of them has."""
    names = {
        "nc1": ("NC1", "scatter within classes against between them"),
        "nc2_angle": ("NC2 angle", "mean distance of cosines from −1/(K−1)"),
        "nc2_norm": ("NC2 length", "relative spread of class-mean lengths"),
        "nc3": ("NC3", "class means against class vectors"),
        "nc4": ("NC4", "share decided like the nearest class mean"),
        "few_angle_means": ("tail means", "degrees between class means of the third with fewest images"),
        "few_angle_vectors": ("tail vectors", "the same between class vectors"),
    }

    def text(key: str, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.1f}°" if key.startswith("few_angle") else f"{value:.3g}"

    columns = []
    for key, (label, meaning) in names.items():
        values = [g.mean(key) for g in groups]
        if any(v is not None for v in values):
            columns.append((label, meaning, [text(key, v) for v in values]))
    return columns


def _settings(run: RunData) -> list[tuple[str, str]]:
    return [(k, str(v)) for k, v in run.recipe.to_dict().items() if v is not None and v != ""]


def write_report(runs: Sequence[RunData], path: str | Path, *, reference: str | None = None) -> Path:
    """Write one self-contained HTML page about the runs.

    Args:
        reference: a method that all others are held against, beside the best.

    Raises:
        InputError: if the runs have different classes, there is no such reference, or the file cannot be written.
    """
    import jinja2

    groups = group_runs(runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("equiframe.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    from markupsafe import Markup

    figures = {name: (Markup(svg) if (svg := _svg(name, groups)) else None) for name in
               ("groups", "classes", "reliability", "collapse", "cosines", "training", "gradients")}  # fmt: skip
    first = runs[0]
    verdicts = _verdicts(groups, reference)
    title = Path(first.recipe.data).name + (
        f", imbalance ratio {first.recipe.imbalance:g}" if first.recipe.imbalance else ""
    )
    html = environment.get_template("page.html.j2").render(
        title=title,
        verdict=_verdict(groups, verdicts),
        differences=_differences(verdicts),
        difference_columns=DIFFERENCE_COLUMNS,
        columns=_columns(groups),
        rows=_rows(groups),
        groups=groups,
        figures=figures,
        classes=groups[0].runs[0].classes,
        class_accuracy=[[("–" if a is None else f"{100 * a:.1f}") for a in g.class_accuracy()] for g in groups],
        collapse=_collapse_columns(groups),
        tracked=None if all("collapse-all" in r.recipe.track for r in runs) else f"{TRACKED_IMAGES:,}",
        fitted_on=FITTED_ON.get(groups[0].runs[0].metrics["temperature_from"], "unknown"),
        untested=sum(not c["num_test"] for c in groups[0].runs[0].classes),
        runs=runs,
        settings=_settings,
        wrong=groups[0].runs[0].details.get("wrong", []),
        wrong_of=f"{groups[0].name}, seed {groups[0].runs[0].recipe.seed}",
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"no such folder: {path.parent}")
    content = html.encode(errors="surrogateescape")  # file names may hold bytes that are not UTF-8
    if (path.parent / CHECKSUMS).is_file():
        announce(path.parent, {path.name: content})
    atomic_write(path, content)
    return path


def write_figures(runs: Sequence[RunData], folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write each figure as PNG, SVG and PDF, on white."""
    import matplotlib.pyplot as plt

    from equiframe.report.figures import FIGURES, STYLE, draw

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {folder}: {error.strerror}") from error
    groups = group_runs(runs)
    written = []
    for name in FIGURES:
        figure = draw(name, groups)
        if figure is None:
            continue
        for kind in formats:
            with plt.rc_context(STYLE):
                figure.savefig(folder / f"{name}.{kind}", dpi=200, facecolor="white")
            written.append(folder / f"{name}.{kind}")
        plt.close(figure)
    return written
