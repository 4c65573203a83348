#!/usr/bin/env bash
# The tables of docs/results.md on the built-in model: recipes and ablations on its own tasks, and easy-VQA.
set -euo pipefail
out=${1:?usage: benchmarks/demo_tables.sh OUT_FOLDER [EASY_VQA_DATA_FOLDER]}
python benchmarks/recipes.py demo --questions 60 --max-tokens 8192 --out "$out/demo.json" \
    --recipes jw-svd,svd-llm,asvd,fwsvd,svd,jw-svd:allocation.rule=uniform,jw-svd:allocation.rule=global-sigma,jw-svd:metric.modality=text,jw-svd:metric.modality=image
if [ $# -gt 1 ]; then
    python benchmarks/recipes.py demo --easy-vqa "$2" --questions 200 --max-tokens 2048 --retain 0.6,0.4 \
        --recipes jw-svd,svd-llm,svd --out "$out/easy-vqa.json"
fi
