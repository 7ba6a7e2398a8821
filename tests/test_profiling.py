"""A profile counts the work of a network exactly, sorts the time of a step, and changes no result."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from equiframe.backbones import make_backbone
from equiframe.profiling import Profile, flop_per_image, kind_of, product_speed, shares_of
from equiframe.train import train


def test_work_of_a_network_by_hand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Linear(5, 7, bias=False)

        def forward(self, x):
            return self.second(self.first(x).mean((2, 3)))

    pixels = 6 * 6
    first, second = 2 * 9 * 3 * 5 * pixels, 2 * 5 * 7
    # forward, gradient of the weights, and of the input: not of the images
    assert flop_per_image(Two(), 6) == 2 * first + 3 * second


def test_resnet32_needs_what_the_docs_say():
    assert flop_per_image(make_backbone("resnet32"), 32) == pytest.approx(0.412e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "around", "kind"),
    [
        ("aten::mkldnn_convolution", ["equiframe: features"], "convolutions"),
        ("aten::native_batch_norm_backward", ["autograd", "equiframe: backward"], "normalisation"),
        ("aten::threshold_backward", ["equiframe: backward"], "activations and sums"),
        ("aten::mm", ["equiframe: backward"], "matrix products"),
        ("aten::mm", ["equiframe: head and loss"], "head and loss"),
        ("aten::_foreach_add_", ["Optimizer.step#SGD.step", "equiframe: optimiser"], "optimiser"),
        ("aten::index_select", [], "batches"),
        ("aten::sinc", ["equiframe: features"], "other"),
        ("CompiledFunction", ["equiframe: features"], "fused kernels"),
    ],
)
def test_kinds_of_work(name, around, kind):
    assert kind_of(name, [name, *around]) == kind


def test_shares_sum_to_one_and_leave_the_device_out():
    def event(name, spent, parent=None, device=DeviceType.CPU):
        return SimpleNamespace(name=name, self_cpu_time_total=spent, cpu_parent=parent, device_type=device)

    step, features = event("ProfilerStep#4", 100.0), event("equiframe: features", 10.0)
    convolution = event("aten::convolution", 60.0, features)
    events = [step, features, convolution, event("aten::index", 30.0), event("kernel", 50.0, device=DeviceType.CUDA)]
    shares = shares_of(events, on_device=False)
    assert shares == {"convolutions": 0.6, "batches": 0.3, "other": 0.1}
    assert list(shares) == ["convolutions", "batches", "other"]


def test_lines_say_how_far_the_limit_is(tmp_path):
    shares = {"convolutions": 0.5, "normalisation": 0.497, "other": 0.003}
    found = Profile(6, 128, 2.0, shares, 1e9, 128e9, 3 << 20, "cpu, float32, 1 thread", tmp_path / "trace.json.gz")
    assert found.images_per_second == 64
    assert found.limit == 128
    lines = found.lines()
    assert len(lines) == 5
    assert "convolutions 50 %, normalisation 50 %" in lines[2]
    assert "other" not in lines[2]
    assert "128 images/s; reached 50%; 100% while in convolutions" in lines[3]


def test_product_speed_is_a_speed():
    assert 1e8 < product_speed(torch.device("cpu"), torch.float32, 128) < 1e14


def test_a_watched_run_is_the_same_run(tiny, tmp_path):
    said = []
    recipe = tiny(epochs=2, batch_size=16)
    plain = train(recipe, tmp_path / "plain")
    watched = train(recipe, tmp_path / "watched", profile=True, say=said.append)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "watched")]
    assert weights[0] == weights[1]
    assert plain["macro"] == watched["macro"]
    (summary,) = [text for text in said if text.startswith("profile of 6 steps of 16 images")]
    assert (tmp_path / "watched" / "profile" / "summary.txt").read_text(encoding="utf-8") == summary + "\n"
    assert len(summary.splitlines()) == 5
    trace = json.loads(gzip.decompress((tmp_path / "watched" / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    for phase in ("features", "head and loss", "backward", "optimiser"):
        assert names.count(f"equiframe: {phase}") >= 6
    assert not (tmp_path / "plain" / "profile").exists()


def test_epochs_of_a_step_or_two(tiny, tmp_path):
    said = []
    train(tiny(epochs=1, batch_size=512), tmp_path / "run", profile=True, say=said.append)
    assert any(text.startswith("profile of 1 steps") for text in said)
