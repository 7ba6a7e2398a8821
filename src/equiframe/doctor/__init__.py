"""Know the machine and the data before training: what is installed, how fast it is, what the classes are like, what is wrong with
the images, how long the training would take, and which method the evidence of this project recommends, if it does.

Everything is looked at or measured; nothing is changed and nothing written.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from equiframe.backbones import check_backbone
from equiframe.data.sources import load_dataset
from equiframe.doctor.advice import advise, find_problems
from equiframe.doctor.images import describe_data
from equiframe.doctor.machine import describe_machine, matrix_speed
from equiframe.doctor.timing import made_up_data, time_training
from equiframe.method import METHOD_FIELDS, resolve_method
from equiframe.numerics import choose_device
from equiframe.recipe import DATA_FIELDS, Recipe

Say = Callable[[str], None]


def data_on_the_command_line(recipe: Recipe) -> str:
    """The data of a recipe as `equiframe train` and its like take it: ``digits --imbalance 50``."""
    usual = Recipe()
    words = [str(recipe.data)]
    for name in DATA_FIELDS:
        value = getattr(recipe, name)
        if name == "data" or value == getattr(usual, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            parts = value if isinstance(value, (list, tuple)) else [value]
            text = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def diagnose(
    recipe: Recipe,
    *,
    images: int = 20_000,
    seconds: float = 3.0,
    folder: str | Path = ".",
    say: Say = lambda text: None,
) -> dict[str, object]:
    """All that `equiframe doctor` tells: ``machine``, and with data ``data``, ``problems``, ``training`` and ``advice``.

    Args:
        recipe: the training that is thought of; without ``data`` a training on random pixels of 32×32 measures the machine.
        images: how many of each split are decoded, evenly spaced; 0: all.
        seconds: about how long training steps are measured.
        folder: where runs would be saved.

    Raises:
        InputError: if there is no such data, or the recipe makes no sense.
    """
    check_backbone(recipe.backbone)
    resolve_method(recipe.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
    say("looking at the machine")
    device = choose_device(recipe.device)
    machine = describe_machine(recipe.device, folder)
    machine["float32_operations_per_second"] = matrix_speed(device)
    if machine["bfloat16_instructions"]:
        machine["bfloat16_operations_per_second"] = matrix_speed(device, torch.bfloat16)
    report: dict[str, object] = {"machine": machine}
    if not recipe.data:
        dataset = made_up_data()
        say("timing a few training steps on random pixels")
        numbers = (len(dataset.train), 0, 0)
        report["training"] = time_training(
            recipe.with_(data="random"), dataset, dataset.train, numbers, seconds=seconds
        )
        return report
    dataset = load_dataset(recipe.data, data_root=recipe.data_root, download=recipe.download)
    say(f"looking at the images of {dataset.name}")
    facts, readable, numbers = describe_data(recipe, dataset, images=images)
    report |= {"data": facts, "problems": find_problems(facts), "training": None}
    if len(readable) >= 2 and facts["problem"] is None:
        say("timing a few training steps")
        report["training"] = time_training(recipe, dataset, readable, numbers, seconds=seconds)
        report["training"]["decoding_seconds"] = sum(numbers) / facts["decoded_per_second"]
    dim = report["training"]["dim"] if report["training"] else 64
    report["advice"] = advise(facts["counts"], dim, data_on_the_command_line(recipe))
    return report
