"""Know the machine and the data before training: what is installed, how fast it is, what the classes are like, what is wrong with
the images, how long the training would take, and which method the evidence of this project recommends, if it does.

Everything is looked at or measured; nothing is changed and nothing written.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from equiframe.backbones import check_backbone
from equiframe.data.batches import Loader
from equiframe.data.images import decode_image, decoding_threads, image_header
from equiframe.data.prepare import PreparedData, choose_indices, settle_loading
from equiframe.data.sources import Dataset, ImageSet, load_dataset, with_pixels
from equiframe.errors import InputError
from equiframe.imbalance import class_groups
from equiframe.method import METHOD_FIELDS, build_loss, resolve_method
from equiframe.model import build_classifier
from equiframe.numerics import Numerics, choose_device, choose_numerics, fast_bfloat16
from equiframe.optimise import build_optimizer
from equiframe.recipe import Recipe
from equiframe.runs import environment
from equiframe.tracking import make_loader
from equiframe.train import Trainer, settle
from equiframe.words import counted

Say = Callable[[str], None]

EXTRAS = {  # distribution → the extra that brings it
    "torchvision": "train", "timm": "train", "pillow": "train", "pyarrow": "train", "pyyaml": "train", "rich": "train",
    "scikit-learn": "train", "scipy": "train", "matplotlib": "train", "jinja2": "train", "tensorboard": "tensorboard",
    "datasets": "hub", "huggingface_hub": "hub", "onnx": "export", "onnxscript": "export", "onnxruntime": "export",
}  # fmt: skip
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
LITTLE_DISK = 2 << 30
SMALL_BATCH = 16  # images of the first look at a step


# --- the machine ------------------------------------------------------------------------------------------------------


def describe_machine(device: str = "auto", folder: str | Path = ".") -> dict[str, object]:
    """Versions, processor, memory, GPU, threads, disk, and which optional packages are missing (package → extra)."""
    where = choose_device(device)
    versions, missing = {}, {}
    for name, extra in EXTRAS.items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing[name] = extra
    gpu = None
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    known = environment(where)
    return {
        **{key: known[key] for key in ("equiframe", "python", "torch", "numpy", "platform", "cpu", "cpu_capability", "cores", "threads")},
        "cpu_flags": _cpu_flags(),
        "bfloat16_instructions": fast_bfloat16(where),
        "memory_bytes": _memory(),
        "load": load,
        "device": str(where),
        "gpu": gpu,
        "disk_free_bytes": shutil.disk_usage(folder).free,
        "disk_of": str(Path(folder).resolve()),
        "packages": versions,
        "missing": missing,
    }  # fmt: skip


def _cpu_flags() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                there = set(line.partition(":")[2].split())
                return [flag for flag in CPU_FLAGS if flag in there]
    return []


def _memory() -> int | None:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def matrix_speed(device: torch.device, dtype: torch.dtype = torch.float32, *, seconds: float = 0.3) -> float:
    """Operations a second of a product of two square matrices (2·n³ each), the best of as many as fit in ``seconds``."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    b, best, until = a.T.contiguous(), float("inf"), time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, rounds = min(best, time.perf_counter() - started), rounds + 1
    return 2 * n**3 / best


# --- the images -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looked:
    """What one look at each of a set's images found. Of a larger set an evenly spaced part was looked at.

    Attributes:
        positions: of the images that were looked at.
        digests: SHA-256 of the file, or of the pixels; None where it could not be read.
        sizes, modes: (width, height), and kind as ``RGB JPEG``, of the readable ones.
        bad: position → why it cannot be read.
    """

    positions: np.ndarray
    digests: list[bytes | None]
    sizes: list[tuple[int, int]]
    modes: list[str]
    bad: dict[int, str]
    seconds: float


