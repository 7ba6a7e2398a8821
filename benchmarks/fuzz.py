"""Feed the parsers with damaged input: each may only return, or raise the one-line `InputError`.

    python benchmarks/fuzz.py --seconds 600 --out benchmarks/results/fuzz.json

The time is shared by the parsers. Guided by coverage where ``atheris`` is installed (``pip install atheris``), else by random
damage to good input. Each parser runs in a process of its own with 4 GiB of memory; an input that takes more than 20 seconds
of processor time (300 by the clock) counts as a finding, too. Images of more than 8 million pixels are refused here (elsewhere Pillow's limit of 179 million holds), so
that the time does not go by with large ones.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

os.environ["OMP_NUM_THREADS"] = "1"
CARD = {"backbone": "mlp", "width": 8, "image_size": 8, "class_names": ["a", "b"], "train_counts": [2, 1],
        "mean": [0.5] * 3, "std": [0.5] * 3, "method": "ce", "method_fields": {}, "centre_crop": 1.0, "format": 1}  # fmt: skip


def targets(folder: Path) -> dict[str, tuple[Callable[[bytes], object], list[bytes]]]:
    """Parser and good inputs by name. A parser that wants a file finds it in ``folder``."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from safetensors.torch import save as save_tensors

    from equiframe.collapse.files import load_features
    from equiframe.data.dataset import Dataset, ImageSet
    from equiframe.data.images import decode_image
    from equiframe.data.lists import read_list
    from equiframe.data.parquet import load_parquet
    from equiframe.data.prepare import _indices_from_manifest, indices_hash
    from equiframe.deployed import read_torch_export_description
    from equiframe.files import read_checksums
    from equiframe.method import METHOD_FIELDS, resolve_method
    from equiframe.model import ModelCard, build_classifier, load_classifier
    from equiframe.recipe import Recipe, dump_recipe, load_recipe
    from equiframe.runs import RunFolder, as_npz

    Image.MAX_IMAGE_PIXELS = 1 << 22  # refused from twice as many on
    CARD["method_fields"] = resolve_method("ce", dict.fromkeys(METHOD_FIELDS))
    (folder / "checkpoints").mkdir(exist_ok=True)
    run = RunFolder(folder)
    images = ImageSet(np.zeros(3, np.int64), ["a", "b", "c"], sources=[b"", b"", b""])
    dataset = Dataset("d", ["x", "y"], images)
    card = ModelCard.from_json(json.dumps(CARD).encode(), "model.json")
    weights = {k: v.clone() for k, v in build_classifier(card, seed=0).state_dict().items()}
    checkpoint, rows, program = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(program, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "m/extra/equiframe.json", json.dumps({name: json.dumps(value) for name, value in CARD.items()})
        )
    torch.save({"epoch": 1, "weights": torch.ones(3), "names": ["a"]}, checkpoint)
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": [0, 1]}), rows)
    pictures = []
    for kind, mode in (
        ("PNG", "RGB"),
        ("JPEG", "RGB"),
        ("GIF", "P"),
        ("WEBP", "RGBA"),
        ("TIFF", "L"),
        ("BMP", "1"),
        ("PPM", "L"),
    ):
        file = io.BytesIO()
        Image.new(mode, (9, 7), 1).save(file, kind)
        pictures.append(file.getvalue())
    split = {"train": [0, 1], "val": [2], "hash": indices_hash(np.array([0, 1]), np.array([2])),
             "fingerprint": dataset.fingerprint()}  # fmt: skip

    def of_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = folder / name

        def parse(content: bytes) -> object:
            path.write_bytes(content)
            return read(path)

        return parse

    def model(content: bytes) -> object:
        (folder / "model.json").write_text(json.dumps(CARD))
        (folder / "model.safetensors").write_bytes(content)
        return load_classifier(folder)

    return {
        "recipe": (of_file("recipe.yaml", lambda p: Recipe(**load_recipe(p))), [dump_recipe(Recipe(data="digits")).encode()]),
        "list": (of_file("train.txt", read_list), [b"a.png 0\nb c.png 1\n"]),
        "csv": (of_file("train.csv", read_list), [b'path,label\na.png,0\n"b,c.png",1\n']),
        "split": (of_file("split.json", lambda p: _indices_from_manifest(str(p), dataset)), [json.dumps(split).encode()]),
        "description": (lambda content: ModelCard.from_json(content, "model.json"), [json.dumps(CARD).encode()]),
        "weights": (model, [save_tensors(weights)]),
        "checkpoint": (of_file("checkpoints/last.pt", lambda p: run.load_checkpoint()), [checkpoint.getvalue()]),
        "arrays": (of_file("predictions.npz", lambda p: run.read_arrays(p.name)), [as_npz({"labels": np.arange(4)})]),
        "features": (of_file("features.npz", load_features), [as_npz({"features": np.eye(4, dtype="f"), "labels": np.arange(4) % 2})]),
        "program": (of_file("model.pt2", read_torch_export_description), [program.getvalue()]),
        "history": (of_file("history.jsonl", lambda p: run.history()), [b'{"epoch": 0}\n{"epoch": 1}\n']),
        "metrics": (of_file("metrics.json", lambda p: run.read_json(p.name)), [b'{"top1": 0.5, "few": null}']),
        "checksums": (of_file("checksums.json", lambda p: read_checksums(folder)), [b'{"a": ["00ff"]}']),
        "image": (decode_image, pictures),
        "parquet": (of_file("train.parquet", lambda p: load_parquet(folder, [p])), [rows.getvalue()]),
    }  # fmt: skip


