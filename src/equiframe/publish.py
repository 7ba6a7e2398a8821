"""A finished run → what is published of it: the classifier, and what its model card tells. No path of this machine goes along."""

from __future__ import annotations

from pathlib import Path

from equiframe.model import Classifier, load_classifier
from equiframe.modelcard import TRAINED_WITH
from equiframe.runs import RunFolder


def published_parts(run: str | Path) -> tuple[Classifier, dict[str, object]]:
    """The classifier of a run, and ``metrics``, ``data`` and ``recipe`` for its `model_page`.

    Raises:
        InputError: if the folder is not a finished run.
    """
    folder = RunFolder(run)
    model, _ = load_classifier(folder.path)
    recipe = folder.recipe()
    data = recipe.data if recipe.data.startswith("hf:") else str(folder.read_json("split.json")["data"])
    settings = {name: getattr(recipe, name) for name in TRAINED_WITH}
    return model, {"metrics": folder.read_json("metrics.json"), "data": data, "recipe": settings}
