"""Exported files: they compute what the run does, say what they want, and are read without running code."""

import importlib
import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch

from conftest import tiny_fields, write_class
from equiframe import export as export_module
from equiframe.backbones import ResNetCIFAR
from equiframe.cli import main
from equiframe.deployed import (
    Deployed,
    as_metadata,
    as_run,
    from_metadata,
    load_exported,
    read_torch_export_description,
)
from equiframe.errors import InputError
from equiframe.export import WRITERS, compare_outputs, export_run, quantise, write_onnx, write_safetensors
from equiframe.method import METHOD_FIELDS, build_head, resolve_method
from equiframe.model import Classifier, ModelCard, build_classifier, load_classifier

FILES = {"onnx": "model.onnx", "torch-export": "model.pt2", "safetensors": "model.safetensors", "int8": "small.onnx"}


@pytest.fixture(scope="module")
def files(finished_run, tmp_path_factory):
    """The finished run in every format: kind → (path, record)."""
    folder = tmp_path_factory.mktemp("exported")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        known = []  # the graph of the one is the graph of the other: two seconds saved
        patch.setitem(
            WRITERS, "onnx", lambda *model: known[0] if known else known.append(write_onnx(*model)) or known[0]
        )
        for kind, name in FILES.items():
            fmt, int8 = ("onnx", "static") if kind == "int8" else (kind, None)
            made[kind] = (folder / name, export_run(finished_run, fmt, folder / name, int8=int8))
    return made


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    for k in range(4):
        write_class(folder, k, 2, start=900 + 10 * k, size=(30, 20))
    return folder


def a_card(head_fields, num_classes, *, temperature=1.7, image_size=4):
    return ModelCard(
        backbone="mlp", width=16, image_size=image_size, class_names=[str(k) for k in range(num_classes)],
        train_counts=[1] * num_classes, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], method="ce",
        method_fields=head_fields, temperature=temperature,
    )  # fmt: skip


