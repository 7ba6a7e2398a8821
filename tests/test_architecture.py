"""Imports go down only, as ARCHITECTURE.md draws them; importing the package stays light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "equiframe"
FLOORS = [  # from the ground up; modules of one floor do not import each other
    {"errors", "words"},
    {"files", "parallel"},
    {"frames", "angular", "transport"},
    {
        "heads",
        "imbalance",
        "samplers",
        "collapse",
        "peeled",
        "recipe",
        "backbones",
        "summaries",
        "optimise",
        "bootstrap",
        "profiling",
    },
    {"losses", "verdicts", "openset"},
    {"method", "incremental"},
    {"modelcard"},
    {"data", "model", "runs", "variants", "integrate", "tabular"},
    {"evaluate", "numerics", "trainers", "publish"},
    {"tracking", "deployed", "ordering", "estimator", "loop"},
    {"measure", "second_stage"},
    {"train", "predict", "export", "suspects"},
    {"grid", "doctor"},
    {"tune"},
    {"compare"},
    {"report", "papers"},
    {"cli"},
]
DATA_FLOORS = [
    {"images", "policies", "mixing"},
    {"dataset"},
    {"folders", "lists", "parquet", "hub"},
    {"published"},
    {"builtin"},
    {"sources", "augment"},
    {"batches"},
    {"prepare"},
]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "equiframe":
            names = [f"equiframe.{a.name}" for a in node.names]
        found |= {n for n in names if n.startswith("equiframe.")}
    return found


def floor_of(room: str, floors) -> int | None:
    return next((i for i, rooms in enumerate(floors) if room in rooms), None)


def check(modules: dict[str, set[str]], floors) -> list[str]:
    """Each import that does not go down."""
    wrong = []
    for module, imports in modules.items():
        for target in imports - {module}:
            here, there = floor_of(module, floors), floor_of(target, floors)
            if there is not None and not there < here:
                wrong.append(f"{module} imports {target}")
    return wrong


def rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            found.setdefault(room, set()).update(name.split(".")[1] for name in imported(path))
    return found


def test_every_room_has_a_floor():
    assert set(rooms()) == set().union(*FLOORS)


def test_imports_go_down_only():
    assert check(rooms(), FLOORS) == []


def test_imports_within_data_go_down_only():
    modules = {}
    for path in (SOURCE / "data").glob("*.py"):
        if path.stem != "__init__":
            inside = {n.split(".")[2] for n in imported(path) if n.startswith("equiframe.data.")}
            modules[path.stem] = inside
    assert check(modules, DATA_FLOORS) == []


def test_the_check_can_fail():
    assert check({"frames": {"heads"}, "heads": set()}, FLOORS) == ["frames imports heads"]


def test_importing_is_light():
    """Against importing torch alone: at most 0.3 s more of processor time (of 3 tries), nothing heavy for a head, a loss and measures,
    and no word to a network: no address is looked up, no connection begun."""
    code = """
import json, sys, time
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event.startswith(("socket.", "urllib.")) else None)
import torch
before, started = set(sys.modules), time.process_time()
import equiframe
head, loss = equiframe.FrameHead(16, 10, logit_scale=16.0), equiframe.DotRegression()
equiframe.attach, equiframe.long_tail_indices
seconds = time.process_time() - started
loss(head(torch.randn(4, 16)), torch.tensor([0, 1, 2, 3]))
import equiframe.collapse
print(json.dumps([seconds, [event for event in asked if event != "socket.__new__"], sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
    heavy = {"timm", "torchvision", "matplotlib", "sklearn", "scipy", "torchmetrics", "pyarrow", "pandas", "PIL", "yaml", "rich",
             "jinja2", "transformers"}  # fmt: skip
    for _ in range(3):  # a machine may be busy for a moment
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, asked, loaded = json.loads(done.stdout)
        assert not asked
        assert not set(loaded) & heavy
        if seconds < 0.3:
            return
    pytest.fail(f"importing equiframe took {seconds:.2f} s more than importing torch")


def test_help_does_not_load_torch():
    code = (
        "import sys, equiframe.cli;\ntry: equiframe.cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'timm', 'matplotlib', 'rich') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "--imbalance" in done.stdout
