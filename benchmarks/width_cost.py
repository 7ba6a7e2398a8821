"""What an image costs to train in a ResNet-32 of width 16 (64 features) and of width 32 (128): processor time and parameters.

    python benchmarks/width_cost.py --out benchmarks/results/width_cost.json      # seconds

Forward and backward pass of one thread in bfloat16, channels last, batch 64; the widths take turns after an untimed warm-up.
"""

import argparse
import json
import statistics
import time

import torch

from equiframe.backbones import make_backbone
from equiframe.numerics import keep_memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--out", help="a JSON file")
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)
keep_memory()

nets = {w: make_backbone("resnet32", image_size=32, width=w).to(memory_format=torch.channels_last) for w in (16, 32)}
images = torch.randn(args.batch, 3, 32, 32).to(memory_format=torch.channels_last)
spent: dict[int, list[float]] = {width: [] for width in nets}
for _ in range(args.rounds + 1):
    for width, net in nets.items():
        started = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = net(images)
        features.float().square().mean().backward()
        spent[width].append(1000 * (time.process_time() - started) / args.batch)
ratios = [wide / own for own, wide in zip(spent[16][1:], spent[32][1:], strict=True)]
result = {
    "milliseconds an image": {width: [round(t, 3) for t in times[1:]] for width, times in spent.items()},
    "ratio": {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "max": round(max(ratios), 2)},
    "parameters": {width: sum(p.numel() for p in net.parameters()) for width, net in nets.items()},
    "batch": args.batch, "torch": torch.__version__,
}  # fmt: skip
print(json.dumps(result, indent=1))
if args.out:
    with open(args.out, "w") as file:
        json.dump(result, file, indent=1)
