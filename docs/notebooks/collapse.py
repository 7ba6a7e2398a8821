# %% [markdown]
# # Watch features collapse
# While a network trains past the point where it makes no mistake, the features of a class draw together (NC1), and the class means
# spread to equal angles (NC2). Under a long tail a learnable classifier stops short of that for the small classes.

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits
from style import BLUE, ORANGE, plt, save
from torch import nn

from equiframe import CrossEntropy, FrameHead, LinearHead, long_tail_indices
from equiframe.collapse import ClassStatistics, centred_means, collapse_measures

images, labels = load_digits(return_X_y=True)
chosen = long_tail_indices(labels, num_classes=10, ratio=50)
x, y = torch.tensor(images[chosen] / 16, dtype=torch.float32), torch.tensor(labels[chosen])


# %%
def train(head: nn.Module, epochs: int = 60) -> tuple[list[dict[str, float]], ClassStatistics]:
    """Measures after each tenth epoch, and the statistics at the end."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.2, momentum=0.9, weight_decay=1e-3)
    loss, history, statistics = CrossEntropy(), [], None
    for epoch in range(1, epochs + 1):
        head.train()
        for batch in np.array_split(np.random.default_rng(epoch).permutation(len(x)), len(x) // 32):
            optimizer.zero_grad()
            loss(head(backbone(x[batch])), y[batch]).backward()
            optimizer.step()
        if epoch % 10 == 0:
            head.eval()
            with torch.no_grad():
                statistics = ClassStatistics(10, 32).update(head(backbone(x)).features, y)
            history.append({"epoch": epoch} | collapse_measures(statistics))
    return history, statistics


runs = {
    "learnable": train(LinearHead(32, 10)),
    "fixed frame": train(FrameHead(32, 10, length="unit", logit_scale=16.0)),
}
for name, (history, _) in runs.items():
    print(f"{name}: NC1 {history[0]['nc1']:.3g} → {history[-1]['nc1']:.3g}, NC2 {history[0]['nc2_angle']:.3f} → {history[-1]['nc2_angle']:.3f}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 2.9))
for (name, (history, _)), color in zip(runs.items(), (ORANGE, BLUE), strict=True):
    epochs = [h["epoch"] for h in history]
    axes[0].semilogy(epochs, [h["nc1"] for h in history], color=color, label=name)
    axes[1].plot(epochs, [h["nc2_angle"] for h in history], color=color, label=name)
axes[0].set(title="NC1: spread within classes", xlabel="epoch")
axes[1].set(title="NC2: distance from equal angles", xlabel="epoch", ylim=(0, None))
axes[0].legend()
for axis, (name, (_, statistics)) in zip(axes[2:], runs.items(), strict=True):
    means = nn.functional.normalize(centred_means(statistics), dim=1)
    shown = axis.imshow((means @ means.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(title=f"class means, {name}", xticks=[], yticks=[])
figure.colorbar(shown, ax=axes[2:], shrink=0.8, label="cosine")
print(save(figure, __file__).name)
