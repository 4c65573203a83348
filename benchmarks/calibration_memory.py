"""Time and memory of calibration as the samples grow: ten times the samples, ten times the time, the same memory.

    python benchmarks/calibration_memory.py [--model DIR] [--text SRC] [--samples N] [--json OUT]

Runs ``spectrim.calibrate`` with N and with 10 N text windows, each in a process of its own, on a random Llama (5 M
parameters, hidden 256, 4 layers) or on a model directory, and prints wall time and peak resident memory; `before` is
the peak when calibration began, of the model and the imported packages. Both read the same text: pseudo-words, unless
a source is given.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spectrim.calibrate import calibrate

GROWTH = 10
WORDS = 4096


def random_llama(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(arguments: argparse.Namespace, samples: int) -> dict[str, float]:
    """One calibration in this process."""
    if arguments.model is None:
        model, tokenizer = random_llama()
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    settings: dict[str, Any] = {"text": arguments.text, "images": None, "seqlen": arguments.seqlen, "curvature": False}
    with tempfile.TemporaryDirectory() as folder:
        before, started = peak_bytes(), time.perf_counter()
        calibrate(model, Path(folder) / "statistics", processor=tokenizer, samples=samples, batch_size=4, **settings)
        return {"seconds": time.perf_counter() - started, "peak": peak_bytes(), "before": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a language model; a small random Llama without it")
    parser.add_argument("--text", help="text source; pseudo-words without it")
    parser.add_argument("--samples", type=int, default=16, help="N (default %(default)s)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a sample (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # a child process: samples to run
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments, arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.text is None:
            arguments.text = str(Path(folder) / "words.txt")
            rng = random.Random(0)
            count = GROWTH * arguments.samples * arguments.seqlen
            Path(arguments.text).write_text(" ".join(f"w{rng.randrange(WORDS)}" for _ in range(count)))
        sizes = (arguments.samples, GROWTH * arguments.samples)
        rows = [{"samples": samples, **child(arguments, samples)} for samples in sizes]
    few, many = rows
    ratios = {key: many[key] / few[key] for key in ("samples", "seconds", "peak")}
    print(f"{'samples':>8} {'seconds':>9} {'peak MiB':>9} {'before MiB':>11}")
    for row in rows:
        print(f"{row['samples']:8d} {row['seconds']:9.2f} {row['peak'] / 2**20:9.0f} {row['before'] / 2**20:11.0f}")
    print(f"{ratios['samples']:7.0f}× {ratios['seconds']:8.2f}× {ratios['peak']:8.2f}×")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"runs": rows, "ratios": ratios}, indent=1) + "\n")


def child(arguments: argparse.Namespace, samples: int) -> Any:
    """The figures of one calibration in a fresh process, so that each has its own peak."""
    command = [sys.executable, __file__, "--measure", str(samples), "--text", arguments.text]
    command += ["--seqlen", str(arguments.seqlen)] + (["--model", arguments.model] if arguments.model else [])
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
