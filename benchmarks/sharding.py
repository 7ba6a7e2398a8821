"""Sharded backbones against shared ones, over many of timm's designs: are two SGD steps the same, and what is put together at a time?

    torchrun --nproc-per-node 2 benchmarks/sharding.py | tee benchmarks/results/sharding.txt
    torchrun --nproc-per-node 2 benchmarks/sharding.py timm:vgg11_bn timm:xcit_nano_12_p16_224

Two gloo processes, two random images each, synchronised BatchNorm, momentum 0.9; dropout is off. ``difference`` is the largest of a weight.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings

import torch
from torch import distributed as dist
from torch import nn

from equiframe.backbones import make_backbone
from equiframe.parallel import World, blocks_of, own, whole

BACKBONES = {
    "resnet20": 32, "densenet150": 16, "mlp": 8, "timm:resnet18": 32, "timm:vit_tiny_patch16_224": 32, "timm:convnext_atto": 32,
    "timm:efficientnet_b0": 32, "timm:swin_tiny_patch4_window7_224": 32, "timm:beit_base_patch16_224": 32, "timm:regnety_002": 32,
    "timm:densenet121": 32, "timm:mobilenetv3_small_050": 32, "timm:coatnet_0_rw_224": 64, "timm:deit3_small_patch16_224": 32,
    "timm:eva02_tiny_patch14_224": 28, "timm:mixer_s32_224": 32, "timm:resnext50_32x4d": 32, "timm:tf_efficientnetv2_b0": 32,
    "timm:maxvit_tiny_tf_224": 32, "timm:cait_xxs24_224": 32, "timm:inception_v3": 96, "timm:hrnet_w18_small": 64,
    "timm:vgg11_bn": 32, "timm:xcit_nano_12_p16_224": 32,
}  # fmt: skip


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def compare(name: str, side: int, world: World) -> str:
    torch.manual_seed(0)
    sharded = make_backbone(name, image_size=side, width=4 if name in ("resnet20", "densenet150") else None)
    for module in sharded.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
            module.eval()
    world.synchronise_batch_norm(sharded)
    shared, blocks, total = copy.deepcopy(sharded), blocks_of(sharded), size_of(sharded)
    in_blocks = [size_of(block) for block in blocks]
    world.shard(sharded, torch.device("cpu"))
    images = torch.randn(world.size, 2, 3, side, side, generator=torch.Generator().manual_seed(1))[world.rank]
    for model in (sharded, world.data_parallel(shared)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)
        for _ in range(2):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    pairs = zip(sharded.parameters(), shared.parameters(), strict=True)
    difference = max(float((whole(a) - b).detach().abs().max()) for a, b in pairs)
    kept = sum(own(p).numel() for p in sharded.parameters()) / total
    largest = max([*in_blocks, total - sum(in_blocks)]) / total
    return (
        f"{name}: {total:,} parameters, {kept:.1%} kept by the first process, {len(blocks)} blocks, largest piece {largest:.1%}, "
        f"difference {difference:.1e}"
    )


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    for name in sys.argv[1:] or BACKBONES:
        line = compare(name, BACKBONES[name], world)
        if world.leads:
            print(line, flush=True)
    if world.leads:
        print(f"torch {torch.__version__}, {world.size} processes, {os.cpu_count()} cores")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
