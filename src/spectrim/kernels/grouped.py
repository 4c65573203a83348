"""Integers of all experts of a layer on a GPU: one product of humming-kernels for those on one grid.

Reading many small weights one by one leaves a GPU waiting for the next call. humming's grouped product takes layouts
side by side, and the rows of inputs in the order of their weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from spectrim.kernels import cuda
from spectrim.kernels.stacked import is_plain, row_of


@dataclass(frozen=True)
class Group:
    """Linears whose layouts lie side by side: their numbers, and humming's description of all of them.

    The tensors are those of the linears, so that nothing is kept here when a linear takes another layout.
    """

    numbers: tuple[int, ...]
    config: Any


@torch.no_grad()
def group(linears: Sequence[Any]) -> list[Group]:
    """Put layouts of one kind side by side, two or more, where `in_groups` may run them.

    The product of all of them is compared with those one by one; where it is another, or fails, the linears stay as
    they are, which is logged. Linears have `gpu_layout`, `grid` and `read` as PackedLinear has; others are left alone.
    """
    kinds: list[tuple[Any, list[int]]] = []
    for number, linear in enumerate(linears):
        layout: cuda.Layout | None = getattr(linear, "gpu_layout", None)
        if layout is None:
            continue
        kind = layout.config, linear.grid.rotated
        mine = next((numbers for other, numbers in kinds if other == kind), None)
        if mine is None:
            kinds.append((kind, mine := []))
        mine.append(number)
    return [found for kind, numbers in kinds if len(numbers) > 1 and (found := _joined(linears, numbers, kind[0]))]


def in_groups(
    linears: Sequence[Any], groups: Sequence[Group], counts: Sequence[int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What maps inputs [rows, in], `counts` of them for each linear in order, to outputs [rows, out].

    Without gradients. Linears outside of groups run by themselves, and so do those of a group of which one with rows is
    not as `group` left it: in another layout, with an adapter or a hook.
    """
    hit = [number for number, count in enumerate(counts) if count]
    members = [(one, [number for number in one.numbers if counts[number]]) for one in groups]
    members = [(one, mine) for one, mine in members if len(mine) > 1 and _intact(linears, one, mine)]

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = dict(zip(hit, x.split([counts[number] for number in hit]), strict=True))
        found: dict[int, torch.Tensor] = {}
        for one, mine in members:
            sizes = [counts[number] for number in mine]
            taken = x if mine == hit else torch.cat([rows[number] for number in mine])
            given, each = linears[mine[0]].read(taken), [counts[number] for number in one.numbers]
            y = _product(given, _stacked(linears, one), each)
            if linears[mine[0]].bias is not None:
                biases = torch.stack([linears[number].bias for number in mine])
                y = y + biases.repeat_interleave(torch.tensor(sizes, device=y.device), 0, output_size=len(y))
            if mine == hit:
                return y
            found |= zip(mine, y.split(sizes), strict=True)
        return torch.cat([found[number] if number in found else linears[number](rows[number]) for number in hit])

    return run


def _joined(linears: Sequence[Any], numbers: list[int], config: Any) -> Group | None:
    """A group of linears, whose layouts become views; None where their product is not that of one by one."""
    layouts = [linears[number].gpu_layout for number in numbers]
    several = replace(config, num_experts=len(numbers))
    codes, scales = torch.stack([x.codes for x in layouts]), torch.stack([x.scales for x in layouts])
    zeros = [x.zeros for x in layouts if x.zeros is not None]
    joined = cuda.Layout(several, codes, scales, torch.stack(zeros) if zeros else None, layouts[0].locks)
    first, counts = linears[numbers[0]], [1 + place % 2 for place in range(len(numbers))]
    x = cuda.random_rows(sum(counts), first.in_features, first.weight_scale)

    def products() -> tuple[torch.Tensor, torch.Tensor]:
        each = [cuda.product(*one) for one in zip(x.split(counts), layouts, strict=True)]
        return _product(x, joined, counts), torch.cat(each)

    if (fault := cuda.fault_of(products)) is not None:
        text = f"experts run one by one, since humming-kernels has no product of several ({fault[1]})"
        cuda.say_once("grouped", text)
        return None
    for place, (number, layout) in enumerate(zip(numbers, layouts, strict=True)):
        own = None if joined.zeros is None else joined.zeros[place]
        linears[number].gpu_layout = replace(layout, codes=codes[place], scales=scales[place], zeros=own)
    return Group(tuple(numbers), several)


def _intact(linears: Sequence[Any], one: Group, mine: list[int]) -> bool:
    """Whether linears of a group are what `group` saw, and their layouts lie where those of the group do."""
    first = linears[one.numbers[0]]
    if getattr(first, "gpu_layout", None) is None or not all(is_plain(linears[n], type(first)) for n in mine):
        return False
    codes = first.gpu_layout.codes
    places = {number: codes.data_ptr() + place * codes.nbytes for place, number in enumerate(one.numbers)}
    layouts = {number: linears[number].gpu_layout for number in mine}
    return all(layout is not None and layout.codes.data_ptr() == places[number] for number, layout in layouts.items())


def _stacked(linears: Sequence[Any], one: Group) -> cuda.Layout:
    """The layouts of a group as one."""
    first: cuda.Layout = linears[one.numbers[0]].gpu_layout
    count = len(one.numbers)
    zeros = None if first.zeros is None else row_of(first.zeros, count)
    return cuda.Layout(one.config, row_of(first.codes, count), row_of(first.scales, count), zeros, first.locks)


def _product(x: torch.Tensor, layout: cuda.Layout, counts: list[int]) -> torch.Tensor:
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=x.device)
    return cuda.product(x, layout, starts)