NAMES = ("recipe", "list", "csv", "split", "description", "weights", "checkpoint", "arrays", "features", "program", "history",
         "metrics", "checksums", "image", "parquet")  # fmt: skip


def damaged(good: bytes, choice: random.Random) -> bytes:
    """A good input with a few bytes changed, cut, repeated or put elsewhere."""
    content = bytearray(good)
    for _ in range(choice.randint(1, 8)):
        at = choice.randrange(len(content) + 1)
        kind = choice.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << choice.randrange(8)
        elif kind == 1:
            content[at:at] = choice.randbytes(choice.randint(1, 8))
        elif kind == 2:
            del content[at : at + choice.randint(1, 1 + len(content) // 4)]
        elif kind == 3:
            content[at:at] = content[choice.randrange(len(content) + 1) :][: choice.randint(1, 40)]
        else:
            content[at : at + 4] = choice.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"1e99", b"null", b"[[[["]
            )
    return bytes(content)


def fuzz(name: str, seconds: float, seed: int) -> None:
    """One parser, in this process; prints how often it ran."""
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # torch maps far more than it uses
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        if atheris is not None:
            with atheris.instrument_imports(include=["equiframe", "PIL", "yaml", "json", "zipfile", "csv"]):
                parse, good = targets(Path(temporary))[name]
        else:
            parse, good = targets(Path(temporary))[name]
        from equiframe.errors import InputError

        outcomes = {"read": 0, "refused": 0}

        def one(content: bytes) -> None:
            started = time.process_time()
            try:
                parse(content)
                outcomes["read"] += 1
            except InputError as error:
                outcomes["refused"] += 1
                if len(str(error)) > 20_000:
                    raise AssertionError(f"a message of {len(str(error))} characters") from error
            if time.process_time() - started > 20:
                raise AssertionError(f"took {time.process_time() - started:.0f} s")
            total = sum(outcomes.values())
            if total % 200 == 0:
                progress.seek(0)
                progress.write(json.dumps(outcomes) + "\n")
                progress.flush()

        for content in good:
            parse(content)  # good input is read: the target is set up as it should be
        with open(os.environ["FUZZ_PROGRESS"], "w") as progress:
            if atheris is not None:
                for i, content in enumerate(good):
                    Path("corpus").mkdir(exist_ok=True)
                    Path("corpus", str(i)).write_bytes(content)
                options = [f"-max_total_time={int(seconds)}", "-timeout=300", "-rss_limit_mb=4096", f"-seed={seed + 1}", "-print_final_stats=1",
                           f"-artifact_prefix={os.environ['FUZZ_PROGRESS']}.", "-max_len=20000"]  # fmt: skip
                atheris.Setup([sys.argv[0], *options, "corpus"], one)
                atheris.Fuzz()
                return
            choice, end = random.Random(seed), time.monotonic() + seconds
            while time.monotonic() < end:
                content = damaged(choice.choice(good), choice)
                try:
                    one(content)
                except Exception:
                    Path(f"{os.environ['FUZZ_PROGRESS']}.crash").write_bytes(content)
                    raise
            print(f"Done {sum(outcomes.values())} runs", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one parser of " + ", ".join(NAMES))
    parser.add_argument("--here", action="store_true", help="in this process (what each parser's own process does)")
    parser.add_argument(
        "--keep", type=Path, default=Path("/tmp/equiframe-fuzz"), help="where inputs that were found go"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.here:
        fuzz(arguments.only, arguments.seconds, arguments.seed)
        return
    arguments.keep.mkdir(parents=True, exist_ok=True)
    results, names = {}, [arguments.only] if arguments.only else NAMES
    share = arguments.seconds / len(names)
    for name in names:
        progress = arguments.keep.absolute() / name
        command = [
            sys.executable,
            __file__,
            "--here",
            "--only",
            name,
            "--seconds",
            str(share),
            "--seed",
            str(arguments.seed),
        ]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              env=os.environ | {"FUZZ_PROGRESS": str(progress)})  # fmt: skip
        executions = re.findall(r"Done (\d+) runs|stat::number_of_executed_units:\s*(\d+)", done.stderr)
        outcomes = json.loads(progress.read_text() or "{}") if progress.exists() else {}
        results[name] = {
            "seconds": round(time.monotonic() - started, 1), "executions": max((int(a or b) for a, b in executions), default=sum(outcomes.values())),
            "outcomes": outcomes, "exit": done.returncode, "finding": done.stderr[-3000:] if done.returncode else None,
        }  # fmt: skip
        print(
            name,
            {k: v for k, v in results[name].items() if k != "finding"},
            (results[name]["finding"] or "")[-1500:],
            flush=True,
        )
    record = {"date": date.today().isoformat(), "command": " ".join(sys.argv), "python": sys.version.split()[0],
              "guided_by_coverage": atheris is not None, "executions": sum(r["executions"] for r in results.values()),
              "findings": [name for name, r in results.items() if r["exit"]], "parsers": results}  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(record["findings"]))


if __name__ == "__main__":
    main()
