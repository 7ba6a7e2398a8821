"""What several test files share: one thread, tiny recipes, small generated images, the real data where it lies."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for this process and for those that tests start
os.environ["EQUIFRAME_CACHE"] = ""  # no test reads or writes the user's cache of measured trials

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell that starts the suite in the background has it ignored

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


def tiny_fields(**changes: object) -> dict[str, object]:
    """A run of well under a second: 10 classes, an MLP of 16 features, no trial of numerics."""
    return {
        "data": "digits", "backbone": "mlp", "width": 16, "epochs": 1, "batch_size": 64, "lr": 0.05, "device": "cpu",
        "precision": "float32", "memory_format": "contiguous", "method": "etf-la",
    } | changes  # fmt: skip


def tiny_flags(**changes: object) -> list[str]:
    """`tiny_fields` as command-line arguments, DATA first."""
    fields = tiny_fields(**changes)
    if "method" not in changes:  # compare has none, and train its default
        del fields["method"]
    flags = [str(fields.pop("data"))]
    for name, value in fields.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


@pytest.fixture
def tiny():
    """``tiny(field=value, …)``: a `Recipe` that trains in well under a second."""
    from equiframe.recipe import Recipe

    return lambda **changes: Recipe(**tiny_fields(**changes))


@pytest.fixture
def flags():
    return tiny_flags


def picture(k: int, i: int, size: tuple[int, int] = (12, 12)) -> Image.Image:
    """A noisy image whose brightness tells its class k."""
    noise = np.random.default_rng((k, i)).integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray((noise + 60 * (k % 4)).astype(np.uint8))


def write_class(folder: Path, k: int, count: int, *, start: int = 0, size: tuple[int, int] = (12, 12)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(k, i, size).save(folder / f"{i:03d}.png")


@pytest.fixture
def class_folder(tmp_path):
    """``class_folder({"cat": 8, "dog": 8}, name="pets", test=…)``: a folder of class folders with generated images."""

    def make(train: dict[str, int], *, name: str = "pets", size: tuple[int, int] = (12, 12), **splits: dict) -> Path:
        root = tmp_path / name
        classes = sorted(train)
        for k, c in enumerate(classes):
            write_class(root / "train" / c if splits else root / c, k, train[c], size=size)
        for split, counts in splits.items():
            for c, count in counts.items():
                k = classes.index(c) if c in classes else 0
                write_class(root / split / c, k, count, start=500, size=size)
        return root

    return make


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_parquet(file: Path, images: list, labels: list, class_names: list[str] | None = None, **columns) -> None:
    """A file in the Hugging Face image convention."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(images)]
    table = pa.table({"image": pa.array(rows, kind), "label": labels, **columns})
    if class_names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory) -> Path:
    """The real CIFAR-10 where ../shared/data has it, else a Parquet folder with as many (small gray) images."""
    if (REAL_DATA / "cifar10").is_dir():
        return REAL_DATA / "cifar10"
    folder = tmp_path_factory.mktemp("data") / "cifar10"
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    images = [encoded(Image.new("L", (32, 32), 25 * k), "JPEG") for k in range(10)]
    random = np.random.default_rng(0)
    for split, count in (("train", 50_000), ("test", 10_000)):
        labels = random.permutation(np.arange(count) % 10)
        write_parquet(folder / f"{split}-00000-of-00001.parquet", [images[k] for k in labels], labels.tolist(), names)
    return folder


@pytest.fixture(scope="session")
def long_tailed(tmp_path_factory) -> Path:
    """A naturally long-tailed Parquet folder with some gray images: the real Tiny-ImageNet-LT, else a generated one."""
    if (REAL_DATA / "tiny-imagenet-lt100").is_dir():
        return REAL_DATA / "tiny-imagenet-lt100"
    folder = tmp_path_factory.mktemp("data") / "tiny-imagenet-lt100"
    names = [f"n{k:08d}" for k in range(20)]
    for split, counts in (("train", [int(100 * 0.05 ** (k / 19)) for k in range(20)]), ("test", [2] * 20)):
        labels = np.repeat(np.arange(20), counts)
        images = [picture(int(k), i, (64, 64)).convert("L" if i % 9 == 0 else "RGB") for i, k in enumerate(labels)]
        write_parquet(folder / f"{split}-00000-of-00001.parquet", [encoded(x, "JPEG") for x in images], labels, names)
    return folder


