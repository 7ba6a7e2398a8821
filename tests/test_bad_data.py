"""One table of data that is not as it should be: refused in one line, or trained on as well as it can be, and nothing else.

Never a traceback, never a folder that is left half written. A bad image is moreover left out by ``--on-bad-image skip``, and
listed.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import encoded, picture, tiny_flags, write_parquet
from equiframe.cli import main

CLASSES = ("cat", "dog")
GOOD = [[encoded(picture(k, i, (8, 8))) for i in range(6)] for k in range(2)]
BIG = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)  # noise: its code has a middle to cut


def pets(root: Path) -> Path:
    """Two classes of six good images."""
    for name, images in zip(CLASSES, GOOD, strict=True):
        (root / name).mkdir(parents=True)
        for i, content in enumerate(images):
            (root / name / f"{i:03d}.png").write_bytes(content)
    return root


# --- images -----------------------------------------------------------------------------------------------------------


def as_kind(kind, mode="RGB", **options):
    return encoded(Image.fromarray(BIG).convert(mode), kind, **options)


def half(kind, **options):
    content = as_kind(kind, **options)
    return content[: len(content) // 2]


def png_header(width, height):
    head = GOOD[0][0][:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + GOOD[0][0][24:29]
    return head + zlib.crc32(head[12:29]).to_bytes(4, "big") + GOOD[0][0][33:]


def png_chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def text_bomb():
    """A PNG whose compressed comment unpacks to 64 MiB."""
    return GOOD[0][0][:33] + png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20))) + GOOD[0][0][33:]


def broken_pixels():
    return GOOD[0][0][:33] + png_chunk(b"IDAT", b"not zlib at all") + png_chunk(b"IEND", b"")


def flipped():
    content = bytearray(as_kind("PNG"))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", GOOD[0][0])
    return file.getvalue()


def animation(kind):
    frames = [picture(k, 0, (8, 8)) for k in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def tiff_bomb():
    content = bytearray(as_kind("TIFF"))
    for tag in (b"\x00\x01", b"\x01\x01"):  # width and length, as little-endian tags
        at = content.index(tag + b"\x04\x00") if tag + b"\x04\x00" in content else content.index(tag + b"\x03\x00")
        content[at + 2 : at + 12] = b"\x04\x00\x01\x00\x00\x00" + (60_000).to_bytes(4, "little")
    return bytes(content)


DAMAGED = "image cannot be decoded (truncated or damaged): dog/003"
NO_IMAGE = "not an image, or a kind that cannot be read: dog/003"
BOMB = "image refused, it would unpack to too many pixels: dog/003"
# what dog/003 holds → (ending, bytes, what is said); said "" means that it is read
IMAGES = {
    "half a PNG": (".png", half("PNG"), DAMAGED),
    "half a JPEG": (".jpg", half("JPEG"), DAMAGED),
    "half a progressive JPEG": (".jpg", half("JPEG", progressive=True), DAMAGED),
    "half a GIF": (".gif", half("GIF"), DAMAGED),
    "half a WebP": (".webp", half("WEBP"), f"{DAMAGED}|{NO_IMAGE}"),
    "half a TIFF": (".tif", half("TIFF"), f"{DAMAGED}|{NO_IMAGE}"),
    "half a BMP": (".bmp", half("BMP"), DAMAGED),
    "half a PPM": (".ppm", half("PPM"), DAMAGED),
    "a PNG's header alone": (".png", GOOD[0][0][:33], f"{DAMAGED}|{NO_IMAGE}"),
    "no bytes": (".png", b"", NO_IMAGE),
    "one byte": (".jpg", b"\xff", NO_IMAGE),
    "zeros": (".bmp", bytes(1000), NO_IMAGE),
    "noise": (".webp", np.random.default_rng(1).bytes(5000), NO_IMAGE),
    "a flipped byte": (".png", flipped(), DAMAGED),
    "pixels that are none": (".png", broken_pixels(), DAMAGED),
    "no width": (".png", png_header(0, 8), f"{DAMAGED}|{NO_IMAGE}"),
    "a JPEG of nothing": (".jpg", b"\xff\xd8" + bytes(99), f"{DAMAGED}|{NO_IMAGE}"),
    "a bomb, PNG": (".png", png_header(60_000, 60_000), BOMB),
    "a bomb, wide": (".png", png_header(2**31 - 1, 1), BOMB),
    "a bomb, GIF": (".gif", b"GIF89a" + b"\xff\xff" * 2 + as_kind("GIF")[10:], f"{BOMB}|{DAMAGED}"),
    "a bomb, TIFF": (".tif", tiff_bomb(), f"{BOMB}|{DAMAGED}|{NO_IMAGE}"),
    "a bomb, BMP": (".bmp", b"BM" + bytes(12) + b"\x28\0\0\0" + (90_000).to_bytes(4, "little") * 2 + bytes(99),
                    f"{BOMB}|{DAMAGED}|{NO_IMAGE}"),
    "a bomb in a comment": (".png", text_bomb(), f"{DAMAGED}|{BOMB}"),
    "HTML": (".png", b"<html><body>404</body></html>", NO_IMAGE),
    "text": (".jpg", b"nicht gefunden", NO_IMAGE),
    "a ZIP": (".jpg", zipped(), NO_IMAGE),
    "SVG": (".png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_IMAGE),
    "PostScript (no Ghostscript is started)": (".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
                                               b"showpage\n", NO_IMAGE),
    "an icon, of a kind that no ending names": (".png", as_kind("ICO"), NO_IMAGE),
    # odd, and read
    "CMYK": (".jpg", as_kind("JPEG", "CMYK"), ""),
    "CMYK in a TIFF": (".tif", as_kind("TIFF", "CMYK"), ""),
    "16 bits, gray": (".png", encoded(Image.fromarray(BIG[..., 0].astype(np.uint16) * 257)), ""),
    "32 bits, gray": (".tif", encoded(Image.fromarray(BIG[..., 0].astype(np.int32)), "TIFF"), ""),
    "floating point": (".tif", encoded(Image.fromarray(BIG[..., 0].astype(np.float32)), "TIFF"), ""),
    "one bit": (".png", as_kind("PNG", "1"), ""),
    "gray with alpha": (".png", as_kind("PNG", "LA"), ""),
    "a palette with a transparent colour": (".png", as_kind("PNG", "P", transparency=3), ""),
    "LAB colours": (".tif", encoded(Image.new("LAB", (8, 8)), "TIFF"), ""),
    "YCbCr": (".tif", as_kind("TIFF", "YCbCr"), ""),
    "an animated GIF": (".gif", animation("GIF"), ""),
    "an animated WebP": (".webp", animation("WEBP"), ""),
    "an animated PNG": (".png", animation("PNG"), ""),
    "several pages": (".tif", animation("TIFF"), ""),
    "a JPEG called PNG": (".png", as_kind("JPEG"), ""),
    "a WebP called JPEG": (".jpg", as_kind("WEBP"), ""),
    "an ending in capitals": (".PNG", as_kind("PNG"), ""),
    "a single pixel": (".png", encoded(Image.new("RGB", (1, 1))), ""),
    "a thread of two million pixels": (".png", encoded(Image.new("1", (2_000_000, 1))), ""),
    "a line of pixels": (".png", encoded(Image.new("RGB", (3000, 1))), ""),
    "turned by EXIF": (".jpg", as_kind("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"), ""),
    "a colour profile that is none": (".jpg", as_kind("JPEG", icc_profile=b"junk"), ""),
}  # fmt: skip


# --- folders and names ------------------------------------------------------------------------------------------------


def replaced(change):
    """Two good classes, of which one file is replaced by what ``change(path)`` makes."""

    def make(root):
        path = pets(root) / "dog" / "003.png"
        path.unlink()
        change(path)

    return make


def renamed(new):
    def make(root):
        pets(root)
        os.rename(
            root / "dog" / "003.png", os.path.join(root, new) if isinstance(new, str) else os.fsencode(root) + new
        )

    return make


def class_renamed(new):
    def make(root):
        pets(root)
        os.rename(
            os.fsencode(root / "dog"), os.path.join(os.fsencode(root), new if isinstance(new, bytes) else new.encode())
        )

    return make


def unix_socket(path):
    where = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(where)


def class_linked(target):
    def make(root):
        pets(root)
        shutil.rmtree(root / "dog")
        os.symlink(target, root / "dog")

    return make


def inner_loop(root):
    pets(root)
    os.symlink(root, root / "dog" / "more")


def also(*files, content=b"x"):
    def make(root):
        pets(root)
        for name in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)

    return make


def with_splits(copy):
    """train/ and test/, where some file of training comes again."""

    def make(root):
        pets(root / "train")
        for k, name in enumerate(CLASSES):
            for split in ("val", "test"):
                (root / split / name).mkdir(parents=True)
                (root / split / name / "900.png").write_bytes(encoded(picture(k, 900, (8, 8))))
        copy(root)

    return make


def no_permission(name):
    def make(root):
        pets(root)
        (root / name).chmod(0)

    return make


FOLDERS = {
    "no folder": (lambda root: None, "no such folder"),
    "an empty folder": (lambda root: root.mkdir(), "has no class folders"),
    "a single class": (lambda root: [pets(root), shutil.rmtree(root / "dog")], "has a single class ('cat')"),
    "a class without images": (also("fox/notes.txt"), "class folder without images"),
    "images beside the classes": (also("stray.png", content=GOOD[0][0]), ""),
    "litter": (also(".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/._003.png", ".git/config"), ""),
    "unicode": (class_renamed("Hündin 犬 🐕"), ""),
    "right to left": (class_renamed("كلب\u202e"), ""),
    "a newline in a class": (class_renamed("d\nog"), ""),
    "HTML in a class": (class_renamed("<script>alert(1)<"), ""),
    "formulas in a class": (class_renamed("$\\frac{$"), ""),
    "bytes that are no text": (class_renamed(b"d\xff\xfeg"), ""),
    "a class like an option": (class_renamed("--help"), ""),
    "a long name": (class_renamed("d" * 250), ""),
    "a newline in a file": (renamed("dog/00\n3.png"), ""),
    "a file of bytes that are no text": (renamed(b"/dog/\xff.png"), ""),
    "a quote and a comma in a file": (renamed('dog/a",b.png'), ""),
    "a loop of links, file": (replaced(lambda path: os.symlink(path.name, path)), "dog/003.png"),
    "a link to nothing": (replaced(lambda path: os.symlink("nowhere", path)), "image not found"),
    "a link to a device without end": (replaced(lambda path: os.symlink("/dev/zero", path)), "not a file"),
    "a pipe that nobody writes to": (replaced(lambda path: os.mkfifo(path)), "not a file (a folder, a pipe or a device)"),
    "a socket": (replaced(unix_socket), "not a file"),
    "a folder called like an image": (replaced(lambda path: path.mkdir()), ""),
    "a class that is a link to itself": (class_linked("dog"), "has a single class ('cat')"),
    "a class that is a link to the whole": (class_linked("."), "is a link to a folder that it lies in"),
    "a class that is a link to above": (class_linked(".."), "is a link to a folder that it lies in"),
    "a loop of links inside a class": (inner_loop, ""),
    "an image that may not be read": (no_permission("dog/003.png"), "no permission to read image: dog/003.png"),
    "a class that may not be read": (no_permission("dog"), "no permission"),
    "a test image that is a training image": (
        with_splits(lambda root: shutil.copy(root / "train/cat/001.png", root / "test/cat/x.png")),
        "+1 test image is a training image to the byte (test/cat/x.png is train/cat/001.png)"),
    "an image in two classes": (
        lambda root: [pets(root), *(shutil.copy(root / "cat/001.png", root / f"dog/{i:03d}.png") for i in range(3))],
        "+training images are images of another class to the byte (dog/"),
    "a validation image that is a training image": (
        with_splits(lambda root: shutil.copy(root / "train/cat/001.png", root / "val/dog/x.png")),
        "+1 validation image is a training image to the byte (val/dog/x.png is train/cat/001.png)"),
    "a class in validation only": (
        with_splits(lambda root: shutil.copytree(root / "val/cat", root / "val/fox")), "class folders that training lacks: fox"),
    "test without images": (with_splits(lambda root: [shutil.rmtree(root / "test"), (root / "test").mkdir()]), "no images in"),
}  # fmt: skip


# --- Parquet ----------------------------------------------------------------------------------------------------------

ROWS = [content for images in GOOD for content in images]
LABELS = [0] * 6 + [1] * 6


def parquet(images=ROWS, labels=LABELS, names=None, **columns):
    return lambda root: write_parquet(root / "train.parquet", images, labels, names, **columns)


def table(columns, metadata=None):
    def make(root):
        root.mkdir()
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), root / "train.parquet")

    return make


def parquet_bytes(cut):
    def make(root):
        parquet()(root)
        file = root / "train.parquet"
        file.write_bytes(cut(file.read_bytes()))

    return make


def swapped(items, i, value):
    return [*items[:i], value, *items[i + 1 :]]


NAMES = {b"huggingface": json.dumps({"info": {"features": {"label": {"names": "cd"}}}}).encode()}
PARQUET = {
    "columns of other names": (table({"picture": ROWS, "class": LABELS}), "lacks the column 'image' (it has picture, class)"),
    "no label column": (table({"image": ROWS}), "lacks the column 'label'"),
    "the same column twice": (
        lambda root: [root.mkdir(), pq.write_table(pa.Table.from_arrays([pa.array(ROWS), pa.array(LABELS), pa.array(LABELS)],
                      names=["image", "label", "label"]), root / "train.parquet")], "label"),
    "no rows": (parquet([], []), "no images in"),
    "a null image": (parquet(swapped(ROWS, 3, None)), "row 3 of .* has no image bytes"),
    "images that are numbers": (table({"image": LABELS, "label": LABELS}), "row 0 of .* has no image bytes"),
    "images that are text": (table({"image": ["x"] * 12, "label": LABELS}), "row 0 of .* has no image bytes"),
    "images without bytes": (table({"image": [{"path": "a.png"}] * 12, "label": LABELS}), "row 0 of .* has no image bytes"),
    "a null label": (parquet(labels=swapped(LABELS, 5, None)), "row 5 of .* has no whole-number label"),
    "labels that are fractions": (parquet(labels=[x / 2 for x in LABELS]), "row 0 of .* has no whole-number label"),
    "labels that are words": (parquet(labels=["cat"] * 6 + ["dog"] * 6), "row 0 of .* has no whole-number label"),
    "labels that are lists": (parquet(labels=[[x] for x in LABELS]), "row 0 of .* has no whole-number label"),
    "labels that are true and false": (parquet(labels=[bool(x) for x in LABELS]), "has no whole-number label"),
    "a negative label": (parquet(labels=swapped(LABELS, 4, -1)), "label -1 of train image '4.png' is outside 0..1"),
    "a label beyond the names": (parquet(labels=swapped(LABELS, 4, 2), names=["cat", "dog"]), "label 2 of train image '4.png'"),
    "a label beyond all": (parquet(labels=swapped(LABELS, 4, 10**12)), "label 1000000000000 in"),
    "a label of 64 bits without a sign": (
        parquet(labels=pa.array(swapped(LABELS, 4, 2**63 + 5), pa.uint64())), "label"),
    "a class without rows": (parquet(labels=[x * 2 for x in LABELS]), "class '1' has no training image"),
    "no training split": (lambda root: write_parquet(root / "test.parquet", ROWS, LABELS), "in"),
    "a split of no known name": (lambda root: [parquet()(root), write_parquet(root / "more.parquet", ROWS, LABELS)],
                                 "cannot tell the split of"),
    "an image that is cut": (parquet(swapped(ROWS, 9, GOOD[0][0][:99])), "(truncated or damaged): 9.png"),
    "a file that is cut": (parquet_bytes(lambda content: content[: len(content) // 2]), "not a readable Parquet file"),
    "a file without bytes": (parquet_bytes(lambda content: b""), "not a readable Parquet file"),
    "a file that is another": (parquet_bytes(lambda content: GOOD[0][0]), "not a readable Parquet file"),
    "pages that are damaged": (parquet_bytes(lambda content: content[:8] + b"\xff" * 60 + content[68:]), "train.parquet"),
    "a folder called like a file": (lambda root: [(root / "train.parquet").mkdir(parents=True)], "train.parquet"),
    "names of classes that are none": (table({"image": ROWS, "label": LABELS}, {b"huggingface": b"{]"}), ""),
    "names that are letters of a word": (table({"image": ROWS, "label": LABELS}, NAMES), ""),
    "narrow labels and large binaries": (
        table({"image": pa.array(ROWS, pa.large_binary()), "label": pa.array(LABELS, pa.int8())}), ""),
}  # fmt: skip


# --- lists ------------------------------------------------------------------------------------------------------------


def listed(text, ending=".lst"):
    def make(root):
        pets(root)
        content = text if isinstance(text, bytes) else text.encode()
        (root / f"list{ending}").write_bytes(content)
        return root / f"list{ending}"

    return make


def lines(*more, join=" "):
    good = [f"{name}/{i:03d}.png{join}{k}" for k, name in enumerate(CLASSES) for i in range(5)]
    return "\n".join([*good, *more]) + "\n"


LISTS = {
    "a list of nothing": (listed(""), "no images in"),
    "a list of empty lines": (listed("\n \n\t\n"), "no images in"),
    "a line without a label": (listed(lines("dog/005.png")), "list.lst, line 11: expected `path label`"),
    "a line without a path": (listed(lines("1")), "list.lst, line 11: expected `path label`"),
    "a label in words": (listed(lines("dog/005.png dog")), "list.lst, line 11: expected `path label`"),
    "a label below 0": (listed(lines("dog/005.png -1")), "list.lst, line 11: expected `path label`"),
    "a label that is a fraction": (listed(lines("dog/005.png 1.5")), "list.lst, line 11: expected"),
    "a label in other digits": (listed(lines("dog/005.png ٣")), "list.lst, line 11: expected"),
    "a label beyond all": (listed(lines("dog/005.png 99999999999")), "list.lst, line 11: label 99999999999 is outside"),
    "a label of a thousand digits": (listed(lines("dog/005.png " + "9" * 1000)), "line 11: label 99.* is outside"),
    "a class that no line has": (listed(lines("dog/005.png 3")), "no line has label 2"),
    "an image that is not there": (listed(lines("dog/nothing.png 1")), "image not found"),
    "a first image that is not there": (listed("no.png 0\n" + lines()), "no image 'no.png' under"),
    "a path of zero bytes": (listed(lines("dog/0\x0003.png 1")), "dog/0"),
    "a list in another code": (listed(lines().encode("utf-16")), "line 1"),
    "binary": (listed(bytes(range(256))), "line"),
    "the same image twice": (listed(lines("dog/004.png 1")), "+list.lst lists 1 image again"),
    "Windows line ends and a mark": (listed(b"\xef\xbb\xbf" + lines().replace("\n", "\r\n").encode()), ""),
    "spaces in a path": (lambda root: [listed(lines("dog/0 0 5.png 1"))(root), (root / "dog/005.png").rename(root / "dog/0 0 5.png"),
                                       root / "list.lst"][-1], ""),
    "CSV": (listed(lines(join=","), ".csv"), ""),
    "CSV with named columns": (listed("path,label\n" + lines(join=","), ".csv"), ""),
    "CSV, a bad row": (listed("path,label\n" + lines("dog/005.png", join=","), ".csv"), "list.csv, line 12: expected `path,label`"),
    "CSV, a row too long": (listed(lines("dog/005.png,1,1", join=","), ".csv"), "list.csv, line 11: expected `path,label`"),
    "CSV, a label in words": (listed(lines("dog/005.png,dog", join=","), ".csv"), "list.csv, line 11: expected `path,label`"),
    "CSV, an open quote": (listed(lines('"dog/005.png,1', join=","), ".csv"), "list.csv, line 11"),
    "CSV, a label outside": (listed("path,label\n" + lines("dog/005.png,3000", join=","), ".csv"), "line 12: label 3000 is"),
}  # fmt: skip


def image_case(ending, content, said):
    def write(path):
        path.with_suffix(ending).write_bytes(content)

    return replaced(write), said


CASES = {
    **{f"image: {name}": image_case(*case) for name, case in IMAGES.items()},
    **{f"folder: {name}": case for name, case in FOLDERS.items()},
    **{f"Parquet: {name}": case for name, case in PARQUET.items()},
    **{f"list: {name}": case for name, case in LISTS.items()},
}
SKIPPED = [name for name in CASES if name.startswith("image: ") and CASES[name][1]] + [
    "folder: a loop of links, file", "folder: a link to nothing", "folder: a link to a device without end",
    "folder: a pipe that nobody writes to", "folder: an image that may not be read", "Parquet: an image that is cut",
    "list: an image that is not there",
]  # fmt: skip


@pytest.fixture
def place():
    """A folder that others may enter, in which the data is called ``data``; the working directory."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder) if hasattr(contextlib, "chdir") else _inside(folder),
    ):
        os.chmod(folder, 0o777)
        yield Path(folder)


