#!/usr/bin/env bash
# What smaller forms of output moments cost in quality: SmolLM2 by ranks and by bits, without compensation.
#   benchmarks/sketches.sh SMOLLM2.gguf CALIBRATION.txt HELDOUT.txt OUT
set -euo pipefail
[ $# = 4 ] || { sed -n 2,3p "$0"; exit 2; }
model=$1 calibration=$2 heldout=$3 out=$4
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
mkdir -p "$out"
for form in full blocks:64 sketch:256 sketch:64 diagonal; do
    here=$out/${form/:/-}
    [ ! -e "$here/results.json" ] || continue
    spectrim calibrate "$model" -o "$here/statistics" --text "$calibration" --seqlen 256 --samples 64 --gradients \
        $(printf -- "--curvature-form %s=$form " q k v o gate up down)
    spectrim compress "$model" -o "$here/ranks" --recipe curvature --retain 0.6 --retain 0.4 --stats "$here/statistics"
    spectrim compress "$model" -o "$here/bits" --recipe curvature --set quantize.bits=auto --bits 3.25 \
        --stats "$here/statistics"
    spectrim evaluate "$model" "$here"/ranks/* "$here/bits" --tasks perplexity --text "$heldout" --max-tokens 10240 \
        --json "$here/results.json"
    echo "$form: $(du -sh "$here/statistics" | cut -f1) of statistics"
    rm -r "$here/statistics" "$here"/ranks/*/*.safetensors "$here"/bits/*.safetensors
done
