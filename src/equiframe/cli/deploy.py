"""Verbs that give a finished run to others: export, push."""

from __future__ import annotations

import argparse
import json

from equiframe.cli.flags import AddVerb
from equiframe.cli.terminal import Reporter, print_export
from equiframe.errors import InputError


def add_verbs(verb: AddVerb) -> None:
    sub = verb("export", _export, "write a finished run as one file for a server, checked on the run's own images")
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument("--format", default="onnx", choices=("onnx", "torch-export", "safetensors"),
                     help="onnx, torch-export (.pt2) or safetensors [onnx]")  # fmt: skip
    sub.add_argument("--out", metavar="FILE", help="the file to write [model.onnx, … in the run folder]")
    sub.add_argument("--int8", nargs="?", const="static", choices=("static", "dynamic"), metavar="static|dynamic",
                     help="8-bit weights and activations (onnx), with the accuracy before and after [static]")  # fmt: skip
    sub.add_argument("--images", type=int, default=512, metavar="N", help="test images to check it on; 0: none [512]")
    sub.add_argument("--data", metavar="DATA", help="where the run's images lie now [where it found them]")
    sub.add_argument("--data-root", metavar="DIR", help="the same for a built-in data set, or the images of lists")
    sub = verb("push", _push, "publish a finished run with a model card, as the Hugging Face Hub has it")
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument(
        "repo", metavar="REPO", nargs="?", help="repository on the Hub, OWNER/NAME; made if it does not exist"
    )
    sub.add_argument("--out", metavar="DIR", help="write the files there instead, to look at them; nothing is sent")
    sub.add_argument("--license", metavar="NAME", help="for the card: mit, apache-2.0, cc-by-4.0, … [not stated]")
    sub.add_argument("--private", action="store_true", help="make a private repository")
    sub.add_argument("--message", default="Upload an equiframe classifier", metavar="TEXT", help="of the commit")


def _export(arguments: argparse.Namespace) -> int:
    from equiframe.export import export_run

    record = export_run(
        arguments.run, arguments.format, arguments.out, int8=arguments.int8, images=arguments.images,
        data=arguments.data, data_root=arguments.data_root, say=Reporter(arguments.quiet).say,
    )  # fmt: skip
    print(json.dumps(record)) if arguments.json else print_export(record)
    return 0


def _push(arguments: argparse.Namespace) -> int:
    if arguments.repo is None and arguments.out is None:
        raise InputError("give a REPO to publish to, OWNER/NAME, or --out DIR to write the files only")
    from equiframe.publish import published_parts

    model, page = published_parts(arguments.run)
    page["license"] = arguments.license
    if arguments.out:
        where = str(model.save_pretrained(arguments.out, name=arguments.repo, **page))
    else:
        where = model.push_to_hub(
            arguments.repo, private=arguments.private or None, commit_message=arguments.message, **page
        )
    if arguments.json:
        print(json.dumps({"written" if arguments.out else "pushed": where}))
    else:
        Reporter(arguments.quiet).say(f"{'written to' if arguments.out else 'pushed to'} {where}")
    return 0
