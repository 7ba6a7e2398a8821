"""The README's Python block runs as printed."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_readme_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        scope: dict = {}
        exec(block, scope)
        assert scope["predicted"].shape == scope["targets"].shape
        assert bool(scope["loss"].isfinite())


def test_readme_lists_every_method():
    from equiframe.method import METHODS

    assert [name for name in METHODS if f"`{name}`" not in README] == []
