"""The blocks of docs/integrations.md run as printed, one after the other."""

import re
from pathlib import Path

import torch
from torch import nn

PAGE = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()


def test_blocks_run(capsys):
    torch.manual_seed(0)
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, scope)
    assert isinstance(scope["model"].fc, nn.Linear)
    printed = capsys.readouterr().out
    assert "this head divides each sample by its length (length='unit'), which no linear layer does" in printed
    assert "torch.Size([8, 4]) 4" in printed


def test_every_example_is_named():
    examples = {path.name for path in (Path(__file__).parents[1] / "examples").glob("swap_*.py")}
    assert examples == set(re.findall(r"\[(swap_\w+\.py)\]", PAGE))
