"""Where images come from (`sources`, by way of `builtin`, `published`, `hub`, `folders`, `lists`, `parquet`), how they are
decoded (`images`), changed (`augment`, `policies`), mixed (`mixing`) and made into batches (`batches`)."""

from equiframe.data.augment import augment, crop_and_flip, cut_out
from equiframe.data.batches import Batch
from equiframe.data.images import decode_image
from equiframe.data.mixing import cut_mix, mix_up, remix
from equiframe.data.sources import BUILTIN_NAMES, Dataset, ImageSet, load_dataset

__all__ = [
    "BUILTIN_NAMES",
    "Batch",
    "Dataset",
    "ImageSet",
    "augment",
    "crop_and_flip",
    "cut_mix",
    "cut_out",
    "decode_image",
    "load_dataset",
    "mix_up",
    "remix",
]
