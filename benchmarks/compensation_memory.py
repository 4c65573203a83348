"""Peak memory of compensation as its samples grow, with and without a limit of memory, and that the bits are the same.

    python benchmarks/compensation_memory.py WORK [--samples 64] [--seqlen 512] [--width 512] [--memory 700MiB]

A random Llama of few, wide blocks in float32. Calibration runs once; `compress --recipe svd-llm` with anchored
compensation and five steps of refinement then runs with all the memory that is free and under the limit, each in a
process of its own: seconds, resident memory when the walk began, and its peak.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spectrim.calibrate import calibrate
from spectrim.calibrate.probe import forget_peak, held_memory, peak_memory
from spectrim.checkpoint import load, load_processor
from spectrim.compensate import Compensation
from spectrim.pipeline import compression

WORDS = 4096
CPU = torch.device("cpu")


def write(work: Path, args: argparse.Namespace) -> None:
    """The model, its tokenizer, the text and the statistics."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=args.width, intermediate_size=args.width, num_hidden_layers=args.blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=args.seqlen,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "model")
    tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0").save_pretrained(work / "model")
    words = random.Random(0)
    many = args.samples * args.seqlen + 10 * args.seqlen
    (work / "words.txt").write_text(" ".join(f"w{words.randrange(WORDS)}" for _ in range(many)))
    model, tokenizer = load(work / "model"), load_processor(work / "model")
    given = {"text": str(work / "words.txt"), "images": None, "samples": args.samples, "seqlen": args.seqlen}
    calibrate(model, work / "stats", processor=tokenizer, curvature=False, **given)


def measure(work: Path, memory: str | None) -> dict[str, object]:
    """One walk in this process, on statistics that hold none."""
    shutil.rmtree(work / "stats" / "compensated", ignore_errors=True)
    model, real, found = load(work / "model"), Compensation.solve, dict[str, object]()

    def solve(self, progress=None):  # type: ignore[no-untyped-def]
        forget_peak(CPU)
        found["before"], began = held_memory(CPU), time.monotonic()
        solved = real(self, progress)
        found["seconds"], found["peak"] = time.monotonic() - began, peak_memory(CPU)
        return solved

    Compensation.solve = solve  # type: ignore[method-assign]
    changes = {"compensate.kind": "anchored", "compensate.refine": 5, "compensate.samples": None}
    given = {"processor": load_processor(work / "model"), "changes": changes, "memory": memory}
    with compression(model, "svd-llm", stats=work / "stats", **given) as prepared:
        small = prepared.apply(prepared.plan(0.5))
    digest = hashlib.sha256()
    for tensor in small.state_dict().values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found | {"digest": digest.hexdigest()}


def main() -> None:
    """Both runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name, value in {"samples": 64, "seqlen": 512, "width": 512, "blocks": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory", default="700MiB")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.work, None if args.measure == "free" else args.measure)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "stats" / "manifest.json").exists():
        write(args.work, args)
    rows = {}
    for memory in ("free", args.memory):
        command = [sys.executable, __file__, str(args.work), "--measure", memory]
        rows[memory] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"\n{args.samples} windows of {args.seqlen} tokens, width {args.width}\n")
    print("| memory | seconds | before, GiB | peak, GiB |\n|---|---|---|---|")
    for memory, row in rows.items():
        print(f"| {memory} | {row['seconds']:.0f} | {row['before'] / 2**30:.2f} | {row['peak'] / 2**30:.2f} |")
    print("the same bits" if len({row["digest"] for row in rows.values()}) == 1 else "OTHER BITS")


if __name__ == "__main__":
    main()
