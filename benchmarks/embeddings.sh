#!/usr/bin/env bash
# What it is worth to store embedding and output head as integers: SmolLM2 at the bytes of 3.2 bits for its linears.
#   benchmarks/embeddings.sh SMOLLM2.gguf CALIBRATION.txt HELDOUT.txt OUT
set -euo pipefail
model=$1 calibration=$2 heldout=$3 out=$4
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
spectrim calibrate "$model" -o "$out/statistics" --text "$calibration" --seqlen 256 --samples 32
spectrim compress "$model" -o "$out/dense-embedding" --bits 3.2 --set quantize.bits=auto --stats "$out/statistics"
size=$(stat -c %s "$out/dense-embedding/model.safetensors")
spectrim compress "$model" -o "$out/sized" --size "$size" --stats "$out/statistics"
spectrim evaluate "$model" "$out/dense-embedding" "$out/sized" --tasks perplexity,kl --text "$heldout" \
    --max-tokens 8192 --json "$out/results.json"
