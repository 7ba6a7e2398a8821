# %% [markdown]
# # Does dot regression converge better?
# On the fixed frame cross-entropy and dot regression have the same optimum. How fast one gets there is another matter: at the optimum
# dot regression has no curvature (its loss is sθ⁴/8 there), so gradient descent slows down for ever; cross-entropy's curvature is small
# where the scale s is large; angular regression has curvature s at every scale.

# %%
import torch
from style import BLUE, GREEN, ORANGE, plt, save

from equiframe.peeled.convergence import slope

NUM_CLASSES, STEPS = 10, 4_000


def angles(loss: str, scale: float, step: float) -> list[tuple[int, float]]:
    """(iteration, θ) of gradient descent on the sphere from 0.8 rad, at powers of 1.3."""
    theta, found, due = torch.tensor(0.8, dtype=torch.float64), [], 1.0
    for iteration in range(1, STEPS + 1):
        theta = theta - step * slope(loss, theta, scale, NUM_CLASSES)
        if iteration >= due:
            found.append((iteration, max(float(theta.abs()), 1e-16)))
            due *= 1.3
        if theta.abs() < 1e-12:
            break
    return found


# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for axis, scale in zip(axes, (1.0, 16.0), strict=True):
    for loss, color, label in (("ce", ORANGE, "cross-entropy"), ("dr", BLUE, "dot regression"),
                               ("angular", GREEN, "angular regression")):  # fmt: skip
        step = 0.1 / scale if loss == "angular" else 0.1  # its curvature is s, and a step of 2/s would overshoot
        path = angles(loss, scale, step)
        axis.loglog(*zip(*path, strict=True), color=color, label=label)
        print(f"s = {scale:g}, {label}: angle {path[-1][1]:.2g} after {path[-1][0]:,} steps")
    axis.set(title=f"scale s = {scale:g}", xlabel="iteration", ylim=(1e-9, 3))
axes[0].set_ylabel("angle to the class vector (rad)")
axes[0].legend(loc="lower left")
print(save(figure, __file__).name)
