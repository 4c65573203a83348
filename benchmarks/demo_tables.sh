#!/usr/bin/env bash
# The tables of docs/results.md on the built-in model: all recipes, ablations of the flagship, of JW-SVD and of
# curvature, easy-VQA, and integers.
set -euo pipefail
out=${1:?usage: benchmarks/demo_tables.sh OUT_FOLDER [EASY_VQA_DATA_FOLDER]}
common=(--max-tokens 8192 --stats "$out/statistics")
python benchmarks/recipes.py demo --questions 60 "${common[@]}" --retain 0.8,0.6,0.4,0.3,0.2 --out "$out/demo.json"
flagship=spectrim:compensate.kind=none,spectrim:compensate.residual=false,spectrim:storage.pivoted=false
flagship=$flagship,spectrim:allocation.rule=uniform,spectrim:metric.modality=text,spectrim:metric.modality=image
flagship=$flagship,spectrim:metric.gamma=1:metric.image_price=1
python benchmarks/recipes.py demo --questions 60 "${common[@]}" --retain 0.4,0.3 --recipes "spectrim,$flagship" \
    --out "$out/flagship.json"
if [ $# -gt 1 ]; then
    python benchmarks/recipes.py demo --easy-vqa "$2" --questions 200 --max-tokens 2048 --stats "$out/statistics" \
        --retain 0.8,0.6,0.4,0.3 --out "$out/easy-vqa.json"
fi
python benchmarks/recipes.py demo --questions 60 "${common[@]}" --store bfloat16 --retain 0.3,0.2,0.15,0.1 \
    --recipes "spectrim:quantize.bits=auto,curvature+gptq,laser+gptq,jw-svd+gptq" --out "$out/bits.json"
python benchmarks/calibration_questions.py "$out/questions"
python benchmarks/recipes.py demo --questions 60 --max-tokens 8192 --stats "$out/asked" --images "$out/questions/questions.jsonl" \
    --samples 189 --retain 0.4,0.3,0.2 --recipes spectrim,laser,jw-svd,svd-llm,asvd,svd --out "$out/asked.json"
jw=jw-svd:allocation.rule=uniform,jw-svd:allocation.rule=global-sigma-mean,jw-svd:metric.modality=text
jw=$jw,jw-svd:metric.modality=image,jw-svd:allocation.places=[backbone]
cu=curvature:allocation.rule=uniform,curvature:metric.modality=text,curvature:metric.modality=image
cu=$cu,curvature:metric.eta=token,curvature:metric.eta=sequence,curvature:metric.damping=0.1
ada=adasvd:compensate.kind=none,adasvd:allocation.rule=uniform
python benchmarks/recipes.py demo --questions 60 "${common[@]}" --retain 0.6,0.4 --recipes "$jw,$cu,$ada" \
    --out "$out/ablations.json"
