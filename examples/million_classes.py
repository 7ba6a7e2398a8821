"""A million classes on a CPU: train an embedding towards a fixed frame, then predict, in under 3 GB.

python examples/million_classes.py                      # K = 1,000,000, D = 1,024: a minute or two
python examples/million_classes.py --classes 2000 --dim 64 --linear 2000 --steps 60

The features are generated so that they can be learned: class k is a cluster around its own vector of the frame, turned by a hidden
rotation that the embedding must find. Samples carry noise of a third of the centre's length. Most classes are never met in
training; that the map serves them all is a property of this made-up world, while time and memory are those of any world.
Dot regression needs one vector a sample and never a million logits.

Beside it stands a learnable linear layer with cross-entropy, measured at --linear classes (the most that fit in 2 GB with their
gradients) and a batch of 64, then multiplied up, openly.
"""

import argparse
import resource
import time

import torch
from torch import nn

from equiframe import DotRegression, FrameHead

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--classes", type=int, default=1_000_000)
parser.add_argument("--dim", type=int, default=1024, help="width of the embedding")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--batch", type=int, default=512)
parser.add_argument("--tests", type=int, default=256, help="test samples")
parser.add_argument("--linear", type=int, default=200_000, help="classes of the learnable layer that is measured")
args = parser.parse_args()
torch.manual_seed(0)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB on Linux


head = FrameHead(args.dim, args.classes, logit_scale=1.0, norm="none")
hidden = torch.linalg.qr(torch.randn(args.dim, args.dim))[0]  # what the world did to the clusters; to be learned


def samples(classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noisy features of these classes, made where they are needed."""
    noise = torch.randn(len(classes), args.dim, generator=generator) / (3 * args.dim**0.5)
    return (head.frame.vectors(classes) + noise) @ hidden


embed = nn.Linear(args.dim, args.dim, bias=False)
loss_of, optimizer = DotRegression(), torch.optim.Adam(embed.parameters(), lr=3e-3)
generator, seconds = torch.Generator().manual_seed(1), 0.0
for step in range(args.steps):
    classes = torch.randint(args.classes, (args.batch,), generator=generator)
    x = samples(classes, generator)
    features = embed(x)
    started = time.process_time()
    loss = loss_of(head(features), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    seconds += time.process_time() - started
    if step % max(1, args.steps // 5) == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

classes = torch.randint(args.classes, (args.tests,), generator=generator)
with torch.no_grad():
    features = head(embed(samples(classes, generator))).features
    started = time.process_time()
    _, top = head.frame.topk(features, 5)
    predicting = time.process_time() - started
first, five = (top[:, 0] == classes).double().mean(), (top == classes[:, None]).any(1).double().mean()
print(f"{args.classes:,} classes: accuracy {100 * first:.1f} %, among the first five {100 * five:.1f} %")
print(f"frame: loss and step {1000 * seconds / args.steps:.1f} ms a batch of {args.batch} (embedding's update included), "
      f"prediction {1000 * predicting / args.tests:.2f} ms a sample, peak memory so far {peak():.2f} GB")  # fmt: skip

linear, few = nn.Linear(args.dim, args.linear, bias=False), torch.randn(64, args.dim)
started = time.process_time()
nn.functional.cross_entropy(linear(few), torch.randint(args.linear, (64,))).backward()
spent, factor = time.process_time() - started, args.classes / args.linear * args.batch / 64
print(f"learnable linear layer, measured at {args.linear:,} classes, batch 64: {1000 * spent:.0f} ms a batch, "
      f"{8 * args.dim * args.linear / 2**30:.2f} GB of weights and gradients\n"
      f"multiplied up to {args.classes:,} classes, batch {args.batch}: {spent * factor:.1f} s a batch, "
      f"{8 * args.dim * args.classes / 2**30:.2f} GB of weights and gradients")  # fmt: skip
print(f"peak memory {peak():.2f} GB")
