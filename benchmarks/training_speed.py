"""Images per second of our training pipeline against the usual one, interleaved in one run.

Both train the same ResNet-32 with linear head and cross-entropy, batch 128, the same SGD, on the same long-tailed CIFAR-10.

* usual: torchvision transforms (RandomCrop, RandomHorizontalFlip, ToTensor, Normalize) on PIL images, DataLoader with 2
  workers, float32, default memory format.
* ours: `equiframe.loop.Trainer` over resident pixels, precision and memory format by the measured trial of
  ``--precision auto``; ``--compile`` adds torch.compile (auto: if a trial finds it faster).

Run: python benchmarks/training_speed.py --data ../shared/data/cifar10
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional as F

from equiframe.data.prepare import prepare_data
from equiframe.losses import CrossEntropy
from equiframe.model import build_classifier
from equiframe.numerics import choose_numerics, keep_memory
from equiframe.recipe import Recipe
from equiframe.runs import environment
from equiframe.tracking import make_loader
from equiframe.train import Trainer, settle


class PilImages(torch.utils.data.Dataset):
    """Decoded images as arrays, turned to PIL and transformed one by one: torchvision's CIFAR10 class does just this."""

    def __init__(self, pixels, labels, transform) -> None:
        self.data = pixels.permute(0, 2, 3, 1).numpy()
        self.labels, self.transform = labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.data[i])), int(self.labels[i])


def usual_steps(data, card, recipe):
    """A generator that trains one step of the usual pipeline at each next()."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    torch.manual_seed(0)
    model = build_classifier(card).to(recipe.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    loader = torch.utils.data.DataLoader(
        PilImages(data.train.pixels, data.train.labels, transform), batch_size=recipe.batch_size, shuffle=True,
        num_workers=2, drop_last=True, persistent_workers=True, pin_memory=recipe.device != "cpu",
    )  # fmt: skip
    model.train()
    while True:
        for images, targets in loader:
            images, targets = images.to(recipe.device, non_blocking=True), targets.to(recipe.device, non_blocking=True)
            loss = F.cross_entropy(model(images).logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # the usual running average
            yield


def ours_steps(data, card, recipe, numerics):
    """A generator that trains one step of our pipeline at each next()."""
    torch.manual_seed(0)
    model = build_classifier(card).to(numerics.device, memory_format=numerics.torch_memory_format)
    loader = make_loader(data.train, card, numerics, recipe, augmentation="crop-flip", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, foreach=True)
    trainer = Trainer(recipe, model, CrossEntropy().to(numerics.device), optimizer, loader, numerics)
    model.train()
    epoch = 0
    while True:
        for parts in loader.parts(epoch):
            float(trainer.train_step(parts, 0.1))
            yield
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--backbone", default="resnet32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="steps of each pipeline in a round")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--compile", nargs="?", choices=("auto", "on", "off"), const="on", default="off")
    parser.add_argument("--keep-memory", action=argparse.BooleanOptionalAction, default=True,
                        help="as `equiframe train` does; the usual pipeline, in the same process, gains by it too")  # fmt: skip
    parser.add_argument("--out", default="benchmarks/results/training_speed.json")
    arguments = parser.parse_args()

    recipe = Recipe(data=arguments.data, imbalance=100, validation=0.0, method="ce", backbone=arguments.backbone,
                    mixup=0.0, compile=arguments.compile, device=arguments.device)  # fmt: skip
    data = prepare_data(recipe)
    recipe, card = settle(recipe, data)
    if arguments.keep_memory:
        keep_memory()
    numerics = choose_numerics(build_classifier(card), 32, recipe.batch_size, device=recipe.device,
                               precision=arguments.precision, memory_format="auto", compile=recipe.compile,
                               steps=1_000_000)  # fmt: skip
    recipe = recipe.with_(device=str(numerics.device))
    print("numerics:", numerics.precision, numerics.memory_format, numerics.trial, flush=True)
    pipelines = {"usual": usual_steps(data, card, recipe), "ours": ours_steps(data, card, recipe, numerics)}
    synchronise = torch.cuda.synchronize if numerics.device.type == "cuda" else lambda: None
    for steps in pipelines.values():  # warm up: workers start, kernels are chosen, the compiler runs
        for _ in range(3):
            next(steps)
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(arguments.rounds):
        for name, steps in list(pipelines.items())[:: 1 if number % 2 else -1]:
            if name == "ours":
                time.sleep(0.5)  # the other's workers fill their queue and rest, so that they take nothing from us
            synchronise()
            started = time.perf_counter()
            for _ in range(arguments.steps):
                next(steps)
            synchronise()
            speeds[name].append(recipe.batch_size * arguments.steps / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["usual"], strict=True)]
    result = {
        "what": __doc__.splitlines()[0],
        "date": date.today().isoformat(),
        "environment": environment(numerics.device),
        "backbone": arguments.backbone,
        "batch_size": recipe.batch_size,
        "numerics": {"precision": numerics.precision, "memory_format": numerics.memory_format, "compile": numerics.compile, "keep_memory": arguments.keep_memory,
                     "trial_images_per_second": numerics.trial},
        "images_per_second": {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in speeds.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "n": len(ratios)},
    }  # fmt: skip
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    for name, v in speeds.items():
        print(f"{name}: median {statistics.median(v):.1f} images/s")
    print(
        f"ours/usual: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}, n={len(ratios)}"
    )


if __name__ == "__main__":
    main()