def look_at(images: ImageSet, *, at_most: int, workers: int | None = None) -> Looked:
    """Read, hash and decode each image once."""
    positions = np.arange(len(images))
    if at_most and len(images) > at_most:
        positions = np.unique(np.linspace(0, len(images) - 1, at_most).round().astype(int))

    def look(i: int) -> tuple[bytes | None, tuple[int, int] | None, str | None, str | None]:
        if images.pixels is not None:
            array = images.pixels[i].numpy()
            return hashlib.sha256(array.tobytes()).digest(), (array.shape[2], array.shape[1]), "RGB pixels", None
        source, name, digest = images.sources[i], images.names[i], None
        try:
            try:
                content = source if isinstance(source, bytes) else Path(source).read_bytes()
            except OSError as error:
                raise InputError(f"image cannot be read: {name}: {error.strerror}") from error
            digest = hashlib.sha256(content).digest()
            header = image_header(content, name=name)
            decode_image(content, name=name)
        except InputError as error:
            return digest, None, None, " ".join(str(error).split())
        return digest, *header, None

    started = time.perf_counter()
    with ThreadPoolExecutor(decoding_threads(workers)) as pool:
        found = list(pool.map(look, positions.tolist()))
    return Looked(
        positions, [f[0] for f in found], [f[1] for f in found if f[1]], [f[2] for f in found if f[2]],
        {int(i): f[3] for i, f in zip(positions, found, strict=True) if f[3]}, time.perf_counter() - started,
    )  # fmt: skip


def find_duplicates(*parts: tuple[ImageSet, Looked]) -> dict[str, list[tuple[str, str]]]:
    """Pairs of names of images that are equal to the byte, the first and each later one: of one class (``same_class``) and of two
    (``two_classes``: one of the labels is wrong). Training and validation images together."""
    first: dict[bytes, tuple[str, int]] = {}
    pairs: dict[str, list[tuple[str, str]]] = {"same_class": [], "two_classes": []}
    for images, looked in parts:
        for i, digest in zip(looked.positions.tolist(), looked.digests, strict=True):
            this = images.names[i], int(images.labels[i])
            name, label = first.setdefault(digest, this) if digest else this
            if (name, label) != this:
                pairs["same_class" if label == this[1] else "two_classes"].append((name, this[0]))
    return pairs


def find_shared(one: ImageSet, looked_one: Looked, two: ImageSet, looked_two: Looked) -> list[tuple[str, str]]:
    """Pairs of names of images of two sets that are equal to the byte."""
    known = {d: one.names[i] for i, d in zip(looked_one.positions.tolist(), looked_one.digests, strict=True) if d}
    pairs = zip(looked_two.positions.tolist(), looked_two.digests, strict=True)
    return [(known[d], two.names[i]) for i, d in pairs if d in known]


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, object]:
    """Smallest, median and largest of width and height, and how many differ in shape from a square by more than 2:1."""
    array = np.array(sizes).reshape(-1, 2)
    if not len(array):
        return {}
    return {
        name: {"least": int(v.min()), "median": int(np.median(v)), "most": int(v.max())}
        for name, v in (("width", array[:, 0]), ("height", array[:, 1]))
    } | {"alike": bool((array == array[0]).all()), "long": int((array.max(1) > 2 * array.min(1)).sum())}


# --- how long it would take -------------------------------------------------------------------------------------------


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


# --- what to do -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """A table of docs/results.md that compares methods: its macro accuracies in percent."""

    data: str
    classes: int
    dim: int
    ratio: float
    seeds: int
    macro: dict[str, float]


_C16 = {"etf-sqrt-blend": 65.3, "crt-adjusted": 60.0, "ce": 46.9}
_DIGITS = {
    "etf-sqrt-blend": 91.3,
    "etf-crt": 91.0,
    "etf-la": 90.9,
    "crt-adjusted": 87.4,
    "balanced-softmax": 86.6,
    "ce": 75.9,
}
_TINY = {"etf-crt": 21.7, "etf-sqrt-blend": 21.4, "crt-adjusted": 20.5, "ce": 14.3}
EVIDENCE = (  # tests hold these against docs/results.md
    Evidence("CIFAR-10 at 16×16, ratio 100", 10, 64, 100, 3, _C16),
    Evidence("Handwritten digits, ratio 50", 10, 64, 50, 8, _DIGITS),
    Evidence("100 classes, ratio 100", 100, 64, 100, 3, _TINY),
)
MOST_DECIDED = 10  # classes: what was measured on more than one data set
BALANCED = 2.0  # ratio: below, nothing was measured
SOURCE = "docs/results.md"


