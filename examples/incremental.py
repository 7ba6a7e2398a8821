"""Digits that arrive later: a frame with reserved vectors against learnable classifiers. Runs in seconds.

python examples/incremental.py --seeds 5

Base session: 7 digits with all their training images; then 3 sessions of one new digit with 5 images each. The backbone is frozen after the
base session. Every method has the same network, the same base epochs, and in each session the same steps, images and memory (one mean
feature a class). For each seed other digits come late.

- frame, reserved vectors: NC-FSCIL's way (Yang et al., ICLR 2023), dot regression; the learning rate of sessions is 0.1 for both that train.
- linear, fine-tuned: cross-entropy; the linear layer grows by a row a class, projection and layer are trained on memory and new images.
- linear, no memory: the same, on the new images alone.
- nearest class mean: the backbone of the linear method; nothing is trained in later sessions.
- frame, nearest mean: the backbone of the frame method, and the nearest class mean.

Beside it, after the base session: do scores of the base classes' test images tell them from those of the three digits never seen (AUROC)?
"""

import argparse
import copy

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from equiframe import (
    CrossEntropy,
    DotRegression,
    FrameHead,
    LinearHead,
    auroc,
    fit_session,
    incremental_measures,
    mean_features,
    open_set_scores,
    stratified_split,
)
from equiframe.incremental import Memory

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--epochs", type=int, default=30, help="of the base session")
parser.add_argument("--steps", type=int, default=100, help="of each later session")
parser.add_argument("--shots", type=int, default=5, help="images of a new digit")
args = parser.parse_args()
BASE, SESSIONS, RATE = 7, [7, 8, 9, 10], 0.1
METHODS = [
    "frame, reserved vectors",
    "linear, fine-tuned",
    "linear, no memory",
    "nearest class mean",
    "frame, nearest mean",
]

images, digits = load_digits(return_X_y=True)
x, train, test = torch.tensor(images / 16, dtype=torch.float32), *stratified_split(digits, 0.3, seed=0)[:2]


def train_base(framed: bool, y: torch.Tensor, seed: int) -> nn.ModuleList:
    """Backbone, projection and head, trained on the base digits."""
    torch.manual_seed(seed)
    head = (
        FrameHead(32, BASE, capacity=10, norm="none", logit_scale=16.0, seed=seed) if framed else LinearHead(32, BASE)
    )
    loss = DotRegression() if framed else CrossEntropy()
    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    projection = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    parts = nn.ModuleList([backbone, projection, head])
    optimizer = torch.optim.SGD(parts.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    images = train[y[train].numpy() < BASE]
    for epoch in range(args.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(images)
        for batch in np.array_split(order, len(order) // 32):
            value = loss(head(projection(backbone(x[batch]))), y[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    backbone.requires_grad_(False)
    return parts.eval()


def grown(head: LinearHead, num_classes: int) -> LinearHead:
    """The same linear classifier with new rows."""
    new = LinearHead(head.dim, num_classes)
    with torch.no_grad():
        new.linear.weight[: head.num_classes], new.linear.bias[: head.num_classes] = (
            head.linear.weight,
            head.linear.bias,
        )
        new.linear.bias[head.num_classes :] = 0
    return new


def nearest_mean(features: torch.Tensor, memory: Memory) -> torch.Tensor:
    return memory.classes[(F.normalize(features, dim=1) @ F.normalize(memory.means, dim=1).T).argmax(1)]


def run(name: str, trained: nn.ModuleList, y: torch.Tensor, seed: int) -> tuple[dict, dict[str, float]]:
    """Measures of all sessions, and AUROC after the base session."""
    torch.manual_seed(1000 + seed)
    backbone, projection, head = copy.deepcopy(trained)
    nothing = Memory(torch.zeros(0, 64), torch.zeros(0, dtype=torch.long))
    base = train[y[train].numpy() < BASE]
    memory = mean_features(backbone(x[base]), y[base])
    predictions, labels, areas = [], [], {}
    for session, seen in enumerate(SESSIONS):
        if session:
            images = train[y[train].numpy() == seen - 1]
            images = np.random.default_rng([seed, session]).permutation(images)[: args.shots]
            features = backbone(x[images])
            if name == "frame, reserved vectors":
                head.add_classes(1)
                fit_session(projection, head, features, y[images], memory, steps=args.steps, lr=RATE)
            elif "linear" in name:
                head = grown(head, seen)
                old = memory if "fine-tuned" in name else nothing
                loss = CrossEntropy(class_weighting="batch-balanced")
                fit_session(projection, head, features, y[images], old, loss=loss, steps=args.steps, lr=RATE)
            memory = memory.joined(mean_features(features, y[images]))
        tested = test[y[test].numpy() < seen]
        with torch.no_grad():
            features = backbone(x[tested])
            output = head(projection(features))
        predictions.append(nearest_mean(features, memory) if "mean" in name else output.logits.argmax(1))
        labels.append(y[tested])
        if not session:
            other = head(projection(backbone(x[test[y[test].numpy() >= BASE]])))
            known, unknown = open_set_scores(output), open_set_scores(other)
            areas = {score: auroc(known[score], unknown[score]) for score in known}
    return incremental_measures(predictions, labels, SESSIONS), areas


results: dict[str, list] = {name: [] for name in METHODS}
for seed in range(args.seeds):
    arrival = np.argsort(np.random.default_rng(seed).permutation(10))  # digit → class, in order of arrival
    y = torch.tensor(arrival)[torch.tensor(digits)]
    trained = {framed: train_base(framed, y, seed) for framed in (True, False)}
    for name in METHODS:
        results[name].append(run(name, trained[name.startswith("frame")], y, seed))


def cell(values: list[float]) -> str:
    return f"{100 * np.mean(values):5.1f} ± {100 * np.std(values, ddof=1) if len(values) > 1 else np.nan:4.1f}"


print(f"accuracy in %, mean ± sd of {args.seeds} seeds: all classes seen after each session; drop = first - last")
columns = ["7 digits", "8", "9", "10", "base", "new", "harmonic", "drop", "forgetting"]
print(f"{'':24}" + "".join(f"{name:>14}" for name in columns))
for name in METHODS:
    found = [measures for measures, _ in results[name]]
    cells = [cell([m["accuracy"][t] for m in found]) for t in range(4)]
    cells += [cell([m[key][-1] for m in found]) for key in ("base", "new", "harmonic")]
    cells += [cell([m[key] for m in found]) for key in ("drop", "forgetting")]
    print(f"{name:24}" + "".join(f"{text:>14}" for text in cells))
print("\nopen set after the base session: AUROC in %, 7 base digits against the other 3")
print(f"{'':24}" + "".join(f"{score:>14}" for score in results[METHODS[0]][0][1]))
for name in METHODS[:2]:
    scores = [areas for _, areas in results[name]]
    print(f"{name.split(',')[0]:24}" + "".join(f"{cell([s[score] for s in scores]):>14}" for score in scores[0]))
