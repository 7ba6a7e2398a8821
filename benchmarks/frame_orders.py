"""Does it matter which class gets which vector, and do vectors that follow a class tree make milder mistakes?

python benchmarks/frame_orders.py --seeds 10 --out benchmarks/results/frame_orders.json

Orders: digits (long-tailed if --ratio says so) through an MLP to D features with an orthoplex of 10 vectors (D = 5, 6). Each seed draws frame,
weights and batches; all orders share them. Orders: as the digits are numbered, random, similar classes apart or together by the mean training
images (which costs no warm-up), apart or together by the class means of the features after a warm-up of a quarter of the epochs in the random order,
and apart by the groups below.

Tree: digits in groups of similar shape (hand-made, below, before any result was seen), 16 features. The simplex against trees of sibling cosine
0.2 and 0.5, and against the same trees of shuffled groups; severity is 1 for a mistake within the true groups, 2 across.
"""

import argparse
import json

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from equiframe import (
    CrossEntropy,
    DotRegression,
    FrameHead,
    TreeFrame,
    assign,
    long_tail_indices,
    make_frame,
    mean_features,
    mistake_severity,
    stratified_split,
)
from equiframe.frames import tree_vectors

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--ratio", type=float, default=10.0, help="imbalance of the training images")
parser.add_argument("--out", help="a JSON file for every number")
args = parser.parse_args()
GROUPS = [0, 1, 2, 2, 1, 2, 0, 1, 3, 3]  # round: 0 6; strokes: 1 4 7; open curves: 2 3 5; loops above: 8 9

images, digits = load_digits(return_X_y=True)
train, test, _ = stratified_split(digits, 0.3, seed=0)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)


def accuracy_and_severity(
    head: FrameHead, loss: nn.Module, train: np.ndarray, seed: int, refit: str | None = None
) -> tuple[float, float]:
    """Macro accuracy and mistake severity on the test images after training an MLP; ``refit``, apart or together, changes the
    order once, after a quarter of the epochs."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, head.dim))
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(args.epochs):
        if refit and epoch == args.epochs // 4:
            frame = make_frame(10, head.dim, geometry="orthoplex", seed=seed)
            with torch.no_grad():
                means = mean_features(net(x[train]), y[train]).means
            head.set_order(assign(frame, means, similar=refit, seed=seed))
        order = np.random.default_rng([seed, epoch]).permutation(train)
        for batch in np.array_split(order, max(1, len(order) // 64)):
            value = loss(head(net(x[batch])), y[batch])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        predicted = head(net(x[test])).logits.argmax(1)
    recall = [float((predicted[y[test] == k] == k).double().mean()) for k in range(10)]
    return float(np.mean(recall)), mistake_severity(predicted, y[test], GROUPS)


LOSSES = {"dot regression": (DotRegression(), 1.0), "cross-entropy, scale 16": (CrossEntropy(), 16.0)}
results: dict[str, list] = {}
for seed in range(args.seeds):
    cut = train[long_tail_indices(digits[train], num_classes=10, ratio=args.ratio, seed=seed)]
    means = mean_features(x[cut], y[cut]).means
    shuffle = np.random.default_rng(seed).permutation(10)
    for name, (loss, scale) in LOSSES.items():
        for dim in (5, 6):
            frame = make_frame(10, dim, geometry="orthoplex", seed=seed)
            orders = {
                "as numbered": range(10),
                "random": shuffle,
                "apart": assign(frame, means, seed=seed),
                "together": assign(frame, means, similar="together", seed=seed),
                "apart by groups": assign(frame, tree_vectors(GROUPS, 9), seed=seed),
                "apart after warm-up": shuffle,
                "together after warm-up": shuffle,
            }
            for kind, order in orders.items():
                head = FrameHead(
                    dim, 10, geometry="orthoplex", seed=seed, order=torch.as_tensor(list(order)), logit_scale=scale
                )
                refit = kind.split()[0] if kind.endswith("after warm-up") else None
                results.setdefault(f"order, D={dim}, {name}, {kind}", []).append(
                    accuracy_and_severity(head, loss, cut, seed, refit)
                )
        groups = np.array(GROUPS)
        frames = {
            "simplex": make_frame(10, 16, seed=seed),
            "tree 0.2": TreeFrame(GROUPS, 16, sibling_cosine=0.2, seed=seed),
            "tree 0.5": TreeFrame(GROUPS, 16, sibling_cosine=0.5, seed=seed),
            "shuffled tree 0.5": TreeFrame(groups[shuffle].tolist(), 16, sibling_cosine=0.5, seed=seed),
        }
        for kind, frame in frames.items():
            head = FrameHead(16, 10, geometry=frame, logit_scale=scale)
            results.setdefault(f"tree, D=16, {name}, {kind}", []).append(accuracy_and_severity(head, loss, cut, seed))

print(f"{'':56}{'macro accuracy %':>20}{'less first %':>20}{'severity':>18}")
first: np.ndarray = np.zeros(0)
for name, values in results.items():
    accuracy, severity = np.array(values).T
    if name.endswith(("as numbered", "simplex")):
        first = accuracy
    shown = [(100 * accuracy, 20), (100 * (accuracy - first), 20), (severity, 18)]
    print(f"{name:56}" + "".join(f"{f'{v.mean():.2f} ± {v.std(ddof=1):.2f}':>{width}}" for v, width in shown))
if args.out:
    with open(args.out, "w") as file:
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        json.dump({"arguments": settings, "accuracy and severity by seed": results}, file, indent=1)