def advise(counts: Sequence[int], dim: int, data: str = "DATA") -> dict[str, object]:
    """Which method the evidence of `SOURCE` recommends for these class counts and D features.

    Returns:
        ``method``; ``decided``: whether the evidence decides; ``why``; ``evidence``: the tables it rests on; ``source``; ``commands``.
    """
    num_classes, ratio = len(counts), max(counts) / max(min(counts), 1)
    close = [e for e in EVIDENCE if (e.classes <= MOST_DECIDED) == (num_classes <= MOST_DECIDED)]
    if ratio < BALANCED:
        method, decided, close = "ce", False, []
        why = (
            f"The classes are nearly balanced (ratio {ratio:.3g}); nothing here was measured on such data, so the evidence does not decide. "
            "Plain cross-entropy is the usual start; compare before you trust either."
        )
    elif num_classes <= MOST_DECIDED:
        method, decided = "etf-sqrt-blend", True
        why = (
            "For 10 classes a fixed frame with logit adjustment and small classes drawn more often (etf-sqrt-blend) was level with or ahead of "
            "everything else, and far ahead of plain cross-entropy (two data sets; small networks, short schedules). Much of that is the sampling: "
            "whether the same on a learnable classifier (sqrt-blend) does as well is not decided."
        )
    else:
        method, decided = "etf-crt", False
        fits = "they fit in a simplex" if num_classes <= dim + 1 else f"more than a simplex holds (K > D+1 = {dim + 1})"
        why = (
            f"{num_classes:,} classes, {dim} features: {fits}. With more than 10 classes there is one data set, so the evidence does not decide. "
            "There a linear classifier fitted anew to the features was ahead of all that was trained in one stage, and best on the features of a "
            "fixed frame (etf-crt): compare it with crt-adjusted, the same on a learnable classifier's features, and with etf-sqrt-blend."
        )
    others = "ce,crt-adjusted,balanced-softmax,sqrt-blend,etf-crt,etf-sqrt-la,etf-sqrt-blend"
    commands = [f"equiframe train {data} --method {method}"] if decided else []
    commands.append(f"equiframe compare {data} --methods {others} --seeds 0,1,2")
    return {
        "method": method, "decided": decided, "why": why, "evidence": [asdict(e) for e in close], "source": SOURCE,
        "commands": commands,
    }  # fmt: skip


def find_problems(facts: dict[str, object]) -> list[dict[str, str]]:
    """What the facts about data mean for a training: records of ``level`` (``error``: it would stop; ``warning``: results would mislead or
    suffer; ``note``) and ``text``, the worst first."""
    found: list[tuple[str, str]] = []

    def some(pairs: Sequence) -> str:
        return f"such as {pairs[0][1]} and {pairs[0][0]}"

    looked = facts["looked_at"]
    for split, reasons in facts["unreadable"].items():
        found.append(("error", f"{len(reasons):,} of {looked[split]:,} {split} images cannot be read: {reasons[0]}. "
                      "--on-bad-image skip leaves them out"))  # fmt: skip
    duplicates = facts["duplicates"]
    if pairs := duplicates["two_classes"]:
        found.append(
            (
                "warning",
                f"{counted(len(pairs), 'training image is', 'training images are')} there twice, under two classes, {some(pairs)}: one label is wrong",
            )
        )
    if pairs := duplicates["train_and_test"]:
        found.append(
            (
                "warning",
                f"{counted(len(pairs), 'test image is a training image', 'test images are training images')} to the byte, {some(pairs)}: the test would flatter",
            )
        )
    if pairs := duplicates["same_class"]:
        found.append(
            (
                "note",
                f"{counted(len(pairs), 'training image is', 'training images are')} there twice in their class, {some(pairs)}",
            )
        )
    counts, tested = facts["counts"], facts["test_counts"]
    names = facts["class_names"]
    if empty := [n for n, c in zip(names, counts, strict=True) if not c]:
        found.append(
            ("error", f"{counted(len(empty), 'class has', 'classes have')} no training image: {', '.join(empty[:3])}")
        )
    if single := [n for n, c in zip(names, counts, strict=True) if c == 1]:
        found.append(
            (
                "warning",
                f"{counted(len(single), 'class has', 'classes have')} a single training image, and none for validation: {', '.join(single[:3])}",
            )
        )
    few = sum(1 < c < 20 for c in counts)
    if few:
        found.append(
            (
                "note",
                f"{few:,} of {len(counts):,} classes have 2 to 19 training images: their accuracy will vary most between seeds",
            )
        )
    if tested is None:
        found.append(("note", "there are no test images: the final metrics would be those of the validation images"))
    else:
        if untested := [n for n, c in zip(names, tested, strict=True) if not c]:
            found.append(
                (
                    "warning",
                    f"{counted(len(untested), 'class has no test image and would', 'classes have no test image and would')} not count: {', '.join(untested[:3])}",
                )
            )
        thin = sum(0 < c < 20 for c in tested)
        if thin:
            found.append(
                (
                    "note",
                    f"{counted(thin, 'class has', 'classes have')} fewer than 20 test images: an accuracy there moves in steps of 5 points or more",
                )
            )
    if facts["problem"]:
        found.append(("error", facts["problem"]))
    if facts["sizes"].get("long"):
        found.append(
            (
                "note",
                f"{facts['sizes']['long']:,} images are longer than 2:1; the centre square is what is seen of them",
            )
        )
    if any(mode.split()[0] not in ("RGB", "L") for mode in facts["modes"]):
        found.append(("note", "palette, alpha, CMYK or 16-bit images are turned to RGB (transparency shows white)"))
    part = {split: n for split, n in looked.items() if n < facts["numbers"][split]}
    if part:
        told = ", ".join(f"{n:,} of {facts['numbers'][split]:,} {split} images" for split, n in part.items())
        found.append(("note", f"looked at {told}; duplicates with the others were not looked for (--images 0: all)"))
    order = ("error", "warning", "note")
    return [{"level": level, "text": text} for level, text in sorted(found, key=lambda f: order.index(f[0]))]


