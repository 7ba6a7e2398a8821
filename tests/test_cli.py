"""The command line: what goes to stdout and to stderr, exit codes, and how little it loads."""

import argparse
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import picture, write_class
from equiframe import __version__
from equiframe.cli import _parser, main
from equiframe.cli.terminal import print_table
from equiframe.method import METHODS
from equiframe.recipe import FIELD_NAMES

pytestmark = pytest.mark.usefixtures("plain_pages")

VERBS = ("train", "compare", "evaluate", "predict", "methods", "frame")


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command in this process."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()


# --- train and compare ------------------------------------------------------------------------------------------------


def test_train_prints_a_table_and_tells_its_progress_on_stderr(tmp_path, capsys, flags):
    code, out, error = run(capsys, "train", *flags(epochs=2), "--out", tmp_path / "run")
    assert code == 0
    assert "top1" in out
    assert "worst" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"{100 * metrics['top1']:.1f}" in out
    lines = error.splitlines()
    assert lines[-1] == f"saved in {tmp_path / 'run'}"
    assert re.match(r"epoch 1/2: loss \d\.\d{4}, validation macro \d+\.\d %, \d+ images/s$", lines[-5])
    assert re.match(r"epoch 2/2: .* %, knew \d+ % of its images before, \d+ images/s$", lines[-4])
    assert re.match(
        r"second stage: crt-blend, \d+ % of the logits .*, validation macro \d+\.\d %; \d+\.\d s$", lines[-3]
    )
    assert "\r" not in error
    assert "\x1b" not in error