@pytest.fixture(scope="session")
def balanced_100(tmp_path_factory) -> Path:
    """100 classes of 500 training and 50 test images, 32x32: the real tiny-imagenet-32x100, else gray stand-ins."""
    if (REAL_DATA / "tiny-imagenet-32x100").is_dir():
        return REAL_DATA / "tiny-imagenet-32x100"
    folder = tmp_path_factory.mktemp("data") / "tiny-imagenet-32x100"
    images = [encoded(Image.new("L", (32, 32), 2 * k), "JPEG") for k in range(100)]
    for split, count in (("train", 50_000), ("test", 5_000)):
        labels = np.random.default_rng(0).permutation(np.arange(count) % 100)
        names = [f"n{k:08d}" for k in range(100)]
        write_parquet(folder / f"{split}-00000-of-00001.parquet", [images[k] for k in labels], labels.tolist(), names)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A small finished run on class folders; tests read it and leave it as it is."""
    from equiframe.recipe import Recipe
    from equiframe.train import train

    root = tmp_path_factory.mktemp("run")
    for k, name in enumerate(("bright", "dark", "gray", "many words")):
        write_class(root / "pets" / "train" / name, k, 24)
        write_class(root / "pets" / "test" / name, k, 6, start=500)
    train(Recipe(**tiny_fields(data=str(root / "pets"), epochs=8, batch_size=16, mixup=0)), root / "run")
    return root / "run"


@pytest.fixture(scope="session")
def recipe():
    """Two short epochs of `digits`; with it go ``data``, ``whole`` and ``stopped``. Tests copy runs and leave these as they are."""
    from equiframe.recipe import Recipe

    return Recipe(**tiny_fields(epochs=2, method="ce", width=8, track="none", ema=0.9, batch_size=256))


@pytest.fixture(scope="session")
def data(recipe):
    from equiframe.data.prepare import prepare_data

    return prepare_data(recipe)


@pytest.fixture(scope="session")
def whole(recipe, data, tmp_path_factory) -> Path:
    """The finished run of ``recipe``."""
    from equiframe.train import train

    path = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, path, data=data)
    return path


@pytest.fixture(scope="session")
def stopped(recipe, data, tmp_path_factory) -> Path:
    """A run with a last and a previous checkpoint."""
    from equiframe.train import Interrupted, train

    path = tmp_path_factory.mktemp("stopped") / "run"
    epochs = []
    with pytest.raises(Interrupted):
        train(
            recipe.with_(epochs=3), path, data=data, progress=lambda state: epochs.append(state),
            stop=lambda: sum(bool(s.get("done")) for s in epochs) >= 2,
        )  # fmt: skip
    return path


def forked(function, *arguments: object) -> tuple[int, str]:
    """Call a function in a fork of this process, which has imported everything already; how it ended (0, or 1 after an exception,
    or minus a signal) and what it printed."""
    with tempfile.TemporaryFile("w+", buffering=1) as said:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads; ours are idle
            child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                sys.stdout = sys.stderr = said
                function(*arguments)
                code = 0
            except BaseException:
                traceback.print_exc(file=said)
            finally:
                said.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


@pytest.fixture
def equiframe():
    """``equiframe("train", …)`` runs the command line in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "equiframe", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=100, **options)

    return run


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """``processes(function, size)``: what ``function(World)`` returns in each of several forked processes, in the order of ranks.
    One that dies leaves None, one that fails fails the test."""

    import torch.distributed as dist

    from equiframe.parallel import World

    def run(function, size=2):
        store = tmp_path / f"store-{len(list(tmp_path.glob('store-*')))}"
        outcomes = [store.with_suffix(f".{rank}") for rank in range(size)]
        children = []
        for rank in range(size):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads; ours are idle
                child = os.fork()
            if child == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
                try:
                    dist.init_process_group(
                        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
                    )
                    outcome = (function(World(rank, size)), None)
                except BaseException:
                    outcome = (None, traceback.format_exc())
                outcomes[rank].write_bytes(pickle.dumps(outcome))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        found = [pickle.loads(file.read_bytes()) if file.exists() else (None, None) for file in outcomes]
        assert not any(problem for _, problem in found), found
        return [result for result, _ in found]

    return run


def caught(function) -> object:
    """What a function returns, or the words of its `InputError`: what a process of `processes` can hand back."""
    from equiframe.errors import InputError

    try:
        return function()
    except InputError as error:
        return f"InputError {error}"


@pytest.fixture
def plain_pages(monkeypatch):
    """Reports without their figures, which take a second each; the tests of reports and figures draw them."""
    monkeypatch.setattr("equiframe.report.page._svg", lambda name, groups: None)