def lived_in(model):
    """The model with BatchNorm statistics and weights as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            module.weight.data.copy_(1 + 0.3 * torch.randn(module.num_features, generator=generator))
    return model.eval()


def pixels(num, side=4, seed=0):
    return torch.randint(0, 256, (num, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# --- the computation --------------------------------------------------------------------------------------------------


def test_the_formula(finished_run, files):
    """Bytes to probabilities by NumPy, image for image and channel for channel, against every file."""
    model, card = load_classifier(finished_run)
    batch = pixels(3, card.image_size)
    for i, picture in enumerate(batch.numpy()):
        x = np.stack([(picture[c] / 255 - card.mean[c]) / card.std[c] for c in range(3)]).astype(np.float32)
        with torch.no_grad():
            z = model(torch.from_numpy(x)[None]).logits[0].double().numpy()
        e = np.exp(z / card.temperature)
        for kind in ("onnx", "torch-export", "safetensors"):
            logits, probabilities = load_exported(files[kind][0], device="cpu", trust=True).run(batch)
            assert logits[i].numpy() == pytest.approx(z, abs=2e-4)
            assert probabilities[i].numpy() == pytest.approx(e / e.sum(), abs=1e-5)


@pytest.mark.parametrize("kind", FILES)
def test_any_number_of_images(files, kind):
    run = load_exported(files[kind][0], device="cpu", trust=True).run
    batch = pixels(9, 12)
    whole = run(batch)[1]
    assert whole.shape == (9, 4)
    torch.testing.assert_close(whole.sum(1), torch.ones(9))
    for parts in ([1, 8], [4, 5]):
        torch.testing.assert_close(torch.cat([run(part)[1] for part in batch.split(parts)]), whole, rtol=0, atol=1e-5)


HEADS = [
    ("ce", {}, 2), ("ce", {}, 1000), ("frozen-random", {}, 5), ("cosine", {}, 7), ("ldam", {}, 3), ("disa", {}, 4),
    ("etf-la", {}, 2), ("etf-la", {}, 17), ("etf-la", {}, 32), ("etf-dr", {"e_h": 4.0, "e_w": 2.0}, 10),
    ("etf-dr", {"geometry": "kerdock"}, 100), ("etf-dr", {"norm": "none", "geometry": "code"}, 40), ("nearest-frame-la", {}, 6),
    *[("ce", {"second_stage": stage}, 5) for stage in ("crt", "tau-norm", "ncm", "post-hoc")],
    ("etf-dr", {"second_stage": "crt", "e_h": 9.0}, 5),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes", "num_classes"), HEADS)
def test_every_head_as_an_affine_map(method, changes, num_classes):
    fields = resolve_method(method, dict.fromkeys(METHOD_FIELDS) | changes)
    card = a_card(fields, num_classes)
    torch.manual_seed(0)
    model = lived_in(build_classifier(card))
    batch = pixels(11)
    with torch.no_grad():
        logits, probabilities = Deployed(model, card).eval()(batch)
    z, p = as_run(model, card, torch.device("cpu"))(batch)
    torch.testing.assert_close(logits, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probabilities, p, rtol=1e-5, atol=1e-6)


def test_convolutions_and_unit_features_in_onnx(tmp_path):
    """An option-A shortcut, BatchNorm, features of unit length on an orthoplex; float32 agrees, 8 bits nearly."""
    fields = resolve_method("etf-dr", {})
    card = a_card(fields, 100, image_size=8)
    torch.manual_seed(0)
    backbone = ResNetCIFAR(8, 16)
    model = lived_in(Classifier(backbone, build_head(fields, backbone.num_features, 100)))
    write = write_onnx(model, card)
    (tmp_path / "m.onnx").write_bytes(write(as_metadata(card, {})))
    reference = as_run(model, card, torch.device("cpu"))
    found = compare_outputs(
        load_exported(tmp_path / "m.onnx").run, reference, iter([(pixels(n, 8, seed=n), None) for n in (1, 6)])
    )
    assert found["num_images"] == 7
    assert found["argmax_agreement"] == 1
    assert found["max_abs_logits"] <= 1e-5 * max(1, found["largest_logit"])
    small = quantise(write({}), "static", [pixels(64, 8)])
    (tmp_path / "s.onnx").write_bytes(export_module._onnx_writer(small)(as_metadata(card, {})))
    assert len(small) < 0.6 * len(write({}))
    found = compare_outputs(load_exported(tmp_path / "s.onnx").run, reference, iter([(pixels(64, 8), None)]))
    assert 1e-5 < found["max_abs_logits"] < 0.2 * found["largest_logit"]


def test_two_outputs_are_compared_image_by_image():
    def outputs(shift):
        def run(batch):
            z = torch.stack([batch[:, 0, 0, 0].float(), torch.full((len(batch),), 100.0 + shift)], 1)
            return z, torch.softmax(z, 1)

        return run

    batches = [(torch.full((3, 3, 4, 4), value, dtype=torch.uint8), None) for value in (0, 102, 200)]
    found = compare_outputs(outputs(5), outputs(0), iter(batches))
    assert found["num_images"] == 9
    assert found["max_abs_logits"] == 5
    assert found["argmax_agreement"] == pytest.approx(6 / 9)  # 102 lies between 100 and 105
    assert found["largest_logit"] == 200


# --- what a file says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_the_description(finished_run, files, kind):
    path, record = files[kind]
    exported = load_exported(path, device="cpu", trust=True)
    assert exported.card == load_classifier(finished_run)[1]
    inside = {key: value for key, value in record.items() if key not in ("path", "bytes")}
    assert exported.record == inside
    parity = record["parity"]
    assert parity["num_images"] == 24
    assert parity["of"] == "test images of pets"
    if kind == "int8":
        assert parity["argmax_agreement"] >= 0.9
    else:
        assert parity["argmax_agreement"] == 1
        assert parity["max_abs_probabilities"] < 1e-5


def test_onnx_metadata_reads_without_equiframe(files):
    import onnxruntime

    session = onnxruntime.InferenceSession(files["onnx"][0])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == ["bright", "dark", "gray", "many words"]
    assert json.loads(metadata["temperature"]) > 0
    assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == 3
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 12, 12])
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("logits", ["batch", 4]),
        ("probabilities", ["batch", 4]),
    ]
    assert "cut the centre 12x12" in session.get_modelmeta().description or "cut the centre" in metadata["record"]


def test_metadata_and_back():
    card = a_card(resolve_method("etf-la", {}), 3)
    record = {"parity": None, "ä": [1, 2.5]}
    metadata = as_metadata(card, record)
    assert all(isinstance(value, str) for value in metadata.values())
    assert from_metadata(metadata, "x") == (card, record)
    for change, message in (
        ({"mean": "[1"}, "damaged description"),
        ({"std": "[0, 1, 1]"}, "std must be"),
        ({"record": "3"}, "no record"),
        ({"class_names": '["a"]'}, "train_counts"),
    ):
        with pytest.raises(InputError, match=message):
            from_metadata(metadata | change, "x")
    with pytest.raises(InputError, match="no description of a classifier"):
        from_metadata({"author": "somebody"}, "x")


# --- int8 -------------------------------------------------------------------------------------------------------------


def test_int8_is_measured_before_and_after(finished_run, files):
    path, record = files["int8"]
    int8 = record["int8"]
    metrics = json.loads((finished_run / "metrics.json").read_text())
    for key in ("top1", "macro", "many", "medium", "few", "head", "middle", "tail", "worst"):
        assert (
            int8["before"][key] == pytest.approx(metrics[key])
            if metrics[key] is not None
            else int8["before"][key] is None
        )
    assert int8["before"]["ece"] == pytest.approx(metrics["ece"], abs=1e-6)
    assert (int8["kind"], int8["num_images"], int8["of"]) == ("static", 24, "test")
    assert int8["after"]["macro"] >= int8["before"]["macro"] - 0.1
    assert int8["after"] != int8["before"]
    import onnx

    kinds = [node.op_type for node in onnx.load(path).graph.node if node.op_type != "DequantizeLinear"]
    assert kinds[:3] == [
        "Cast",
        "Mul",
        "Sub",
    ]  # what comes before the first product and from the classifier on is float32
    assert [kind for kind in kinds if kind != "Div"][-2:] == ["Gemm", "Softmax"]  # a temperature of 1 divides nothing
    assert kinds.count("QuantizeLinear") >= 3


def test_calibration_images_are_the_same_number_of_each_class():
    labels = np.array([0] * 900 + [1] * 90 + [2] * 9)
    chosen = labels[export_module._calibration_positions(labels, 3)]
    assert np.bincount(chosen).tolist() == [171, 90, 9]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_not_kept(finished_run, tmp_path, monkeypatch):
    def wrong(model, card):
        model.head.batch_norm.weight.data.mul_(1.01)
        return write_safetensors(model, card)

    monkeypatch.setitem(export_module.WRITERS, "safetensors", wrong)
    before, _ = load_classifier(finished_run)  # what the check compares with must not change with it
    reference = as_run(before, load_classifier(finished_run)[1], torch.device("cpu"))
    monkeypatch.setattr(export_module, "as_run", lambda *args: reference)
    with pytest.raises(InputError, match=r"does not compute what .* does: logits differ .* nothing was written"):
        export_run(finished_run, "safetensors", tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "onxx"), "did you mean 'onnx'"),
        (("--format", "safetensors", "--int8"), "int8 is onnxruntime's, for format onnx"),
        (("--int8", "statc"), "did you mean 'static'"),
        (("--format", "onnx", "--out", "model.bin"), "a file of format onnx ends in .onnx"),
        (("--out", "nowhere/model.onnx"), "no such folder: nowhere"),
        (("--images", "-1"), "images must be at least 0"),
        (("--format", "safetensors", "--data", "nowhere/else"), "no such folder: nowhere/else"),
    ],
)
def test_wrong_input_is_one_line(finished_run, capsys, arguments, message):
    assert main(["export", str(finished_run), *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert message in error
    assert error.count("\n") == 1


def test_the_runs_own_weights_are_not_overwritten(finished_run):
    with pytest.raises(InputError, match="holds the run's own weights"):
        export_run(finished_run, "safetensors", finished_run / "model.safetensors")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra(finished_run, monkeypatch, capsys, package):
    imported = importlib.import_module

    def missing(name, *rest):
        if name == package:
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["export", str(finished_run)]) == 2
    assert f"format onnx needs {package}: pip install 'equiframe[export]'" in capsys.readouterr().err


def test_unchecked_on_request(finished_run, tmp_path, capsys):
    """Without images the data is not needed."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    text = (run / "recipe.yaml").read_text().replace("data: ", "data: /gone")
    (run / "recipe.yaml").write_text(text)
    (run / "checksums.json").unlink()
    assert main(["export", str(run), "--format", "safetensors", "--images", "0"]) == 0
    assert "not checked on any image" in capsys.readouterr().out
    assert load_exported(run / "exported.safetensors").record["parity"] is None


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_predict_takes_the_file_in_place_of_the_run(finished_run, files, images, capsys, kind):
    def rows(what, *more):
        assert main(["predict", str(what), str(images), "--device", "cpu", *more]) == 0
        lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
        return lines[0], [(row[0], {row[i]: float(row[i + 1]) for i in range(1, len(row), 2)}) for row in lines[1:]]

    header, expected = rows(finished_run)
    got_header, got = rows(files[kind][0], *(["--trust"] if kind == "torch-export" else []))
    assert got_header == header
    assert len(got) == 8
    for (path, p), (other, q) in zip(got, expected, strict=True):
        assert path == other
        assert p == pytest.approx(q, abs=0.1 if kind == "int8" else 1e-5)


