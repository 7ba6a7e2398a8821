"""The layer-peeled laboratory: the theory of the fixed frame, solved, certified and judged.

`PeeledModel` is the problem, `solve_features` and `solve_joint` solve it, `feature_gap` and `joint_gap` certify the
answer; `claim_c1` … `claim_c3` judge the paper's claims; `run` is the verb ``equiframe peeled``.
"""

from equiframe.angular import angular_regression, cosine_regression
from equiframe.peeled.claims import Verdict, claim_c1, claim_c2, claim_c3, theorem1_value
from equiframe.peeled.cli import run
from equiframe.peeled.collapse_theory import StepProblem, collapse_threshold, minor_cosine, optimal_value
from equiframe.peeled.gradients import GradientSplit, class_norms, push_over_pull, split_gradients, track_gradients
from equiframe.peeled.losses import LOSSES, make_loss
from equiframe.peeled.model import PeeledModel, class_counts
from equiframe.peeled.solve import METHODS, Solution, feature_gap, joint_gap, solve_features, solve_joint

__all__ = [
    "LOSSES",
    "METHODS",
    "GradientSplit",
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
    "make_loss",
    "minor_cosine",
    "optimal_value",
    "push_over_pull",
    "run",
    "solve_features",
    "solve_joint",
    "split_gradients",
    "theorem1_value",
    "track_gradients",
]
