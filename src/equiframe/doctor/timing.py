"""How long a training would take: a few steps of it, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from equiframe.data.batches import Loader
from equiframe.data.prepare import PreparedData, settle_loading
from equiframe.data.sources import Dataset, ImageSet, with_pixels
from equiframe.method import build_loss
from equiframe.model import build_classifier
from equiframe.numerics import Numerics, choose_device, choose_numerics
from equiframe.optimise import build_optimizer
from equiframe.recipe import Recipe
from equiframe.tracking import make_loader
from equiframe.train import Trainer, settle

SMALL_BATCH = 16  # images of the first look at a step


def time_training(
    recipe: Recipe, dataset: Dataset, train: ImageSet, numbers: tuple[int, int, int], *, seconds: float = 3.0
) -> dict[str, object]:
    """Measure a few training steps of a recipe on its own images and say how long all of it would take.

    Args:
        train: readable training images, of which a few batches are taken.
        numbers: how many images train, validate and test.

    Returns:
        ``backbone``, ``dim``, ``parameters``, ``numerics``, ``batch`` (images of the measured steps), ``step_seconds`` (of a whole batch),
        ``images_per_second``, ``evaluated_per_second``, ``steps``, ``training_seconds``, ``evaluation_seconds``, ``total_seconds``, and ``idle_seconds``: the
        total if the processors did nothing else (by processor time; None on a GPU).
    """
    num_train, num_val, num_test = numbers
    size = recipe.image_size or replace(dataset, train=train).native_size()
    resident, augmentation = settle_loading(recipe, dataset, sum(numbers), size)
    batch = min(recipe.batch_size, num_train)
    few = train.subset(np.random.default_rng(0).permutation(len(train))[: 4 * batch])
    if resident:
        few = with_pixels(few, size, workers=recipe.workers)
    classes = dataset.num_classes
    prepared = PreparedData(
        dataset.name, dataset.class_names, few, None, few, "test", size, "resident" if resident else "stream", augmentation,
        [0.5] * 3, [0.25] * 3, {},
    )  # fmt: skip
    settled, card = settle(recipe, prepared)
    card = replace(card, train_counts=np.maximum(train.counts(classes), 1).tolist())
    device = choose_device(recipe.device)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(recipe.seed)
        model = build_classifier(card, seed=recipe.seed)

        def steps_of(images: int, numerics_of: Recipe) -> tuple[Callable[[], tuple[float, float]], Loader, Numerics]:
            """A function that takes a training step on so many images and tells its seconds, of the clock and of processors."""
            numerics = choose_numerics(
                model, size, images, device=str(device), precision=numerics_of.precision,
                memory_format=numerics_of.memory_format, compile="off",
            )  # fmt: skip
            model.to(numerics.device, memory_format=numerics.torch_memory_format)
            fields = settled.with_(batch_size=images)
            loader = make_loader(
                few, card, numerics, fields, augmentation=augmentation, mixup=fields.mixup, cutmix=fields.cutmix,
                remix=fields.remix, draft=fields.draft,
            )  # fmt: skip
            optimizer = build_optimizer(
                model.backbone, model.head, kind=fields.optimizer, lr=1e-9, momentum=fields.momentum,
                weight_decay=fields.weight_decay, layer_decay=fields.layer_decay,
            )  # fmt: skip
            criterion = build_loss(card.method_fields, card.train_counts).to(numerics.device)
            trainer = Trainer(fields, model, criterion, optimizer, loader, numerics)
            model.train()
            batches = (b for epoch in range(10**6) for b in trainer.world.steps(loader.parts(epoch)))

            def step() -> tuple[float, float]:
                started = time.perf_counter(), time.process_time()
                loss = trainer.train_step(next(batches), 1e-9)
                float(loss)  # waits for a GPU
                return time.perf_counter() - started[0], time.process_time() - started[1]

            return step, loader, numerics

        plain = recipe.with_(
            precision="float32" if recipe.precision == "auto" else recipe.precision,
            memory_format="contiguous" if recipe.memory_format == "auto" else recipe.memory_format,
        )
        small = min(SMALL_BATCH, batch, len(few))
        look, loader, numerics = steps_of(small, plain)
        guess = min(look()[0], look()[0]) * batch / small
        if guess < seconds / 3:  # whole batches fit in the time, and a trial of what is left to the machine
            small = min(batch, len(few))
            look, loader, numerics = steps_of(small, recipe)
            look()
        times, until = [], time.perf_counter() + seconds
        while len(times) < 3 or (time.perf_counter() < until and len(times) < 50):
            times.append(look())
        step_seconds, busy_seconds = (statistics.median(t) * batch / small for t in zip(*times, strict=True))
        forward = _evaluation_seconds(model, loader, numerics, small)
    finally:
        torch.set_rng_state(state)
    steps = recipe.epochs * max(1, num_train // batch)
    evaluated = recipe.epochs * num_val + 2 * num_train + num_val + num_test  # as train and measure do
    idle = None
    if device.type == "cpu":  # evaluation is as much slower than on an idle machine as training is
        share = min(1.0, busy_seconds / torch.get_num_threads() / step_seconds)
        idle = share * (steps * step_seconds + evaluated * forward)
    return {
        "backbone": settled.backbone, "dim": model.head.dim, "parameters": sum(p.numel() for p in model.parameters()),
        "image_size": size, "numerics": str(numerics), "batch": small, "step_seconds": step_seconds,
        "images_per_second": batch / step_seconds, "evaluated_per_second": 1 / forward, "steps": steps, "epochs": recipe.epochs,
        "training_seconds": steps * step_seconds, "evaluation_seconds": evaluated * forward,
        "total_seconds": steps * step_seconds + evaluated * forward,
        "idle_seconds": idle,
    }  # fmt: skip


@torch.no_grad()
def _evaluation_seconds(model, loader, numerics, batch: int) -> float:
    """Seconds an image of a pass without gradients."""
    model.eval()
    times = []
    for images, _ in islice(loader.ordered(batch), 3):
        started = time.perf_counter()
        with numerics.autocast():
            features = model.backbone(images)
        float(model.head(features).logits.sum())
        times.append((time.perf_counter() - started) / len(images))
    return min(times)


def made_up_data(num_classes: int = 10, side: int = 32) -> Dataset:
    """Random pixels, to measure a machine without data."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (256, 3, side, side), dtype=np.uint8))
    images = ImageSet(np.arange(256) % num_classes, [str(i) for i in range(256)], pixels)
    return Dataset("random pixels", [str(k) for k in range(num_classes)], images, None, images)
