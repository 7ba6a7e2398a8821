"""From bytes to a uint8 RGB array, whatever the file is: gray, palette, alpha, 16 bit, EXIF-rotated."""

from __future__ import annotations

import io
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equiframe.errors import BadImage, InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# what is read, whatever a file is called: PIL knows more kinds, among them PostScript, for which it would start Ghostscript
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
THREAD = 64  # an image that is so many times as long as wide is a thread


def decoding_threads(workers: int | None) -> int:
    """As many as asked for; by default one for each core that this process may use."""
    if workers is not None:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_image(source: str | Path | bytes, *, name: str | None = None, reduce: int = 1):
    """Open an image as a PIL image in mode RGB.

    EXIF rotation is applied; transparent pixels show white; 16-bit gray is scaled to 8 bits; of an animation the
    first frame counts.

    Args:
        source: a path, or the encoded bytes.
        name: what to call the image in an error (default: the path).
        reduce: 1, 2, 4 or 8: a JPEG is decoded at this part of its sides, which is faster; other kinds come whole.

    Raises:
        BadImage: if the image cannot be read or is truncated; the message names it.
    """
    from PIL import Image, ImageOps

    name = name or _name_of(source)
    with _opened(source, name) as image:
        if reduce > 1:
            image.draft(image.mode, (image.width // reduce, image.height // reduce))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I;16", "I;16B", "I;16L", "I"):
            image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def upright_size(source: str | Path | bytes, *, name: str | None = None) -> tuple[int, int]:
    """(width, height) of an image as `decode_image` would give it; reads the header only."""
    with _opened(source, name or _name_of(source)) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the sides
        return (image.height, image.width) if turned else image.size


def image_header(source: str | Path | bytes, *, name: str | None = None) -> tuple[tuple[int, int], str]:
    """(width, height) upright, and the kind as ``RGB JPEG`` (the mode as stored); reads the header only."""
    with _opened(source, name or _name_of(source)) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return (image.height, image.width) if turned else image.size, f"{image.mode} {image.format}"


def _name_of(source: str | Path | bytes) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)


@contextmanager
def _opened(source: str | Path | bytes, name: str):
    """An image whose header was read; whatever goes wrong with it becomes an error that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise BadImage(f"not a file (a folder, a pipe or a device): {name}")  # reading it might never end
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"image not found: {source}") from error
    except PermissionError as error:
        raise BadImage(f"no permission to read image: {name}") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image, or a kind that cannot be read: {name}") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"image refused, it would unpack to too many pixels: {name}") from error
    except Exception as error:  # a damaged file makes PIL's readers raise all sorts
        raise BadImage(f"image cannot be decoded (truncated or damaged): {name}: {error}") from error


def fit_square(image, size: int, share: float = 1.0):
    """Resize the shorter side to ``size / share`` and cut the centre square of side ``size``; an image of that size is
    left as it is where all of it is wanted.

    ``share`` 1 keeps as much as a square can; 0.875 is the usual view of ImageNet, 256 → 224. Of a thread of pixels only the
    middle is resized: the whole could take more memory than there is.
    """
    from PIL import Image

    width, height = image.size
    if (width, height) == (size, size) and share == 1:
        return image
    longest = THREAD * min(width, height)
    if max(width, height) > longest:
        left, top = (width - min(width, longest)) // 2, (height - min(height, longest)) // 2
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = image.size
    scale = round(size / share) / min(width, height)
    resized = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_tensor(image) -> Tensor:
    """PIL RGB image → uint8 tensor ``(3, H, W)``."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def decode_all(sources: list, names: list[str], size: int, *, workers: int | None = None, progress=None) -> Tensor:
    """Decode many images into one uint8 tensor ``(N, 3, size, size)``; PIL decodes outside the interpreter's lock."""
    images = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)

    def decode(i: int) -> None:
        images[i] = to_tensor(fit_square(decode_image(sources[i], name=names[i]), size))

    with ThreadPoolExecutor(decoding_threads(workers)) as pool:
        for done, _ in enumerate(pool.map(decode, range(len(sources))), 1):
            if progress and done % 1000 == 0:
                progress(done, len(sources))
    return images


def unreadable(sources: list, names: list[str], *, workers: int | None = None) -> dict[int, str]:
    """Position → reason of each image that cannot be decoded. Decodes all of them."""

    def reason(i: int) -> str | None:
        try:
            decode_image(sources[i], name=names[i])
        except InputError as error:
            return " ".join(str(error).split())
        return None

    with ThreadPoolExecutor(decoding_threads(workers)) as pool:
        return {i: why for i, why in enumerate(pool.map(reason, range(len(sources)))) if why is not None}


def image_sizes(sources: list, names: list[str], *, at_most: int = 64) -> list[tuple[int, int]]:
    """(width, height) of an evenly spaced sample of the images; reads headers only."""
    step = max(1, len(sources) // at_most)
    sizes = []
    for source, name in zip(sources[::step], names[::step], strict=True):
        with _opened(source, name) as image:
            sizes.append(image.size)
    return sizes
