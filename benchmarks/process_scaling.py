"""One process against two, one thread each; and what more would cost, by calculation.

    python benchmarks/process_scaling.py

Two processes (gloo, one thread each) take turns: one alone, both together, both apart. Counted is the clock over a few training steps
of `equiframe.loop.Trainer` (float32, etf-la, mixup, crops of resident pixels), interleaved, as many rounds as the seconds for a model allow. On a machine that others
use, the best of the rounds tells most: ratios are of each way's best round, and beside them the median and range of the ratios within a round. Processor
seconds (of the process that took more) do not see waiting, but other programs disturb them least.

* one: one process, B images a step; the other waits.
* apart: each trains its own model, B images a step, and says nothing: what two processes can do at most on this machine.
* weak: together, 2·B images a step. Efficiency: images a second over twice those of one.
* weak, own BatchNorm: the same without synchronised BatchNorm.
* strong: together, B images a step. Speed-up: images a second over those of one.

The calculation: a ring all-reduce of G bytes over N processes sends and receives 2·(N − 1)/N·G bytes in each. G: four bytes a parameter of the
backbone, and of a linear head K·(D + 1) more. Step of a GPU: counted operations (backward as twice the forward pass) over peak · share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from equiframe.backbones import make_backbone
from equiframe.data.sources import ImageSet
from equiframe.loop import Trainer
from equiframe.method import METHOD_FIELDS, build_loss, resolve_method
from equiframe.model import ModelCard, build_classifier
from equiframe.numerics import Numerics, keep_memory
from equiframe.optimise import build_optimizer
from equiframe.parallel import ALONE, World
from equiframe.recipe import Recipe
from equiframe.runs import environment
from equiframe.tracking import make_loader

MODELS = {"resnet20": (32, 64), "resnet32": (32, 64), "timm:vit_tiny_patch16_224": (64, 32)}  # side, images a process
WAYS = ("one", "apart", "weak", "weak, own BatchNorm", "strong")
CLASSES = 10
LARGE = {"timm:resnet50": 128, "timm:vit_base_patch16_224": 128, "timm:vit_large_patch16_224": 64}  # images a GPU
PEAK, SHARE = (
    312e12,
    0.4,
)  # bfloat16 operations a second of an A100 as its maker states them; the share of them that training gets
LINKS = {
    "10 Gbit/s": 1.25e9,
    "100 Gbit/s": 12.5e9,
    "400 Gbit/s": 50e9,
    "NVLink 3, 300 GB/s a direction": 300e9,
}  # bytes/s


def trainer_of(backbone: str, side: int, batch: int, world: World, sync: bool) -> tuple[Trainer, object]:
    """A trainer on random images, and an endless iterator over its steps."""
    recipe = Recipe(data="random", backbone=backbone, batch_size=batch, epochs=1000, device="cpu")
    fields = resolve_method("etf-la", {name: getattr(recipe, name) for name in METHOD_FIELDS})
    labels = np.arange(8 * batch) % CLASSES
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3, side, side), dtype=np.uint8)
    images = ImageSet(labels, [str(i) for i in range(len(labels))], torch.from_numpy(pixels))
    card = ModelCard(
        backbone, None, side, [str(k) for k in range(CLASSES)], np.bincount(labels).tolist(), [0.5] * 3, [0.25] * 3, "etf-la", fields
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_classifier(card)
    if sync:
        world.synchronise_batch_norm(model)
    numerics = Numerics(torch.device("cpu"), "float32", "contiguous", {}, world=world)
    loader = make_loader(images, card, numerics, recipe, augmentation="crop-flip", mixup=1.0)
    optimizer = build_optimizer(model.backbone, model.head, lr=0.01)
    trainer = Trainer(recipe, model, build_loss(fields, card.train_counts), optimizer, loader, numerics)
    model.train()
    return trainer, (parts for epoch in range(10**6) for parts in loader.parts(epoch))


def measure(rank: int, seconds: float, steps: int, say) -> dict[str, object]:
    both, results = World(rank, 2), {}
    for name, (side, batch) in MODELS.items():
        makers = {
            "one": (batch, ALONE, True), "apart": (batch, ALONE, True), "weak": (2 * batch, both, True),
            "weak, own BatchNorm": (2 * batch, both, False), "strong": (batch, both, True),
        }  # fmt: skip
        trainers = {way: trainer_of(name, side, *maker) for way, maker in makers.items() if way != "apart"}
        trainers["apart"] = trainers["one"]
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        busy: dict[str, list[float]] = {way: [] for way in WAYS}
        until, turn = time.monotonic() + seconds, 0
        while turn < 4 or not both.any(time.monotonic() > until):
            for way in WAYS:
                trainer, parts = trainers[way]
                dist.barrier()
                started, cpu = time.perf_counter(), time.process_time()
                if rank == 0 or way != "one":
                    for _ in range(steps):
                        trainer.train_step(next(parts), 0.01)
                own = time.perf_counter() - started, time.process_time() - cpu
                took, worked = (max(of_each) for of_each in zip(*both.gather(own), strict=True))
                images = steps * makers[way][0] * (2 if way == "apart" else 1)
                if turn:  # the first round warms up
                    rates[way].append(images / took)
                    busy[way].append(worked / steps)
            turn += 1
        one = rates["one"]
        share = {way: 1 if way == "strong" else 2 for way in WAYS[1:]}
        ratio = {
            way: {
                "best": round(max(rates[way]) / max(one) / of, 3),
                **spread([r / o / of for r, o in zip(rates[way], one, strict=True)], 3),
            }
            for way, of in share.items()
        }
        parameters = sum(p.numel() for p in trainers["one"][0].model.parameters() if p.requires_grad)
        gradients = torch.zeros(parameters)
        exchange = []
        for _ in range(10):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(gradients)
            exchange.append(time.perf_counter() - started)
        results[name] = {
            "side": side,
            "images_a_process": batch,
            "parameters": parameters,
            "gradient_megabytes": round(4e-6 * parameters, 3),
            "all_reduce_seconds": spread(exchange, 5),
            "images_per_second": {way: spread(values, 1) for way, values in rates.items()},
            "processor_seconds_a_step": {way: spread(values, 3) for way, values in busy.items()},
            "rounds": len(one),
            "efficiency (strong: speed-up)": ratio,
        }
        say(f"{name}: {json.dumps(results[name])}")
    return results


def spread(values: list[float], digits: int) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def in_two_processes(seconds: float, steps: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        rank = 0 if child else 1
        torch.set_num_threads(1)
        keep_memory()
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        results = measure(
            rank, seconds, steps, (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
        )
        dist.barrier()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        dist.destroy_process_group()
    return results


def calculate() -> dict[str, object]:
    """Seconds of a step and of its exchange, by formula."""

    def exchange(gradient_bytes: float, processes: int, link: float) -> float:
        return 2 * (processes - 1) / processes * gradient_bytes / link

    backbones = {}
    for name, batch in LARGE.items():
        with torch.device("meta"):
            model = make_backbone(name, image_size=224)
            counter = FlopCounterMode(display=False)
            with counter:
                model(torch.zeros(1, 3, 224, 224))
        parameters = sum(p.numel() for p in model.parameters())
        step = 3 * batch * counter.get_total_flops() / (PEAK * SHARE)
        row = {"parameters": parameters, "features": model.num_features, "images_a_gpu": batch, "step_seconds": step}
        for link, speed in LINKS.items():
            for processes in (2, 8, 64):
                seconds = exchange(4 * parameters, processes, speed)
                row[f"{link}, {processes} processes"] = {
                    "exchange_seconds": seconds,
                    "efficiency_without_overlap": step / (step + seconds),
                    "efficiency_with_overlap": step / max(step, step / 3 + seconds),  # beside the backward pass
                }
        adam = {
            n: {"shared_gigabytes": 16e-9 * parameters, "sharded_gigabytes": 16e-9 * parameters / n} for n in (8, 64)
        }
        backbones[name] = row | {"weights, gradients and AdamW's averages": adam}
    heads = {
        f"K = {classes:,}, D = {dim:,}": {
            "gradient_bytes": 4 * classes * (dim + 1),
            "frame_bytes": 0,
            **{link: exchange(4 * classes * (dim + 1), 8, speed) for link, speed in LINKS.items()},
        }
        for dim in (768, 2048)
        for classes in (10_000, 100_000, 1_000_000)
    }
    return {"peak": PEAK, "share": SHARE, "backbones": backbones, "heads, 8 processes, seconds": heads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=75, help="for each model")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "process_scaling.json")
    arguments = parser.parse_args()
    measured = in_two_processes(arguments.seconds, arguments.steps)
    machine = environment(torch.device("cpu"))
    machine = {name: machine[name] for name in ("torch", "python", "cpu", "cpu_capability", "cores")}
    command = f"python benchmarks/process_scaling.py --seconds {arguments.seconds:g} --steps {arguments.steps}"
    record = {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        **machine,
        "steps": arguments.steps,
        "load_before": [round(x, 2) for x in LOAD],
        "measured": measured,
        "calculated": calculate(),
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


LOAD = os.getloadavg()

if __name__ == "__main__":
    main()
