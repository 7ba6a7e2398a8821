"""Run the tests with the lowest versions that pyproject.toml allows, in an environment of its own.

    python benchmarks/lower_bounds.py --python python3.10 --venv /tmp/lower --out benchmarks/results/lower_bounds.json

``name>=1.2`` becomes ``name==1.2`` for every dependency of the package and of the extras that users install (pip then brings what
these need; a version that was never published for this Python fails here, which is the point). What only tests need (the extra
``dev``) comes as new as fits. Words after ``--`` go to pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]


def lowest(requirements: list[str]) -> list[str]:
    """``["torch>=2.6", "equiframe[train]"]`` → ``["torch==2.6"]``."""
    pairs = [re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", text) for text in requirements]
    return [f"{pair[1]}=={pair[2]}" for pair in pairs if pair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="python3.10")
    parser.add_argument("--venv", type=Path, default=Path("/tmp/equiframe-lower-bounds"))
    parser.add_argument(
        "--without", default="hub", help="extras that are not pinned, with commas (transformers 5 needs a newer hub)"
    )
    parser.add_argument("--out", type=Path, help="write versions and the tests' summary as JSON")
    parser.add_argument("pytest", nargs="*", help="what pytest gets")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = [name for name in extras if name not in ("dev", "docs", *arguments.without.split(","))]
    wanted = lowest(project["dependencies"]) + [name for extra in pinned for name in lowest(extras[extra])]
    tools = [text for text in extras["dev"] if not text.startswith(("equiframe", "ruff", "mypy", "hatch"))]
    python = arguments.venv / "bin" / "python"
    if not python.exists():
        subprocess.run([arguments.python, "-m", "venv", arguments.venv], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *dict.fromkeys(wanted), *tools], check=True)
    freeze = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    old = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]  # old packages among each other
    command = [str(python), "-m", "pytest", "-n", "2", *old, *arguments.pytest]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(result.stdout[-6000:], result.stderr[-2000:])
    names = {re.split("==", text)[0].lower() for text in wanted}
    record = {
        "date": date.today().isoformat(), "command": " ".join(sys.argv),
        "python": subprocess.run([python, "-V"], capture_output=True, text=True).stdout.strip(),
        "versions": [line for line in freeze if re.split("==| @", line)[0].lower() in names],
        "exit": result.returncode, "summary": result.stdout.strip().splitlines()[-1:],
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.M),
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
