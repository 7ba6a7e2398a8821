"""A fixed frame in your own PyTorch loop: long-tailed digits, an MLP, mixup. Runs in a few seconds.

python examples/own_loop.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from equiframe import FrameHead, LogitAdjustedCrossEntropy, MixedTargets, long_tail_indices, stratified_split

images, labels = load_digits(return_X_y=True)
train, test, _ = stratified_split(labels, 0.3, seed=0)
train = train[long_tail_indices(labels[train], num_classes=10, ratio=50)]  # 125 images of digit 0, 2 of digit 9
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

torch.manual_seed(0)
backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
head = FrameHead(dim=64, num_classes=10, length="free", logit_scale=1.0)  # trains a BatchNorm, no classifier
criterion = LogitAdjustedCrossEntropy(class_counts=np.bincount(labels[train]).tolist())
optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4)

for epoch in range(60):
    for batch in np.array_split(np.random.default_rng(epoch).permutation(train), max(1, len(train) // 32)):
        share = float(np.random.default_rng(epoch).beta(0.2, 0.2))
        other = batch[::-1].copy()
        mixed = torch.lerp(x[other], x[batch], share)
        loss = criterion(head(backbone(mixed)), MixedTargets(y[batch], y[other], share))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

backbone.eval(), head.eval()
with torch.no_grad():
    predicted = head(backbone(x[test])).logits.argmax(1)
recall = [(predicted[y[test] == k] == k).double().mean().item() for k in range(10)]
print(
    f"macro accuracy {100 * np.mean(recall):.1f} %, digits 7 to 9 (few training images) {100 * np.mean(recall[7:]):.1f} %"
)
