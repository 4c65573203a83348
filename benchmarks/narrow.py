"""Narrower layers beside factors and integers at equal bytes: predicted losses, and the loss of the whole model.

    python benchmarks/narrow.py MODEL --stats STATS --heldout heldout.txt --retain 0.8,0.6,0.4 --bits 4,3,2.5

`narrow` removes hidden units of an MLP (rows of gate and up, columns of down), and value dimensions of a head (rows of
v, columns of o, after the rotation of each head that orders them). Units go one by one, whichever costs least with
what is left fitted again in the metric: ``W C[:, S] C[S, S]⁻¹``. `apart` are factors of each linear by itself, with
pivots, at the best ranks for the bytes. `both` narrows first and factors (or rounds) what is left. A share holds for
every block alike (uniform), or for all of them together, spent where the predicted loss falls most (spent). The rest of
the model stays dense. Nothing is compensated. With `--bits` MLPs are in integers, with feedback on both sides.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics
from spectrim.checkpoint import load, load_processor
from spectrim.demo import resolve
from spectrim.evaluate import load_questions, vqa
from spectrim.evaluate.results import score
from spectrim.linear import Linear
from spectrim.maths.decompose import OutputMetric, decompose, factors
from spectrim.maths.roots import BlockRoot, root
from spectrim.maths.rounding import Grid, conditional, expected, fitting_group, quantize
from spectrim.metrics.metric import layer_metric
from spectrim.plan.spend import Curve, spend
from spectrim.recipe import Recipe
from spectrim.samples import load_text

STEP = 256  # units between two widths that are factored or rounded; groups of scales stay whole
SHARES = np.arange(0.2, 1.001, 0.05)  # of a pair's bytes, at which its best ranks are found
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Option:
    """Bytes and nats of one way to store some linears, and their weights; whether units are left out."""

    bytes: int
    cost: float
    make: Callable[[], Weights]
    narrow: bool = False


@dataclass(frozen=True)
class Part:
    """One linear with its weight, its metrics and the dtype that bytes count in."""

    linear: Linear
    W: torch.Tensor
    C: torch.Tensor
    G: torch.Tensor

    @property
    def name(self) -> str:
        """Of the linear."""
        return self.linear.name

    def with_rows(self, kept: torch.Tensor) -> "Part":
        """Of these outputs alone."""
        return Part(self.linear, self.W[kept], self.C, self.G[kept][:, kept])

    def with_columns(self, kept: torch.Tensor) -> "Part":
        """Of these inputs alone, fitted again."""
        C = self.C[kept][:, kept]
        return Part(self.linear, torch.linalg.solve(C, self.C[kept] @ self.W.T).T, C, self.G)


def removal(
    W: torch.Tensor, C: torch.Tensor, G: torch.Tensor, size: int, most: int, at_once: int = 1
) -> tuple[list[int], np.ndarray]:
    """The first `most` groups of `size` columns of W to go, in order; nats [most + 1] after 0, 1, … of them.

    Without columns g the others, fitted again, lose ``tr(G W_g (C⁻¹_gg)⁻¹ W_gᵀ)`` more, C⁻¹ that of what was left. The
    `at_once` cheapest ones go together.
    """
    P, GW, left = torch.linalg.inv(C), G @ W, torch.arange(W.shape[1]).unflatten(0, (-1, size))
    gone, lost = list[int](), [0.0]
    while len(gone) < most:
        grouped = [M.unflatten(1, (-1, size)).permute(1, 0, 2) for M in (GW, W)]
        inner = P.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(0, 0, 2).permute(2, 0, 1)
        cost = torch.linalg.solve(inner, grouped[0].mT @ grouped[1]).diagonal(0, 1, 2).sum(1)
        taken = torch.zeros(len(left), dtype=torch.bool)
        taken[cost.argsort()[: min(at_once, most - len(gone))]] = True
        out, kept = (which.repeat_interleave(size) for which in (taken, ~taken))
        step = torch.linalg.solve(P[out][:, out], P[out])
        total = float((GW[:, out] * torch.linalg.solve(P[out][:, out], W[:, out].T).T).sum())
        lost += (lost[-1] + total * np.arange(1, int(taken.sum()) + 1) / int(taken.sum())).tolist()
        W, GW, P = ((M - M[:, out] @ step)[:, kept] for M in (W, GW, P))
        P = P[kept]
        gone += (left[taken, 0] // size).tolist()
        left = left[~taken]
    return gone, np.array(lost)


def low_rank(part: Part) -> list[Option]:
    """The dense weight, and factors of every rank that are smaller."""
    (out, size), linear = part.W.shape, part.linear
    spectrum = decompose(part.W, part.C, OutputMetric((BlockRoot(part.G[None]),), torch.ones(1)))
    lost = np.append(spectrum.s.flip(0).cumsum(0).flip(0).numpy(), 0.0)

    def make(rank: int) -> Weights:
        A, B = factors(part.W, *spectrum.directions(rank))
        return {part.name: A @ B}

    found = [Option(out * size * linear.dtype.itemsize, 0.0, lambda: {part.name: part.W})]
    for rank in range(1, min(out, size)):
        plain = rank * (out + size) * linear.dtype.itemsize
        pivoted = rank * ((out + size - rank) * linear.dtype.itemsize + 4)
        if min(plain, pivoted) < found[0].bytes:
            found.append(Option(min(plain, pivoted), lost[rank], partial(make, rank)))
    return found


def integers(part: Part, bits: Iterable[int] = (2, 3, 4)) -> list[Option]:
    """Integers with scales of 16 bits, errors fed on."""
    (out, size), found = part.W.shape, []
    weights = conditional(part.C, size, part.W), conditional(part.G, out, part.W)

    def make(grid: Grid) -> Weights:
        return {part.name: quantize(part.W, grid, part.C, part.G, dtype=torch.bfloat16).dense()}

    for number in bits:
        grid = Grid(number, fitting_group(size, 128))
        cost = float(expected(part.W, grid, *weights, torch.bfloat16).sum())
        found.append(Option(grid.nbytes(out, size, 2), cost, partial(make, grid)))
    return found


def curve(options: Sequence[Option]) -> Curve:
    """For the allocator."""
    return Curve(np.array([o.bytes for o in options], np.int64), np.array([o.cost for o in options]))


def joined(options: Sequence[Option], cost: float = 0.0, place: Callable[[Weights], Weights] | None = None) -> Option:
    """Several options as one; `cost` is what they lose together besides."""

    def make() -> Weights:
        found = {name: W for option in options for name, W in option.make().items()}
        return found if place is None else place(found)

    narrow = place is not None or any(o.narrow for o in options)
    return Option(sum(o.bytes for o in options), cost + sum(o.cost for o in options), make, narrow)


def best(menus: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option of each menu, of least loss within the budget."""
    return [menu[at] for menu, at in zip(menus, spend([curve(menu) for menu in menus], budget), strict=True)]


