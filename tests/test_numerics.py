"""The measured trial: candidates, the cache of its speeds, compilation where it pays and a line where it cannot."""

import functools
import json
import subprocess
import sys

import pytest
import torch

from equiframe import numerics
from equiframe.backbones import MLP, make_backbone
from equiframe.cli import main
from equiframe.errors import InputError
from equiframe.heads import LinearHead
from equiframe.model import Classifier
from equiframe.numerics import Numerics, choose_numerics, compiling_fails, keep_memory
from equiframe.recipe import Recipe, load_recipe, setting_from_text
from equiframe.runs import RunFolder
from equiframe.train import train

CPU = {"device": "cpu", "precision": "float32", "memory_format": "auto"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIFRAME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(make_backbone("resnet20", width=2), LinearHead(8, 2))


@pytest.fixture
def speeds(monkeypatch):
    """``speeds({"float32 contiguous": 10, …})``: steps that take no time, on a clock that says how fast each one is.
    Returns the list of candidates that were tried, which grows."""
    tried, clock = [], [0.0]

    def install(table):
        def step_of(_model, candidate, _size, batch):
            tried.append(str(candidate))

            def step():
                clock[0] += batch / table[str(candidate)]

            return step

        monkeypatch.setattr(numerics, "_trial_step", step_of)
        monkeypatch.setattr(numerics.time, "perf_counter", lambda: clock[0])
        monkeypatch.setattr(numerics, "compiling_fails", lambda device: None)
        return tried

    return install


def test_the_next_run_asks_the_cache_and_chooses_the_same(model, speeds, cache):
    tried = speeds({"float32 contiguous": 10, "float32 channels-last": 20})
    first = choose_numerics(model, 8, 4, **CPU)
    assert (first.memory_format, first.trial) == (
        "channels-last",
        {"float32 contiguous": 10, "float32 channels-last": 20},
    )
    assert first.note == ""
    speeds({"float32 contiguous": 20, "float32 channels-last": 10})  # a busier moment
    again = choose_numerics(model, 8, 4, **CPU)
    assert again == first
    assert again.note == "kept from an earlier trial"
    assert len(tried) == 2
    assert len(list(cache.iterdir())) == 1
    for other in (
        lambda: choose_numerics(model, 16, 4, **CPU),
        lambda: choose_numerics(model, 8, 8, **CPU),
        lambda: choose_numerics(Classifier(make_backbone("resnet20", width=4), LinearHead(16, 2)), 8, 4, **CPU),
    ):  # another question
        before = len(tried)
        assert other().memory_format == "contiguous"
        assert len(tried) == before + 2


def test_threads_are_part_of_the_question(model, speeds, monkeypatch):
    tried = speeds({"float32 contiguous": 10, "float32 channels-last": 20})
    choose_numerics(model, 8, 4, **CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    choose_numerics(model, 8, 4, **CPU)
    assert len(tried) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"batch": 4', '"batch": 5'),
        lambda text: text.replace("20.0", "NaN"),
        lambda text: text.replace("20.0", "0"),
        lambda text: text.replace("20.0", '"fast"'),
        lambda text: json.dumps(json.loads(text) | {"images_per_second": {}}),
        lambda text: "\x00\xff",
    ],
)
def test_a_damaged_cache_is_measured_anew_and_rewritten(model, speeds, cache, damage):
    tried = speeds({"float32 contiguous": 10, "float32 channels-last": 20})
    choose_numerics(model, 8, 4, **CPU)
    (file,) = cache.iterdir()
    whole = file.read_text()
    assert damage(whole) != whole
    file.write_text(damage(whole), encoding="utf-8")
    assert choose_numerics(model, 8, 4, **CPU).memory_format == "channels-last"
    assert len(tried) == 4
    assert file.read_text() == whole


