"""Whatever is wrong with the input: exit code 2, one clear line, no traceback, nothing half-written left behind."""

import json
import os
import shutil
import signal
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import encoded, picture, tiny_fields, tiny_flags, write_class, write_parquet
from equiframe.cli import main
from equiframe.recipe import Recipe
from equiframe.train import Interrupted, train


@pytest.fixture(scope="module")
def world(tmp_path_factory, finished_run):
    """A folder full of things that are not quite right. Nothing may change in it."""
    root = tmp_path_factory.mktemp("world")
    good = encoded(picture(0, 0))
    for k, name in enumerate(("cat", "dog")):
        for data in ("pets", "gap", "text", "cut", "strangers", "moved"):
            write_class(root / data / name, k, 30 if data in ("pets", "moved") else 8)
    (root / "gap" / "fox").mkdir()
    (root / "text" / "dog" / "003.png").write_text("this is not an image")
    (root / "cut" / "dog" / "003.png").write_bytes(good[:150])
    for split in ("train", "val"):
        shutil.copytree(root / "strangers", root / "extra" / split)
    write_class(root / "extra" / "val" / "fox", 0, 1)
    write_class(root / "single" / "cat", 0, 5)
    for name in ("empty", "flat", "hollow/train", "hollow/test"):
        (root / name).mkdir(parents=True)
    (root / "flat" / "a.png").write_bytes(good)
    bomb = good[:16] + (60_000).to_bytes(4, "big") * 2 + good[24:29]  # a PNG header of 60,000 x 60,000 pixels
    bomb += zlib.crc32(bomb[12:29]).to_bytes(4, "big") + good[33:]
    for name, bad in {"zero": b"", "bomb": bomb, "html": b"<html>", "noise": b"\xff\xd8" + bytes(99)}.items():
        for k, c in enumerate(("cat", "dog")):
            write_class(root / name / c, k, 8)
        (root / name / "dog" / "003.png").write_bytes(bad)
    for k, c in enumerate(("c\nt", "d\u00f6g")):
        write_class(root / "odd names" / c, k, 8)
    (root / "odd names" / "c\nt" / "00\n3.png").write_bytes(good[:150])
    (root / "loop").mkdir()
    os.symlink(root / "loop" / "cat", root / "loop" / "cat")
    for k, c in enumerate(("cat", "dog")):
        write_class(root / "dangling" / c, k, 8)
    os.symlink(root / "nothing.png", root / "dangling" / "dog" / "a.png")
    for name, text in {"words": "pets/cat/000.png cat", "short": "pets/cat/000.png", "minus": "pets/cat/000.png -1",
                       "gap": "pets/cat/000.png 0\npets/dog/000.png 2\npets/dog/001.png 2", "none": "", "lost": "no.png 0",
                       "wild": "pets/cat/000.png 99999999999"}.items():  # fmt: skip
        (root / f"{name}.lst").write_text(text)
    (root / "file").write_text("x")
    for k in range(100):
        write_class(root / "hundred" / f"{k:03d}", k, 2)

    write_parquet(root / "outside" / "train.parquet", [good] * 3, [0, 1, 2], ["cat", "dog"])
    write_parquet(root / "no rows" / "train.parquet", [], [])
    write_parquet(root / "null label" / "train.parquet", [good] * 3, [0, None, 1])
    write_parquet(root / "fractions" / "train.parquet", [good] * 3, [0.0, 1.0, 0.5])
    write_parquet(root / "negative" / "train.parquet", [good] * 3, [0, 1, -1])
    write_parquet(root / "null" / "train.parquet", [good, None, good], [0, 1, 1])
    write_parquet(root / "junk-image" / "train.parquet", [good] * 9 + [good[:99]], [0, 1] * 5)
    write_parquet(root / "test-only" / "test.parquet", [good] * 2, [0, 1])
    for name, table in (("columns", {"picture": [good], "class": [0]}), ("words", {"image": [good], "label": ["cat"]})):
        (root / name).mkdir()
        pq.write_table(pa.table(table), root / name / "train.parquet")
    (root / "not-parquet").mkdir()
    (root / "not-parquet" / "train.parquet").write_text("PAR1 or so")

    recipes = {
        "broken.yaml": "epochs: [1, 2", "list.yaml": "- epochs", "empty.yaml": "", "types.yaml": "epochs: many",
        "field.yaml": "epcohs: 3", "number.yaml": "17", "keys.yaml": "1: 2", "tag.yaml": "data: !!python/object:os.x {}",
    }  # fmt: skip
    for name, text in recipes.items():
        (root / name).write_text(text)
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")

    recipe = Recipe(**tiny_fields(data=str(root / "pets"), batch_size=4, width=4, method="ce"))
    with pytest.raises(Interrupted):
        train(
            recipe, root / "stopped",
            progress=lambda state: signal.raise_signal(signal.SIGINT) if state.get("step") == 10 else None,
        )  # fmt: skip
    for name, file, content in (
        ("damaged", "checkpoints/last.pt", b"PK junk"),
        ("halved", "checkpoints/last.pt", (root / "stopped" / "checkpoints" / "last.pt").read_bytes()[:3000]),
        ("no-recipe", "recipe.yaml", b"{"),
        ("no-split", "split.json", b"[]"),
    ):
        shutil.copytree(root / "stopped", root / name)
        (root / name / file).write_bytes(content)
    shutil.copytree(finished_run, root / "run")
    shutil.copytree(finished_run, root / "run-damaged")
    (root / "run-damaged" / "model.safetensors").write_bytes(b"junk")
    train(recipe.with_(data=str(root / "moved")), root / "run-moved")
    shutil.rmtree(root / "moved")
    (root / "good.png").write_bytes(good)
    (root / "bad.png").write_bytes(good[:150])
    (root / "text.jpg").write_text("text")
    return root


