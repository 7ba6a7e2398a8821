"""The packaged recipes: each loads, resolves, and says only what differs from the defaults."""

import json
import re
from pathlib import Path

import pytest
import yaml

from equiframe.backbones import OWN_BACKBONES, check_backbone, make_backbone
from equiframe.cli import main
from equiframe.data.builtin import BUILTIN_NAMES
from equiframe.errors import InputError
from equiframe.frames import choose_geometry
from equiframe.heads import FrameHead
from equiframe.method import METHOD_FIELDS, METHODS, build_head, resolve_method
from equiframe.recipe import PACKAGED_RECIPES, Recipe, load_recipe, packaged_recipes
from equiframe.variants import parse_variants

pytestmark = pytest.mark.usefixtures("plain_pages")

DOCS = Path(__file__).parents[1] / "docs" / "datasets.md"
NAMES = sorted(set(packaged_recipes()) - {"equiframe-best"})


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_resolves(name):
    stated = load_recipe(name)
    recipe = Recipe(**stated)
    assert recipe.data in BUILTIN_NAMES
    assert [field for field, value in stated.items() if getattr(Recipe(), field) == value] == []
    check_backbone(recipe.backbone)
    for method in METHODS:  # every method can be put on it
        assert resolve_method(method, {field: getattr(recipe, field) for field in METHOD_FIELDS})["head"]


def test_equiframe_best_is_what_train_does_by_default():
    stated = load_recipe("equiframe-best")
    assert {"method", "weight_decay"} == set(stated)
    assert Recipe(**stated) == Recipe()


def test_the_papers_recipes():
    assert {"cifar10-lt", "cifar100-lt", "svhn-lt", "stl10-lt", "imagenet-lt-resnet50"} < set(NAMES)
    assert {"cub-resnet34", "cub-resnet50", "cub-resnet101"} < set(NAMES)
    for name in ("cifar10-lt", "cifar100-lt", "cifar100-lt-standard", "svhn-lt", "stl10-lt"):
        recipe = Recipe(**load_recipe(name))
        assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum) == (200, 128, 0.1, 0.9)
        assert (recipe.weight_decay, recipe.mixup, recipe.schedule, recipe.imbalance) == (2e-4, 1.0, "steps", 100)
        assert recipe.warmup * recipe.epochs == pytest.approx(5)
        assert recipe.backbone == "resnet32"
    imagenet = Recipe(**load_recipe("imagenet-lt-resnet50"))
    assert (imagenet.epochs, imagenet.batch_size, imagenet.lr, imagenet.weight_decay) == (90, 1024, 0.1, 5e-4)
    assert (imagenet.mixup, imagenet.schedule) == (0.2, "cosine")


@pytest.mark.parametrize(
    ("name", "num_classes", "geometry"),
    [("cifar10-lt", 10, "simplex"), ("cifar100-lt", 100, "simplex"), ("cifar100-lt-standard", 100, "orthoplex")],
)
def test_the_frame_that_fits(name, num_classes, geometry):
    recipe = Recipe(**load_recipe(name))
    assert recipe.backbone in OWN_BACKBONES
    assert choose_geometry(num_classes, make_backbone(recipe.backbone, width=recipe.width).num_features) == geometry


def test_a_recipe_by_name_is_its_file(tmp_path, monkeypatch):
    assert load_recipe("cifar10-lt") == yaml.safe_load((PACKAGED_RECIPES / "cifar10-lt.yaml").read_text())
    with pytest.raises(InputError, match=r"unknown recipe 'cifar10-it'; did you mean 'cifar10-lt'\?"):
        load_recipe("cifar10-it")
    monkeypatch.chdir(tmp_path)
    Path("cifar10-lt").write_text("epochs: 3")  # a file of that name needs its folder told
    assert load_recipe("cifar10-lt")["epochs"] == 200
    assert load_recipe("./cifar10-lt") == {"epochs": 3}
    assert load_recipe(tmp_path / "cifar10-lt") == {"epochs": 3}


def test_the_command_line_takes_the_name(capsys, tmp_path):
    command = ["train", "--config", "cub-resnet34", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"equiframe: cub200 is not under --data-root {tmp_path} ")


def test_the_verb_lists_them(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in packaged_recipes() if name not in shown] == []
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {name: load_recipe(name) for name in packaged_recipes()}
    assert all(len(text) > 20 for text in packaged_recipes().values())


def test_the_docs_tell_of_every_recipe():
    assert [name for name in packaged_recipes() if f"{name}`" not in DOCS.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    ("ratio", "frame", "learnable"), [(1, "etf-ce", ["ce"]), (100, "etf-la", ["balanced-softmax", "ce"])]
)
def test_the_widths_benchmark_holds_an_orthoplex_against_a_simplex(ratio, frame, learnable):
    """benchmarks/tiny-imagenet-widths.sh, which is not run here: its settings resolve to the heads that it promises."""
    folder = Path(__file__).parents[1] / "benchmarks"
    fields = yaml.safe_load((folder / f"tiny-imagenet-widths-r{ratio}.yaml").read_text())
    script = (folder / "tiny-imagenet-widths.sh").read_text().replace("\\\n", "")
    names = re.search(rf"-r{ratio}\.yaml.*--methods (\S+)", script).group(1).split(",")
    heads = {}
    for variant in parse_variants(names):
        recipe = variant.recipe(Recipe(method="ce", **fields))
        width = make_backbone(recipe.backbone, image_size=32, width=recipe.width, pretrained=False).num_features
        head = build_head(resolve_method(recipe.method, {n: getattr(recipe, n) for n in METHOD_FIELDS}), width, 100)
        heads[variant.name] = (width, head.frame.geometry if isinstance(head, FrameHead) else "learnable")
    promised = {frame: (64, "orthoplex"), f"{frame}:width=32": (128, "simplex")}
    if ratio == 100:
        promised["etf-la:epochs=12"] = promised[frame]
    assert heads == promised | dict.fromkeys(learnable, (64, "learnable"))
    assert (fields.get("imbalance"), sum(fields.get("class_counts", []))) == {1: (None, 10_800), 100: (100.0, 0)}[ratio]


def test_a_recipe_of_an_earlier_version(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: digits\nprofile: step\n")
    assert Recipe(**load_recipe(tmp_path / "recipe.yaml")).tail == "step"