def test_a_streamed_run_with_a_centre_crop(class_folder, tmp_path):
    """Images of any size, cut as evaluation cuts them."""
    from equiframe.recipe import Recipe
    from equiframe.train import train

    data = class_folder({"a": 8, "b": 8}, size=(30, 20), test={"a": 3, "b": 3})
    fields = tiny_fields(
        data=str(data), image_size=12, data_mode="stream", centre_crop=0.75, batch_size=8, augmentation="none"
    )
    train(Recipe(**fields), tmp_path / "run")
    record = export_run(tmp_path / "run", "safetensors")
    assert record["parity"]["argmax_agreement"] == 1
    assert "resize the shorter side to 16" in record["resize"]


# --- files from others ------------------------------------------------------------------------------------------------


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pt2_file_is_read_only_where_it_is_trusted(files, tmp_path, capsys):
    """torch.export.load runs pickles (and this test would tell if it no longer did): so the file is refused by default, and its
    description is read without touching the rest."""
    mark, evil = tmp_path / "ran", tmp_path / "evil.pt2"
    payload = io.BytesIO()
    torch.save((Evil(mark),), payload)
    with zipfile.ZipFile(files["torch-export"][0]) as source, zipfile.ZipFile(evil, "w", zipfile.ZIP_STORED) as target:
        for member in source.infolist():
            inside = "sample_inputs" in member.filename and member.filename.endswith(".pt")
            target.writestr(member.filename, payload.getvalue() if inside else source.read(member))
    card, record = read_torch_export_description(evil)
    assert card.class_names[0] == "bright"
    assert record["format"] == "torch-export"
    assert main(["predict", str(evil), str(tmp_path), "--device", "cpu"]) == 2
    assert "can run code that its maker put in; add --trust" in capsys.readouterr().err
    assert not mark.exists()
    with pytest.raises(InputError):  # what was unpickled is no input
        load_exported(evil, device="cpu", trust=True)
    assert mark.exists()


