"""The experts of one layer of a 30B-A3B on a GPU: 4-bit integers in grouped products and one by one, against dense.

    python benchmarks/gpu/experts.py [--json OUT]      # H100 or H200, under 3 minutes
    python benchmarks/gpu/experts.py --small           # on the CPU, to see that it runs

128 experts of 2048 × 768, 8 for each token, bfloat16, random weights and routes; the dense rows are transformers' own
`grouped_mm` and `eager`. Calls are timed one by one, since each asks the GPU how many tokens an expert has. Wanted: not
slower than dense at the same number of tokens.
"""

import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
from timing import Clock, asked, table, verdict
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from spectrim.anatomy import anatomy
from spectrim.experts import GROUPS, unfused
from spectrim.maths.rounding import Grid, quantize
from spectrim.storage import exchange, stored_layers
from spectrim.storage.runtime import set_runtime

TOKENS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Row:
    """One way to run the experts at one number of tokens; `ratio` is the time of `grouped_mm` over its own."""

    tokens: int
    way: str
    us: float
    ratio: float


def dense(small: bool, device: torch.device) -> nn.Module:
    """A model of one layer, whose other parts are small."""
    width, inner, experts, active = (64, 32, 8, 2) if small else (2048, 768, 128, 8)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=width, intermediate_size=inner, moe_intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=experts, num_experts_per_tok=active,
        decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def integers(model: nn.Module) -> nn.Module:
    """The same with experts in 4 bits, groups of 128 where they divide the inputs, rounded to nearest."""
    weights, specs = {}, {}
    for linear in anatomy(model).linears:
        if linear.expert is not None:
            weights[linear.name] = model.get_submodule(linear.name).weight.detach()
            grid = Grid(4, 128 if linear.in_features % 128 == 0 else 32)
            specs[linear.name] = ("integers", grid.spec)
    exchange(model, specs)
    for name, layer in stored_layers(model).items():
        layer.load(quantize(weights[name], layer.grid, dtype=torch.bfloat16))
    return model


def seconds(clock: Clock, experts: nn.Module, x: torch.Tensor, routes: torch.Tensor, weights: torch.Tensor) -> float:
    """Median of single calls, after some that warm up."""
    times = []
    for number in range(3 + 3 * clock.repeats):
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        experts(x, routes, weights)
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def ways_of(small: bool, device: torch.device) -> dict[str, nn.Module]:
    """The experts of a layer, each way to run them by its name."""
    ways = {}
    for name in ("grouped_mm", "eager"):
        model = dense(small, device)
        model.set_experts_implementation(name)
        ways[f"dense, {name}"] = model.model.layers[0].mlp.experts
    model = integers(dense(small, device))
    print("layouts:", set_runtime(model, "auto"))
    ways["4 bits"] = experts = next(module for module in model.modules() if unfused(module))
    if hasattr(experts, GROUPS):
        alone = copy.copy(experts)  # of the same linears
        delattr(alone, GROUPS)
        alone.forward = partial(experts.forward.func, alone)
        ways["4 bits, one by one"] = alone
    return ways


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options, elapsed = asked(__doc__, "small shapes on the CPU", arguments)
    clock = Clock.here(options.small)
    ways = ways_of(options.small, clock.device)
    count, active, width = (8, 2, 64) if options.small else (128, 8, 2048)
    rows: list[Row] = []
    for tokens in TOKENS:
        if elapsed() > options.limit:
            print(f"out of time: {tokens} tokens are left out")
            continue
        generator = torch.Generator(clock.device).manual_seed(tokens)
        like = {"device": clock.device, "generator": generator}
        x = torch.randn(tokens, width, dtype=torch.bfloat16, **like)
        routes = torch.rand(tokens, count, **like).topk(active).indices
        weights = torch.full((tokens, active), 1 / active, dtype=torch.bfloat16, device=clock.device)
        base = 0.0
        for way, one in ways.items():
            us = 1e6 * seconds(clock, one, x, routes, weights)
            base = base or us
            rows.append(Row(tokens, way, us, base / us))
    print(f"{clock.name}, torch {torch.__version__}\n")
    print(table(["tokens", "experts", "µs", "× grouped_mm"], [
        [str(r.tokens), r.way, f"{r.us:.0f}", f"{r.ratio:.2f}"] for r in rows
    ]))  # fmt: skip
    for tokens in TOKENS:
        found = next((r.ratio for r in rows if r.tokens == tokens and r.way == "4 bits"), None)
        print(verdict(f"4 bits at {tokens} tokens, against grouped_mm,", found, 1.0))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
