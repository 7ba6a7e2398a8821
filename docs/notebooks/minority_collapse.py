# %% [markdown]
# # Minority collapse, and what a fixed frame does about it
# In the layer-peeled model the features are free, and a learnable classifier is solved for together with them. With few samples of
# some classes, the class vectors of these classes move together: at a ratio R* they coincide (Fang et al. 2021). A frame cannot move.

# %%
import math

from style import BLUE, ORANGE, plt, save

from equiframe.peeled import StepProblem, collapse_threshold, minor_cosine

problem = StepProblem(num_major=3, num_minor=3, constraint="average", scale=2.5)  # s = √(E_W E_H)
threshold = collapse_threshold(problem)
ratios = [10 ** (k / 6) for k in range(17)]
angles = [math.degrees(math.acos(max(-1.0, min(1.0, minor_cosine(problem, ratio))))) for ratio in ratios]
print(f"learnable: {angles[0]:.1f} degrees at R = 1, {angles[-1]:.1f} at R = {ratios[-1]:.0f}; collapse at R* = {threshold:.1f}")

# %%
figure, axis = plt.subplots(figsize=(5.5, 3.2))
axis.semilogx(ratios, angles, color=ORANGE, marker="s", ms=3, label="learnable classifier")
axis.axhline(math.degrees(math.acos(-1 / 5)), color=BLUE, label="fixed frame: arccos(−1/5)")
axis.axvline(threshold, color=ORANGE, ls=":", lw=1)
axis.annotate(f"R* = {threshold:.0f}", (threshold, 60), xytext=(4, 0), textcoords="offset points", color=ORANGE)
axis.set(xlabel="imbalance ratio R", ylabel="angle between minor class vectors (°)", ylim=(-4, 119))
axis.set_title("3 major and 3 minor classes, √(E_W E_H) = 2.5")
axis.legend(loc="lower left")
print(save(figure, __file__).name)
