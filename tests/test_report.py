"""The report on runs that a small generator writes: what it says, that it is one safe file, that a browser likes it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from equiframe import InputError
from equiframe.frames import make_frame
from equiframe.recipe import Recipe, dump_recipe
from equiframe.report import find_runs, group_runs, write_figures, write_report

SECTIONS = ["best", "classes", "calibration", "collapse", "training", "setup", "errors"]
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def write_run(
    path: Path, method: str, seed: int, *, num_classes: int = 6, accuracy: float = 0.7, epochs: int = 4, **recipe
):
    """A finished run folder with made-up results."""
    random = np.random.default_rng([seed, num_classes])
    path.mkdir(parents=True)
    counts = [int(500 * 50 ** (-k / (num_classes - 1))) for k in range(num_classes)]
    recall = np.clip(accuracy + 0.1 * random.standard_normal(num_classes), 0, 1)
    recall += accuracy - recall.mean()
    measures = dict.fromkeys(("top1", "macro", "many", "medium", "head", "middle", "tail", "worst"), accuracy)
    metrics = measures | {
        "few": None, "ece": 0.05, "nll": 1.0, "nc1": 0.4, "nc2_angle": 0.1, "nc2_norm": 0.2, "nc3": 0.3, "nc4": 0.9,
        "few_angle_means": 61.0, "few_angle_vectors": 88.0, "num_train": sum(counts), "num_test": 100, "seconds": 3.0,
        "images_per_second": 100.0, "evaluated_on": "test", "temperature": 1.1, "temperature_from": "validation",
        "classes": [
            {"name": f"<i>class {k}</i>", "num_train": n, "num_test": 10, "accuracy": float(a)}
            for k, (n, a) in enumerate(zip(counts, recall, strict=True))
        ],
    }  # fmt: skip
    history = [
        {"epoch": e, "loss": 2 / (e + 1), "lr": 0.1, "seconds": 1.0, "images_per_second": 100.0, "val_macro": 0.1 * e,
         **{f"train_{m}": 1 / (e + 1) for m in ("nc1", "nc2_angle", "nc2_norm", "nc3")}}
        for e in range(epochs)
    ]  # fmt: skip
    matrix = (np.eye(min(num_classes, 100)) - 0.1).tolist()
    details = {
        "reliability": [{"count": 10, "confidence": c, "accuracy": c - 0.05} for c in (0.3, 0.5, 0.7, 0.9)],
        "cosines": {"means": matrix, "vectors": matrix},
        "wrong": [
            {"name": "<script>document.title='hacked'</script>.png", "true": "a", "predicted": "b", "probability": 0.99,
             "thumbnail": PIXEL}
        ],
    }  # fmt: skip
    settings = {"data": "photos", "imbalance": 50.0} | recipe
    (path / "recipe.yaml").write_text(dump_recipe(Recipe(method=method, seed=seed, **settings)))
    for name, content in {
        "metrics.json": metrics,
        "details.json": details,
        "split.json": {"hash": "ab" * 32},
        "environment.json": {"command": "equiframe train photos", "cpu": "a cpu", "device": "cpu", "threads": 2,
                             "torch": "2", "python": "3", "equiframe": "0"},
    }.items():  # fmt: skip
        (path / name).write_text(json.dumps(content))
    (path / "history.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))


@pytest.fixture
def comparison(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"etf-la/seed-{seed}", "etf-la", seed, accuracy=0.70 + 0.01 * seed)
        write_run(tmp_path / f"ce/seed-{seed}", "ce", seed, accuracy=0.60 + 0.011 * seed)
    return tmp_path


class Page(HTMLParser):
    """Ids, tags and outside addresses of a page; fails on tags that do not nest."""

    VOID = ("meta", "link", "br", "img", "use", "path", "rect", "image", "hr", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.tags, self.addresses, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.addresses.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_safe_and_answers_in_order(comparison, tmp_path):
    html = write_report(find_runs([comparison]), tmp_path / "report.html").read_text()
    page = Page(html)
    assert [i for i in page.ids if i in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids)), "ids of different figures must not meet"
    assert page.addresses == [], "nothing is fetched"
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert "&lt;script&gt;document.title" in html
    assert page.tags.count("svg") == 6, "no gradients were tracked"
    assert "prefers-color-scheme: dark" in html
    assert "viewport" in html


def test_verdict_needs_the_interval(comparison, tmp_path):
    html = write_report(find_runs([comparison]), tmp_path / "r.html").read_text()
    # differences 0.100, 0.099, 0.098: mean 9.9 points, t interval 9.9 ± 4.303·0.1/√3
    assert "etf-la has the highest macro accuracy" in html
    assert re.search(r"better than ce \(\+9\.9 points, 95\s%\sinterval \+9\.7 to \+10\.1 over seeds\)", html)
    assert re.search(r'<td>[\d.e-]+</td><td class="left worse">worse</td>', html)
    assert "have no interval over images" in html


def test_no_win_is_called_when_seeds_disagree(tmp_path):
    for seed, a, b in ((0, 0.7, 0.6), (1, 0.6, 0.65), (2, 0.7, 0.68)):
        write_run(tmp_path / f"x/a-{seed}", "etf-la", seed, accuracy=a)
        write_run(tmp_path / f"x/b-{seed}", "ce", seed, accuracy=b)
    html = write_report(find_runs([tmp_path / "x"]), tmp_path / "r.html").read_text()
    assert re.search(r"Whether it is better than ce .* cannot be told yet \(3 seeds\)\.", html)
    assert "worse</td>" not in html


def test_a_single_run_and_a_single_seed(tmp_path):
    write_run(tmp_path / "one", "ce", 0)
    assert "ce reaches 70.0" in write_report(find_runs([tmp_path / "one"]), tmp_path / "r.html").read_text()
    write_run(tmp_path / "two", "etf-la", 0, accuracy=0.8)
    html = write_report(find_runs([tmp_path / "one", tmp_path / "two"]), tmp_path / "r.html").read_text()
    assert "cannot be told yet (1 seed)" in html


def keep_predictions(path: Path, accuracy: float) -> None:
    labels = np.repeat(np.arange(6), 50)
    right = np.random.default_rng(0).random(300) < accuracy
    predicted = np.where(right, labels, (labels + 1) % 6)
    np.savez_compressed(path / "predictions.npz", labels=labels, predicted=predicted)


def test_intervals_over_images_and_a_reference(comparison, tmp_path):
    for method, accuracy in (("etf-la", 0.71), ("ce", 0.61)):
        for seed in range(3):
            keep_predictions(comparison / method / f"seed-{seed}", accuracy)
    html = write_report(find_runs([comparison]), tmp_path / "r.html", reference="ce").read_text()
    assert "<h3>Held against ce</h3>" in html
    assert "<h3>Held against etf-la</h3>" not in html  # the same pair, seen from the other side
    assert "over seeds and images)" in html
    assert re.search(r'<td>[\d.e-]+</td><td class="left better">better</td>', html)
    with pytest.raises(InputError, match="unknown reference 'c'"):
        write_report(find_runs([comparison]), tmp_path / "r.html", reference="c")
    single = write_report(find_runs([comparison / "ce" / "seed-0"]), tmp_path / "r.html").read_text()
    assert re.search(r"Other test images would give \d\d\.\d to \d\d\.\d.*does not cover the variation", single)
    (comparison / "ce/seed-0/predictions.npz").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"predictions\.npz is damaged"):
        find_runs([comparison])


@pytest.mark.parametrize("num_classes", [2, 40, 1000])
def test_any_number_of_classes(tmp_path, num_classes):
    write_run(tmp_path / "a", "etf-la", 0, num_classes=num_classes)
    write_run(tmp_path / "b", "ce", 0, num_classes=num_classes)
    Page(write_report(find_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "r.html").read_text())


def test_a_run_without_details_or_epochs_still_reports(tmp_path):
    write_run(tmp_path / "a", "ce", 0, epochs=1)
    (tmp_path / "a/details.json").unlink()
    html = write_report(find_runs([tmp_path / "a"]), tmp_path / "r.html").read_text()
    assert "no reliability data" in html


def test_same_method_with_other_settings_is_kept_apart(tmp_path):
    write_run(tmp_path / "a", "etf-la", 0, epochs=2)
    write_run(tmp_path / "b", "etf-la", 0, epochs=2, lr=0.01)
    names = sorted(g.name for g in group_runs(find_runs([tmp_path / "a", tmp_path / "b"])))
    assert names == ["etf-la (lr 0.01)", "etf-la (lr 0.1)"]


def test_wrong_input(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        find_runs([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no finished run"):
        find_runs([tmp_path / "empty"])
    write_run(tmp_path / "a", "ce", 0, num_classes=5)
    write_run(tmp_path / "b", "ce", 1, num_classes=6)
    with pytest.raises(InputError, match="has other classes than"):
        write_report(find_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "r.html")


def test_figures_for_a_paper(comparison, tmp_path):
    files = write_figures(find_runs([comparison]), tmp_path / "figures")
    assert sorted({f.stem for f in files}) == ["classes", "collapse", "cosines", "groups", "reliability", "training"]
    assert {f.suffix for f in files} == {".png", ".svg", ".pdf"}
    assert all(f.stat().st_size > 1000 for f in files)


def test_frame_figures(tmp_path):
    import matplotlib.pyplot as plt

    from equiframe.report.figures import frame_figure

    for k, d in ((4, 3), (10, 64), (500, 300)):
        figure = frame_figure(make_frame(k, d))
        figure.savefig(tmp_path / f"{k}.png")
        plt.close(figure)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_in_a_browser(comparison, tmp_path):
    """Headless Chromium finds the sections, runs nothing of what class and file names say, and logs no error."""
    report = write_report(find_runs([comparison]), tmp_path / "report.html")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--log-level=0", "--dump-dom", report.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    for section in SECTIONS:
        assert f'<section id="{section}">' in done.stdout
    assert "<title>photos, imbalance ratio 50" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_tables_do_not_scroll_sideways(tmp_path):
    """Twelve methods with long names, all measures there, at 1000 pixels."""
    names = ["ce", "etf-la", "cosine", "etf-angular-balanced", "etf-dr-released", "balanced-softmax"]
    for method in (*names, *(f"{name}+tau=0.55+lr=0.025" for name in names)):
        for seed in (0, 1):
            path = tmp_path / "g" / method / f"seed-{seed}"
            write_run(path, method.split("+")[0], seed, accuracy=0.7 + 0.01 * len(method) + 0.02 * seed)
            metrics = json.loads((path / "metrics.json").read_text()) | {
                "few": 0.3 + 0.1 * seed,
                "ece": 0.1 + 0.1 * seed,
            }
            (path / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(find_runs([tmp_path / "g"]), tmp_path / "report.html", reference="ce")
    look = (
        "<script>document.title = [...document.querySelectorAll('#best .wide, #collapse .wide')]"
        ".map(e => e.scrollWidth - e.clientWidth).join(' ')</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", look))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1000,900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    overflow = re.search(r"<title>([\d ]+)</title>", done.stdout)[1].split()
    assert overflow == ["0"] * 6


def test_one_seed_counts_once(tmp_path):
    """The same seed in two precisions makes two rows; the very same training twice is refused."""
    for name, precision in (("one", "float32"), ("other", "bfloat16"), ("copy", "float32")):
        write_run(tmp_path / name, "ce", 0, precision=precision)
    groups = group_runs(find_runs([tmp_path / "one", tmp_path / "other"]))
    assert sorted(g.name for g in groups) == ["ce (precision bfloat16)", "ce (precision float32)"]
    with pytest.raises(InputError, match="with seed 0: one training counts once"):
        group_runs(find_runs([tmp_path / "one", tmp_path / "copy"]))
    write_run(tmp_path / "next", "ce", 1, precision="bfloat16")  # another seed on another machine: one method
    assert [g.name for g in group_runs(find_runs([tmp_path / "one", tmp_path / "next"]))] == ["ce"]