def test_json_is_all_that_is_on_stdout(tmp_path, capsys, flags):
    code, out, error = run(capsys, "train", *flags(), "--out", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert out.count("\n") == 1
    assert "epoch 1/1" in error
    code, out, error = run(capsys, "train", *flags(seed=1), "--out", tmp_path / "two", "--json", "--quiet")
    assert json.loads(out)["num_train"] == 1132
    assert error == ""


def test_flags_override_the_recipe_file(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("data: digits\nepochs: 2\nlr: 1e-2\nmethod: ce\nbackbone: mlp\nwidth: 12\n")
    code, *_ = run(capsys, "train", "--config", "r.yaml", "--epochs", "1", "--precision", "float32", "--device", "cpu")
    assert code == 0
    assert os.listdir(tmp_path / "runs") == ["digits-ce-s0"]  # named by data, method and seed
    recipe = (tmp_path / "runs" / "digits-ce-s0" / "recipe.yaml").read_text()
    assert "epochs: 1\n" in recipe
    assert "lr: 0.01\n" in recipe
    code, _out, _ = run(
        capsys, "train", "--config", tmp_path / "runs/digits-ce-s0/recipe.yaml", "--out", "again", "--json"
    )
    first, again = (json.loads((tmp_path / p / "metrics.json").read_text()) for p in ("runs/digits-ce-s0", "again"))
    assert first["top1"] == again["top1"]  # a resolved recipe is a recipe


def test_boolean_and_list_flags(tmp_path, capsys, flags):
    counts = "30,20,10,9,8,7,6,5,4,3"
    code, out, _ = run(
        capsys, "train", *flags(batch_size=16), "--class-counts", counts, "--no-compile", "--validation", "0",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert code == 0
    assert [c["num_train"] for c in json.loads(out)["classes"]] == [30, 20, 10, 9, 8, 7, 6, 5, 4, 3]


def test_an_interrupt_exits_with_130_and_resume_continues(tmp_path, capsys, monkeypatch, flags):
    from equiframe.cli.terminal import Reporter

    progress = Reporter.progress

    def interrupting(self, state):
        if state.get("step") == 10:
            signal.raise_signal(signal.SIGINT)
        progress(self, state)

    monkeypatch.setattr(Reporter, "progress", interrupting)
    for verb, options in (("train", []), ("compare", ["--methods", "ce", "--seeds", "0"])):
        code, out, error = run(capsys, verb, *flags(), *options, "--out", tmp_path / verb)
        assert code == 130
        assert out == ""
        assert error.splitlines()[-1].startswith(f"stopped and saved in {tmp_path / verb}; ")
    monkeypatch.undo()
    code, _, error = run(capsys, "train", *flags(), "--out", tmp_path / "train", "--resume")
    assert code == 0
    assert "continuing at epoch 1, step 10" in error
    code, _, error = run(capsys, "train", *flags(), "--out", tmp_path / "train", "--resume")
    assert code == 0
    assert "is finished" in error
    assert run(capsys, "compare", *flags(), "--methods", "ce", "--seeds", "0", "--out", tmp_path / "compare")[0] == 0


def test_an_interrupt_before_training(tmp_path, capsys, monkeypatch, flags):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("equiframe.train.prepare_data", interrupted)
    assert run(capsys, "train", *flags(), "--out", tmp_path / "run") == (130, "", "equiframe: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_compare(tmp_path, capsys, flags):
    command = ("compare", *flags(imbalance=10), "--methods", "ce, etf-dr", "--seeds", "0,1", "--out", tmp_path / "g")
    code, out, error = run(capsys, *command)
    assert code == 0
    for method in ("ce", "etf-dr"):
        assert re.search(rf"{method} .* ± ", out)
    assert "digits, imbalance ratio 10" in out
    assert "mean ± sd over seeds 0,1" in out
    assert "[4/4] etf-dr, seed 1" in error
    code, again, error = run(capsys, *command, "--json")
    assert json.loads(again) == json.loads((tmp_path / "g" / "comparison.json").read_text())
    assert error.splitlines() == [f"report: {tmp_path / 'g' / 'report.html'}", f"saved in {tmp_path / 'g'}"]
    assert "earlier calls" not in out
    code, out, _ = run(capsys, *(word.replace("ce, ", "") if isinstance(word, str) else word for word in command))
    assert code == 0
    assert "; ce from earlier calls in this folder" in " ".join(out.split())


def test_what_speaks_against_a_temperature_is_told(capsys):
    from equiframe.cli.compare import _doubts
    from equiframe.cli.terminal import temperature_doubt

    def metrics(temperature, val_top1=0.5, source="validation"):
        return {"temperature": temperature, "val_top1": val_top1, "temperature_from": source}

    assert temperature_doubt(metrics(1.5)) == temperature_doubt(metrics(1.0, 1, "train")) == ""
    assert "no better than chance" in temperature_doubt(metrics(999.0))
    assert "a run that was too short" in temperature_doubt(metrics(23.0))
    assert "no error tells how sure" in temperature_doubt(metrics(1.0, 1))
    runs = {"ce": {"0": metrics(23.0), "1": metrics(1.5)}, "etf-la": {"0": metrics(30.0), "1": metrics(1.0, 1)}}
    short, sure = _doubts(runs)
    assert short.startswith("temperature of ce seed 0 and etf-la seed 0: very high")
    assert sure.startswith("temperature of etf-la seed 1: all right there")


def test_compare_tells_who_is_better_and_how_sure_that_is(tmp_path, capsys, flags):
    command = ("compare", *flags(imbalance=10), "--methods", "ce,etf-la:tau=0.5", "--seeds", "0", "--set", "epochs=2")
    code, out, _ = run(capsys, *command, "--set", "mixup=0", "--out", tmp_path / "g")
    assert code == 0
    assert "cannot be told yet (1 seed)" in out
    assert "do not cover the variation between trainings" in " ".join(out.split())
    content = json.loads((tmp_path / "g" / "comparison.json").read_text())
    assert (content["recipe"]["epochs"], content["recipe"]["mixup"]) == (2, 0)
    assert "etf-la:tau=0.5" in (tmp_path / "g" / "report.html").read_text()
    code, out, _ = run(capsys, *command[:-2], "--budget", "0.001s", "--out", tmp_path / "none")
    assert code == 0
    assert "2 of 2 runs are missing" in " ".join(out.split())


def test_times_with_units():
    from equiframe.cli.flags import seconds

    assert [seconds(text) for text in ("90s", "30min", "2h", "1.5 h", "2d")] == [90, 1800, 7200, 5400, 172_800]
    for text in ("", "30", "min", "1w", "1.2.3s"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a time such as"):
            seconds(text)


# --- evaluate and predict ---------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_measures(finished_run, capsys):
    code, out, error = run(capsys, "evaluate", finished_run, "--json", "--device", "cpu")
    assert code == 0
    assert error == ""
    saved = json.loads((finished_run / "metrics.json").read_text())
    measured = json.loads(out)
    assert measured == {name: saved[name] for name in measured}
    assert set(saved) - set(measured) <= {"seconds", "images_per_second", "epochs", "selected"}
    assert f"{100 * saved['macro']:.1f}" in run(capsys, "evaluate", finished_run)[1]


@pytest.fixture
def images(tmp_path):
    write_class(tmp_path / "new", 1, 3, start=800)
    picture(2, 801, (50, 31)).convert("L").save(tmp_path / "new" / "gray.jpg")
    return tmp_path / "new"


def test_predict_writes_csv(finished_run, images, tmp_path, capsys):
    code, out, error = run(capsys, "predict", finished_run, images, "--top", "3")
    assert code == 0
    assert error == ""
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["image", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    assert [row["image"] for row in rows] == sorted(map(str, images.iterdir()))
    for row in rows:
        values = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert values == sorted(values, reverse=True)
        assert sum(values) <= 1 + 3e-6
        assert len({row["class"], row["class_2"], row["class_3"]}) == 3
    code, nothing, error = run(capsys, "predict", finished_run, images, "--top", "3", "--out", tmp_path / "p.csv")
    assert (code, nothing) == (0, "")
    assert error == f"4 predictions in {tmp_path / 'p.csv'}\n"
    assert (tmp_path / "p.csv").read_text(encoding="utf-8") == out


def test_predict_one_image_and_as_json(finished_run, images, capsys):
    _code, out, _ = run(capsys, "predict", finished_run, images / "800.png", "--json")
    [record] = json.loads(out)
    assert record["image"] == str(images / "800.png")
    assert len(record["classes"]) == 4
    assert math.isclose(sum(c["probability"] for c in record["classes"]), 1, abs_tol=1e-5)
    _, text, _ = run(capsys, "predict", finished_run, images / "800.png")
    row = list(csv.reader(io.StringIO(text)))[1]
    assert row[1] == record["classes"][0]["class"]
    assert float(row[2]) == pytest.approx(record["classes"][0]["probability"], abs=1e-6)


# --- the small verbs --------------------------------------------------------------------------------------------------


def test_methods(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0
    assert all(name in out for name in METHODS)
    listed = json.loads(run(capsys, "methods", "--json")[1])
    assert set(listed) == set(METHODS)
    assert listed["etf-la"]["head"] == "frame"
    assert all(method["summary"] for method in listed.values())


@pytest.mark.parametrize(
    ("arguments", "geometry", "coherence"),
    [((10, 16), "simplex", -1 / 9), ((20, 16), "orthoplex", 0), ((5, 16, "--geometry", "orthoplex"), "orthoplex", 0)],
)
def test_frame(capsys, arguments, geometry, coherence):
    described = json.loads(run(capsys, "frame", *arguments, "--json")[1])
    assert described["geometry"] == geometry
    assert described["coherence"] == pytest.approx(coherence)
    assert f"{geometry} frame: {arguments[0]} unit vectors in R^16" in run(capsys, "frame", *arguments)[1]


def test_version_and_no_verb(capsys):
    assert run(capsys, "--version") == (0, f"{__version__}\n", "")
    code, out, _ = run(capsys)
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "%(" not in out
    if verb in ("train", "compare"):
        for name in FIELD_NAMES:
            assert name == "data" or "--" + name.replace("_", "-") in out


def test_every_field_of_the_recipe_has_a_flag_and_a_help():
    train = next(a for a in _parser()._actions if a.dest == "verb").choices["train"]
    flags = {a.dest: a for a in train._actions}
    assert set(FIELD_NAMES) <= set(flags)
    assert all(action.help for action in train._actions)


# --- real processes ---------------------------------------------------------------------------------------------------

HEAVY = ("timm", "torchvision", "matplotlib", "sklearn", "scipy", "pyarrow", "pandas", "PIL", "yaml", "rich", "jinja2")


def python(code, **options):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_line_starts_without_torch():
    code = """
import json, sys
from equiframe.cli import main
try:
    main(["--help"])
except SystemExit:
    print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(json.loads(python(code).splitlines()[-1]))
    assert not loaded & {"torch", "numpy", *HEAVY}


def test_a_terminal_that_knows_only_ascii_loses_no_result(finished_run, tmp_path, monkeypatch):
    """A letter that cannot be shown is escaped, instead of an error after the work is done."""
    named = shutil.copytree(finished_run, tmp_path / "Käfer")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main(["evaluate", str(named), "--device", "cpu"]) == 0
    sys.stdout.flush()
    assert b"top1" in shown.getvalue()
    assert b"K\\xe4fer" in shown.getvalue()


def test_a_reader_that_goes_away(tmp_path):
    command = f"{sys.executable} -m equiframe methods | head -c 10"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100)
    assert result.stderr == ""
    assert len(result.stdout) == 10


def test_what_is_not_there_is_an_error_of_python_too():
    import equiframe

    with pytest.raises(AttributeError, match="no attribute 'FrameHaed'"):
        equiframe.FrameHaed  # noqa: B018
    assert set(equiframe.__all__) <= set(dir(equiframe))
    for name in equiframe.__all__:
        assert getattr(equiframe, name) is not None


def test_resume_needs_only_the_folder(tmp_path, capsys, monkeypatch, flags):
    """`train --resume --out RUN`, as the message after Ctrl-C says: the saved recipe is taken."""
    monkeypatch.chdir(tmp_path)
    from equiframe.cli.terminal import Reporter

    progress = Reporter.progress

    def interrupting(self, state):
        progress(self, state)
        if state.get("done") and state["epoch"] == 0:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "progress", interrupting)
        code, _, error = run(capsys, "train", *flags(epochs=3), "--out", "run")
    assert code == 130
    assert error.splitlines()[-1] == "stopped and saved in run; continue with: equiframe train --resume --out run"
    code, out, _ = run(capsys, "train", "--resume", "--out", "run", "--json")
    assert code == 0
    assert json.loads(out)["epochs"] == 3
    assert run(capsys, "train", "--resume", "--out", "run", "--lr", "0.5")[0] == 2


def test_an_early_interrupt_is_one_line(tmp_path):
    """Wherever Ctrl-C lands before training, be it inside an import, it ends in one line and code 130."""
    for seconds in (0.2, 0.8):
        process = subprocess.Popen(
            [sys.executable, "-m", "equiframe", "train", "digits", "--imbalance", "20", "--out", "run"],
            cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(1.0 + seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in error


def test_compare_has_no_single_method_or_seed(capsys):
    code, _, error = run(capsys, "compare", "digits", "--method", "ce")
    assert code == 2
    assert "'--methods'" in error


def test_the_shell_completes(tmp_path, capsys):
    """In a real bash: verbs, a verb's options, a field's choices, methods and files."""
    code, out, _ = run(capsys, "--print-completion", "bash")
    assert code == 0
    (tmp_path / "completion").write_text(out)
    (tmp_path / "pets").mkdir()
    ask = r"""
source completion
for words in "$@"; do
  COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  $(complete -p equiframe | sed 's/.*-F \([^ ]*\).*/\1/') equiframe "${COMP_WORDS[COMP_CWORD]}" ""
  echo ${COMPREPLY[@]}
done
"""
    typed = (
        "equiframe ev",
        "equiframe train --imb",
        "equiframe train --precision bf",
        "equiframe train --method etf-l",
        "equiframe train pe",
    )
    shell = ["bash", "-c", ask, "bash", *typed]
    answers = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert answers == ["evaluate", "--imbalance", "bfloat16", "etf-la", "pets"]
    for other in ("zsh", "tcsh", "fish"):
        assert "evaluate" in run(capsys, "--print-completion", other)[1]
    assert run(capsys, "--print-completion", "bsh") == (
        2,
        "",
        "equiframe: unknown shell 'bsh'; did you mean 'bash'? (known: bash, fish, tcsh, zsh)\n",
    )


def test_a_temperature_that_saw_no_error_is_told(finished_run, capsys):
    from equiframe.cli.terminal import print_metrics

    metrics = json.loads((finished_run / "metrics.json").read_text())
    for share, told in ((1.0, True), (0.9, False)):
        print_metrics(metrics | {"val_top1": share}, "run")
        assert ("do not trust probabilities near 1" in " ".join(capsys.readouterr().out.split())) is told


def test_a_table_that_is_too_wide_is_parted(monkeypatch, capsys):
    """On 42 columns nothing is cut: the columns that do not fit come below, beside the first one again."""
    monkeypatch.setenv("COLUMNS", "42")
    rows = [["etf-sqrt-la", *(f"{k}0.5 ± 1.2" for k in range(1, 6))], ["etf-sqrt-blend", *["–"] * 5]]
    print_table("a title", ["method", "top1", "macro", "few", "worst", "ece"], rows)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 42
    assert shown.count("etf-sqrt-la ") == shown.count("method") == 3
    assert all(f"{k}0.5 ± 1.2" in shown for k in range(1, 6))
    assert shown.count("a title") == 1
