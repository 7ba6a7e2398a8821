"""Neural collapse, measured: one mergeable pass over the features, then pure functions of what it has gathered.

>>> import torch
>>> statistics = ClassStatistics(num_classes=3, dim=4)
>>> _ = statistics.update(torch.eye(4, dtype=torch.float64)[:3], torch.arange(3))  # one sample a class: a simplex
>>> {name: round(value, 9) for name, value in collapse_measures(statistics).items()}
{'nc1': 0.0, 'nc2_angle': 0.0, 'nc2_norm': 0.0}

The same as `torchmetrics.Metric` classes are in `equiframe.collapse.metrics`.
"""

from equiframe.collapse.hull import min_norm_point, one_vs_rest_distances
from equiframe.collapse.measures import (
    NC1_METHODS,
    cdnv,
    feature_norm_spread,
    mean_decisions,
    mean_norms,
    minority_angle,
    nc1,
    nc1_standard_error,
    nc3_cosines,
    nc3_distance,
    nc3_distances,
    nc3_duality_error,
    nc3_uniform_duality,
    nc4,
    nc5_orthogonality,
    paper_cosines,
)
from equiframe.collapse.nearest import LinearAgreement, NearestMean, nc4_agreement
from equiframe.collapse.statistics import WITHIN, ClassStatistics, merge_states, state_size
from equiframe.collapse.summary import collapse_measures
from equiframe.collapse.vectors import (
    CENTERS,
    KERNELS,
    centred_means,
    cosine_moments,
    global_mean,
    log_riesz_energy,
    mean_angle,
    nc2_equiangle,
    nc2_equinorm,
    nc2_etf_error,
    pair_distances,
    uniformity,
)

__all__ = [
    "CENTERS",
    "KERNELS",
    "NC1_METHODS",
    "WITHIN",
    "ClassStatistics",
    "LinearAgreement",
    "NearestMean",
    "cdnv",
    "centred_means",
    "collapse_measures",
    "cosine_moments",
    "feature_norm_spread",
    "global_mean",
    "log_riesz_energy",
    "mean_angle",
    "mean_decisions",
    "mean_norms",
    "merge_states",
    "min_norm_point",
    "minority_angle",
    "nc1",
    "nc1_standard_error",
    "nc2_equiangle",
    "nc2_equinorm",
    "nc2_etf_error",
    "nc3_cosines",
    "nc3_distance",
    "nc3_distances",
    "nc3_duality_error",
    "nc3_uniform_duality",
    "nc4",
    "nc4_agreement",
    "nc5_orthogonality",
    "one_vs_rest_distances",
    "pair_distances",
    "paper_cosines",
    "state_size",
    "uniformity",
]
