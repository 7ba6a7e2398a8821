#!/bin/sh
# ResNet-32 with its own 64 features on 100 classes, where no simplex exists: the orthoplex (geometry auto at D = 64), against the
# authors' way out of doubling the width (D = 128, simplex) and against learnable classifiers. Same images for all; etf-la:epochs=12 costs
# about what the doubled width costs in 4 (width_cost.py). At ratio 1 logit adjustment is plain cross-entropy. Some 40 minutes of one core.
# A comparison takes up where it was stopped, and takes further flags: sh benchmarks/tiny-imagenet-widths.sh --set mixup=1
set -e
equiframe compare --config benchmarks/tiny-imagenet-widths-r100.yaml --seeds 0 --reference etf-la \
  --methods etf-la,etf-la:width=32,etf-la:epochs=12,balanced-softmax,ce --out runs/tiny-imagenet-widths-r100 "$@"
equiframe compare --config benchmarks/tiny-imagenet-widths-r1.yaml --seeds 0 --reference etf-ce \
  --methods etf-ce,etf-ce:width=32,ce --out runs/tiny-imagenet-widths-r1 "$@"
