"""The tables: published numbers known to us, each with where it was read. What is not here is unknown.

Reading order of a cell's values: the paper's own or as quoted, then independent reruns. Recipe fields are those of the
authors' released configurations unless the table says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from equiframe.errors import unknown
from equiframe.papers.grid import Claim, Column, DataSet, Published, Row, Table

_TORCHVISION = "torchvision's, under --data-root or with --download"
_PUBLISHED = "as published, under --data-root (docs/datasets.md)"
DATA_SETS: Mapping[str, DataSet] = {
    "cifar10": DataSet("CIFAR-10", 10, 50_000, _TORCHVISION),
    "cifar100": DataSet("CIFAR-100", 100, 50_000, _TORCHVISION),
    "svhn-extra": DataSet("SVHN (train + extra)", 10, 604_388, _TORCHVISION),
    "stl10": DataSet("STL-10", 10, 5_000, _TORCHVISION),
    "cub200": DataSet("CUB-200-2011", 200, 5_994, _PUBLISHED),
    "imagenet-lt": DataSet("ImageNet-LT", 1_000, 115_846, _PUBLISHED),
}

_YANG = "Yang et al., Inducing Neural Collapse in Imbalanced Learning, NeurIPS 2022"
# SGD, momentum 0.9, warm-up of 5 epochs, x0.1 after epoch 160 and x0.01 after 180; every image trains, none is held out
_CIFAR_RECIPE: Mapping[str, object] = {
    "epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4, "schedule": "steps",
    "warmup": 0.025, "mixup": 1.0, "validation": 0.0, "subset_seed": 0, "tail": "exponential",
}  # fmt: skip

_CE = Row("ce", "ce", "learnable linear classifier, cross-entropy", "Learnable + CE")
_FROZEN = Row(
    "frozen-random", "frozen-random", "linear classifier frozen at random: what the authors' ResNet code trains as its "
    "learnable baseline",
)  # fmt: skip
_ETF_CE = Row("etf-ce", "etf-ce", "fixed frame, cross-entropy, free feature length", "ETF + CE")
_ETF_CE_RELEASED = Row(
    "etf-ce-released", "etf-ce", "fixed frame, cross-entropy of bare cosines, as the authors' code would", "ETF + CE",
    {"length": "unit", "logit_scale": 1.0},
)  # fmt: skip
_ETF_DR = Row("etf-dr", "etf-dr", "fixed frame, dot regression as the paper writes it", "ETF + DR")
_ETF_DR_RELEASED = Row(
    "etf-dr-released", "etf-dr-released", "fixed frame, the authors' released loss with its per-batch weights",
    "ETF + DR",
)  # fmt: skip
_GAIN = (
    Claim("ETF + DR (the paper's formula) beats learnable + CE in each column", "etf-dr", "ce"),
    Claim("ETF + DR (the released loss) beats learnable + CE in each column", "etf-dr-released", "ce"),
)
_LAST_EPOCH = "here the last epoch counts; the authors' code reports the best test accuracy over epochs"
_SVHN_LABELS = "labels are right here; the authors' SVHN code shifts a third of them"


def _long_tailed(**fields_of: Mapping[str, object]) -> tuple[Column, ...]:
    """CIFAR-10/100, SVHN, STL-10 x ratio 200, 100, 50 (the paper's 0.005, 0.01, 0.02); ``fields_of`` a data set."""
    return tuple(
        Column(
            f"{data.removesuffix('-extra')}-r{ratio}", f"{DATA_SETS[data].label}, ratio {ratio} ({1 / ratio:g})", data,
            {"imbalance": float(ratio), **fields_of[data.removesuffix("-extra")]},
            (_SVHN_LABELS,) if data == "svhn-extra" else (),
        )
        for data in ("cifar10", "cifar100", "svhn-extra", "stl10")
        for ratio in (200, 100, 50)
    )  # fmt: skip


_LONG_TAILED_RESNET = Table(
    name="long-tailed-resnet",
    paper=_YANG,
    what="long tails of CIFAR-10/100, SVHN, STL-10 with ResNet-32",
    columns=_long_tailed(
        cifar10={"backbone": "resnet32", "width": 16},
        cifar100={"backbone": "resnet32", "width": 32},  # the authors' is twice as wide here, so that 128 >= K
        svhn={"backbone": "resnet32", "width": 16},
        stl10={"backbone": "resnet32", "width": 16, "image_size": 96},
    ),
    rows=(_CE, _FROZEN, _ETF_CE, _ETF_CE_RELEASED, _ETF_DR, _ETF_DR_RELEASED),
    claims=(
        *_GAIN,
        Claim(
            "ETF + DR (the released loss) beats the frozen random classifier in each column (the comparison that the "
            "authors' ResNet code makes)", "etf-dr-released", "frozen-random",
        ),
    ),
    fields=_CIFAR_RECIPE,
    notes=(
        _LAST_EPOCH,
        "the authors' ResNet code freezes its learnable baseline by mistake; whether the published rows did is unknown",
        "SVHN and STL-10 are normalised by channel statistics here, by 0.5 in the authors' code",
        "the same recipe upstream with a learnable classifier (MiSLAS, stage 1): table baselines-cifar, row mixup",
    ),
)  # fmt: skip

_ISSUE = "issue #5 of the authors' repository"
_LONG_TAILED_DENSENET = Table(
    name="long-tailed-densenet",
    paper=_YANG,
    what="the same long tails with DenseNet-150 (growth 12)",
    columns=_long_tailed(
        cifar10={"backbone": "densenet150", "width": 12},
        cifar100={"backbone": "densenet150", "width": 12},
        svhn={"backbone": "densenet150", "width": 12},
        stl10={"backbone": "densenet150", "width": 12, "image_size": 96},
    ),
    rows=(_CE, _ETF_CE, _ETF_CE_RELEASED, _ETF_DR, _ETF_DR_RELEASED),
    claims=_GAIN,
    fields=_CIFAR_RECIPE,
    published={
        ("Learnable + CE", "cifar100-r100"): (
            Published(43.08, "second-hand", _ISSUE),
            Published(44.66, "independent rerun", _ISSUE, sd=0.24, n=3),
        ),
        ("ETF + DR", "cifar100-r100"): (
            Published(44.0, "second-hand", _ISSUE),
            Published(43.02, "independent rerun", _ISSUE, sd=0.56, n=3),
        ),
        ("Learnable + CE", "cifar100-r50"): (
            Published(49.07, "second-hand", _ISSUE),
            Published(50.57, "independent rerun", _ISSUE, sd=0.46, n=3),
        ),
        ("ETF + DR", "cifar100-r50"): (
            Published(49.8, "second-hand", _ISSUE),
            Published(48.45, "independent rerun", _ISSUE, sd=0.10, n=3),
        ),
    },
    notes=(
        _LAST_EPOCH,
        "an independent rerun found the reverse order on CIFAR-100 with and without mixup, and the paper's on CIFAR-10",
    ),
    departures=("no DenseNet configuration was released, this recipe is that of the ResNet runs",),
)

_CUB = Table(
    name="cub",
    paper=_YANG,
    what="fine-grained birds, CUB-200-2011, by backbone",
    columns=tuple(
        Column(f"resnet{depth}", f"CUB-200-2011, ResNet-{depth}", "cub200", {"backbone": f"timm:resnet{depth}"})
        for depth in (34, 50, 101)
    ),
    rows=(_CE, Row("etf-ce", _ETF_CE.method, _ETF_CE.what), _ETF_DR, _ETF_DR_RELEASED),
    claims=_GAIN,
    fields={
        "epochs": 60,
        "batch_size": 64,
        "lr": 0.01,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "mixup": 0.0,
        "validation": 0.0,
        "image_size": 224,
        "pretrained": True,
    },
    departures=("the paper's recipe for CUB is unknown to us, this one is ours",),
    notes=("here the last epoch counts; what the paper reports is unknown",),
)  # fmt: skip

_IMAGENET_LT = Table(
    name="imagenet-lt",
    paper=_YANG,
    what="ImageNet-LT with ResNet-50, by length of training",
    columns=tuple(
        Column(f"epochs{epochs}", f"ImageNet-LT, {epochs} epochs", "imagenet-lt", {"epochs": epochs})
        for epochs in (90, 120, 150, 180)
    ),
    rows=(
        _CE,
        Row("etf-ce", _ETF_CE.method, _ETF_CE.what),
        _ETF_DR,
        Row(
            "etf-dr-released", "etf-dr-released",
            _ETF_DR_RELEASED.what + ", free feature length and a penalty on it as on ImageNet", "ETF + DR",
            {"length": "free", "length_penalty": 0.01},
        ),
    ),
    claims=_GAIN,
    fields={
        "backbone": "timm:resnet50", "batch_size": 1024, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
        "schedule": "cosine", "warmup": 0.0, "mixup": 0.2, "validation": 0.0, "image_size": 224,
        "data_mode": "stream", "augmentation": "resized-crop-flip+color-jitter", "centre_crop": 0.875,
    },
    departures=("a standard ResNet-50 of 2,048 features, where the authors' last stage is twice as wide",),
    notes=(_LAST_EPOCH,),
)  # fmt: skip


def _line(row: str, data: str, values: tuple[float | None, ...], source: str, where: str, sd=(None,) * 4, notes=None):
    """Published values of a row on one data set, for ratios 200, 100, 50, 10; None where nothing was read."""
    return [
        ((row, f"{data}-r{ratio}"), Published(value, source, where, sd=s, note=(notes or {}).get(ratio, "")))
        for ratio, value, s in zip((200, 100, 50, 10), values, sd, strict=True)
        if value is not None
    ]


def _collect(*lines) -> dict[tuple[str, str], tuple[Published, ...]]:
    published: dict[tuple[str, str], tuple[Published, ...]] = {}
    for key, value in (entry for line in lines for entry in line):
        published[key] = (*published.get(key, ()), value)
    return published


_S = ("second-hand", "SURE, Table 2")
_BOT = ("independent rerun", "BagofTricks-LT gallery")
_DDC = ("independent rerun", "DDC README")
_MISLAS = ("independent rerun", "MiSLAS README, stage 1")
_OTHER_RECIPE = {200: "another recipe and data"}
_SIC = {50: "sic"}
_C10, _C100 = "cifar10", "cifar100"
_LA, _BS = "Logit adjustment", "Balanced softmax"

_BASELINES_CIFAR = Table(
    name="baselines-cifar",
    paper="mixup (Zhang 2018), LDAM-DRW (Cao 2019), balanced softmax (Ren 2020), logit adjustment (Menon 2021), VS (Kini 2021)",
    what="long tails of CIFAR-10/100 with ResNet-32, learnable baselines",
    columns=tuple(
        Column(f"{data}-r{ratio}", f"{DATA_SETS[data].label}, ratio {ratio}", data, {"imbalance": float(ratio)})
        for data in (_C10, _C100)
        for ratio in (200, 100, 50, 10)
    ),
    rows=(
        Row("ce", "ce", "learnable linear classifier, cross-entropy, no mixup", "CE"),
        Row("mixup", "ce", "cross-entropy with mixup", "Mixup", {"mixup": 1.0}),
        Row("ldam-drw", "ldam-drw", "LDAM with deferred re-weighting", "LDAM-DRW"),
        Row("balanced-softmax", "balanced-softmax", "balanced softmax", _BS),
        Row("logit-adjusted", "logit-adjusted", "logit-adjusted cross-entropy", _LA),
        Row("vs", "vs", "vector scaling", "VS"),
    ),
    claims=(
        Claim("mixup beats plain cross-entropy in each column", "mixup", "ce"),
        Claim("LDAM-DRW beats plain cross-entropy in each column", "ldam-drw", "ce"),
        Claim("balanced softmax beats plain cross-entropy in each column", "balanced-softmax", "ce"),
        Claim("logit adjustment beats plain cross-entropy in each column", "logit-adjusted", "ce"),
        Claim("vector scaling beats plain cross-entropy in each column", "vs", "ce"),
    ),
    fields={**_CIFAR_RECIPE, "backbone": "resnet32", "width": 16, "mixup": 0.0},
    published=_collect(
        _line("CE", _C10, (None, 70.40, 74.80, 86.40), *_S),
        _line("CE", _C10, (None, 71.25, None, 86.74), *_DDC, sd=(None, 0.10, None, None)),
        _line("CE", _C10, (74.0, None, None, None), "independent rerun", "BALMS README", notes=_OTHER_RECIPE),
        _line("CE", _C100, (None, 38.30, 43.90, 55.70), *_S),
        _line("CE", _C100, (None, 38.06, None, 56.73), *_DDC, sd=(None, 1.03, None, None)),
        _line("CE", _C100, (41.2, None, None, None), "independent rerun", "BALMS README", notes=_OTHER_RECIPE),
        _line("Mixup", _C10, (None, 73.06, 77.82, 87.10), *_S),
        _line("Mixup", _C10, (None, 74.06, 78.67, None), *_BOT),
        _line("Mixup", _C10, (None, 72.8, 78.1, 87.6), *_MISLAS),
        _line("Mixup", _C100, (None, 39.54, 54.99, 58.02), *_S, notes=_SIC),
        _line("Mixup", _C100, (None, 40.82, 45.92, None), *_BOT),
        _line("Mixup", _C100, (None, 39.5, 45.4, 59.1), *_MISLAS),
        _line("LDAM-DRW", _C10, (None, 77.03, 81.03, 88.16), *_S),
        _line("LDAM-DRW", _C10, (None, 77.73, 81.60, None), *_BOT),
        _line("LDAM-DRW", _C100, (None, 42.04, 46.62, 58.71), *_S),
        _line("LDAM-DRW", _C100, (None, 42.47, 47.29, None), *_BOT),
        _line(_BS, _C10, (None, 77.54, 81.11, None), *_BOT),
        _line(_BS, _C10, (79.8, None, None, None), "paper", "BALMS README", notes=_OTHER_RECIPE),
        _line(_BS, _C100, (None, 42.99, 46.55, None), *_BOT),
        _line(_BS, _C100, (46.7, None, None, None), "paper", "BALMS README", notes=_OTHER_RECIPE),
        _line(_LA, _C10, (None, 80.92, None, None), "second-hand", "Awesome-Long-Tailed README"),
        _line(_LA, _C100, (None, 43.89, None, None), "second-hand", "Awesome-Long-Tailed README"),
        _line("VS", _C10, (None, 80.29, None, 88.74), *_DDC),
        _line("VS", _C100, (None, 42.67, None, 58.50), *_DDC),
    ),
    departures=("one recipe for all rows, not that of each paper",),
    notes=("published values come from different recipes: rows of different sources do not compare to the point",),
)

TABLES: Mapping[str, Table] = {
    table.name: table for table in (_LONG_TAILED_RESNET, _LONG_TAILED_DENSENET, _CUB, _IMAGENET_LT, _BASELINES_CIFAR)
}


def find_table(name: str) -> Table:
    """A table by name.

    Raises:
        InputError: for an unknown name, with the nearest one.
    """
    if name not in TABLES:
        raise unknown("table", name, TABLES)
    return TABLES[name]
