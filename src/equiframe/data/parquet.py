"""Parquet files in the Hugging Face image convention."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from equiframe.data.dataset import Dataset, ImageSet, split_named
from equiframe.errors import InputError


def load_parquet(path: Path, files: list[Path]) -> Dataset:
    """Parquet files ``train-*.parquet``, ``test-*.parquet``, … with columns ``image`` {bytes, path} and ``label``."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError("Parquet data needs pyarrow: pip install 'equiframe[train]'") from error

    by_split: dict[str, list[Path]] = {}
    for file in files:
        stem = re.split(r"[-_.]", file.stem.lower())[0]
        split = split_named(stem) or ("train" if len(files) == 1 else None)
        if split is None:
            raise InputError(f"cannot tell the split of {file}; name it train-*.parquet, validation-* or test-*")
        by_split.setdefault(split, []).append(file)
    if "train" not in by_split:
        raise InputError(f"no train-*.parquet in {path}")

    class_names: list[str] | None = None
    sets: dict[str, ImageSet] = {}
    for split, parts in by_split.items():
        sources: list[bytes] = []
        names: list[str] = []
        labels: list[np.ndarray] = []
        for file in parts:
            try:
                columns = pq.read_schema(file).names
                for column in ("image", "label"):
                    if column not in columns:
                        raise InputError(f"{file} lacks the column {column!r} (it has {', '.join(columns)})")
                table = pq.read_table(file, columns=["image", "label"], partitioning=None)
            except InputError:
                raise
            except (OSError, ValueError, pa.ArrowException) as error:
                raise InputError(f"not a readable Parquet file: {file}: {error}") from error
            rows = table["image"].to_pylist()
            for i, row in enumerate(rows):
                content = row.get("bytes") if isinstance(row, dict) else row
                if not isinstance(content, bytes):
                    raise InputError(f"row {i} of {file} has no image bytes")
                sources.append(content)
                names.append((row.get("path") if isinstance(row, dict) else None) or f"{file.name}:{i}")
            column = table["label"]
            if len(rows) and (not pa.types.is_integer(column.type) or column.null_count):
                bad = next((i for i, value in enumerate(column.to_pylist()) if not isinstance(value, int)), 0)
                raise InputError(f"row {bad} of {file} has no whole-number label (the column holds {column.type})")
            labels.append(column.to_numpy().astype(np.int64) if rows else np.zeros(0, np.int64))
            class_names = class_names or _parquet_class_names(table.schema.metadata)
        sets[split] = ImageSet(np.concatenate(labels), names, sources=sources)
    if class_names is None:
        train = sets["train"].labels
        if len(train) and train.max() >= len(train):  # some class would have no image
            raise InputError(f"label {train.max()} in {path}, which has only {len(train)} training images")
        class_names = [str(k) for k in range(max(train, default=-1) + 1)] or ["?"]
    return Dataset(path.resolve().name, class_names, sets["train"], sets.get("val"), sets.get("test"))


def _parquet_class_names(metadata: dict | None) -> list[str] | None:
    try:
        return list(json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None
