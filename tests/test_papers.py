"""The papers' tables: what is known of them, the verdict on a claim, and a small table run from end to end."""

import json
import math
import signal
from itertools import combinations

import pytest

from conftest import tiny_fields
from equiframe.cli import main
from equiframe.errors import InputError
from equiframe.method import METHOD_FIELDS, METHODS, build_loss, resolve_method
from equiframe.papers.grid import SOURCES, Claim, Column, DataSet, Published, Row, Table, choose, num_train
from equiframe.papers.reproduce import collect, reproduce, verdict_text
from equiframe.papers.tables import DATA_SETS, TABLES
from equiframe.papers.verdicts import HELD, NOT_HELD, UNTOLD, Verdict, judge, judge_all
from equiframe.train import Interrupted

pytestmark = pytest.mark.usefixtures("plain_pages")


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command in this process."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()


# --- the published numbers --------------------------------------------------------------------------------------------

SECOND, RERUN, PAPER = "second-hand", "independent rerun", "paper"
DENSENET = {  # DenseNet, CIFAR-100: as quoted, then an outside rerun over three seeds
    ("Learnable + CE", "cifar100-r100"): [(43.08, SECOND, None, None), (44.66, RERUN, 0.24, 3)],
    ("ETF + DR", "cifar100-r100"): [(44.0, SECOND, None, None), (43.02, RERUN, 0.56, 3)],
    ("Learnable + CE", "cifar100-r50"): [(49.07, SECOND, None, None), (50.57, RERUN, 0.46, 3)],
    ("ETF + DR", "cifar100-r50"): [(49.8, SECOND, None, None), (48.45, RERUN, 0.10, 3)],
}
BASELINES = {  # (row, data): source → values at ratios 100, 50, 10
    ("CE", "cifar10"): {"SURE": (70.40, 74.80, 86.40), "DDC": (71.25, None, 86.74)},
    ("CE", "cifar100"): {"SURE": (38.30, 43.90, 55.70), "DDC": (38.06, None, 56.73)},
    ("Mixup", "cifar10"): {"SURE": (73.06, 77.82, 87.10), "Bago": (74.06, 78.67, None), "MiSL": (72.8, 78.1, 87.6)},
    ("Mixup", "cifar100"): {"SURE": (39.54, 54.99, 58.02), "Bago": (40.82, 45.92, None), "MiSL": (39.5, 45.4, 59.1)},
    ("LDAM-DRW", "cifar10"): {"SURE": (77.03, 81.03, 88.16), "Bago": (77.73, 81.60, None)},
    ("LDAM-DRW", "cifar100"): {"SURE": (42.04, 46.62, 58.71), "Bago": (42.47, 47.29, None)},
    ("Balanced softmax", "cifar10"): {"Bago": (77.54, 81.11, None)},
    ("Balanced softmax", "cifar100"): {"Bago": (42.99, 46.55, None)},
    ("Logit adjustment", "cifar10"): {"Awesome": (80.92, None, None)},
    ("Logit adjustment", "cifar100"): {"Awesome": (43.89, None, None)},
    ("VS", "cifar10"): {"DDC": (80.29, None, 88.74)},
    ("VS", "cifar100"): {"DDC": (42.67, None, 58.50)},
}
RATIO_200 = {  # BALMS README
    ("CE", "cifar10-r200"): 74.0, ("CE", "cifar100-r200"): 41.2,
    ("Balanced softmax", "cifar10-r200"): 79.8, ("Balanced softmax", "cifar100-r200"): 46.7,
}  # fmt: skip


def test_published_numbers_of_the_paper():
    table = TABLES["long-tailed-densenet"]
    published = {k: [(p.value, p.source, p.sd, p.n) for p in v] for k, v in table.published.items()}
    assert published == DENSENET
    for name in ("long-tailed-resnet", "cub", "imagenet-lt"):
        assert TABLES[name].published == {}  # unknown stays unknown
    assert (table.num_known, table.num_unknown) == (4, 32)
    assert (TABLES["long-tailed-resnet"].num_known, TABLES["long-tailed-resnet"].num_unknown) == (0, 36)


