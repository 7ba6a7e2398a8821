# %% [markdown]
# # Frames: how far apart can K directions be?
# Four directions in three dimensions can all have the same angle, arccos(−1/3) ≈ 109.5°: a simplex. With more classes than
# dimensions the best that can be had changes its kind, and `make_frame` takes the best that is known.

# %%
import torch
from style import BLUE, GRAY, plt, save

from equiframe import make_frame

simplex = make_frame(4, 3, seed=0).dense()
print("cosines of the simplex:\n", (simplex @ simplex.T).round(decimals=3))

# %% [markdown]
# The same call for ever more classes in 16 dimensions. The coherence is the largest cosine between two vectors: the smaller, the
# farther apart the nearest two classes are.

# %%
sizes = (8, 17, 24, 32, 200)
frames = {num: make_frame(num, 16, seed=0) for num in sizes}
for num, frame in frames.items():
    print(f"{num:4d} classes: {type(frame).__name__:15s} coherence {frame.coherence:+.4f}")

# %%
figure = plt.figure(figsize=(10, 3.2))
axis = figure.add_subplot(1, 4, 1, projection="3d")
for vector in simplex:
    axis.plot(*torch.stack([torch.zeros_like(vector), vector]).T, color=BLUE, lw=2)
    axis.scatter(*vector, color=BLUE, s=25)
for i in range(4):
    for j in range(i):
        axis.plot(*torch.stack([simplex[i], simplex[j]]).T, color=GRAY, lw=0.6)
axis.set(title="4 classes in 3-D", xticklabels=[], yticklabels=[], zticklabels=[])
axis.set_box_aspect((1, 1, 1))
for place, num in enumerate((17, 32, 200), start=2):
    vectors = frames[num].dense()
    axis = figure.add_subplot(1, 4, place)
    shown = axis.imshow((vectors @ vectors.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    name = type(frames[num]).__name__.removesuffix("Frame").lower()
    axis.set(title=f"{num} classes in 16-D: {name}", xticks=[], yticks=[])
figure.colorbar(shown, ax=figure.axes[1:], shrink=0.8, label="cosine")
print(save(figure, __file__).name)