def combined(
    menus: Sequence[Sequence[Option]], cost: float = 0.0, place: Callable[[Weights], Weights] | None = None
) -> list[Option]:
    """The best of several menus at every budget: all combinations of few options, or those on the common hull."""
    if math.prod(map(len, menus)) < 100:
        every = [[]] if not menus else [[o] for o in menus[0]]
        for menu in menus[1:]:
            every = [[*some, o] for some in every for o in menu]
    else:
        least, most = (sum(f(o.bytes for o in menu) for menu in menus) for f in (min, max))
        curves = [curve(menu) for menu in menus]
        found = [spend(curves, int(most * share)) for share in SHARES if most * share >= least]
        every = [[menu[at] for menu, at in zip(menus, some, strict=True)] for some in found]
    return [joined(some, cost, place) for some in every]


def mlp(
    parts: Sequence[Part], step: int, menu: Callable[[Part], list[Option]] | None
) -> tuple[list[Option], list[Option]]:
    """Options of the linears of one MLP: narrow alone, at every 16th of its units, and narrow with `menu` on the rest.

    The last part is the one that reads the units.
    """
    *first, down = parts
    units = down.W.shape[1]
    gone, lost = removal(down.W, down.C, down.G, 1, units - units // 4, units // 64)

    def narrowed(width: int) -> tuple[list[Part], Callable[[Weights], Weights]]:
        kept = torch.ones(units, dtype=torch.bool)
        kept[gone[: units - width]] = False

        def place(found: Weights) -> Weights:
            wide = {part.name: part.W.clone() for part in first} | {down.name: torch.zeros_like(down.W)}
            for part in first:
                wide[part.name][kept] = found[part.name]
            wide[down.name][:, kept] = found[down.name]
            return wide

        return [*(part.with_rows(kept) for part in first), down.with_columns(kept)], place

    def alone(width: int) -> Option:
        def make() -> Weights:
            some, place = narrowed(width)
            return place({part.name: part.W for part in some})

        size = sum(part.W.numel() for part in parts) // units * width * down.linear.dtype.itemsize
        return Option(size, lost[units - width], make, narrow=width < units)

    both = []
    for width in range(units - step, units // 4, -step) if menu is not None else ():
        some, place = narrowed(width)
        both += combined([menu(part) for part in some], lost[units - width], place)
    return [alone(width) for width in range(units // 4, units + 1, units // 64)], both


def values(v: Part, o: Part, heads: int) -> list[Option]:
    """Options of a pair of v and o without some dimensions of some heads; o reads each of the `heads` of v in a row."""
    size, item = len(v.W) // heads, v.linear.dtype.itemsize
    readers = o.W.shape[1] // len(v.W)  # query heads to a head of values
    C, K = o.C, o.W.T @ o.G @ o.W
    turn = []
    for h in range(heads):  # the directions that cost most, over the query heads that read them
        blocks = [slice(q * size, (q + 1) * size) for q in range(h * readers, (h + 1) * readers)]
        R = root(torch.stack([C[q, q] for q in blocks]).mean(0))
        _, V = torch.linalg.eigh(R.T @ torch.stack([K[q, q] for q in blocks]).sum(0) @ R)
        turn.append(V.T @ torch.linalg.pinv(R))
    T = torch.block_diag(*(turn[h] for h in range(heads) for _ in range(readers)))
    # Columns in new coordinates z = T x, those of one dimension of a head of values side by side.
    order = torch.arange(len(T)).unflatten(0, (heads, readers, size)).transpose(1, 2).flatten()
    T = T[order]
    W, C = torch.linalg.solve(T.T, o.W.T).T, T @ C @ T.T
    gone, lost = removal(W, C, o.G, readers, len(v.W) - len(v.W) // 4, max(1, len(v.W) // 64))

    def make(count: int) -> Weights:
        kept = torch.ones(len(v.W), readers, dtype=torch.bool)
        kept[gone[:count]] = False
        kept = kept.flatten()
        return {o.name: torch.linalg.solve(C[kept][:, kept], C[kept] @ W.T).T @ T[kept]}

    bytes_ = [(len(v.W) - n) * (v.W.shape[1] + readers * len(o.W)) * item for n in range(len(lost))]
    return [Option(b, cost, partial(make, n), n > 0) for n, (b, cost) in enumerate(zip(bytes_, lost, strict=True))]


def main() -> None:
    """Parse the command line, predict, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stats", required=True)
    parser.add_argument("--heldout", default="builtin", help="text for perplexity")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=10240, help="0: predictions alone")
    parser.add_argument("--questions", type=int, default=100, help="of each task, where the model sees")
    parser.add_argument("--retain", default="0.8,0.6,0.4", help="of the bytes of what is compressed")
    parser.add_argument(
        "--bits", default="", help="of a weight of an MLP, scales counted: integers in place of factors"
    )
    parser.add_argument("--what", choices=("mlp", "vo"), default="mlp", help="linears: MLPs, or values and outputs")
    parser.add_argument("--how", default="apart,narrow,both", help="of these")
    parser.add_argument("--spread", default="uniform,spent", help="of these")
    parser.add_argument("--blocks", default=":", help="the first, and the one after the last")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    source = resolve(args.model)
    model, processor = load(source, dtype=torch.float32), load_processor(source)
    statistics, recipe = Statistics.open(args.stats), Recipe.read("spectrim")
    blocks: dict[str, dict[str, Part]] = {}
    parts = anatomy(model)
    first, last = (int(x) if x else None for x in args.blocks.split(":"))
    for linear in parts.linears:
        if linear.block not in parts.blocks()[first:last]:
            continue
        W = model.get_submodule(linear.name).weight.double()
        metric = layer_metric(recipe.metric, linear, statistics)
        assert metric.value is not None
        assert metric.output is not None
        C = metric.value + 1e-6 * metric.value.diagonal().mean() * torch.eye(W.shape[1], dtype=W.dtype)
        blocks.setdefault(linear.block, {})[linear.role] = Part(linear, W, C, metric.output.dense(len(W)))

    menus: dict[str, list[list[Option]]] = {"apart": [], "narrow": [], "both": []}
    menu: Callable[[Part], list[Option]] = integers if args.bits else low_rank
    full = 0
    for roles in blocks.values():
        units = [roles[role] for role in (("gate", "up", "down") if "gate" in roles else ("fc1", "fc2"))]
        wanted = units if args.what == "mlp" else [roles["v"], roles["o"]]
        full += sum(part.W.numel() for part in wanted)
        apart, both = combined([menu(part) for part in wanted]), list[Option]()
        if args.what == "mlp":
            narrow, both = mlp(units, STEP, menu if "both" in args.how else None)
        else:
            narrow = values(roles["v"], roles["o"], roles["v"].linear.heads or 1)
        menus["apart"].append(apart)
        menus["narrow"].append(narrow)
        menus["both"].append([*apart, *both, *(narrow if not args.bits else [])])
    item = 2 if args.bits else next(iter(next(iter(blocks.values())).values())).linear.dtype.itemsize
    shares = [float(b) / 16 for b in args.bits.split(",")] if args.bits else [float(x) for x in args.retain.split(",")]
    report(model, processor, args, menus, full * item, shares)


def report(
    model: Any,
    processor: Any,
    args: argparse.Namespace,
    menus: dict[str, list[list[Option]]],
    full: int,
    shares: list[float],
) -> None:
    """Tables of losses."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = tokenizer(load_text(args.heldout, split="heldout"), return_tensors="pt").input_ids[0, : args.max_tokens]
    windows = [window[None] for window in tokens.split(args.window)]
    sees = hasattr(processor, "image_processor")
    questions = load_questions("builtin", args.questions, 0) if sees else []

    def log_probabilities() -> Iterable[torch.Tensor]:
        return (model(input_ids=window).logits[0, :-1].log_softmax(-1) for window in windows)

    dense = list(log_probabilities()) if args.max_tokens else []

    def measured() -> list[float]:
        risen, diverged = [], []
        for window, p, q in zip(windows, dense, log_probabilities(), strict=True):
            labels = window[0, 1:, None]
            risen.append((p - q).gather(1, labels))
            diverged.append((p.exp() * (p - q)).sum(1))
        found = [float(torch.cat(risen).mean()), float(torch.cat(diverged).mean())]
        return [*found, *([100 * score(vqa(model, processor, questions), 1.0).mean] if questions else [])]

    if questions and args.max_tokens:
        print(f"dense: {measured()[2]:.1f} % of questions", flush=True)
    kept = {name: weight.clone() for name, weight in model.state_dict().items() if weight.ndim == 2}
    print("| share | of | how | bytes | narrowed blocks | predicted nats | excess nats | KL |" + " VQA |" * sees)
    print("|---" * (8 + sees) + "|")
    for share in shares:
        for how in args.how.split(","):
            menu = menus[how]
            for spread in args.spread.split(","):
                if spread == "spent":
                    chosen = best(menu, int(full * share))
                else:
                    sizes = [max(o.bytes for o in menus["apart"][n]) for n in range(len(menu))]
                    whole = sum(sizes)
                    chosen = [
                        best([some], int(full * share * size / whole))[0]
                        for some, size in zip(menu, sizes, strict=True)
                    ]
                for name, W in (pair for o in chosen if args.max_tokens for pair in o.make().items()):
                    model.get_submodule(name).weight.copy_(W)
                found = measured() if args.max_tokens else [math.nan, math.nan]
                model.load_state_dict(kept, strict=False)
                cells = [
                    f"{share:.1%}",
                    spread,
                    how,
                    f"{sum(o.bytes for o in chosen) / full:.1%}",
                    str(sum(o.narrow for o in chosen)),
                ]
                cells += [f"{sum(o.cost for o in chosen):.4f}", f"{found[0]:.4f}", f"{found[1]:.4f}"]
                print(f"| {' | '.join(cells)} |" + "".join(f" {x:.1f} |" for x in found[2:]), flush=True)


if __name__ == "__main__":
    main()
