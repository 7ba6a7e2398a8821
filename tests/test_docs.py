"""The site builds, its Python runs, its commands are accepted by the real parser, and its notebooks run."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from equiframe.cli import _parser, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("guides/*.md")])
NOTEBOOKS = [path for path in sorted(DOCS.glob("notebooks/*.py")) if path.stem != "style"]
RUN_ELSEWHERE = {"README.md", "deploy.md", "doctor.md", "integrations.md"}  # tests of their own run these pages' Python


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """The lines of shell blocks that call equiframe, continued lines joined, comments cut."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split(" #")[0].split("#")[0] if "#" in line else line
            if line.strip().startswith("equiframe "):
                found.append(line.strip())
    return found


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in RUN_ELSEWHERE and blocks(p, "python")], ids=lambda p: p.stem
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.stem)
def test_commands_of_a_page_exist(page):
    """Every verb and every option is one that the parser knows (… stands for what a reader fills in)."""
    for command in commands(page):
        words = [w for w in shlex.split(command.replace("…", "")) if not w.startswith("[")][1:]
        arguments, rest = _parser().parse_known_args(words)
        assert arguments.verb or arguments.version, command
        assert rest == [], (command, rest)


FRAME_COMMANDS = commands(DOCS / "frames.md")


@pytest.mark.parametrize("command", FRAME_COMMANDS, ids=range(len(FRAME_COMMANDS)))
def test_commands_of_the_frames_page_run(command, tmp_path):
    words = shlex.split(command)[1:]
    train = ["--epochs", "2", "--track", "none", "--precision", "float32", "--out", str(tmp_path / "run")]
    assert main(words + train if words[0] == "train" else words) == 0
    if "--class-tree" in words:
        assert 1 <= json.loads((tmp_path / "run" / "metrics.json").read_text())["mistake_severity"] <= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_draws_its_picture(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    monkeypatch.syspath_prepend(str(path.parent))
    with plt.rc_context():
        runpy.run_path(str(path))
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 10_000
    assert (path.with_suffix(".png")).is_file()
    assert (
        "!["
        in (DOCS / "notebooks" / "index.md").read_text(encoding="utf-8").split(f"{path.stem}.png")[0].splitlines()[-1]
    )
    assert capsys.readouterr().out.endswith(f"{path.stem}.png\n")


def test_the_site_builds_strictly_and_without_the_network(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
    }
    environment |= {"https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) >= 16
    for page in pages:  # a reader's browser fetches nothing from elsewhere
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', text)
        assert fetched == [], (page, fetched)
    assert "FrameHead" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
