"""Where do minor classes collapse? Our solver against our formulas, and both against the programs of Fang et al. and Hong & Ling.

python benchmarks/minority_collapse.py --out benchmarks/results/minority_collapse.json

Part 1, thresholds: for each problem the ratio R at which the minor class vectors merge is found by bisection on the solutions of `solve_joint` from
random starts, which knows nothing of thresholds, and held against `collapse_threshold`. Merged: their largest distance is below 1e-3 of the
longest class vector. Part 2 needs cvxpy (pip install cvxpy) and is left out without it: the convex programs that the authors solve in their
repositories, written anew and solved by an interior-point method that shares nothing with ours,

    Fang et al. 2021 (HornHehhf/LPM, optimization.py): K = 10, E_W = 1, E_H = 5, a semidefinite X ⪰ 0 with the mean diagonal of each block limited;
    Hong & Ling 2023 (WanliHongC/Neural-Collapse, ana_utils.py and README): K = 10, n_B = 100, nuclear norm of Z√N with weight l, a bias with
    weight 0.01, at the l and n_A of their Figures 5 to 8.
"""

import argparse
import json
import math

import torch

from equiframe.peeled import (
    PeeledModel,
    StepProblem,
    class_counts,
    collapse_threshold,
    minor_cosine,
    optimal_value,
    solve_joint,
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=7, help="bisections of log R")
parser.add_argument("--part", type=int, choices=(1, 2), help="one part only [both]")
parser.add_argument("--out", help="a JSON file for every number")
args = parser.parse_args()
torch.set_num_threads(1)
GROUPS = [(2, 2), (2, 6), (5, 5), (6, 2)]
LIMITS = [("average", 1.0), ("average", 2.0), ("vector", 1.0), ("vector", 2.0), ("penalty", 0.01), ("penalty", 0.03)]


def merged(problem: StepProblem, ratio: float) -> tuple[bool, float]:
    """Do the minor class vectors coincide in the solution, and its certified gap."""
    k, s, mu = problem.num_classes, problem.scale, problem.penalty
    counts = class_counts(k, ratio, num_minor=problem.num_minor)
    model = PeeledModel(counts, k, s, s, constraint=problem.constraint, lambda_w=mu, lambda_h=mu)
    found = solve_joint(model, max_iterations=2500)
    spread = torch.pdist(found.vectors[problem.num_major :]).max() / found.vectors.norm(dim=1).max()
    return bool(spread < 1e-3), found.gap


def measured_threshold(problem: StepProblem, theory: float) -> tuple[float, float, float]:
    """A bracket around the measured threshold, and the largest gap of the solutions it rests on."""
    low, high, worst = max(1.0, theory / 3), 4 * theory, 0.0  # R* is no midpoint
    for step in range(args.steps + 2):
        middle = (low, high)[step] if step < 2 else math.sqrt(low * high)
        together, gap = merged(problem, middle)
        worst = max(worst, gap)
        if step < 2:
            assert together == (step == 1) or middle == 1.0, (problem, middle)
        else:
            low, high = (low, middle) if together else (middle, high)
    return low, high, worst


rows = []
for major, minor in GROUPS if args.part != 2 else []:
    for limit, value in LIMITS:
        sizes = {"penalty": value} if limit == "penalty" else {"scale": value}
        problem = StepProblem(major, minor, limit, **sizes)
        theory = collapse_threshold(problem)
        if theory <= 1.0 or theory > 1e4:
            continue
        low, high, gap = measured_threshold(problem, theory)
        row = {
            "K_A": major,
            "K_B": minor,
            "limit": limit,
            **sizes,
            "theory": theory,
            "measured": [low, high],
            "gap": gap,
        }
        row["error"] = math.sqrt(low * high) / theory - 1
        rows.append(row)
        print(row, flush=True)
if rows:
    print(f"{len(rows)} thresholds, largest relative error {max(abs(row['error']) for row in rows):.2e}")
result = {"thresholds": rows} if rows else {}

try:
    import cvxpy
except ImportError:
    cvxpy = None
    print("part 2 left out: pip install cvxpy")


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def loss(z, counts):
    """Σ_k n_k CE(z_k, k), the logits z_k the columns."""
    return sum(n * (cvxpy.log_sum_exp(z[:, k]) - z[k, k]) for k, n in enumerate(counts))