@contextlib.contextmanager
def _inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def as_nobody(wanted):
    """Root may read everything; without its rights the system says no as it does to anybody."""
    if not wanted or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def flags(data, *more):
    fields = {
        "data": data,
        "width": 4,
        "method": "ce",
        "batch_size": 4,
        "image_size": 8,
        "track": "none",
        "validation": 0.2,
    }
    return ["train", *tiny_flags(**fields), "--out", "out/run", "--quiet", *more]


def matches(pattern, text):
    position = 0
    for part in pattern.split(".*"):
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def train_on(case, place, monkeypatch, capfd, *more):
    """Exit code, what was said, and what was said on stdout."""
    monkeypatch.setattr("equiframe.cli.training.write_page", lambda out: out)  # the report has its own tests
    make, _ = CASES[case]
    given = make(Path("data"))
    data = str(given) if isinstance(given, Path) and given.suffix else "./data"
    with as_nobody("may not be read" in case):
        words = flags(data, *more)
        words.remove("--quiet")
        code = main(words)
    out, error = capfd.readouterr()
    return code, out, error


def lines_of(error):
    return [line for line in error.splitlines() if line.startswith("equiframe: ")]


@pytest.mark.parametrize("case", CASES)
def test_data_that_is_not_as_it_should_be(case, place, monkeypatch, capfd):
    said = CASES[case][1]
    code, _, error = train_on(case, place, monkeypatch, capfd)
    assert "Traceback" not in error
    if not said or said.startswith("+"):
        assert code == 0, error
        assert said.lstrip("+") in error
        assert (place / "out/run/metrics.json").is_file()
        assert json.loads((place / "out/run/split.json").read_text()).get("skipped", {}) == {}
    else:
        assert code == 2, error
        assert len(lines_of(error)) == 1
        assert error.endswith(lines_of(error)[0] + "\n")
        assert any(matches(part, error) for part in said.split("|")), error
        assert not (place / "out").exists(), "nothing half written is left"


@pytest.mark.parametrize("case", SKIPPED)
def test_bad_images_are_left_out_and_listed(case, place, monkeypatch, capfd):
    code, _, error = train_on(case, place, monkeypatch, capfd, "--on-bad-image", "skip")
    assert code == 0, error
    listed = json.loads((place / "out/run/split.json").read_text())["skipped"]
    reasons = [reason for split in listed.values() for reason in split]
    assert len(reasons) == 1
    assert any(matches(part, reasons[0]) for part in CASES[case][1].split("|")), reasons


def test_the_table_is_long_enough():
    assert len(CASES) >= 60
    assert sum(bool(said) and not said.startswith("+") for _, said in CASES.values()) >= 60
