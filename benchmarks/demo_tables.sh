#!/usr/bin/env bash
# The tables of docs/results.md on the built-in model: recipes, ablations of JW-SVD and of curvature, and easy-VQA.
set -euo pipefail
out=${1:?usage: benchmarks/demo_tables.sh OUT_FOLDER [EASY_VQA_DATA_FOLDER]}
stats=(--stats "$out/statistics")
python benchmarks/recipes.py demo --questions 60 --max-tokens 8192 "${stats[@]}" --out "$out/demo.json" \
    --recipes laser,curvature,jw-svd,svd-llm,asvd,fwsvd,svd
jw=jw-svd:allocation.rule=uniform,jw-svd:allocation.rule=global-sigma,jw-svd:metric.modality=text
jw=$jw,jw-svd:metric.modality=image,jw-svd:allocation.places=[backbone]
cu=curvature:allocation.rule=uniform,curvature:metric.modality=text,curvature:metric.modality=image
cu=$cu,curvature:metric.eta=token,curvature:metric.eta=sequence,curvature:metric.damping=0.1
python benchmarks/recipes.py demo --questions 60 --max-tokens 8192 "${stats[@]}" --retain 0.6,0.4 \
    --out "$out/ablations.json" --recipes "$jw,$cu"
if [ $# -gt 1 ]; then
    python benchmarks/recipes.py demo --easy-vqa "$2" --questions 200 --max-tokens 2048 "${stats[@]}" --retain 0.6,0.4 \
        --recipes laser,jw-svd,svd-llm,asvd,svd --out "$out/easy-vqa.json"
fi
