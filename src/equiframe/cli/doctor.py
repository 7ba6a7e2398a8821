"""The verb doctor."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence

from equiframe.cli.flags import AddVerb, recipe_of
from equiframe.cli.terminal import Reporter
from equiframe.errors import InputError
from equiframe.words import counted

MARKS = {"error": ("✗", "bold red"), "warning": ("▲", "yellow"), "note": ("·", "dim")}
GROUP_STYLE = {"many": "blue", "medium": "cyan", "few": "magenta"}
ROWS = 24  # bars at most; of more classes, neighbours share one
WIDTH = 100  # columns where stdout is no terminal


def add_verbs(verb: AddVerb) -> None:
    sub = verb(
        "doctor", _doctor, "look at this machine and at DATA before training; takes the settings of train", recipe=True
    )
    sub.add_argument(
        "--images", type=int, default=20_000, metavar="N", help="decode at most N of each split; 0: all [20000]"
    )
    sub.add_argument("--seconds", type=float, default=3.0, metavar="X", help="how long training steps are timed [3]")
    sub.add_argument("--plot", metavar="FILE", help="also draw the class counts (png, svg, pdf)")


def _doctor(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments, data_needed=False)
    if arguments.images < 0 or not arguments.seconds > 0:
        raise InputError("--images must be at least 0 and --seconds above 0")
    if arguments.plot and not recipe.data:
        raise InputError("--plot draws the class counts of DATA, and there is none")
    from equiframe.doctor import diagnose

    report = diagnose(
        recipe, images=arguments.images, seconds=arguments.seconds, folder=arguments.out or ".",
        say=Reporter(arguments.quiet or arguments.json).say,
    )  # fmt: skip
    if arguments.plot:
        from equiframe.report.figures import counts_figure, save_figure

        save_figure(lambda: counts_figure(report["data"]["class_names"], report["data"]["counts"]), arguments.plot)
    if arguments.json:
        print(json.dumps(report))
    else:
        from rich.console import Console

        print_report(report, Console(width=None if sys.stdout.isatty() else WIDTH))
    return 0


# --- the picture ------------------------------------------------------------------------------------------------------


def print_report(report: dict, console) -> None:
    """The report for a person."""
    sections = {"Machine": _machine(report["machine"], report["training"] if "data" not in report else None)}
    if "data" in report:
        sections["Data"] = _data(report["data"])
        sections["Classes"] = _bars(report["data"], console.width)
        sections["Findings"] = _problems(report["problems"])
        sections["Training"] = _training(report["training"], report["machine"])
        sections["Method"] = _advice(report["advice"])
    for title, content in sections.items():
        console.print()
        console.rule(f"[bold]{title}[/]", align="left", style="dim", characters="─")
        console.print(content)
    for command in report["advice"]["commands"] if "data" in report else ():
        console.print(_text(f"  {command}", "bold"), soft_wrap=True)  # one line each, to be copied


def _pairs(rows: Sequence[tuple[str, object]]):
    """Names and values in two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _text(text: str, style: str = ""):
    from rich.text import Text

    return Text(text, style)


def quantity(number: float, unit: str) -> str:
    """``1.53e11`` → ``153 GFlop/s``."""
    step = min(int(math.log(max(number, 1), 1000)), 5)
    return f"{number / 1000**step:.3g} {['', 'k', 'M', 'G', 'T', 'P'][step]}{unit}"