def train_on(data, *more):
    return ["train", *tiny_flags(data=data, width=4, method="ce", batch_size=4), "--out", "out/run", "--quiet", *more]


def digits(*more):
    return train_on("digits", *more)


def resume(run, *more):
    return [*train_on("pets", "--resume", *more), "--out", run]


CASES = {
    # data
    "missing path": (train_on("no/such/folder"), "no such folder: no/such/folder"),
    "missing name": (train_on("cifra10"), "unknown data set 'cifra10'; did you mean 'cifar10'?"),
    "no DATA": (["train", "--epochs", "1"], "DATA is missing: equiframe train DATA"),
    "file": (train_on("file"), "DATA is a file, not a folder: file"),
    "empty folder": (train_on("empty"), "empty has no class folders"),
    "images without class folders": (train_on("flat"), "flat has no class folders"),
    "empty train folder": (train_on("hollow"), "no class folders|without images"),
    "class folder without images": (train_on("gap"), "class folder without images: gap/fox"),
    "single class": (train_on("single"), "single has a single class ('cat'); classification needs at least two"),
    "class in val only": (train_on("extra"), "extra/val has class folders that training lacks: fox"),
    "text as image": (
        train_on("text"),
        "not an image, or a kind that cannot be read: dog/003.png (--on-bad-image skip leaves such files out",
    ),
    "text as image, streamed": (train_on("text", "--data-mode", "stream"), "not an image, .*: dog/003.png"),
    "truncated image": (train_on("cut"), "image cannot be decoded (truncated or damaged): dog/003.png"),
    "truncated image, streamed": (train_on("cut", "--data-mode", "stream"), "(truncated or damaged): dog/003.png"),
    "truncated image in Parquet": (train_on("junk-image"), "image cannot be decoded (truncated or damaged): 9.png"),
    "hub name": (train_on("hf:"), "hf:NAME lacks the NAME"),
    "Parquet without columns": (train_on("columns"), "lacks the column 'image' (it has picture, class)"),
    "Parquet with null bytes": (train_on("null"), "row 1 of null/train.parquet has no image bytes"),
    "Parquet label outside": (train_on("outside"), "label 2 of train image '2.png' is outside 0..1"),
    "Parquet negative label": (train_on("negative"), "label -1 of train image '2.png' is outside 0..1"),
    "Parquet label in words": (train_on("words"), "row 0 of words/train.parquet has no whole-number label"),
    "not Parquet": (train_on("not-parquet"), "not a readable Parquet file: not-parquet/train.parquet"),
    "Parquet without train": (train_on("test-only"), "test-only"),
    "empty image": (train_on("zero"), "dog/003.png"),
    "decompression bomb": (train_on("bomb"), "would unpack to too many pixels: dog/003.png"),
    "decompression bomb, streamed": (train_on("bomb", "--data-mode", "stream"), "too many pixels: dog/003.png"),
    "HTML called PNG": (train_on("html"), "not an image, .*: dog/003.png"),
    "JPEG of nothing": (train_on("noise"), "dog/003.png"),
    "newline in a name": (train_on("odd names"), "(truncated or damaged): c t/00 3.png"),
    "symlink loop": (train_on("loop"), "loop has no class folders"),
    "dangling symlink": (train_on("dangling"), "image not found: dangling/dog/a.png"),
    "Parquet without rows": (train_on("no rows"), "no images in no rows"),
    "Parquet with a null label": (train_on("null label"), "row 1 of .* has no whole-number label"),
    "Parquet with fractions": (train_on("fractions"), "has no whole-number label"),
    "list of words": (train_on("words.lst"), "words.lst, line 1: expected `path label`"),
    "list without labels": (train_on("short.lst"), "short.lst, line 1: expected `path label`"),
    "list with a negative label": (train_on("minus.lst"), "minus.lst, line 1: expected `path label`"),
    "list with a gap": (train_on("gap.lst"), "gap.lst: no line has label 1"),
    "empty list": (train_on("none.lst"), "no images in none.lst"),
    "list of nothing there": (train_on("lost.lst"), "no image 'no.png' under"),
    "list with a wild label": (train_on("wild.lst"), "wild.lst, line 1: label 99999999999 is outside"),
    "all images bad": (["predict", "run", "bad.png", "--on-bad-image", "skip"], "none of the 1 images can be read"),
    "what to do with bad images": (train_on("pets", "--on-bad-image", "ignore"), "unknown on bad image 'ignore'"),
    "time to stop": (train_on("pets", "--stop-after", "soon"), "'soon' is not a time such as 90s"),
    "no built-in data": (train_on("svhn", "--data-root", "empty"), "svhn is not under --data-root empty"),
    # what does not fit
    "K and D": (
        train_on(
            "hundred", "--method", "etf-ce", "--geometry", "orthoplex", "--backbone", "resnet20", "--validation", "0.5"
        ),
        "K=100.*D=16",
    ),
    "simplex in too few dimensions": (
        digits("--method", "etf-ce", "--geometry", "simplex"),
        "K=10 needs D >= 9, got D=4",
    ),
    "counts of another length": (digits("--class-counts", "5,4,3"), "3 class counts were given for 10 classes"),
    "count of nothing": (digits("--class-counts", "5,4,3,0,5,5,5,5,5,5"), "every class needs at least one image"),
    "counts and ratio": (
        digits("--class-counts", "5,4", "--imbalance", "5"),
        "give imbalance or class_counts, not both",
    ),
    "ratio beyond the data": (digits("--imbalance", "5000"), "without images; use a ratio of at most 125"),
    "ratio below 1": (digits("--imbalance", "0.01"), "n_max/n_min must be >= 1, got 0.01"),
    "nothing to validate on": (train_on("pets", "--validation", "0"), "validation must not be 0"),
    "resized crops in memory": (digits("--augmentation", "resized-crop-flip"), "needs data_mode stream"),
    "dot regression on a linear head": (digits("--loss", "dr"), "needs head 'frame' or 'nearest-frame', not 'linear'"),
    "margins on a linear head": (digits("--loss", "ldam"), "needs head 'cosine', 'frame' or 'nearest-frame'"),
    "late start of no weighting": (digits("--reweight-from", "0.8"), "does not belong to class weighting 'none'"),
    "effective number beyond 1": (
        digits("--class-weighting", "effective-number", "--effective-beta", "1"),
        "effective_beta must be in",
    ),
    "scales on a frame": (
        digits("--method", "etf-ce", "--second-stage", "lws"),
        "those of head 'frame' all have equal",
    ),
    "second stage": (digits("--second-stage", "crtt"), "unknown second stage 'crtt'; did you mean 'crt'?"),
    "unknown augmentation": (
        digits("--augmentation", "crop+cutot"),
        "unknown augmentation 'cutot'; did you mean 'cutout'",
    ),
    "two crops": (
        digits("--augmentation", "crop+crop-flip"),
        "crop and crop-flip both say how images are cut; take one",
    ),
    "centre crop in memory": (digits("--centre-crop", "0.875"), "centre_crop belongs to streamed images"),
    "centre crop beyond": (digits("--centre-crop", "1.5"), "centre_crop must be between 0.1 and 1, got 1.5"),
    "draft in memory": (
        digits("--draft"),
        "draft decodes what random boxes need; it needs augmentation resized-crop-flip",
    ),
    "sampler": (digits("--sampler", "balanced"), "unknown sampler 'balanced'; did you mean 'class-balanced'?"),
    "negative cutmix": (digits("--cutmix", "-1"), "cutmix must not be negative, got -1"),
    "mixing that never begins": (
        digits("--mixup", "1", "--mix-until", "0"),
        "mix_until must be above 0 and at most 1, got 0",
    ),
    "share of no mixing": (
        digits("--mix-share", "known", "--mixup", "0"),
        "mix_share says how many batches are mixed; it needs",
    ),
    "end of no mixing": (digits("--mix-until", "0.8", "--mixup", "0"), "it needs mixup or cutmix above 0"),
    "share of no mixing, by the method": (digits("--mix-share", "known"), "it needs mixup or cutmix above 0"),
    "remix of nothing": (digits("--remix", "--mixup", "0"), "it needs mixup or cutmix above 0"),
    "field of another head": (digits("--e-w", "2"), "field 'e_w' does not belong to head 'linear'"),
    "frame of length 0": (digits("--method", "etf-ce", "--width", "9", "--e-w", "0"), "e_w must be a positive number"),
    "smoothing beyond 1": (digits("--label-smoothing", "1.5"), "smoothing"),
    "split of other data": (train_on("pets", "--split", "run/split.json"), "run/split.json belongs to other data"),
    "split that is none": (train_on("pets", "--split", "good.png"), "good.png is not a split manifest"),
    "split that is missing": (train_on("pets", "--split", "none.json"), "cannot read split none.json"),
    "pretrained of ours": (digits("--pretrained"), "mlp has no pretrained weights"),
    "width of timm": (digits("--backbone", "test_resnet"), "width is an option of"),
    "device": (digits("--device", "gpu"), "device 'gpu' cannot be used here"),
    # names
    "method": (digits("--method", "etf-rd"), "unknown method 'etf-rd'; did you mean 'etf-dr'?"),
    "backbone": (digits("--backbone", "resnt32"), "unknown backbone 'resnt32'; did you mean 'resnet32'?"),
    "geometry": (digits("--method", "etf-ce", "--geometry", "simplx"), "did you mean 'simplex'?"),
    "head": (digits("--head", "liner"), "unknown head 'liner'; did you mean 'linear'?"),
    "loss": (digits("--loss", "balanced"), "unknown loss 'balanced'; did you mean 'balanced-softmax'?"),
    "weighting": (digits("--class-weighting", "balanced"), "did you mean 'class-balanced'?|'batch-balanced'"),
    "option value": (digits("--schedule", "cosin"), "unknown schedule 'cosin'; did you mean 'cosine'?"),
    "flag": (digits("--epoch", "3"), "unknown option '--epoch'; did you mean '--epochs'?"),
    "flag with =": (digits("--epoch=3"), "unknown option '--epoch'; did you mean '--epochs'?"),
    "flag of predict": (["predict", "run", "good.png", "--tpo", "3"], "unknown option '--tpo'; did you mean '--top'?"),
    "verb": (["trian", "digits"], "unknown command 'trian'; did you mean 'train'?"),
    "one word too many": (digits("more"), "unexpected argument 'more'"),
    "flag without value": (["train", "digits", "--epochs"], "argument --epochs: expected one argument"),
    "no RUN": (["evaluate"], "the following arguments are required: RUN"),
    # numbers
    "epochs 0": (digits("--epochs", "0"), "epochs must be at least 1, got 0"),
    "epochs in words": (digits("--epochs", "ten"), "argument --epochs: invalid int value: 'ten'"),
    "negative mixup": (digits("--mixup", "-1"), "mixup must not be negative, got -1"),
    "infinite rate": (digits("--lr", "inf"), "field 'lr' must be a finite number"),
    "rate that explodes": (digits("--lr", "1e30", "--warmup", "0"), "in epoch 1, step .* lower --lr than 1e+30"),
    "optimiser": (digits("--optimizer", "adam"), "unknown optimizer 'adam'; did you mean 'adamw'?"),
    "layer decay above 1": (digits("--layer-decay", "1.5"), "layer_decay must be above 0 and at most 1, got 1.5"),
    "layer decay of ours": (digits("--layer-decay", "0.7"), "needs a backbone of timm that groups its layers; MLP"),
    "average of all": (digits("--ema", "1"), "ema must be at least 0 and below 1, got 1"),
    "radius below 0": (digits("--sam", "-0.1"), "sam must not be negative, got -0.1"),
    "validation out of range": (digits("--validation", "1.5"), "validation must be between 0 and 0.9, got 1.5"),
    "batch of one": (digits("--batch-size", "1"), "batch_size must be at least 2, got 1"),
    "tiny images": (digits("--image-size", "2"), "image_size must be at least 4, got 2"),
    "width 0": (digits("--width", "0"), "width must be at least 1, got 0"),
    "huge seed": (digits("--seed", str(10**30)), "seed must be below 2^63"),
    "counts in words": (digits("--class-counts", "a,b"), "'a,b' is not a list of whole numbers"),
    # recipes
    "recipe missing": (digits("--config", "none.yaml"), "cannot read recipe none.yaml"),
    "recipe is a folder": (digits("--config", "./pets"), "cannot read recipe ./pets"),
    "recipe not packaged": (digits("--config", "cifar10"), "unknown recipe 'cifar10'; did you mean 'cifar10-lt'?"),
    "broken YAML": (digits("--config", "broken.yaml"), "recipe broken.yaml is not YAML"),
    "YAML that runs code": (digits("--config", "tag.yaml"), "recipe tag.yaml is not YAML"),
    "binary recipe": (digits("--config", "binary.yaml"), "recipe binary.yaml is not YAML"),
    "list": (digits("--config", "list.yaml"), "must be a mapping of fields, got list"),
    "number": (digits("--config", "number.yaml"), "must be a mapping of fields, got int"),
    "empty recipe": (digits("--config", "empty.yaml"), "must be a mapping of fields, got NoneType"),
    "types": (["train", "digits", "--config", "types.yaml"], "field 'epochs' must be a whole number, got 'many'"),
    "field": (digits("--config", "field.yaml"), "unknown field 'epcohs'; did you mean 'epochs'?"),
    "keys": (digits("--config", "keys.yaml"), "unknown field 1"),
    # output folders
    "another run": ([*digits(), "--out", "run"], "run already holds a finished run; choose another --out"),
    "other files": ([*digits(), "--out", "pets"], "output folder pets is not empty and not a run"),
    "output is a file": ([*digits(), "--out", "file"], "output file is a file"),
    "below a file": ([*digits(), "--out", "file/run"], "cannot create file/run: file is a file|file is a file"),
    "no permission": ([*digits(), "--out", "/proc/equiframe/run"], "cannot create /proc|no permission"),
    "nothing to resume": ([*digits("--resume")], "nothing to resume: out/run holds no run"),
    "resume in other files": (resume("pets"), "nothing to resume: pets holds no run"),
    "another recipe": (
        resume("stopped", "--lr", "0.2"),
        "stopped holds a run of another recipe (lr was 0.05, now 0.2)",
    ),
    "damaged checkpoint": (resume("damaged"), "checkpoint damaged/checkpoints/last.pt cannot be read"),
    "half a checkpoint": (resume("halved"), "checkpoint halved/checkpoints/last.pt cannot be read"),
    "damaged recipe": (resume("no-recipe"), "recipe no-recipe/recipe.yaml is not YAML"),
    "damaged split": (resume("no-split"), "no-split/split.json is damaged"),
    # compare
    "no methods": (["compare", *tiny_flags(), "--methods", ","], "compare needs at least one method and one seed"),
    "method in a list": (["compare", *tiny_flags(), "--methods", "ce,etf"], "unknown method 'etf'; did you mean 'etf-"),
    "seeds in words": (["compare", *tiny_flags(), "--seeds", "x"], "'x' is not a list of whole numbers"),
    "variant of an unknown field": (
        ["compare", *tiny_flags(), "--methods", "ce,etf-la:tua=1"],
        "unknown field 'tua'; did you mean 'tau'",
    ),
    "setting of an unknown field": (digits("--set", "epcohs=3"), "unknown field 'epcohs'; did you mean 'epochs'?"),
    "setting without a value": (digits("--set", "lr"), "a setting must be FIELD=VALUE, got 'lr'"),
    "seed as a setting": (["compare", *tiny_flags(), "--set", "seed=1"], "--set seed: a comparison takes --seeds"),
    "reference": (["compare", *tiny_flags(), "--methods", "ce", "--reference", "cosine"], "unknown reference 'cosine'"),
    "budget in words": (
        ["compare", *tiny_flags(), "--budget", "soon"],
        "'soon' is not a time such as 90s, 30min, 2h or 1d",
    ),
    "no budget": (["compare", *tiny_flags(), "--budget", "0s"], "budget must be more than 0 seconds, got 0"),
    "no jobs": (["compare", *tiny_flags(), "--jobs", "0"], "jobs must be at least 1, got 0"),
    "tuning on test images": (
        ["compare", *tiny_flags(), "--validation", "0", "--tune", "2"],
        "validation 0 leaves none",
    ),
    "reference of a report": (["report", "run", "--reference", "etf", "--out", "r.html"], "unknown reference 'etf'"),
    "compare into a run": (["compare", *tiny_flags(), "--out", "run"], "output folder run holds other files"),
    "compare into a file": (["compare", *tiny_flags(), "--out", "file"], "file is a file"),
    # finished runs
    "evaluate nothing": (["evaluate", "none"], "no such run folder: none"),
    "evaluate a folder": (["evaluate", "pets"], "pets is not a run folder"),
    "evaluate an unfinished run": (["evaluate", "stopped"], "stopped has not finished training"),
    "evaluate a damaged run": (["evaluate", "run-damaged"], "run-damaged/model.safetensors is damaged or does not fit"),
    "evaluate without its data": (["evaluate", "run-moved"], "no such folder"),
    "predict without a run": (["predict", "pets", "good.png"], "pets is not a run folder"),
    "predict a missing image": (["predict", "run", "none.png"], "no such image or folder: none.png"),
    "predict a folder without images": (["predict", "run", "empty"], "no images in empty"),
    "predict a damaged image": (["predict", "run", "good.png", "bad.png"], "(truncated or damaged): bad.png"),
    "predict text": (["predict", "run", "text.jpg"], "not an image, or a kind that cannot be read: text.jpg"),
    "predict top 0": (["predict", "run", "good.png", "--top", "0"], "--top must be at least 1, got 0"),
    "predict to nowhere": (["predict", "run", "good.png", "--out", "none/p.csv"], "no such folder: none"),
    "predict to a folder": (["predict", "run", "good.png", "--out", "empty", "--quiet"], "cannot write empty"),
    "predict on no device": (["predict", "run", "good.png", "--device", "tpu"], "device 'tpu' cannot be used here"),
    # frames
    "frame of one class": (["frame", "1", "5"], "at least 2 classes, got num_classes=1"),
    "frame that does not fit": (["frame", "1000", "3", "--geometry", "orthoplex"], "K=1000 needs D >= 500"),
    "frame without room": (["frame", "1025", "3"], "K=1025 classes in D=3 dimensions: widen to D >= 32 (gold)"),
    "frame of words": (["frame", "ten", "5"], "argument K: invalid int value: 'ten'"),
    "frame of no dimensions": (["frame", "3", "0"], "dim >= 1"),
    "frame geometry": (
        ["frame", "3", "5", "--geometry", "simplx"],
        "unknown geometry 'simplx'; did you mean 'simplex'?",
    ),
}


