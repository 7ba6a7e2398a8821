"""The layer-peeled laboratory: the theory of the fixed frame, solved, certified and judged.

`PeeledModel` is the problem, `solve_features` and `solve_joint` solve it, `feature_gap` and `joint_gap` certify the
answer; `mse_optimum`, `relu_optimum` and `collapse_threshold` are what is known in closed form; `claim_c1` … `claim_c3`
judge the paper's claims; `laboratory` is what ``equiframe peeled`` does.
"""

from equiframe.angular import angular_regression, cosine_regression
from equiframe.peeled.claims import Verdict, claim_c1, claim_c2, claim_c3, theorem1_value
from equiframe.peeled.closed_forms import Optimum, mse_optimum, relu_optimum
from equiframe.peeled.collapse_theory import (
    StepProblem,
    collapse_threshold,
    minor_cosine,
    optimal_value,
    vanishing_threshold,
)
from equiframe.peeled.gradients import GradientSplit, class_norms, push_over_pull, split_gradients, track_gradients
from equiframe.peeled.laboratory import laboratory
from equiframe.peeled.losses import LOSSES, make_loss
from equiframe.peeled.model import PeeledModel, class_counts
from equiframe.peeled.solve import JOINT_METHODS, METHODS, Solution, feature_gap, joint_gap, solve_features, solve_joint

__all__ = [
    "JOINT_METHODS",
    "LOSSES",
    "METHODS",
    "GradientSplit",
    "Optimum",
    "PeeledModel",
    "Solution",
    "StepProblem",
    "Verdict",
    "angular_regression",
    "claim_c1",
    "claim_c2",
    "claim_c3",
    "class_counts",
    "class_norms",
    "collapse_threshold",
    "cosine_regression",
    "feature_gap",
    "joint_gap",
    "laboratory",
    "make_loss",
    "minor_cosine",
    "mse_optimum",
    "optimal_value",
    "push_over_pull",
    "relu_optimum",
    "solve_features",
    "solve_joint",
    "split_gradients",
    "theorem1_value",
    "track_gradients",
    "vanishing_threshold",
]