def duration(seconds: float) -> str:
    """Two digits are all that such an estimate has."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s" if seconds >= 1 else "less than a second"


def _machine(machine: dict, training: dict | None):
    gib = 2**30
    memory = f", {machine['memory_bytes'] / gib:.0f} GiB memory" if machine["memory_bytes"] else ""
    speed = f"{quantity(machine['float32_operations_per_second'], 'Flop/s')} in float32"
    if "bfloat16_operations_per_second" in machine:
        speed += f", {quantity(machine['bfloat16_operations_per_second'], 'Flop/s')} in bfloat16"
    gpu = machine["gpu"]
    bf16 = "bfloat16 instructions" if machine["bfloat16_instructions"] else "no bfloat16 instructions"
    flags = " ".join(f for f in machine["cpu_flags"] if f != machine["cpu_capability"].lower())
    rows = [
        ("processor", _text(f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} used{memory}")),
        ("", _text(f"{machine['cpu_capability']}{f' ({flags})' if flags else ''}, {bf16}", "dim")),
        (
            "GPU",
            _text(f"{gpu['name']}, {gpu['memory_bytes'] / gib:.0f} GiB, CUDA {gpu['cuda']}" if gpu else "none used"),
        ),
        ("speed", _text(f"{speed} (matrix product on {machine['device']}, best of several)")),
    ]
    if training:
        rows.append(("training", _text(f"{training['images_per_second']:,.0f} images/s, {training['backbone']} on random pixels of "
                                       f"{training['image_size']}×{training['image_size']}, {training['numerics']}")))  # fmt: skip
    load, cores = machine["load"], machine["cores"]
    if load is not None and load > cores:
        rows.append(
            (
                "load",
                _text(f"{load:.1f} on {cores} cores: the machine is busy, and every time here is too long", "yellow"),
            )
        )
    low = machine["disk_free_bytes"] < 2 * gib
    rows += [
        ("disk", _text(f"{machine['disk_free_bytes'] / gib:,.1f} GiB free at {machine['disk_of']}", "yellow" if low else "")),
        ("versions", _text(f"equiframe {machine['equiframe']}, torch {machine['torch']}, Python {machine['python']}, "
                           f"NumPy {machine['numpy']}")),
    ]  # fmt: skip
    if machine["missing"]:
        extras = sorted(set(machine["missing"].values()))
        rows.append(
            ("not there", _text(f"{', '.join(machine['missing'])}: pip install 'equiframe[{','.join(extras)}]'"))
        )
    return _pairs(rows)


def _data(facts: dict):
    numbers = ", ".join(f"{n:,} {name}" for name, n in facts["numbers"].items())
    counts, groups = facts["counts"], facts["groups"]
    sizes = facts["sizes"]
    rows = [
        ("images", _text(f"{numbers} of {facts['name']}")),
        ("classes", _text(f"{facts['classes']:,}, of {max(counts):,} to {min(counts):,} training images: "
                          f"imbalance ratio {facts['ratio']:,.4g}{_before(facts)}")),
    ]  # fmt: skip
    if sizes:
        w, h = sizes["width"], sizes["height"]
        told = f"all {w['most']}×{h['most']}" if sizes["alike"] else (
            f"{w['least']}×{h['least']} to {w['most']}×{h['most']}, median {w['median']}×{h['median']} (width×height)")  # fmt: skip
        kinds = ", ".join(f"{n:,} in {mode}" for mode, n in list(facts["modes"].items())[:5])
        rows.append(("sizes", _text(f"{told}; {kinds}")))
    rows.append(("groups", _groups(groups)))
    rows += [("note", _text(note, "dim")) for note in facts["notes"]]
    return _pairs(rows)


def _before(facts: dict) -> str:
    """The ratio before validation images were held out, where that changes it."""
    held = facts["validation_counts"]
    if held is None or not any(held):
        return ""
    whole = [a + b for a, b in zip(facts["counts"], held, strict=True)]
    ratio = max(whole) / max(min(whole), 1)
    return "" if math.isclose(ratio, facts["ratio"]) else f" ({ratio:,.4g} with the validation images)"


def _groups(groups: dict):
    from rich.text import Text

    limits = {"many": "more than 100", "medium": "20 to 100", "few": "fewer than 20"}
    text = Text()
    for i, (name, num) in enumerate(groups.items()):
        text.append(("   " if i else "") + "■ ", GROUP_STYLE[name])
        text.append(f"{name} ({limits[name]}): {num:,}")
    return text


def bar(share: float, width: int) -> str:
    """A bar of a share in [0, 1] of so many columns, in eighths of one; never empty."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _bars(facts: dict, width: int):
    """A bar a class, the largest first; with many classes a bar for neighbours, their mean."""
    from rich.table import Table

    counts, names = facts["counts"], facts["class_names"]
    order = sorted(range(len(counts)), key=lambda k: -counts[k])
    chunks = [[k] for k in order]
    if len(order) > ROWS:
        edges = [round(i * len(order) / ROWS) for i in range(ROWS + 1)]
        chunks = [order[a:b] for a, b in itertools.pairwise(edges)]
    merged = len(chunks) < len(order)
    rows, at = [], 0
    for chunk in chunks:
        most, least = counts[chunk[0]], counts[chunk[-1]]
        label = names[chunk[0]] if len(chunk) == 1 and not merged else f"{at + 1} to {at + len(chunk)}"
        told = f"{most:,}" if most == least else f"{most:,} to {least:,}"
        rows.append((label, told, sum(counts[k] for k in chunk) / len(chunk)))
        at += len(chunk)
    first, second = min(24, max(len(r[0]) for r in rows)), max(len(r[1]) for r in rows)
    room = max(10, width - first - second - 6)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max(r[2] for r in rows)
    if merged:
        table.add_row(*(_text(head, "dim") for head in ("rank", "images", "their mean")))
    for label, told, mean in rows:
        group = "many" if mean > 100 else "medium" if mean >= 20 else "few"
        table.add_row(_text(label), _text(told), _text(bar(mean / max(most, 1), room), GROUP_STYLE[group]))
    return table


