"""Backbones: images → features (B, D). Small residual and dense networks for 32×32; everything else is timm.

``make_backbone(name)`` returns a module with the attribute ``num_features``.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equiframe.errors import InputError

RESNET_DEPTHS = (20, 32, 44, 56, 110)
OWN_BACKBONES = (*(f"resnet{d}" for d in RESNET_DEPTHS), "densenet150", "mlp")


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions with an option-A shortcut (subsample and zero-pad: no parameters; He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        before = (width - inputs) // 2
        self.stride, self.pad = stride, (before, width - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            # pooling of one pixel subsamples exactly, and its gradient is one pass where that of slices is four
            x = F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, *self.pad))
        return F.relu(out.add_(x), inplace=True)


class ResNetCIFAR(nn.Module):
    """ResNet-(6n+2) for 32×32 images (He et al. 2016, §4.2), without its classifier.

    Args:
        depth: 20, 32, 44, 56 or 110.
        width: channels of the first stage; features are ``4·width`` wide (16 → 64 as usual, 32 → 128 as the authors
            use for CIFAR-100).
    """

    def __init__(self, depth: int = 32, width: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise InputError(f"a CIFAR ResNet has depth 6n+2, got {depth}")
        blocks = (depth - 2) // 6
        self.num_features = 4 * width
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            for block in range(blocks):
                stages.append(_BasicBlock(inputs, width << stage, 2 if stage and not block else 1))
                inputs = width << stage
        self.blocks = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return self.blocks(x).mean((2, 3))


class _Bottleneck(nn.Module):
    """BN-ReLU-1×1, BN-ReLU-3×3, concatenated to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        return torch.cat([x, self.conv2(F.relu(self.bn2(out), inplace=True))], 1)


class DenseNetBC(nn.Module):
    """DenseNet-BC for 32×32 images (Huang et al. 2017), compression 0.5, without its classifier.

    Depth 150 and growth 12 as in the authors' code: three blocks of 24 layers, 510 features.
    """

    def __init__(self, depth: int = 150, growth: int = 12, in_channels: int = 3) -> None:
        super().__init__()
        layers = (depth - 4) // 6
        channels = 2 * growth
        stages: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
        for block in range(3):
            for _ in range(layers):
                stages.append(_Bottleneck(channels, growth))
                channels += growth
            stages += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if block < 2:
                stages += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
        self.layers = nn.Sequential(*stages)
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class MLP(nn.Module):
    """Flatten, then ``depth`` times Linear-BatchNorm-ReLU of the given width."""

    def __init__(self, in_features: int, width: int = 256, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for _ in range(depth):
            layers += [nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            in_features = width
        self.layers = nn.Sequential(*layers)
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_backbone(
    name: str,
    *,
    image_size: int = 32,
    in_channels: int = 3,
    width: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A backbone by name, as a module with ``num_features``.

    Args:
        name: one of `OWN_BACKBONES`, or any timm model name (``timm:resnet18`` where a name means both).
        image_size: height and width of the images; only ``mlp`` and some timm models need it.
        width: base channels of a ResNet (default 16), growth of the DenseNet (12), hidden width of the MLP (256).
        pretrained: load timm's pretrained weights.

    Raises:
        InputError: for an unknown name (with the nearest one), or options that the backbone does not have.
    """
    if name in OWN_BACKBONES:
        if pretrained:
            raise InputError(f"{name} has no pretrained weights; use a timm backbone, e.g. timm:resnet18")
        if name == "mlp":
            return MLP(in_channels * image_size**2, width or 256)
        if name == "densenet150":
            return DenseNetBC(growth=width or 12, in_channels=in_channels)
        return ResNetCIFAR(int(re.sub(r"\D", "", name)), width or 16, in_channels)
    check_backbone(name)
    import timm

    timm_name = name.removeprefix("timm:")
    if width is not None:
        raise InputError(f"width is an option of {', '.join(OWN_BACKBONES)}, not of {name!r}")
    config = timm.get_pretrained_cfg(timm_name)
    options = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    try:
        model = timm.create_model(timm_name, pretrained=pretrained, num_classes=0, in_chans=in_channels, **options)
    except (RuntimeError, OSError) as error:
        if pretrained:
            raise InputError(f"the pretrained weights of {name!r} could not be loaded: {error}") from error
        raise
    try:  # timm's own num_features is not always the width of the output (mobilenetv3)
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, in_channels, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"backbone {name!r} cannot take images of {image_size}x{image_size}: {error}") from error
    if output.ndim != 2:
        raise InputError(f"backbone {name!r} does not give one feature vector an image")
    model.num_features = output.shape[1]
    return model.train()


def unknown_backbone(name: str) -> InputError:
    """The error for an unknown backbone: the nearest name among ours and timm's, without listing a thousand."""
    import difflib

    import timm

    near = difflib.get_close_matches(name, [*OWN_BACKBONES, *timm.list_models()], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return InputError(f"unknown backbone {name!r}{hint} (ours: {', '.join(OWN_BACKBONES)}; else any name of timm)")


def check_backbone(name: str) -> None:
    """Refuse an unknown name before any data is read; does not build anything."""
    if name in OWN_BACKBONES or name == "auto":
        return
    try:
        import timm
    except ImportError as error:
        raise InputError(f"backbone {name!r} comes from timm: pip install 'equiframe[train]'") from error
    if not timm.is_model(name.removeprefix("timm:")):
        raise unknown_backbone(name)
