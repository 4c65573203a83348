#!/usr/bin/env bash
# Quantizers side by side: GPTQ and AWQ of llm-compressor, AutoRound's light setting, rounding to nearest, and spectrim,
# on the same weights, calibration tokens, stored bytes and test text. Each peer has an environment of its own in WORK.
#   benchmarks/peers.sh WORK MODEL CALIBRATION.txt HELDOUT.txt [SAMPLES SEQLEN]      # MODEL: a directory or a .gguf
#   IMAGES=builtin benchmarks/peers.sh WORK demo builtin builtin 64 256     # the built-in model, questions about images too
# Settings of bits and group size: "4 64", "3 64", "2 32" (4.25, 3.25 and 2.5 bits per weight with 16-bit scales).
set -euo pipefail
work=${1:?usage: benchmarks/peers.sh WORK MODEL CALIBRATION HELDOUT [SAMPLES SEQLEN]}
model=$2 calibration=$3 heldout=$4 samples=${5:-128} seqlen=${6:-512}
peers=${PEERS:-rtn gptq awq autoround} settings=${SETTINGS:-4,64 3,64 2,32}
export HF_HUB_OFFLINE=1
mkdir -p "$work"
environment() { # NAME PACKAGE
    [ -e "$work/$1/bin/python" ] || { python -m venv "$work/$1" && "$work/$1/bin/pip" install -q "torch>=2.10,<2.14" "$2"; }
}
[ -e "$work/samples.json" ] || python benchmarks/peers.py prepare "$model" "$work" --text "$calibration" \
    --samples "$samples" --seqlen "$seqlen" ${IMAGES:+--images "$IMAGES"}
for setting in $settings; do
    for peer in $peers; do
        [ -e "$work/$peer-${setting/,/-}/peer.json" ] && continue
        case $peer in
            gptq | awq) environment llm-compressor llmcompressor && python="$work/llm-compressor/bin/python" ;;
            autoround) environment auto-round auto-round && python="$work/auto-round/bin/python" ;;
            *) python=python ;;
        esac
        "$python" benchmarks/peers.py quantize "$work" "$peer" --bits "${setting%,*}" --group "${setting#*,}"
    done
done
python benchmarks/peers.py compare "$work" --text "$heldout"
