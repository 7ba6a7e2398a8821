"""Up to which K has an optimised code a smaller largest cosine than the best Kerdock or Gold frame in D dimensions?

    python benchmarks/code_limits.py --out benchmarks/results/code_limits.json      # minutes

For each D of `equiframe.frames.select.CODE_WINS`, at the limit K that stands there and (where a code may have so many classes and the other frame
too) a quarter beyond; and for the same limit at the last D before the next one. The time is the processor time of making the code.
"""

import argparse
import json
import time

import torch

from equiframe.frames.code import MOST, largest_cosine, optimise_code
from equiframe.frames.embedded import bases_frame, capacity, inner_dim
from equiframe.frames.select import CODE_WINS

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--most", type=int, default=MOST, help="no larger K")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="a JSON file")
args = parser.parse_args()

rows, starts = [], sorted(CODE_WINS)
for first, after in zip(starts, [*starts[1:], 512], strict=True):
    limit = CODE_WINS[first]
    for dim, wanted in ((first, limit), (first, limit * 5 // 4), (after - 1, limit)):
        k = min(wanted, capacity(inner_dim(dim)), args.most)
        if k <= 2 * dim or k in [row["classes"] for row in rows if row["dim"] == dim]:
            continue
        started = time.process_time()
        code = largest_cosine(optimise_code(k, dim, seed=args.seed))
        spent, bases = time.process_time() - started, bases_frame(k, inner_dim(dim)).coherence
        rows.append({"dim": dim, "classes": k, "taken": "code" if k <= limit else "bases", "code": round(code, 4),
                     "bases": round(bases, 4), "seconds": round(spent, 2)})  # fmt: skip
        better = "code" if code < bases else "bases"
        print(rows[-1], "" if better == rows[-1]["taken"] else f"but {better} would be better", flush=True)
if args.out:
    with open(args.out, "w") as file:
        json.dump({"seed": args.seed, "torch": torch.__version__, "rows": rows}, file, indent=1)
