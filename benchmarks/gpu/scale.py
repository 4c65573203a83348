"""What it takes to compress a 7B model on one GPU: two blocks of its shape, and the sum over all 28.

    python benchmarks/gpu/scale.py [--json OUT]      # H100 or H200, under 4 minutes
    python benchmarks/gpu/scale.py --small           # small shapes on the CPU, to see that it runs

Calibration with 20 windows of 512 tokens (fewer would be kept as they are, docs/methods.md, section 6), without and
with full output moments (its passes, and then what is written); spectra in float64 of metrics on both sides, and
eigenvectors in float32 beside them; feedback rounding to 3 bits on both sides. Weights and words are random: time
does not depend on them. What does not fit into `--limit` seconds is left out and named.
"""

import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import SEVEN, SMALL, Shape
from timing import Clock, asked, table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from spectrim.calibrate import calibrate
from spectrim.maths.decompose import OutputMetric, decompose
from spectrim.maths.roots import BlockRoot
from spectrim.maths.rounding import Grid, quantize

WORDS = 4096
BLOCKS = 2  # that are calibrated
WANTED = 256 * 2048  # tokens of one modality, for the sum


def qwen2(shape: Shape, device: torch.device) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A random model of two blocks with few words."""
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=BLOCKS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared,
        dtype=torch.bfloat16,
    )
    with device:
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")


def calibrated(shape: Shape, device: torch.device, samples: int, seqlen: int, curvature: bool) -> dict[str, float]:
    """Seconds of the passes and of what follows them, and tokens of a sample."""
    model, tokenizer = qwen2(shape, device)
    words = random.Random(0)
    marks: list[float] = []

    def progress(done: int, total: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "words.txt"
        text.write_text(" ".join(f"w{words.randrange(WORDS)}" for _ in range(2 * samples * seqlen)))
        started = time.perf_counter()
        calibrate(
            model,
            Path(folder) / "statistics",
            processor=tokenizer,
            text=str(text),
            images=None,
            samples=samples,
            seqlen=seqlen,
            curvature=curvature,
            progress=progress,
        )
        ended = time.perf_counter()
    return {"passes": marks[-1] - started, "rest": ended - marks[-1]}


def metric(size: int, device: torch.device) -> torch.Tensor:
    """A metric [size, size] float64 as moments have it, of full rank."""
    X = torch.randn(min(size, 4096), size, dtype=torch.float64, device=device)
    M = X.T @ X / len(X)
    M.diagonal().add_(0.1)
    return M


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def linears(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """By role: outputs, inputs, and how many of them a block has."""
    width, inner, shared = shape.width, shape.inner, shape.shared * shape.head
    return {
        "q, o": (width, width, 2),
        "gate, up": (inner, width, 2),
        "down": (width, inner, 1),
        "k, v": (shared, width, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    options, elapsed = asked(__doc__, "small shapes on the CPU", arguments)
    clock, shape = Clock.here(options.small), SMALL if options.small else SEVEN
    device, (samples, seqlen) = clock.device, (2, 32) if options.small else (20, 512)
    print(f"{clock.name}, torch {torch.__version__}\n")
    record: dict[str, Any] = {"device": clock.name, "calibration": {}, "linears": {}}

    def late(what: str) -> bool:
        if elapsed() > options.limit:
            print(f"out of time: {what} is left out")
            return True
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    torch.linalg.eigh(torch.eye(8, dtype=torch.float64, device=device))  # starts the library
    for role, (out, size, count) in linears(shape).items():
        if late(role):
            continue
        W = torch.randn(out, size, device=device) * size**-0.5
        C, G = metric(size, device), metric(out, device)
        root = OutputMetric((BlockRoot(G[None]),), torch.ones(1, dtype=torch.float64))
        row = {"count": count, "spectrum": seconds(lambda W=W, C=C, root=root: decompose(W, C, root), device)}
        if not late(f"rounding of {role}"):
            row["rounding"] = seconds(lambda W=W, C=C, G=G: quantize(W, Grid(3, 128), C, G), device)
        record["linears"][role] = row
        print(f"{role}: {row}", flush=True)
        del W, C, G, root
    if not late("eigenvectors"):
        M = metric(shape.width, device)
        record["eigh"] = {str(M.to(kind).dtype): seconds(lambda kind=kind: torch.linalg.eigh(M.to(kind)), device)
                          for kind in (torch.float64, torch.float32)}  # fmt: skip
        del M
    for curvature in (False, True):
        if not late(f"calibration with curvature={curvature}"):
            name = "with curvature" if curvature else "without"
            record["calibration"][name] = calibrated(shape, device, samples, seqlen, curvature)
            print(f"{name}: {record['calibration'][name]}", flush=True)

    layers = shape.layers
    cells = [
        [role, f"{row['spectrum']:.2f}", f"{row.get('rounding', float('nan')):.2f}"]
        for role, row in record["linears"].items()
    ]
    print("\n" + table(["linears", "spectrum, s", "rounding, s"], cells))
    for step in ("spectrum", "rounding"):
        total = layers * sum(row["count"] * row.get(step, float("nan")) for row in record["linears"].values())
        print(f"{step} of {layers} blocks: {total:.0f} s")
    if "eigh" in record:
        print(f"eigenvectors of {shape.width} × {shape.width}: {record['eigh']} s")
    for name, parts in record["calibration"].items():
        per_token = parts["passes"] / (samples * seqlen) * layers / BLOCKS
        print(
            f"calibration {name}: {parts['passes']:.1f} s and {parts['rest']:.1f} s to write; {WANTED} tokens of "
            f"{layers} blocks at that speed: {per_token * WANTED / 60:.0f} minutes"
        )
    if device.type == "cuda":
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(f"peak {record['peak_gib']:.1f} GiB")
    print(f"{elapsed():.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
