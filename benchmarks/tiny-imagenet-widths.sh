#!/bin/sh
# ResNet-32 with its own 64 features on 100 classes, where no simplex exists: the orthoplex (geometry auto at D = 64), against
# the authors' way out of doubling the width (D = 128, simplex; about four times the work an image) and against a learnable
# classifier at both widths. Same images, epochs and seeds; ratios 1 and 100. NOT RUN YET: it needs a GPU or a day of CPU.
# A comparison takes up where it was stopped: sh benchmarks/tiny-imagenet-widths.sh [--budget 2h]
set -e
for ratio in 1 100; do
  equiframe compare --config benchmarks/tiny-imagenet-widths.yaml --imbalance "$ratio" --seeds 0,1,2 --reference ce \
    --methods ce,ce:width=32,etf-la,etf-la:width=32,etf-dr-balanced,etf-dr-balanced:width=32 \
    --out "runs/tiny-imagenet-widths-r$ratio" "$@"
done
