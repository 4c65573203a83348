#!/usr/bin/env bash
# The test suite on another Python: tools/newest_python.sh python3.13 [arguments of pytest]
# Not part of .ci/run: where pip finds no CPU build of torch for that Python it fetches gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
"$1" -m venv .venv-newest
.venv-newest/bin/pip install -q -e '.[dev]'
shift
.venv-newest/bin/pytest -n auto "$@"
