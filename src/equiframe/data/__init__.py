"""Where images come from (`sources`, by way of `builtin`, `published`, `hub`, `folders`, `lists`, `parquet`), how they are
decoded (`images`), how batches are made (`batches`)."""

from equiframe.data.batches import Batch, augment, crop_and_flip, mix_up
from equiframe.data.images import decode_image
from equiframe.data.sources import BUILTIN_NAMES, Dataset, ImageSet, load_dataset

__all__ = [
    "BUILTIN_NAMES",
    "Batch",
    "Dataset",
    "ImageSet",
    "augment",
    "crop_and_flip",
    "decode_image",
    "load_dataset",
    "mix_up",
]
