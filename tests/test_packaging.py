"""The wheel holds what it needs, and works with the core dependencies alone."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXTRAS = "torchvision timm PIL pyarrow yaml rich sklearn scipy matplotlib jinja2 onnx onnxruntime transformers datasets tensorboard"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_the_wheel_holds_code_types_recipes_and_the_page(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    for path in (source / "equiframe").rglob("*"):
        if path.suffix in (".py", ".yaml", ".j2", ".typed"):
            assert str(path.relative_to(source)) in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"equiframe"}


def test_the_version_comes_from_the_tag(wheel):
    version = wheel.name.split("-")[1]
    assert re.match(r"\d+\.\d+", version)
    tag = subprocess.run(["git", "describe", "--tags", "--exact-match", "--match", "v*"], cwd=ROOT, capture_output=True,
                         text=True, check=False).stdout.strip()  # fmt: skip
    if tag:
        assert version == tag.removeprefix("v") or "dev" in version  # a changed tree is not the tag


def test_core_dependencies_are_enough(wheel, tmp_path):
    code = f"""
import sys
import torch, torchmetrics  # they look for extras of their own

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {EXTRAS.split()!r} else self.finder.find_spec(name, path, target)

for name in [n for n in sys.modules if n.split(".")[0] in {EXTRAS.split()!r}]:
    del sys.modules[name]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, {str(wheel)!r})
import equiframe
assert equiframe.__file__.startswith({str(wheel)!r}), equiframe.__file__
for name in equiframe.__all__:
    try:
        getattr(equiframe, name)
    except equiframe.InputError as error:
        assert "pip install" in str(error), error
head = equiframe.FrameHead(64, 10, logit_scale=16.0)
loss = equiframe.DotRegression()(head(torch.randn(4, 64, requires_grad=True)), torch.arange(4))
loss.backward()
from equiframe.collapse import ClassStatistics, collapse_measures, metrics
collapse_measures(ClassStatistics(3, 8).update(torch.randn(30, 8), torch.arange(30) % 3))
from equiframe.cli import main
assert main(["train", "digits"]) == 2
print("fine", equiframe.__version__)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fine " in done.stdout
