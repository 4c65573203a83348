#!/usr/bin/env bash
# What a size that holds the key/value cache as well makes of keys and values: the built-in model in 30 MB.
#   benchmarks/context.sh OUT
set -euo pipefail
export HF_HUB_OFFLINE=1
spectrim calibrate demo -o "$1/statistics" --samples 32
for batch in 1 2 4 8; do
    spectrim plan demo --size 30MB --context 8192 --batch "$batch" --recipe laser --stats "$1/statistics"
done
