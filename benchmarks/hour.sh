#!/usr/bin/env bash
# A user's first hour, timed: a clone, a new environment, the demo, then a model of one's own made to fit a size.
#   benchmarks/hour.sh MODEL SIZE TEXT WORK        e.g. SmolLM2-135M.gguf 60MB calibration.txt work
# WORK takes everything and must not exist. TEXT calibrates with its first part and is asked about its last.
set -euo pipefail
[ $# = 4 ] || { sed -n 2,4p "$0"; exit 2; }
model=$(realpath "$1") size=$2 text=$(realpath "$3") work=$4
source=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
mkdir "$work" && cd "$work"
step() { # title, command …
    local began=$SECONDS title=$1
    shift
    echo "## $title"
    "$@"
    echo "## $title: $((SECONDS - began)) s"
}
lines=$(wc -l < "$text")
head -n $((lines * 4 / 5)) "$text" > calibration.txt
tail -n $((lines / 5)) "$text" > other.txt
step "clone" git clone -q "$source" clone
step "environment" python3 -m venv .venv
step "install" .venv/bin/pip install -q './clone[report,gguf]'
PATH=$PWD/.venv/bin:$PATH
step "demo" spectrim demo
step "anatomy" spectrim anatomy "$model"
step "calibrate" spectrim calibrate "$model" -o stats --text calibration.txt --gradients --samples 64 --seqlen 256
step "plan" spectrim plan "$model" --size "$size" --stats stats
step "compress" spectrim compress "$model" -o small --size "$size" --stats stats
ls -l small
step "evaluate" spectrim evaluate "$model" small --text other.txt --tasks perplexity,kl --max-tokens 8192 --json results.json
step "bench" spectrim bench "$model" small --prompt 64 --new 24 --repeats 3 --json bench.json
step "report" spectrim report results.json bench.json small -o report.html
step "generate" python -c "
import spectrim
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained('small'), AutoTokenizer.from_pretrained('small')
given = tokenizer('Python is a language', return_tensors='pt')
print(tokenizer.decode(model.generate(**given, max_new_tokens=20, do_sample=False)[0]))"
echo "## the whole: $SECONDS s"