def solve(problem) -> None:
    """As exactly as the solvers manage."""
    for tolerance in (1e-10, 1e-9, 1e-8, 1e-7):
        try:
            problem.solve(solver="CLARABEL", tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance)
        except cvxpy.error.SolverError:
            continue
        if problem.status == "optimal":
            return
    problem.solve(solver="SCS", eps=1e-9, max_iters=200_000)  # a first-order method, where that one fails


def fang(major: int, ratio: float, energy_w: float, energy_h: float) -> tuple[float | None, float]:
    """Mean cosine of the minor class vectors (None where they are zero), and mean loss."""
    k, counts = 10, [ratio] * major + [1.0] * (10 - major)
    x = cvxpy.Variable((2 * k, 2 * k), PSD=True)
    limits = [cvxpy.trace(x[:k, :k]) <= k * energy_h, cvxpy.trace(x[k:, k:]) <= k * energy_w]
    problem = cvxpy.Problem(cvxpy.Minimize(loss(x[k:, :k], counts) / sum(counts)), limits)
    solve(problem)
    gram = torch.from_numpy(x.value[k + major :, k + major :])
    if float(gram.diagonal().min()) < 1e-6 * float(x.value.max()):
        return None, float(problem.value)
    cosine = gram / gram.diagonal().outer(gram.diagonal()).sqrt()
    size = len(gram)
    return float((cosine.sum() - size) / (size * (size - 1))), float(problem.value)


def hong_ling(counts: list[float], weight: float, bias_weight: float | None) -> tuple[float, float]:
    """What is left of the minor classes' differences, max |z_jk − z_ll| within their block, and the objective."""
    k, minor = len(counts), counts.count(min(counts))
    z, b = cvxpy.Variable((k, k)), cvxpy.Variable((k, 1))
    root = torch.tensor(counts, dtype=torch.float64).sqrt().diag().numpy()
    objective = loss(z + b @ torch.ones(1, k).numpy(), counts) / sum(counts) + weight * cvxpy.normNuc(z @ root)
    limits = [b == 0] if bias_weight is None else []
    problem = cvxpy.Problem(cvxpy.Minimize(objective + (bias_weight or 0) * cvxpy.sum_squares(b)), limits)
    solve(problem)
    block = z.value[-minor:, -minor:]
    return float(block.max() - block.min()), float(problem.value)


if cvxpy is not None and args.part != 1:
    rows = []
    for major in (3, 5, 7):
        problem = StepProblem(major, 10 - major, "average", math.sqrt(5))
        threshold = collapse_threshold(problem)
        for ratio in sorted({1.0, 10**0.5, 10.0, 0.9 * threshold, 1.1 * threshold, 100.0, 1000.0}):
            cosine, value = fang(major, ratio, 1.0, 5.0)
            row = {
                "K_A": major,
                "R": ratio,
                "threshold": threshold,
                "cosine_theirs": cosine,
                "cosine_ours": finite(minor_cosine(problem, ratio)),
            }
            rows.append(row | {"value_theirs": value, "value_ours": optimal_value(problem, ratio)})
            print(rows[-1], flush=True)
    result["fang"] = rows
    rows = []
    cases = [(5, 500, w) for w in (0.0027, 0.0030, 0.0033, 0.0039, 0.0045)] + [
        (3, 500, w) for w in (0.0037, 0.0041, 0.0045, 0.0053, 0.0062)
    ]
    cases += [(5, n, 0.005) for n in (100, 200, 300, 400, 600)] + [(3, n, 0.005) for n in (100, 400, 450, 500, 700)]
    for major, n_major, weight in cases:
        counts = [float(n_major)] * major + [100.0] * (10 - major)
        problem = StepProblem(major, 10 - major, "penalty", penalty=weight, unit=100.0)
        left, _ = hong_ling(counts, weight, 0.01)
        _, value = hong_ling(counts, weight, None)
        row = {
            "K_A": major,
            "n_A": n_major,
            "l": weight,
            "R": n_major / 100,
            "threshold": collapse_threshold(problem),
            "left_theirs": left,
        }
        rows.append(row | {"value_theirs": value, "value_ours": optimal_value(problem, n_major / 100)})
        print(rows[-1], flush=True)
    result["hong_ling"] = rows
if args.out:
    with open(args.out, "w") as file:
        json.dump(result, file, indent=1)
