# %% [markdown]
# # A long tail of handwritten digits
# scikit-learn's digits, cut to a long tail (125 images of the digit 0, two of the digit 9). The same small network three times: with a
# learnable classifier, with a learnable classifier that knows the class counts, and on a fixed frame that knows them.

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits
from style import BLUE, GRAY, ORANGE, plt, save
from torch import nn

from equiframe import (
    BalancedSoftmax,
    CrossEntropy,
    FrameHead,
    LinearHead,
    LogitAdjustedCrossEntropy,
    long_tail_indices,
    stratified_split,
)

images, labels = load_digits(return_X_y=True)
train, test, _ = stratified_split(labels, 0.3, seed=0)
train = train[long_tail_indices(labels[train], num_classes=10, ratio=50)]
counts = np.bincount(labels[train]).tolist()
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
print("training images of each digit:", counts)


# %%
def recalls(head: nn.Module, loss: nn.Module, seed: int, epochs: int = 40) -> list[float]:
    """Share of each digit's test images that are found, after training from a seed."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.05, momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        for batch in np.array_split(np.random.default_rng((seed, epoch)).permutation(train), len(train) // 32):
            optimizer.zero_grad()
            loss(head(backbone(x[batch])), y[batch]).backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        predicted = head(backbone(x[test])).logits.argmax(1)
    return [(predicted[y[test] == k] == k).double().mean().item() for k in range(10)]


ways = {
    "learnable, cross-entropy": lambda: (LinearHead(64, 10), CrossEntropy()),
    "learnable, balanced softmax": lambda: (LinearHead(64, 10), BalancedSoftmax(class_counts=counts)),
    "fixed frame, logit-adjusted": lambda: (
        FrameHead(64, 10, length="free", logit_scale=1.0),
        LogitAdjustedCrossEntropy(class_counts=counts),
    ),
}
found = {name: np.array([recalls(*make(), seed) for seed in range(3)]) for name, make in ways.items()}
for name, values in found.items():
    print(f"{name}: macro {100 * values.mean():.1f} ± {100 * values.mean(1).std(ddof=1):.1f} %, "
          f"digits 7 to 9 {100 * values[:, 7:].mean():.1f} %")  # fmt: skip

# %%
figure, axis = plt.subplots(figsize=(7.5, 3.2))
for place, (name, color) in enumerate(zip(ways, (GRAY, ORANGE, BLUE), strict=True)):
    values = found[name]
    axis.bar(np.arange(10) + 0.27 * (place - 1), 100 * values.mean(0), 0.25, yerr=100 * values.std(0, ddof=1),
             color=color, error_kw={"lw": 0.8}, label=name)  # fmt: skip
axis.set_xticks(range(10), [f"{k}\n({n})" for k, n in enumerate(counts)])
axis.set(xlabel="digit (its training images)", ylabel="found, % of test images", ylim=(0, 128), yticks=range(0, 101, 20))
axis.legend(ncols=3, loc="upper center", fontsize=8)
print(save(figure, __file__).name)