def tree(root):
    """Every file and folder below the root with its time and size; the root's own time tells of what came and went, too."""
    found = {}
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            state = os.lstat(path)
            found[os.path.relpath(path, root)] = state.st_mtime_ns, state.st_size
    found.pop(".")
    return found


@pytest.fixture(scope="module")
def changes(world):
    """``changes()``: what changed in the world since it was last asked."""
    before = tree(world)

    def changed():
        nonlocal before
        earlier, before = before, tree(world)
        return {name for name, _ in earlier.items() ^ before.items()}

    return changed


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, world, changes, monkeypatch, capfd):
    arguments, message = CASES[case]
    monkeypatch.chdir(world)
    code = main(arguments)
    out, error = capfd.readouterr()
    assert code == 2, error
    assert out == ""
    assert error.count("\n") == 1, error
    assert error.startswith("equiframe: ")
    assert any(matches(part, error) for part in message.split("|")), error
    assert not changes()


def test_the_check_of_changes_can_fail(world, changes):
    assert not changes()
    (world / "pets" / "cat" / "new").touch()
    assert changes() == {"pets/cat", "pets/cat/new"}
    (world / "pets" / "cat" / "new").unlink()
    assert changes() == {"pets/cat", "pets/cat/new"}


def matches(pattern, text):
    """Whether the parts of a pattern, separated by ``.*``, come in the text in this order."""
    position = 0
    for part in pattern.split(".*"):
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def test_the_check_of_messages_can_fail():
    assert matches("a.*c", "abc")
    assert not matches("c.*a", "abc")