def test_published_numbers_of_the_baselines():
    published = TABLES["baselines-cifar"].published
    found = {(row, column, p.where.split()[0].strip(","), p.value) for (row, column), v in published.items() for p in v}
    expected = {(row, column, "BALMS", value) for (row, column), value in RATIO_200.items()}
    for (row, data), by_source in BASELINES.items():
        for source, values in by_source.items():
            for ratio, value in zip((100, 50, 10), values, strict=True):
                if value is not None:
                    where = {"Bago": "BagofTricks-LT", "MiSL": "MiSLAS", "Awesome": "Awesome-Long-Tailed"}
                    expected.add((row, f"{data}-r{ratio}", where.get(source, source), value))
    assert found == expected
    assert sum(map(len, published.values())) == len(expected)
    spreads = {(c, p.value): p.sd for (_, c), v in published.items() for p in v if p.sd is not None}
    assert spreads == {("cifar10-r100", 71.25): 0.10, ("cifar100-r100", 38.06): 1.03}
    [sic] = [p for v in published.values() for p in v if p.note == "sic"]
    assert sic.value == 54.99


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_cell_has_a_source_or_is_unknown(table):
    names = [c.name for c in table.columns]
    assert set(table.published) <= {(row, name) for row in table.paper_rows for name in names}
    for values in table.published.values():
        assert values  # an empty cell is left out, not stored
        for p in values:
            assert p.source in SOURCES
            assert p.where
            assert 0 < p.value < 100
            assert p.n is None or p.sd is not None
    assert table.num_known + table.num_unknown == len(table.paper_rows) * len(table.columns)
    for row in table.rows:
        for column in table.columns:
            assert table.cell(row, column) == () or row.published_as is not None


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_fit_together(table):
    for parts in (table.columns, table.rows):
        names = [part.name for part in parts]
        assert len(set(names)) == len(names)
    assert "common" not in [row.name for row in table.rows]
    for one, two in combinations(table.rows, 2):  # no two rows are the same training
        assert (one.method, dict(one.fields)) != (two.method, dict(two.fields))
    for claim in table.claims:
        assert {claim.better, claim.worse} <= {row.name for row in table.rows}
    assert {column.data for column in table.columns} <= set(DATA_SETS)


