"""Scales and roundings of one block trained towards the dense block, started from feedback on both sides.

    python benchmarks/learned_rounding.py demo --stats STATS --block 7 --bits 2 --group 64

The block reads what it reads in the dense model, on the text windows of the statistics; the error of its output, in the
metric of its last linear's output, is printed for the last quarter of the windows, which nothing is trained on, as a
share of the error of feedback alone. `scales` trains these alone (Adam); `roundings` also a number beside each code
that starts at what was rounded away and passes its gradient through rounding. `--start codes` starts it at the code.
"""

import argparse
import math
import random
import time
from typing import Any

import torch
from torch import nn

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import reload_data
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.linear import Linear
from spectrim.maths.rounding import DAMPING, Grid, _spread, _triangular, fitting_group, quantize
from spectrim.metrics.metric import layer_metric
from spectrim.recipe import Recipe

RATE = 2e-3  # of scales, as a share of each


class _ArrivedError(Exception):
    """The block has been reached."""


class Rounded(nn.Module):
    """A linear without bias in integers; `codes` float32 [out, in] and `factors` [out, groups] may be trained."""

    def __init__(self, weight: torch.Tensor, linear: Linear, statistics: Statistics, bits: int, group: int) -> None:
        super().__init__()
        W, metric = weight.double(), layer_metric(Recipe.read("spectrim").metric, linear, statistics)
        assert metric.output is not None
        C, G = metric.value, metric.output.dense(len(W))
        self.grid = Grid(bits, fitting_group(W.shape[1], group))
        found = quantize(W, self.grid, C, G, dtype=torch.bfloat16)
        rows, _, S = _triangular(G, len(W), DAMPING, W)
        columns, _, T = _triangular(C, W.shape[1], DAMPING, W)
        assert S is not None
        assert T is not None
        ordered = (W - found.dense())[rows][:, columns]
        away = torch.empty_like(W)  # what each rounding left
        away[rows[:, None], columns] = ordered + S.T @ ordered + (ordered + S.T @ ordered) @ T
        self.start, self.scale = found.codes.float(), found.scale.float()
        self.before = self.start + (away / _spread(found.scale, None, W.shape[1])[0]).clamp(-0.49, 0.49).float()
        self.reset(False, self.before)

    def reset(self, rounds: bool, before: torch.Tensor) -> None:
        """Start again."""
        self.rounds = rounds
        self.codes, self.factors = nn.Parameter(before.clone()), nn.Parameter(torch.ones_like(self.scale))

    def rounded(self) -> torch.Tensor:
        """The codes as they are now."""
        return self.codes.detach().round().clamp(self.grid.low, self.grid.high) if self.rounds else self.start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs [..., in] to [..., out]."""
        codes = self.rounded()
        codes = self.codes + (codes - self.codes).detach() if self.rounds else codes
        return x @ (codes.unflatten(1, (self.scale.shape[1], -1)) * (self.scale * self.factors)[..., None]).flatten(1).T


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", required=True)
    parser.add_argument("--block", type=int, required=True, help="of all blocks of the model")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--windows", type=int, default=8, help="of a step")
    parser.add_argument("--rates", default="0.003,0.01", help="of Adam on codes, in steps of the grid")
    parser.add_argument("--start", choices=("residuals", "codes"), default="residuals")
    args = parser.parse_args()
    source, statistics = resolve(args.model), Statistics.open(args.stats)
    model, processor = load(source, dtype=torch.float32).requires_grad_(False), load_processor(source)
    parts = anatomy(model)
    windows = reload_data(model, processor, statistics, sees=parts.tower is not None, samples=None).windows
    assert windows is not None
    name = parts.blocks()[args.block]
    block, calls = model.get_submodule(name), list[Any]()

    def arrive(_module: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        calls.append((given, more))
        raise _ArrivedError

    handle = block.register_forward_pre_hook(arrive, with_kwargs=True)
    for window in windows:
        try:
            with torch.no_grad():
                model(window[None], use_cache=False)
        except _ArrivedError:
            pass
    handle.remove()

    def output(number: int) -> torch.Tensor:
        given, more = calls[number]
        found = block(*given, **more)
        return (found[0] if isinstance(found, tuple) else found).flatten(0, -2)

    with torch.no_grad():
        wanted = [output(number) for number in range(len(calls))]
    linears = [linear for linear in parts.linears if linear.block == name]
    last = layer_metric(Recipe.read("spectrim").metric, linears[-1], statistics).output
    assert last is not None
    L = last.roots[0].times(torch.eye(wanted[0].shape[1], dtype=torch.float64)).float()
    layers = []
    for linear in linears:
        weight = model.get_submodule(linear.name).weight.detach()
        layers.append(Rounded(weight, linear, statistics, args.bits, args.group))
        model.set_submodule(linear.name, layers[-1])
    trained = len(calls) * 3 // 4

    def lost(number: int) -> torch.Tensor:
        return (L @ (wanted[number] - output(number)).T).square().sum() / len(wanted[number])

    @torch.no_grad()
    def left() -> float:
        return sum(float(lost(number)) for number in range(trained, len(calls))) / (len(calls) - trained)

    start = left()
    print("| trained | rate of codes | error, × feedback alone | codes changed | seconds |\n|---|---|---|---|---|")
    for rate in (0.0, *map(float, args.rates.split(","))):
        for layer in layers:
            layer.reset(rate > 0, layer.before if args.start == "residuals" else layer.start)
        groups = [{"params": [layer.factors for layer in layers], "lr": RATE}]
        groups += [{"params": [layer.codes for layer in layers], "lr": rate}] if rate else []
        optimizer, order = torch.optim.Adam(groups, betas=(0.9, 0.95)), random.Random(0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 + math.cos(math.pi * k / args.steps)) / 2)
        started = time.perf_counter()
        for _ in range(args.steps):
            optimizer.zero_grad()
            for number in order.sample(range(trained), args.windows):
                (lost(number) / args.windows).backward()
            optimizer.step()
            schedule.step()
        changed = sum(int((layer.rounded() != layer.start).sum()) for layer in layers)
        share, seconds = changed / sum(layer.start.numel() for layer in layers), time.perf_counter() - started
        kind = "scales and roundings" if rate else "scales"
        print(f"| {kind} | {rate or '–'} | {left() / start:.3f} | {share:.2%} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
