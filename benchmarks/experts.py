"""Decode and prefill of a mixture of 16 experts with random weights: compressed beside dense, in turn.

    python benchmarks/experts.py [--hidden 512 --inner 512 --layers 4 --repeats 15]

Rows: the dense model by transformers' `grouped_mm` and `eager`, the same with experts as linears of their own, 4-bit
integers (as the runtime `auto` chooses, and by `memory`), factors of half the bytes. Milliseconds are medians over
repeats in turn; ratios are medians of the ratios to `grouped_mm` within one turn, so that other load on the machine
matters little. Memory: all parameters and buffers that are held, and the safetensors file.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from spectrim.anatomy import anatomy
from spectrim.checkpoint import load, save
from spectrim.experts import unfuse
from spectrim.storage import exchange, stored_layers

WORK = (("decode, 1", 1, 1), ("decode, 8", 8, 1), ("prefill, 1 × 256", 1, 256))


def dense(args):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=args.hidden, intermediate_size=args.inner, moe_intermediate_size=args.inner,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=16,
        num_experts_per_tok=4, decoder_sparse_step=1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def compressed(args, folder, kind, runtime):
    """Every linear of the experts in one form with random numbers, saved and opened again."""
    model = dense(args)
    spec = {"bits": 4, "group": 64, "symmetric": True}
    if kind == "low-rank":
        spec = {"rank": args.hidden * args.inner // (args.hidden + args.inner) // 2, "pivoted": False}
    exchange(model, {x.name: (kind, spec) for x in anatomy(model).linears if x.expert is not None})
    for layer in stored_layers(model).values():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            elif name == "weight_packed":
                tensor.random_()
    place = Path(folder, f"{kind} {runtime}")
    save(model, place)
    return load(place, runtime=runtime), sum(path.stat().st_size for path in place.glob("*.safetensors"))


def held(model):
    """Bytes of all tensors of a model, layouts of integers included."""
    seen = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                storage = value.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@torch.no_grad()
def seconds(model, batch, length):
    ids = torch.randint(0, 1024, (batch, length), generator=torch.Generator().manual_seed(1))
    if length > 1:
        began = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        return time.perf_counter() - began
    steps = 4
    cache = model(input_ids=ids.repeat(1, 8), use_cache=True).past_key_values
    began = time.perf_counter()
    for step in range(steps):
        model(input_ids=(ids + 17 * step) % 1024, past_key_values=cache, use_cache=True)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = dense(args)
    models = {"dense, grouped_mm": (base, None)}
    base.set_experts_implementation("grouped_mm")
    for name in ("eager", "as linears"):
        one = copy.deepcopy(base)
        one.set_experts_implementation("eager")
        if name == "as linears":
            unfuse(one)
        models[f"dense, {name}"] = (one, None)
    folder = tempfile.TemporaryDirectory()
    models["4 bits, auto"] = compressed(args, folder.name, "integers", "auto")
    models["4 bits, memory"] = compressed(args, folder.name, "integers", "memory")
    models["factors, 50 %"] = compressed(args, folder.name, "low-rank", "auto")
    times = {(name, what): [] for name in models for what, *_ in WORK}
    for _ in range(args.repeats):
        for what, batch, length in WORK:
            for name, (model, _) in models.items():
                times[name, what].append(seconds(model, batch, length))
    print(f"hidden {args.hidden}, inner {args.inner}, {args.layers} layers, 16 experts, 4 active, bfloat16")
    print("| model | " + " | ".join(f"{what}: ms | ratio" for what, *_ in WORK) + " | held, MB | file, MB |")
    print("|---" * (3 + 2 * len(WORK)) + "|")
    first = next(iter(models))
    for name, (model, size) in models.items():
        cells = []
        for what, *_ in WORK:
            ratios = [a / b for a, b in zip(times[name, what], times[first, what], strict=True)]
            cells += [f"{1000 * statistics.median(times[name, what]):.1f}", f"{statistics.median(ratios):.2f}"]
        file = "–" if size is None else f"{size / 1e6:.1f}"
        print(f"| {name} | {' | '.join(cells)} | {held(model) / 1e6:.1f} | {file} |")


if __name__ == "__main__":
    main()
