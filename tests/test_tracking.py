"""What an epoch records: collapse on train and validation images, pull and push of gradients, TensorBoard events."""

import json
import sys

import numpy as np
import pytest
import torch

from equiframe import CrossEntropy, DotRegression, InputError, evaluate
from equiframe.cli import main
from equiframe.collapse import ClassStatistics, nc1
from equiframe.data.batches import Loader
from equiframe.data.sources import ImageSet
from equiframe.heads import LinearHead
from equiframe.model import Classifier
from equiframe.numerics import Numerics
from equiframe.tracking import check_tracks, event_writer, gradient_record, parse_tracks, tracked_positions

CPU = Numerics(torch.device("cpu"), "float32", "contiguous", {})


def test_tracked_positions_are_the_first_of_each_class():
    labels = np.array([2, 0, 0, 1, 0, 2, 0, 1, 2, 2])
    assert tracked_positions(labels, per_class=2).tolist() == [0, 1, 2, 3, 5, 7]
    assert tracked_positions(labels, per_class=99).tolist() == list(range(10))


def test_tracks_are_checked():
    assert parse_tracks("collapse, gradients") == {"collapse", "gradients"}
    assert parse_tracks("none") == set()
    with pytest.raises(InputError, match="did you mean 'collapse'"):
        parse_tracks("colapse")
    with pytest.raises(InputError, match="the gradient of DotRegression is another"):
        check_tracks("gradients", DotRegression())
    assert check_tracks("gradients", CrossEntropy()) == {"gradients"}


