"""Verbs on finished runs: evaluate, report, predict, second-stage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from equiframe.cli.flags import AddVerb
from equiframe.cli.terminal import Reporter, print_metrics, print_values, write_page
from equiframe.errors import InputError
from equiframe.words import counted


def add_verbs(verb: AddVerb) -> None:
    sub = verb("evaluate", _evaluate, "measure a finished run again, on its own test images")
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument("--collapse", action="store_true", help="also every measure of neural collapse (training images)")
    sub.add_argument(
        "--label-noise", metavar="FILE.csv", help="also list images whose neighbours have another label, here"
    )
    sub.add_argument("--data", metavar="DATA", help="where the run's images lie now [where it found them]")
    sub.add_argument("--data-root", metavar="DIR", help="the same for a built-in data set, or the images of lists")
    sub.add_argument("--device", default="auto", help="cpu, cuda, … [auto]")
    sub = verb("report", _report, "write one HTML page about finished runs")
    sub.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of runs such as a comparison's")
    sub.add_argument("--out", metavar="FILE.html", help="where to write the page [report.html in the first folder]")
    sub.add_argument("--reference", metavar="METHOD", help="hold all others against this one, beside the best")
    sub.add_argument("--figures", metavar="DIR", help="also write each figure as PNG, SVG and PDF")
    sub = verb("predict", _predict, "classify images with a finished run or an exported file")
    sub.add_argument("run", metavar="RUN", help="a run folder, or a file that `equiframe export` made")
    sub.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="images, or folders of images")
    sub.add_argument("--out", metavar="FILE.csv", help="where to write the CSV [stdout]")
    sub.add_argument("--top", type=int, default=5, metavar="K", help="how many classes an image [5]")
    sub.add_argument("--device", default="auto", help="cpu, cuda, … [auto]")
    sub.add_argument("--on-bad-image", choices=("error", "skip"), default="error",
                     help="an image that cannot be read ends it, or is told on stderr and left out [error]")  # fmt: skip
    sub.add_argument("--trust", action="store_true", help="read a .pt2 file: whoever made it can run code here")
    sub = verb("second-stage", _second_stage, "give a finished run a better classifier on the features that it has")
    sub.add_argument("run", metavar="RUN", help="a run folder without a second stage; it stays as it is")
    sub.add_argument(
        "--stage",
        required=True,
        metavar="NAME",
        help="crt-blend, crt-adjusted, crt, tau-norm, lws, label-aware-smoothing, ncm, ncm-euclidean or post-hoc",
    )
    sub.add_argument(
        "--stage-tau", type=float, metavar="X", help="τ of tau-norm, post-hoc [chosen on validation images]"
    )
    sub.add_argument("--out", metavar="DIR", help="the new run folder [RUN-STAGE, beside the run]")
    sub.add_argument("--data", metavar="DATA", help="where the run's images lie now [where it found them]")
    sub.add_argument("--device", default="auto", help="cpu, cuda, … [auto]")


def _evaluate(arguments: argparse.Namespace) -> int:
    from equiframe.measure import evaluate_run

    noise = Path(arguments.label_noise) if arguments.label_noise else None
    if noise is not None and not noise.parent.is_dir():
        raise InputError(f"no such folder: {noise.parent}")
    metrics = evaluate_run(
        arguments.run,
        device=arguments.device,
        full=arguments.collapse,
        data=arguments.data,
        data_root=arguments.data_root,
    )
    told = _label_noise(arguments, noise) if noise is not None else None
    if arguments.json:
        print(json.dumps(metrics))
        return 0
    print_metrics(metrics, arguments.run)
    if told is not None:
        print(told)
    if arguments.collapse:
        known = [
            "top1",
            "macro",
            "many",
            "medium",
            "few",
            "head",
            "middle",
            "tail",
            "worst",
            "ece",
            "nll",
            "temperature",
            "val_top1",
            "val_macro",
        ]
        print_values({k: v for k, v in metrics.items() if isinstance(v, float) and k not in known}, "neural collapse")
    return 0


def _label_noise(arguments: argparse.Namespace, target: Path) -> str:
    """Write the list of suspects; returns what to tell."""
    from equiframe.runs import atomic_write
    from equiframe.suspects import as_csv, find_suspects

    suspects, judged = find_suspects(
        arguments.run, device=arguments.device, data=arguments.data, data_root=arguments.data_root
    )
    atomic_write(target, as_csv(suspects))
    parts = [f"{sum(s.split == split for s in suspects):,} of {count:,} {split}" for split, count in judged.items()]
    return f"label noise: {', '.join(parts)} images look like another class; the surest first in {target}"


def _report(arguments: argparse.Namespace) -> int:
    from equiframe.report import find_runs, write_figures, write_report

    runs = find_runs(arguments.runs)
    written = [
        write_report(runs, arguments.out or Path(arguments.runs[0]) / "report.html", reference=arguments.reference)
    ]
    if arguments.figures:
        written += write_figures(runs, arguments.figures)
    if arguments.json:
        print(json.dumps([str(path) for path in written]))
    elif not arguments.quiet:
        figures = f", and {len(written) - 1} figure files in {arguments.figures}" if arguments.figures else ""
        print(f"{counted(len(runs), 'run')} in {written[0]}{figures}", file=sys.stderr)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.top < 1:
        raise InputError(f"--top must be at least 1, got {arguments.top}")
    from equiframe.deployed import is_exported, load_exported
    from equiframe.model import load_classifier
    from equiframe.predict import as_csv, find_images, predict, split_readable
    from equiframe.runs import atomic_write

    target = Path(arguments.out) if arguments.out else None
    if target is not None and not target.parent.is_dir():
        raise InputError(f"no such folder: {target.parent}")
    if is_exported(arguments.run):
        exported = load_exported(arguments.run, device=arguments.device, trust=arguments.trust)
        model, card = exported.run, exported.card
    else:
        model, card = load_classifier(arguments.run)
    images = find_images(arguments.images)
    if arguments.on_bad_image == "skip":
        images, skipped = split_readable(images)
        for reason in skipped:
            print(f"skipped: {reason}", file=sys.stderr)
        if skipped:
            print(f"note: skipped {len(skipped):,} of {len(images) + len(skipped):,} images", file=sys.stderr)
    ranked = list(predict(model, card, images, top=arguments.top, device=arguments.device))
    if target is not None:
        atomic_write(target, as_csv(images, ranked))
        if not arguments.quiet:
            print(f"{len(images):,} predictions in {target}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([
            {"image": str(image), "classes": [{"class": name, "probability": p} for name, p in row]}
            for image, row in zip(images, ranked, strict=True)
        ]))  # fmt: skip
    elif target is None:
        print(as_csv(images, ranked), end="")
    return 0


def _second_stage(arguments: argparse.Namespace) -> int:
    from equiframe.train import apply_second_stage

    run, reporter = Path(arguments.run), Reporter(arguments.quiet)
    whole = run if run.name not in ("", "..") else run.resolve()
    out = Path(arguments.out) if arguments.out else whole.parent / f"{whole.name}-{arguments.stage}"
    metrics = apply_second_stage(
        arguments.run, arguments.stage, out, tau=arguments.stage_tau, device=arguments.device, data=arguments.data,
        say=reporter.say,
    )  # fmt: skip
    reporter.say(f"report: {write_page(out)}")
    reporter.say(f"saved in {out}")
    print(json.dumps(metrics)) if arguments.json else print_metrics(metrics, str(out))
    return 0