def _problems(problems: Sequence[dict]):
    from rich.table import Table

    if not problems:
        return _text("nothing that would be in the way", "green")
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for problem in problems:
        mark, style = MARKS[problem["level"]]
        table.add_row(_text(mark, style), _text(problem["text"], "" if problem["level"] != "note" else "dim"))
    return table


def _training(training: dict | None, machine: dict):
    if training is None:
        return _text("not timed: see the findings", "yellow")
    busy = machine["load"] is not None and machine["load"] > machine["cores"] and training["idle_seconds"]
    told = (
        f"about {duration(training['total_seconds'])} for {training['epochs']:,} epochs ({training['steps']:,} steps)"
    )
    if busy:
        told += f" as busy as it is now, about {duration(training['idle_seconds'])} on an idle machine"
    rows = [
        ("network", _text(f"{training['backbone']}, {training['parameters']:,} parameters, {training['dim']} features, images of "
                          f"{training['image_size']}×{training['image_size']}, {training['numerics']}")),
        ("speed", _text(f"{_rate(training['images_per_second'])} training, {_rate(training['evaluated_per_second'])} evaluating "
                        f"(a few batches of {training['batch']}, measured now)")),
        ("time", _text(told, "bold")),
        ("", _text(f"of which {duration(training['evaluation_seconds'])} evaluation", "dim")),
    ]  # fmt: skip
    return _pairs(rows)


def _rate(speed: float) -> str:
    return f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s"


def _advice(advice: dict):
    rows = [
        ("take", _text(advice["method"] if advice["decided"] else f"not decided; {advice['method']} to begin with",
                       "bold green" if advice["decided"] else "bold yellow")),
        ("why", _text(advice["why"])),
    ]  # fmt: skip
    for e in advice["evidence"]:
        macro = ", ".join(f"{name} {value:.1f}" for name, value in e["macro"].items())
        classes = counted(e["classes"], "class", "classes")
        setting = [f"{e['dim']} features", f"{counted(e['seeds'], 'seed')} or more"]
        setting = setting if e["data"].startswith(classes) else [classes, *setting]
        rows.append(
            (
                "measured",
                _text(
                    f"{e['data']} ({', '.join(setting)}): macro accuracy {macro} %",
                    "dim",
                ),
            )
        )
    rows.append(("source", _text(advice["source"], "dim")))
    return _pairs(rows)