@pytest.mark.parametrize("kind", ["onnx", "torch-export", "safetensors"])
def test_damaged_files(files, tmp_path, kind):
    path = files[kind][0]
    content = path.read_bytes()
    broken = tmp_path / path.name
    for share in (0, 0.5, 0.99):
        broken.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=broken.name):
            load_exported(broken, device="cpu", trust=True)


def test_a_graph_of_somebody_else(tmp_path):
    import onnx

    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    with pytest.raises(InputError, match="no description of a classifier"):
        load_exported(path)
    onnx.helper.set_model_props(model, as_metadata(a_card(resolve_method("ce", {}), 2), {}))
    onnx.save(model, path)
    with pytest.raises(InputError, match="other inputs or outputs"):
        load_exported(path)


def test_a_device_that_cannot_run_it(files):
    for kind, message in (("onnx", "cannot run ONNX files here"), ("safetensors", "cannot be used here")):
        with pytest.raises(InputError, match=message):
            load_exported(files[kind][0], device="hip" if kind == "onnx" else "cuda")


def test_other_paths(finished_run, tmp_path):
    with pytest.raises(InputError, match="give its folder"):
        load_exported(finished_run / "model.safetensors")
    with pytest.raises(InputError, match="no such file"):
        load_exported(tmp_path / "none.onnx")
    (tmp_path / "model.onxx").write_text("")
    with pytest.raises(InputError, match=r"did you mean '.onnx'"):
        load_exported(tmp_path / "model.onxx")
