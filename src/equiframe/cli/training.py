"""The verb train."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from equiframe.cli.flags import AddVerb, default_out, recipe_of, seconds
from equiframe.cli.terminal import Reporter, print_metrics, write_page


def add_verbs(verb: AddVerb) -> None:
    sub = verb("train", _train, "train one model into a run folder", recipe=True)
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run")
    sub.add_argument(
        "--resume-or-start",
        action="store_true",
        help="continue the run if it has begun, else begin it: for jobs that restart",
    )
    sub.add_argument(
        "--stop-after",
        type=seconds,
        metavar="TIME",
        help="save and stop (exit 130) after 90s, 55min or 2h; then --resume",
    )
    sub.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of a few training steps into OUT/profile, and say where their time goes",
    )


def _train(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    recipe = recipe_of(arguments, saved=arguments.resume)
    out = Path(arguments.out) if arguments.out else default_out(recipe, recipe.method, f"s{recipe.seed}")
    from equiframe.parallel import Lost, restarted, started_rank
    from equiframe.train import Interrupted, train

    resume = "auto" if arguments.resume_or_start or restarted() else arguments.resume
    leads = started_rank() == 0

    def stop() -> bool:
        return arguments.stop_after is not None and time.monotonic() - started >= arguments.stop_after

    reporter = Reporter(arguments.quiet or not leads)
    try:
        metrics = train(
            recipe, out, resume=resume, say=reporter.say, progress=reporter.progress, stop=stop,
            profile=arguments.profile,
        )  # fmt: skip
    except Interrupted:
        reporter.say(f"stopped and saved in {out}; continue with: equiframe train --resume --out {out}")
        return 130
    except Lost as lost:
        if lost.tells:
            kept = f"continue from the last checkpoint with: equiframe train … --resume --out {out}"
            print(f"equiframe: {lost}; this one stops, too; {kept}", file=sys.stderr)
        return 3
    if not leads:
        return 0
    reporter.say(f"report: {write_page(out)}")
    reporter.say(f"saved in {out}")
    print(json.dumps(metrics)) if arguments.json else print_metrics(metrics, str(out))
    return 0