def test_where_the_cache_lies_and_how_to_switch_it_off(model, speeds, tmp_path, monkeypatch):
    tried = speeds({"float32 contiguous": 10, "float32 channels-last": 20})
    monkeypatch.setenv("EQUIFRAME_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for _ in range(2):
        choose_numerics(model, 8, 4, **CPU)
    assert len(tried) == 4
    assert not (tmp_path / "xdg").exists()
    monkeypatch.delenv("EQUIFRAME_CACHE")
    choose_numerics(model, 8, 4, **CPU)
    assert len(list((tmp_path / "xdg" / "equiframe").glob("trial-*.json"))) == 1
    monkeypatch.setenv("EQUIFRAME_CACHE", str(tmp_path / "file" / "in"))
    (tmp_path / "file").write_text("not a folder")
    assert choose_numerics(model, 8, 4, **CPU).memory_format == "channels-last"  # a cache that cannot be is none


def test_compiling_is_tried_where_the_run_is_long_enough(model, speeds):
    table = {"float32 contiguous": 100, "float32 channels-last": 100, "float32 contiguous compiled": 200}
    tried = speeds(table)
    short = choose_numerics(model, 8, 4, **CPU, compile="auto", steps=45_000)  # 180,000 images: 1,800 s
    assert not short.compile
    assert short.note == "not compiled: 1800 s of training would not earn it back"
    assert not any("compiled" in name for name in tried)
    long = choose_numerics(model, 8, 4, **CPU, compile="auto", steps=45_001)
    assert long.compile
    assert str(long) == "float32 contiguous compiled"
    assert long.trial == table
    fixed = {"device": "cpu", "precision": "float32", "memory_format": "contiguous"}
    assert choose_numerics(model, 8, 4, **fixed, compile="auto", steps=10**6).compile
    assert choose_numerics(model, 8, 4, **fixed).trial == {}


def test_compiling_that_gains_little_is_not_chosen(model, speeds):
    speeds({"float32 contiguous": 100, "float32 channels-last": 100, "float32 contiguous compiled": 109})
    chosen = choose_numerics(model, 8, 4, **CPU, compile="auto", steps=10**6)
    assert not chosen.compile
    assert chosen.trial["float32 contiguous compiled"] == 109


def test_without_a_compiler_auto_says_so_and_on_is_an_error(model, speeds, monkeypatch):
    tried = speeds({"float32 contiguous": 100, "float32 channels-last": 100})
    monkeypatch.setattr(numerics, "compiling_fails", lambda device: "No working C++ compiler found")
    chosen = choose_numerics(model, 8, 4, **CPU, compile="auto", steps=10**6)
    assert not chosen.compile
    assert chosen.note == "not compiled: No working C++ compiler found"
    assert not any("compiled" in name for name in tried)
    with pytest.raises(
        InputError, match=r"--compile on cannot work here: No working C\+\+ compiler found; take --comp"
    ):
        choose_numerics(model, 8, 4, **CPU, compile="on")


def test_what_fails_is_told_in_one_line(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("\n  backend='inductor' raised:\nInvalidCxxCompiler: none\n")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert compiling_fails(torch.device("cpu")) == "backend='inductor' raised:"
    monkeypatch.setattr(torch, "compile", functools.partial(lambda f: f))
    assert compiling_fails(torch.device("cpu")) is None


def test_the_field_reads_as_before(tmp_path):
    for value, expected in ((True, "on"), (False, "off"), ("auto", "auto"), ("on", "on"), ("off", "off")):
        assert Recipe(compile=value).compile == expected
    for text, expected in (("true", "on"), ("false", "off"), ("on", "on"), ("auto", "auto"), ("no", "off")):
        (tmp_path / "recipe.yaml").write_text(f"compile: {text}\n")
        assert Recipe(**load_recipe(tmp_path / "recipe.yaml")).compile == expected
    assert setting_from_text("compile=true") == ("compile", "on")
    with pytest.raises(InputError, match=r"unknown compile 'maybe'.*known: auto, off, on"):
        Recipe(compile="maybe")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--compile"], "on"), (["--no-compile"], "off"), (["--compile", "auto"], "auto"), (["--compile=off"], "off")],
)
def test_the_flag_reads_as_before(given, expected, monkeypatch):
    asked = []
    monkeypatch.setattr("equiframe.train.train", lambda recipe, *a, **k: asked.append(recipe) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(["train", "digits", *given])
    assert asked[0].compile == expected


def test_a_run_records_what_was_chosen(tiny, tmp_path):
    said = []
    train(tiny(compile="auto", epochs=1), tmp_path / "run", say=said.append)
    assert RunFolder(tmp_path / "run").recipe().compile == "off"
    assert "compile" in RunFolder(tmp_path / "run").read_json("environment.json")["left_open"]
    assert any("not compiled: 0 s of training would not earn it back" in line for line in said)


def test_kept_memory_is_not_faulted_in_again():
    """In a process of its own, for it changes the process: page faults of taking and freeing 32 MB."""
    code = (
        "import resource, torch; from equiframe.numerics import keep_memory; torch.set_num_threads(1)\n"
        "def faults():\n before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        " for _ in range(5): torch.ones(1 << 23)\n"
        " return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "torch.ones(1 << 23); first = faults(); kept = keep_memory(); torch.ones(1 << 23)\n"
        "print(kept, first, min(faults() for _ in range(4)))"
    )
    kept, first, second = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    if kept == "True":
        assert int(second) < 0.1 * int(first)
    assert isinstance(keep_memory(), bool)


def test_a_choice_in_words():
    assert str(Numerics(torch.device("cpu"), "bfloat16", "channels-last", {}, compile=True)) == (
        "bfloat16 channels-last compiled"
    )


def test_short_steps_stay_in_float32(monkeypatch):
    """Where nothing is to be gained, the noise of a trial must not decide how equal commands compute."""
    monkeypatch.setattr(numerics, "_speeds", lambda model, candidates, size, batch: (
        {str(c): 1e5 * (1 + i) for i, c in enumerate(candidates)}, False))  # fmt: skip
    monkeypatch.setattr(numerics, "fast_bfloat16", lambda device: True)
    model = Classifier(MLP(3 * 8 * 8, width=8), LinearHead(8, 2))
    chosen = numerics.choose_numerics(model, 8, 64, device="cpu", precision="auto", memory_format="auto")
    assert (chosen.precision, chosen.memory_format) == ("float32", "contiguous")
    assert "need no choice" in chosen.note
    monkeypatch.setattr(numerics, "SHORT_STEP", 0.0)
    assert numerics.choose_numerics(
        model, 8, 64, device="cpu", precision="auto", memory_format="auto"
    ).precision == "bfloat16"  # fmt: skip