def test_nothing_but_the_line_in_a_real_process(equiframe, world):
    for arguments in (train_on("cut"), ["train", "digits", "--epoch", "3"]):
        result = equiframe(*arguments, cwd=world)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("equiframe: ")
        assert result.stderr.count("\n") == 1


def test_a_folder_that_may_not_be_read(world, monkeypatch, capsys):
    """Root may read everything, so the system's answer is imitated."""
    monkeypatch.chdir(world)
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    assert main(train_on("pets")) == 2
    assert capsys.readouterr().err == "equiframe: no permission: pets/dog\n"


def test_a_bug_of_ours_is_not_called_bad_input(monkeypatch):
    def bug(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("equiframe.train.prepare_data", bug)
    with pytest.raises(ZeroDivisionError):  # a traceback, and exit code 1
        main(train_on("digits"))


def test_the_good_neighbours_of_the_bad_input_work(world, tmp_path, monkeypatch, capsys):
    """The table would prove nothing if its flags were wrong already."""
    monkeypatch.chdir(world)
    assert main([*train_on("pets"), "--out", str(tmp_path / "run")]) == 0
    shutil.copytree("stopped", tmp_path / "stopped")
    assert main([*resume(str(tmp_path / "stopped"))]) == 0
    assert main(["predict", "run", "good.png"]) == 0
    assert main(["frame", "10", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_classes"] == 10
