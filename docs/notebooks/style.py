"""Shared by the notebooks: where a picture goes, and how it looks."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#6b7280"
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
                 "figure.constrained_layout.use": True, "legend.frameon": False}  # fmt: skip


def save(figure, script: str) -> Path:
    """Write a notebook's picture beside it, or into the folder that the command line names."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(script).parent
    file = folder / f"{Path(script).stem}.png"
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file