# --- all of it --------------------------------------------------------------------------------------------------------


def describe_data(
    recipe: Recipe, dataset: Dataset, *, images: int
) -> tuple[dict[str, object], ImageSet, tuple[int, int, int]]:
    """Facts about a data set as a recipe would use it, its readable training images, and how many images train, validate and test.

    Args:
        images: how many of each split are decoded, evenly spaced; 0: all.
    """
    problem = None
    try:
        train_at, val_at = choose_indices(recipe, dataset, [])
    except InputError as error:
        problem, train_at, val_at = str(error), np.arange(len(dataset.train)), None
    train = dataset.train.subset(train_at)
    val = dataset.val if val_at is None else dataset.train.subset(val_at) if len(val_at) else None
    parts = {
        name: part
        for name, part in (("training", train), ("validation", val), ("test", dataset.test))
        if part is not None
    }
    looks = {name: look_at(part, at_most=images, workers=recipe.workers) for name, part in parts.items()}
    known = [(parts[name], looks[name]) for name in ("training", "validation") if name in parts]
    duplicates: dict[str, list] = find_duplicates(*known) | {"train_and_test": []}
    if dataset.test is not None:
        duplicates["train_and_test"] = find_shared(train, looks["training"], dataset.test, looks["test"])
    counts = train.counts(dataset.num_classes)
    groups = class_groups(counts)
    decoded = sum(len(look.positions) for look in looks.values())
    facts: dict[str, object] = {
        "name": dataset.name,
        "classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "counts": counts.tolist(),
        "validation_counts": None if val is None else val.counts(dataset.num_classes).tolist(),
        "test_counts": None if dataset.test is None else dataset.test.counts(dataset.num_classes).tolist(),
        "numbers": {name: len(part) for name, part in parts.items()},
        "ratio": float(counts.max() / max(counts.min(), 1)),
        "groups": {name: int(groups[name].sum()) for name in ("many", "medium", "few")},
        "looked_at": {name: len(look.positions) for name, look in looks.items()},
        "decoded_per_second": decoded / max(sum(look.seconds for look in looks.values()), 1e-9),
        "unreadable": {name: list(look.bad.values()) for name, look in looks.items() if look.bad},
        "duplicates": duplicates,
        "sizes": describe_sizes(looks["training"].sizes),
        "modes": dict(Counter(looks["training"].modes).most_common()),
        "notes": list(dataset.notes),
        "problem": problem,
    }
    readable = [i for i in looks["training"].positions.tolist() if i not in looks["training"].bad]
    numbers = (len(train), 0 if val is None else len(val), 0 if dataset.test is None else len(dataset.test))
    return facts, train.subset(np.array(readable, dtype=np.int64)), numbers


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
    report["advice"] = advise(facts["counts"], dim, recipe.data)
    return report
