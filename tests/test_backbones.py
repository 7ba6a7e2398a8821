"""Backbones: the published sizes, features of the promised width."""

import pytest
import torch
from torch import nn

from equiframe.backbones import OWN_BACKBONES, ResNetCIFAR, _BasicBlock, check_backbone, make_backbone
from equiframe.errors import InputError


def size(module):
    return sum(p.numel() for p in module.parameters())


# He et al. 2016, table 6 (0.27, 0.46, 0.66, 0.85, 1.7 M); exact with option-A shortcuts and a classifier of 10 classes
PUBLISHED = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize("depth", PUBLISHED)
def test_resnets_have_the_published_sizes(depth):
    backbone = make_backbone(f"resnet{depth}")
    classifier = 64 * 10 + 10
    assert size(backbone) + classifier == PUBLISHED[depth]
    blocks, w = (depth - 2) // 6, 16
    convolutions = 27 * w + 9 * (2 * blocks * w**2 * (1 + 4 + 16) - (w**2 * 2 + 4 * w**2 * 2))
    norms = 2 * (w + 2 * blocks * (w + 2 * w + 4 * w))
    assert size(backbone) == convolutions + norms
    assert backbone.num_features == 64
    assert sum(isinstance(m, nn.Conv2d) for m in backbone.modules()) + 1 == depth  # and the classifier


def test_the_shortcut_has_no_parameters_and_pads_with_zeros():
    block = _BasicBlock(4, 8, 2)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    x = torch.rand(2, 4, 6, 6)
    out = block.eval()(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].abs().sum() + out[:, 6:].abs().sum() == 0


@pytest.mark.parametrize("side", [4, 7])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_block_computes_to_the_bit_what_slices_and_a_sum_would(side, memory_format, precision):
    def plain(block, x):
        out = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
        if block.stride != 1:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *block.pad))
        return torch.relu(out + x)

    for inputs, width, stride in ((4, 4, 1), (4, 8, 2)):
        torch.manual_seed(side)
        block = _BasicBlock(inputs, width, stride).to(memory_format=memory_format)
        results = []
        for forward in (plain, _BasicBlock.forward):
            x = torch.randn(3, inputs, side, side, generator=torch.Generator().manual_seed(1))
            x = x.to(memory_format=memory_format).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                out = forward(block, torch.relu(x).to(precision))
            block.zero_grad()
            out.float().square().mean().backward()
            results.append([out, x.grad, *(p.grad.clone() for p in block.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("width", [1, 4, 5, 32])
def test_width_of_a_resnet(width):
    backbone = make_backbone("resnet20", width=width)
    assert backbone.num_features == 4 * width
    assert backbone(torch.rand(2, 3, 16, 16)).shape == (2, 4 * width)


@pytest.mark.parametrize("side", [4, 8, 32, 33])
def test_resnets_take_images_of_any_size(side):
    assert make_backbone("resnet20", width=4)(torch.rand(2, 3, side, side)).shape == (2, 16)


def test_a_resnet_of_another_depth():
    assert ResNetCIFAR(8, 4)(torch.rand(2, 3, 8, 8)).shape == (2, 16)
    with pytest.raises(InputError, match=r"depth 6n\+2, got 18"):
        ResNetCIFAR(18)


def test_densenet_has_the_authors_510_features():
    backbone = make_backbone("densenet150").eval()
    assert backbone.num_features == 510
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 8, 8)).shape == (1, 510)
    assert sum(isinstance(m, nn.Conv2d) for m in backbone.modules()) == 1 + 3 * 24 * 2 + 2
    assert make_backbone("densenet150", width=4).num_features == 170


def test_mlp():
    backbone = make_backbone("mlp", image_size=8)
    assert backbone.num_features == 256
    assert size(backbone) == 192 * 256 + 2 * 256 + 256 * 256 + 2 * 256
    assert make_backbone("mlp", image_size=8, width=7)(torch.rand(2, 3, 8, 8)).shape == (2, 7)


def test_features_have_gradients_down_to_the_first_layer():
    for name in ("resnet20", "mlp"):
        backbone = make_backbone(name, image_size=8, width=4)
        backbone(torch.rand(4, 3, 8, 8)).square().sum().backward()
        assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "width"),
    [("timm:test_resnet", 96), ("test_efficientnet.r160_in1k", 256), ("mobilenetv3_small_050", 1024), ("test_vit", 64)],
)
def test_a_timm_model_gives_features_of_the_width_that_it_says(name, width):
    """In timm, ``num_features`` of mobilenetv3 is the width before its last layer."""
    backbone = make_backbone(name, image_size=32)
    assert backbone.training
    assert backbone.num_features == width
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, width)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet21", "resnet"), ("resnet5", "resnet"), ("mlpp", "mlp"), ("timm:resnet19", "resnet1")]
)
def test_an_unknown_name_names_the_nearest(name, near):
    for check in (check_backbone, make_backbone):
        with pytest.raises(InputError, match=f"unknown backbone '{name}'; did you mean '{near}.*ours: resnet20,"):
            check(name)


def test_known_names_pass_the_check():
    for name in (*OWN_BACKBONES, "auto", "resnet18", "timm:resnet18", "resnet18.a1_in1k"):
        check_backbone(name)


def test_options_that_a_backbone_does_not_have():
    with pytest.raises(InputError, match="resnet20 has no pretrained weights"):
        make_backbone("resnet20", pretrained=True)
    with pytest.raises(InputError, match=r"width is an option of .*, not of 'resnet18'"):
        make_backbone("resnet18", width=4)


def test_pretrained_weights_that_cannot_be_loaded(monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match="pretrained weights of 'resnet18' could not be loaded: no route"):
        make_backbone("resnet18", pretrained=True)


def test_images_that_a_timm_model_cannot_take():
    with pytest.raises(InputError, match="'inception_v3' cannot take images of 8x8"):
        make_backbone("inception_v3", image_size=8)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"'resnet18' comes from timm: pip install 'equiframe\[train\]'"):
        make_backbone("resnet18")
    assert make_backbone("resnet20").num_features == 64