def test_every_row_is_a_method_and_every_cell_a_recipe():
    unknown = {row.method for table in TABLES.values() for row in table.rows} - set(METHODS)
    assert not unknown
    for table in TABLES.values():
        for row in table.rows:
            for column in table.columns:
                recipe = table.recipe(column, row)
                assert recipe.validation == 0  # every image trains
                if row.method in METHODS:
                    fields = resolve_method(row.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
                    build_loss(fields, [9] * 10)


def test_the_authors_recipe():
    """All released CIFAR configurations, and the widths that their networks have."""
    table = TABLES["long-tailed-resnet"]
    assert [round(1 / c.fields["imbalance"], 3) for c in table.columns] == [0.005, 0.01, 0.02] * 4
    for column in table.columns:
        r = table.recipe(column, table.rows[0])
        assert (r.epochs, r.batch_size, r.lr, r.momentum, r.weight_decay) == (200, 128, 0.1, 0.9, 2e-4)
        assert (r.schedule, r.warmup * r.epochs, r.mixup) == ("steps", 5, 1.0)
        assert (r.backbone, r.width) == ("resnet32", 32 if column.data == "cifar100" else 16)
    table = TABLES["imagenet-lt"]
    recipes = [table.recipe(column, table.rows[0]) for column in table.columns]
    assert [r.epochs for r in recipes] == [90, 120, 150, 180]
    for r in recipes:
        assert (r.batch_size, r.lr, r.weight_decay, r.schedule, r.mixup) == (1024, 0.1, 5e-4, "cosine", 0.2)
    assert [c.fields["backbone"] for c in TABLES["cub"].columns] == [f"timm:resnet{d}" for d in (34, 50, 101)]


def test_a_row_keeps_what_it_is():
    table = TABLES["baselines-cifar"]
    mixup = next(row for row in table.rows if row.name == "mixup")
    recipe = table.recipe(table.columns[0], mixup, {"mixup": 0.2, "epochs": 3})
    assert (recipe.mixup, recipe.epochs) == (1.0, 3)


def test_cost():
    assert num_train(DATA_SETS["cifar10"], 100.0) == 12_406
    assert num_train(DATA_SETS["cifar100"], 100.0) == 10_847
    assert num_train(DATA_SETS["cub200"]) == 5_994
    table = TABLES["long-tailed-resnet"]
    column = next(c for c in table.columns if c.name == "cifar10-r100")
    assert table.image_passes([column], table.rows[:2], 3, DATA_SETS) == 12_406 * 200 * 2 * 3
    assert table.image_passes([column], table.rows[:2], 3, DATA_SETS, epochs=5) == 12_406 * 5 * 2 * 3


def test_choose():
    columns = TABLES["long-tailed-resnet"].columns
    assert choose("column", None, columns) == list(columns)
    assert [c.name for c in choose("column", ["stl10-r50", "cifar10-*"], columns)] == [
        "cifar10-r200", "cifar10-r100", "cifar10-r50", "stl10-r50",
    ]  # fmt: skip
    with pytest.raises(InputError, match="unknown column 'cifar10-r20'; did you mean 'cifar10-r200'"):
        choose("column", ["cifar10-r20"], columns)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_claim_held_or_did_not():
    """By Student's interval of the paired differences: t(0.975, 2) = 4.3027 here."""
    better, worse = {0: 50.0, 1: 61.0, 2: 72.1}, {0: 48.0, 1: 59.1, 2: 70.0}  # differences 2, 1.9, 2.1
    found = judge(better, worse)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert found.verdict == HELD
    assert (found.difference.mean, found.difference.low, found.difference.high) == (
        pytest.approx(2), pytest.approx(2 - half), pytest.approx(2 + half),
    )  # fmt: skip
    turned = judge(worse, better)
    assert turned.verdict == NOT_HELD
    assert turned.difference.mean == pytest.approx(-2)


def test_a_verdict_is_paired_by_seed():
    """The seeds' own spread (10 points) does not hide a steady difference; unpaired it would."""
    seeds = range(4)
    worse = {s: 40.0 + 10 * s for s in seeds}
    assert judge({s: worse[s] + 1 + 0.1 * (s % 2) for s in seeds}, worse).verdict == HELD
    assert judge({s + 4: worse[s] + 1 for s in seeds}, worse).verdict == UNTOLD  # no seed in common


@pytest.mark.parametrize(
    ("better", "worse", "reason"),
    [
        ({0: 1.0}, {1: 0.0}, "the rows share no seed"),
        ({0: 9.0, 1: 9.0, 2: 9.0}, {0: 1.0}, "too few shared seeds, a verdict needs 3"),
        ({0: 9.0, 1: 9.0}, {0: 1.0, 1: 1.0}, "too few shared seeds, a verdict needs 3"),
        ({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 1.0, 2: 1.0}, "the interval over 3 seeds includes 0"),
        ({s: 2.0 for s in range(4)}, {s: 2.0 for s in range(4)}, "the interval over 4 seeds includes 0"),
    ],
)
def test_what_cannot_be_told_yet(better, worse, reason):
    found = judge(better, worse)
    assert (found.verdict, found.reason) == (UNTOLD, reason)


def test_a_claim_about_each_column():
    held, refuted, untold = Verdict(HELD), Verdict(NOT_HELD), Verdict(UNTOLD)
    assert judge_all({"a": held, "b": held}).verdict == HELD
    assert judge_all({"a": held, "b": untold}) == Verdict(UNTOLD, None, "held in 1 of 2 columns so far")
    assert judge_all({"a": held, "b": refuted, "c": untold}) == Verdict(NOT_HELD, None, "not in b")
    assert judge_all({}).verdict == UNTOLD


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ((HELD, True, 1.24, 0.31, 2.17, 3, ""), "held here: +1.2 (95 % 0.3 to 2.2), n = 3"),
        ((HELD, False, 1.24, 0.31, 2.17, 3, ""), "held: +1.2 (95 % 0.3 to 2.2), n = 3"),
        ((NOT_HELD, True, -1.0, -1.5, -0.5, 2, ""), "did not hold here: -1.0 (95 % -1.5 to -0.5), n = 2"),
        ((UNTOLD, True, 1.0, None, None, 1, "one seed"), "cannot be told yet: +1.0, n = 1; one seed"),
        ((UNTOLD, False, None, None, None, 0, "no run"), "cannot be told yet: no run"),
    ],
)
def test_what_a_verdict_says(record, text):
    names = ("verdict", "here_only", "mean", "low", "high", "n", "reason")
    assert verdict_text(dict(zip(names, record, strict=True))) == text