def test_gradient_record_against_autograd():
    """The sum of pull and push is autograd's gradient on the class vectors; their ratio is what is recorded."""
    torch.manual_seed(0)
    labels = np.array([0] * 6 + [1] * 3 + [2])
    images = ImageSet(labels, [str(i) for i in labels], torch.randint(0, 255, (10, 3, 4, 4), dtype=torch.uint8))
    model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)), LinearHead(5, 3))
    loader = Loader(images, batch_size=10, image_size=4, mean=[0.5] * 3, std=[0.2] * 3, device=CPU.device)
    record = gradient_record(model, loader, CrossEntropy(), CPU, [6, 3, 1])

    batch, targets = next(loader.ordered())
    h = model.backbone(batch).detach()
    p = torch.softmax(model.head.linear(h), 1).detach()
    for name, k in (("head", 0), ("tail", 2)):
        pull = sum((1 - p[i, k]) * h[i] for i in range(10) if targets[i] == k)
        push = sum(p[i, k] * h[i] for i in range(10) if targets[i] != k)
        assert record[f"vector_push_over_pull_{name}"] == pytest.approx(float(push.norm() / pull.norm()), rel=1e-5)
        w = model.head.linear.weight
        loss = torch.nn.functional.cross_entropy(model.head.linear(h), targets)
        grad = torch.autograd.grad(loss, w)[0][k]
        torch.testing.assert_close(grad, (push - pull) / 10, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("tracked") / "run"
    words = "train digits --imbalance 20 --method ce --backbone resnet20 --width 4 --epochs 2 --batch-size 64 --quiet"
    assert (
        main([*words.split(), "--track", "collapse-all,gradients,test", "--log", "tensorboard", "--out", str(out)]) == 0
    )
    return out


def test_history_holds_what_was_asked_for(tracked_run):
    records = [json.loads(line) for line in (tracked_run / "history.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for key in ("train_nc1", "train_nc2_angle", "train_nc3", "train_cdnv", "val_nc1", "val_nc4", "train_few_angle_means",
                "test_nc1", "test_nc4", "test_macro", "vector_push_over_pull_head", "vector_push_over_pull_tail", "feature_push_over_pull_tail"):  # fmt: skip
        assert isinstance(records[0][key], float), key
        assert records[0][key] > 0
    final = json.loads((tracked_run / "metrics.json").read_text())
    assert records[1]["test_macro"] == pytest.approx(final["macro"], abs=1e-9)  # the last epoch is what is tested


def test_events_can_be_read_by_tensorboard(tracked_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked_run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [0, 1]
    assert "train_nc1" in events.Tags()["scalars"]


def test_last_tracked_collapse_is_the_final_one(tracked_run):
    """After the last epoch the model is the final model: what was tracked on all images is what metrics.json says."""
    last = json.loads((tracked_run / "history.jsonl").read_text().splitlines()[-1])
    final = json.loads((tracked_run / "metrics.json").read_text())
    for key in ("nc1", "nc2_angle", "nc2_norm", "nc3", "nc4", "few_angle_means"):
        assert last[f"train_{key}"] == pytest.approx(final[key], rel=1e-6)


def test_collapse_is_tracked_on_train_and_test_by_default(tmp_path, monkeypatch):
    """On up to a fixed number of images of each, and without a look at the accuracy on test images."""
    monkeypatch.setattr("equiframe.tracking.TRACKED_IMAGES", 120)
    seen = []
    real = evaluate.collect

    def collect(model, loader, **options):
        seen.append(len(loader.images))
        return real(model, loader, **options)

    monkeypatch.setattr("equiframe.tracking.collect", collect)
    words = "train digits --imbalance 20 --method ce --backbone resnet20 --width 4 --epochs 1 --batch-size 64 --quiet"
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    for split in ("train", "val", "test"):
        for key in ("nc1", "nc2_angle", "nc2_norm", "nc3", "nc4", "few_angle_means", "few_angle_vectors"):
            assert isinstance(record[f"{split}_{key}"], float), (split, key)
        assert f"{split}_cdnv" not in record
    assert "test_macro" not in record
    assert seen[0] <= 120  # training images
    assert seen[-1] == 120  # test images: 12 of each class


def test_a_missing_tensorboard_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="needs TensorBoard"):
        event_writer("tensorboard", "nowhere")


def test_tracking_does_not_change_the_training(tmp_path):
    words = "train digits --imbalance 20 --backbone resnet20 --width 4 --epochs 1 --batch-size 64 --quiet"
    words += " --memory-format contiguous --track"
    for track in ("none", "collapse-all"):
        assert main([*words.split(), track, "--out", str(tmp_path / track)]) == 0
    weights = [(tmp_path / track / "model.safetensors").read_bytes() for track in ("none", "collapse-all")]
    assert weights[0] == weights[1]


def test_report_and_details_of_a_real_run(tracked_run, tmp_path, capsys):
    details = json.loads((tracked_run / "details.json").read_text())
    assert sum(b["count"] for b in details["reliability"]) == 539
    assert len(details["cosines"]["means"]) == 10
    assert details["wrong"][0]["probability"] >= details["wrong"][-1]["probability"]
    assert (tracked_run / "report.html").is_file()
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    assert main(["report", str(tracked_run), "--out", str(page), "--figures", str(figures), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == str(page)
    assert "How did it train?" in page.read_text()
    assert (figures / "collapse.pdf").is_file()


def test_evaluate_with_collapse_prints_every_measure(tracked_run, capsys):
    assert main(["evaluate", str(tracked_run), "--collapse", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    saved = json.loads((tracked_run / "metrics.json").read_text())
    assert metrics["nc1"] == pytest.approx(saved["nc1"], rel=1e-5)
    assert {"cdnv", "nc2_etf_error", "nc3_cos_mean", "uniformity_log_mean", "cos_hw_mean"} <= metrics.keys()


def test_collapse_of_features_from_anywhere(tmp_path, capsys):
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 60)
    vectors = random.standard_normal((4, 6))
    features = vectors[labels] + 0.2 * random.standard_normal((60, 6))
    np.savez(tmp_path / "f.npz", features=features, labels=labels, class_vectors=vectors)
    assert main(["collapse", str(tmp_path / "f.npz"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    statistics = ClassStatistics(4, 6).update(torch.from_numpy(features), torch.from_numpy(labels))
    assert values["nc1"] == pytest.approx(nc1(statistics))
    decided = (features @ vectors.T).argmax(1)
    means = np.stack([features[labels == k].mean(0) for k in range(4)])
    nearest = ((features[:, None] - means) ** 2).sum(2).argmin(1)
    assert values["nc4"] == pytest.approx((decided == nearest).mean())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(3, int)}, "lacks the array 'features' (it has labels)"),
        ({"features": np.zeros((3, 2))}, "lacks the array 'labels'"),
        ({"features": np.zeros((3, 2)), "labels": np.zeros(4, int)}, "must be 3 whole numbers"),
        ({"features": np.zeros((3, 2)), "labels": np.array([0, -1, 1])}, "must be 3 whole numbers from 0"),
        ({"features": np.zeros(3), "labels": np.zeros(3, int)}, "must be floating (N, D)"),
        ({"features": np.zeros((3, 2)), "labels": np.arange(3), "bias": np.zeros(2)}, "bias of"),
        ({"features": np.array([{}]), "labels": np.zeros(1, int)}, "is not a NumPy archive (.npz) of plain arrays"),
        ({"features": np.full((4, 2), np.nan), "labels": np.arange(4)}, "NaN or infinite"),
    ],
)
def test_wrong_feature_files(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "f.npz", **arrays)
    assert main(["collapse", str(tmp_path / "f.npz")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_collapse_of_no_archive(tmp_path, capsys):
    (tmp_path / "f.npz").write_text("hello")
    assert main(["collapse", str(tmp_path / "f.npz")]) == 2
    assert main(["collapse", str(tmp_path / "missing.npz")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_frame_plot_and_peeled_verbs(tmp_path, capsys):
    assert main(["frame", "4", "3", "--plot", str(tmp_path / "f.svg"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optimal"] is True
    assert (tmp_path / "f.svg").stat().st_size > 1000
    assert main(["frame", "4", "3", "--plot", str(tmp_path / "f.docx")]) == 2
    assert "its ending must be one of" in capsys.readouterr().err
    assert main(["peeled", "--classes", "4", "--dim", "3", "--ratio", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["peeled", "--claim", "C9"]) == 2
    assert "unknown claim 'C9'" in capsys.readouterr().err