# --- a table from end to end ------------------------------------------------------------------------------------------

FIELDS = {k: v for k, v in tiny_fields(validation=0.0, mixup=0.0, epochs=2).items() if k not in ("data", "method")}
TINY = Table(
    name="tiny",
    paper="nobody",
    what="digits",
    columns=tuple(Column(f"r{r}", f"digits, ratio {r}", "digits", {"imbalance": float(r)}) for r in (10, 20)),
    rows=(
        Row("ce", "ce", "cross-entropy", "CE"),
        Row("etf-ce", "etf-ce", "fixed frame", "ETF"),
        Row("slow", "ce", "hardly trained", None, {"lr": 1e-6}),
    ),
    claims=(Claim("training helps in each column", "ce", "slow"), Claim("and in reverse", "slow", "ce")),
    fields=FIELDS,
    published={("CE", "r10"): (Published(81.5, "independent rerun", "a dream", sd=0.5, n=2),)},
    notes=("nothing of note",),
)


@pytest.fixture
def tiny_table(monkeypatch):
    monkeypatch.setitem(TABLES, "tiny", TINY)
    monkeypatch.setitem(DATA_SETS, "digits", DataSet("digits", 10, 1_257, "scikit-learn's"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One column of the tiny table with two seeds, all its rows; read only."""
    out = tmp_path_factory.mktemp("papers") / "out"
    return out, reproduce(TINY, TINY.columns[:1], TINY.rows, (0, 1), out)


def test_a_column_is_run_and_judged(done):
    out, content = done
    assert json.loads((out / "reproduction.json").read_text()) == content == collect(TINY, out)
    assert sorted(str(p.parent.relative_to(out)) for p in out.rglob("metrics.json")) == [
        f"r10/{group}/{method}/seed-{s}"
        for group, method in (("common", "ce"), ("common", "etf-ce"), ("slow", "ce"))
        for s in (0, 1)
    ]
    column = content["columns"][0]
    top1 = [json.loads((out / f"r10/common/ce/seed-{s}/metrics.json").read_text())["top1"] for s in (0, 1)]
    ce = column["rows"]["ce"]
    assert ce["by_seed"] == {"0": 100 * top1[0], "1": 100 * top1[1]}
    assert (ce["n"], ce["mean"]) == (2, pytest.approx(50 * sum(top1)))
    assert ce["published"] == [{"value": 81.5, "source": "independent rerun", "where": "a dream", "sd": 0.5, "n": 2,
                                "note": ""}]  # fmt: skip
    assert column["rows"]["etf-ce"]["published"] == "unknown"
    assert column["rows"]["slow"]["published"] == "no such row"
    assert column["departures"] == []
    first, reverse = content["claims"]
    slow = column["rows"]["slow"]["by_seed"]
    judged = first["columns"]["r10"]
    assert judged["mean"] == pytest.approx(sum(ce["by_seed"][s] - slow[s] for s in slow) / 2)
    assert judged["mean"] == -reverse["columns"]["r10"]["mean"]
    assert first["columns"]["r20"] == {
        "verdict": UNTOLD, "mean": None, "low": None, "high": None, "n": 0, "reason": "no finished run of ce and slow",
        "here_only": False,
    }  # fmt: skip
    assert first["verdict"] == UNTOLD  # one of two columns
    text = (out / "reproduction.md").read_text()
    assert "| r10 | ce | " in text
    assert "81.5 ± 0.5, n = 2 (independent rerun) |" in text
    assert "| r20 |" not in text
    assert "- nothing of note" in text


def test_show_and_a_second_call_train_nothing(done, tiny_table, capsys):
    out, content = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.json")}
    code, shown, _ = run(capsys, "reproduce", "tiny", "--out", out, "--show")
    assert code == 0
    assert "81.5 ± 0.5, n = 2" in shown
    assert "training helps in each column: cannot be told yet" in shown
    assert "not run" not in shown
    assert json.loads(run(capsys, "reproduce", "tiny", "--out", out, "--show", "--json")[1]) == content
    code, printed, error = run(
        capsys, "reproduce", "tiny", "--only", "r10", "--seeds", "0,1", "--out", out, "--json", "--quiet"
    )
    assert (code, json.loads(printed), error) == (0, content, "")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.json")} == before


def test_other_settings_are_for_here_only(tiny_table, tmp_path, capsys, class_folder):
    """Changed epochs and stand-in data are told, survive in the folder, and mixed settings are not compared."""
    pets = class_folder({c: 24 for c in "abcd"}, name="pets", test={c: 8 for c in "abcd"})
    command = ("reproduce", "tiny", "--only", "r10", "--rows", "ce,slow", "--seeds", "0,1", "--set", "batch-size=8")
    code, shown, _ = run(capsys, *command, "--data", pets, "--epochs", "4", "--out", tmp_path / "a")
    assert code == 0
    assert "epochs was 2, now 4; batch_size was 64, now 8 (r10)" in " ".join(shown.split())
    assert f"not the paper's setting: data was 'digits', now '{pets}'" in " ".join(shown.split())
    content = json.loads((tmp_path / "a" / "reproduction.json").read_text())
    verdict = content["claims"][0]["columns"]["r10"]
    assert verdict["here_only"]
    assert content["claims"][0]["here_only"]
    assert content["claims"][0]["verdict"] == UNTOLD
    shown = run(capsys, "reproduce", "tiny", "--out", tmp_path / "a", "--show")[1]
    assert verdict_text(verdict) in shown
    # the same row again with other epochs is another recipe; another row with other epochs is not compared with it
    code, _, error = run(capsys, *command, "--data", pets, "--epochs", "3", "--out", tmp_path / "a")
    assert code == 2
    assert "epochs was 4, now 3" in error
    one = ("reproduce", "tiny", "--only", "r10", "--seeds", "0,1", "--out", tmp_path / "b")
    assert run(capsys, *one, "--rows", "ce")[0] == 0
    code, shown, _ = run(capsys, *one, "--rows", "slow", "--epochs", "1", "--json")
    judged = json.loads(shown)["claims"][0]["columns"]["r10"]
    assert judged["verdict"] == UNTOLD
    assert judged["reason"] == "the rows were trained differently (epochs was 2, now 1)"


def test_data_in_a_folder_under_the_root_are_the_tables_own(monkeypatch, tmp_path, class_folder):
    root = class_folder({c: 24 for c in "abcd"}, name="birds", test={c: 8 for c in "abcd"}).parent
    monkeypatch.setitem(DATA_SETS, "birds", DataSet("Birds", 4, 96, "a folder"))
    table = Table(
        "b", "nobody", "birds", (Column("c", "birds", "birds"),), TINY.rows[:1], (), {**FIELDS, "batch_size": 8}
    )
    with pytest.raises(InputError, match=r"Birds must lie in data/birds \(--data-root says where\)"):
        reproduce(table, table.columns, table.rows, (0,), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    content = reproduce(table, table.columns, table.rows, (0,), tmp_path / "out", changes={"data_root": str(root)})
    assert content["columns"][0]["departures"] == []
    assert content["columns"][0]["rows"]["ce"]["n"] == 1


def test_a_folder_that_hides_a_data_set(tiny_table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    code, _, error = run(capsys, "reproduce", "tiny", "--out", "x")
    assert code == 2
    assert "a folder 'digits' lies here and would be taken for the data set" in error


def test_a_spent_budget_and_an_interrupt_keep_what_is_there(tiny_table, tmp_path, capsys):
    command = ("reproduce", "tiny", "--only", "r10", "--rows", "ce,etf-ce", "--seeds", "0", "--out", tmp_path / "o")
    code, shown, error = run(capsys, *command, "--budget", "0s")
    assert code == 0
    assert "the budget is spent; the same command continues" in error
    assert "nothing is finished" in shown
    assert not (tmp_path / "o").exists()
    begun = []

    def interrupt_the_second(state):
        if len(begun) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        reproduce(
            TINY, TINY.columns[:1], TINY.rows[:2], (0,), tmp_path / "o",
            on_cell=lambda *cell: begun.append(cell), progress=interrupt_the_second,
        )  # fmt: skip
    content = json.loads((tmp_path / "o" / "reproduction.json").read_text())
    assert [row["n"] for row in content["columns"][0]["rows"].values()] == [1, 0, 0]
    plan = json.loads(run(capsys, *command, "--dry-run", "--json")[1])
    assert plan["columns"][0]["to_run"] == {"ce": [], "etf-ce": [0]}
    assert run(capsys, *command)[0] == 0
    assert json.loads(run(capsys, *command, "--dry-run", "--json")[1])["columns"][0]["image_passes"] == 0


def test_an_interrupt_of_the_verb(tiny_table, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise Interrupted

    monkeypatch.setattr("equiframe.papers.reproduce.reproduce", interrupted)
    code, out, error = run(capsys, "reproduce", "tiny", "--out", tmp_path / "o")
    assert (code, out, error) == (130, "", f"stopped and saved in {tmp_path / 'o'}; the same command continues\n")


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_list(capsys):
    code, out, _ = run(capsys, "reproduce")
    assert code == 0
    assert all(name in out for name in TABLES)
    records = {r["name"]: r for r in json.loads(run(capsys, "reproduce", "--json")[1])}
    assert set(records) == set(TABLES)
    assert (records["long-tailed-densenet"]["known"], records["long-tailed-densenet"]["unknown"]) == (4, 32)
    assert all(r["claims"] and r["data"] and r["image_passes"] > 0 for r in records.values())


def test_dry_run(capsys, tmp_path):
    command = ("reproduce", "long-tailed-densenet", "--only", "cifar100-r*", "--rows", "ce,etf-dr", "--seeds", "0,1",
               "--out", tmp_path / "o", "--dry-run")  # fmt: skip
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "4 of 4" in out
    assert "CIFAR-100, ratio 100 (0.01)" in out
    plan = json.loads(run(capsys, *command, "--epochs", "10", "--json")[1])
    assert [c["image_passes"] for c in plan["columns"]][1] == 10_847 * 10 * 2 * 2
    assert plan["columns"][0]["published"]["ce"] == "unknown"
    assert plan["columns"][1]["published"]["ce"][0]["value"] == 43.08
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cbu",), "unknown table 'cbu'; did you mean 'cub'?"),
        (("cub", "--only", "resnet35"), "unknown column 'resnet35'; did you mean 'resnet5"),
        (("cub", "--only", ","), "',' names nothing"),
        (("cub", "--rows", "etf-rd"), "unknown row 'etf-rd'; did you mean 'etf-dr'?"),
        (("cub",), "cub200 is not under --data-root data"),
        (("cub", "--show"), "no such folder: runs/reproduce-cub"),
        (("cub", "--budget", "3"), "'3' is not a time such as 90s, 30min, 2h or 1d"),
        (("cub", "--set", "lr"), "a setting must be FIELD=VALUE, got 'lr'"),
        (("cub", "--set", "rl=1"), "unknown field 'rl'; did you mean 'lr'?"),
        (("cub", "--set", "seed=1"), "--set cannot change 'seed'; use --seeds"),
        (("cub", "--epochs", "0", "--dry-run"), "epochs must be at least 1, got 0"),
        (("long-tailed-resnet", "--data", "digits"), "--data takes the place of one data set, and the columns need"),
        (("tiny", "--rows", "ce", "--set", "e_w=2"), "field 'e_w' does not belong to head 'linear'"),
        (("tiny", "--seeds", "1,1"), "seed 1 is listed twice"),
        (("tiny", "--out", "home"), "output folder home holds other files (thesis.tex)"),
        (("tiny", "--out", "other"), "other holds results of table 'cub', not of 'tiny'"),
    ],
)
def test_wrong_input_is_one_line(tiny_table, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "reproduction.json").write_text('{"table": "cub"}')
    before = sorted(tmp_path.rglob("*"))
    code, out, error = run(capsys, "reproduce", *words, "--quiet")
    assert (code, out) == (2, "")
    assert error.startswith("equiframe: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before
