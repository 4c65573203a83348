"""Experts that a model keeps in fused 3-D parameters, as linears of their own, and back (docs/methods.md, section 11).

transformers 5 keeps ``gate_up_proj`` [E, 2·inter, hidden] (or transposed, or interleaved) and ``down_proj`` in one
module, which functions of its experts interface read. Unfused, that module keeps its class and everything that is no
weight (activation, gate, norms), and has children ``0``, ``1``, …, each with plain linears, by the names that files of
single experts have (``experts.7.gate_proj``, Mixtral's ``experts.7.w1``). Its forward runs the experts that are hit,
each once and on its tokens in order, so that whatever works for a linear works for one of an expert.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations import moe

from spectrim.away import Away, forget_away, is_away, keep_away
from spectrim.errors import ModelError
from spectrim.kernels.grouped import group, in_groups
from spectrim.kernels.stacked import ROWS, stack, together

GROUPS = "_spectrim_groups"  # the attribute with `Group`s by role, where integers of several experts run at once
_LAYOUT = "_spectrim_experts"  # the attribute by which an unfused module is known
_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_ALL_TOKENS: ContextVar[bool] = ContextVar("all_tokens", default=False)


@dataclass(frozen=True)
class Layout:
    """How a module keeps its experts fused: transposed [E, in, out], gate and up concatenated or interleaved.

    ``gated`` experts have gate and up in one parameter. ``blocks`` is the way of Llama 4, whose module gets the tokens
    of all experts, E blocks of them, with zeros where an expert was not chosen. ``names`` are those of an expert's
    linears by role.
    """

    experts: int
    transposed: bool
    concatenated: bool
    biased: bool
    gated: bool
    blocks: bool
    names: dict[str, str]

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The fused parameters, and the roles of what each holds."""
        return {"gate_up_proj" if self.gated else "up_proj": ("gate", "up")[not self.gated :], "down_proj": ("down",)}


def layout(module: nn.Module) -> Layout | None:
    """The layout of a module's fused experts that can be unfused; None for any other module."""
    own = dict(module.named_parameters(recurse=False))
    blocks = type(module).__name__ == "Llama4TextExperts"
    interface = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    if not (blocks or interface) or getattr(module, "_is_expert_parallel", False):
        return None
    gated, biased = getattr(module, "has_gate", True), getattr(module, "has_bias", False)
    concatenated, transposed = getattr(module, "is_concatenated", True), getattr(module, "is_transposed", blocks)
    count = own["down_proj"].shape[0] if "down_proj" in own else 0
    found = Layout(count, transposed, concatenated, biased, gated, blocks, {})
    wanted = dict.fromkeys(found.parts, 3) | ({f"{name}_bias": 2 for name in found.parts} if biased else {})
    if {name: x.ndim for name, x in own.items()} != wanted or any(len(x) != count for x in own.values()):
        return None
    return found


def unfused(module: nn.Module) -> int:
    """How many experts an unfused module has; 0 for any other module."""
    known: Layout | None = vars(module).get(_LAYOUT)
    return 0 if known is None else known.experts


def unfuse(model: nn.Module) -> None:
    """Give every expert of a model linears of its own, in place; what it computes stays the same.

    Their weights are views of the fused ones, or copies where a fused parameter is transposed or interleaved. Where
    accelerate keeps the fused ones elsewhere, each is read from there when it runs. Modules of other kinds stay as they
    are.
    """
    found = {name: known for name, module in model.named_modules() if (known := layout(module)) is not None}
    named = _file_names(model) if found else []
    for path, known in found.items():
        roles = {name: known.parts[name] for name in known.parts}
        for parameter, roles_of in roles.items():
            names = next((n for target, n in named if f"{path}.{parameter}".endswith(target)), ())
            chosen = names if len(names) == len(roles_of) else [_NAMES[role] for role in roles_of]
            known.names.update(zip(roles_of, chosen, strict=True))
        _split(model.get_submodule(path), known)


def fuse(model: nn.Module) -> None:
    """The inverse of `unfuse`, in place; all linears of experts have to be dense, and in memory.

    Raises ModelError where they are not in memory.
    """
    experts = [module for module in model.modules() if unfused(module)]
    if any(hasattr(part, "_hf_hook") and is_away(part) for module in experts for part in module.modules()):
        raise ModelError("experts that are read from files when they run cannot be fused; load the model into memory")
    for module in experts:
        _join(module)


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """A dense model's experts as its own code has them, inside the block; unfused again after it where they were."""
    were = any(unfused(module) for module in model.modules())
    if were:
        fuse(model)
    try:
        yield
    finally:
        if were:
            unfuse(model)


@contextmanager
def all_tokens() -> Iterator[None]:
    """Inside the block, every expert runs on all tokens; what comes out is the same."""
    token = _ALL_TOKENS.set(True)
    try:
        yield
    finally:
        _ALL_TOKENS.reset(token)


def loads_as_is(conversions: list[Any], model: nn.Module) -> list[Any]:
    """The conversions of transformers without those that would merge tensors of experts that are linears in `model`."""
    names = [
        f"{path}.0.{name}.weight"
        for path, module in model.named_modules()
        if unfused(module)
        for name in vars(module)[_LAYOUT].names.values()
    ]
    if not names:
        return conversions

    def merges(one: Any) -> bool:
        return isinstance(one, WeightConverter) and any(one.rename_source_key(name)[1] is not None for name in names)

    return [one for one in conversions if not merges(one)]


def _file_names(model: nn.Module) -> list[tuple[str, list[str]]]:
    """How files of this model name the linears of single experts: the end of a fused parameter's name, and theirs."""
    if not isinstance(model, PreTrainedModel):
        return []
    converters = (x for x in get_model_conversion_mapping(model, add_legacy=False) if isinstance(x, WeightConverter))
    found = []
    for converter in converters:
        sources = [
            re.search(r"experts\.?\*\.(\w+)\.weight$", re.sub(r"\\", "", s)) for s in _patterns(converter, "source")
        ]
        if all(sources):
            target = re.sub(r"\\", "", _patterns(converter, "target")[0])
            found.append((target, [match[1] for match in sources if match is not None]))
    return found


def _patterns(converter: WeightConverter, which: str) -> list[str]:
    patterns: list[str] = getattr(converter, f"_original_{which}_patterns")
    return patterns


def _rows(fused: torch.Tensor, known: Layout, roles: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """One expert's share of a fused parameter, [out, …], by role."""
    if len(roles) == 1:
        return {roles[0]: fused}
    if known.concatenated:
        return dict(zip(roles, fused.chunk(2), strict=True))
    return {role: fused[number::2] for number, role in enumerate(roles)}


class _Share(Mapping[str, torch.Tensor]):
    """Weight, and bias if there is one, of one linear of an expert, read from fused parameters that are elsewhere."""

    def __init__(self, kept: Away, known: Layout, number: int, parameter: str, role: str, shape: torch.Size) -> None:
        self._kept, self._known, self._number, self._role, self._shape = kept, known, number, role, shape
        self._names = {"weight": parameter} | ({"bias": f"{parameter}_bias"} if known.biased else {})
        self._roles = known.parts[parameter]

    def __getitem__(self, name: str) -> torch.Tensor:
        one = self._kept.row(self._names[name], self._number)
        if name == "weight":
            if one.shape != self._shape:  # as a file has it that transformers would transpose
                one = one.T
            one = one.T if self._known.transposed else one
        return _rows(one, self._known, self._roles)[self._role].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@torch.no_grad()
def _split(module: Any, known: Layout) -> None:
    kept = forget_away(module)
    experts = [nn.Module() for _ in range(known.experts)]
    for parameter, roles in known.parts.items():
        whole, biases = getattr(module, parameter), getattr(module, f"{parameter}_bias", None)
        delattr(module, parameter)
        for number, expert in enumerate(experts):
            weight = whole.detach()[number]
            weights = _rows(weight.T if known.transposed else weight, known, roles)
            shares = {} if biases is None else _rows(biases.detach()[number], known, roles)
            for role, W in weights.items():
                linear = skip_init(nn.Linear, W.shape[1], W.shape[0], bias=role in shares, device="meta", dtype=W.dtype)
                linear.weight = nn.Parameter(W.contiguous(), requires_grad=whole.requires_grad)
                if role in shares:
                    linear.bias = nn.Parameter(shares[role].contiguous(), requires_grad=whole.requires_grad)
                expert.add_module(known.names[role], linear.train(module.training))
                if kept is not None:
                    keep_away(linear, _Share(kept, known, number, parameter, role, whole.shape[1:]), kept.device)
        if biases is not None:
            delattr(module, f"{parameter}_bias")
    for number, expert in enumerate(experts):
        module.add_module(str(number), expert.train(module.training))
    setattr(module, _LAYOUT, known)
    vars(module)["_is_hf_initialized"] = True  # while files are loaded, its class would fill what it had
    module.forward = partial(_run_blocks if known.blocks else _run, module)


@torch.no_grad()
def _join(module: Any) -> None:
    known: Layout = vars(module)[_LAYOUT]
    for parameter, roles in known.parts.items():
        linears = [[module.get_submodule(f"{e}.{known.names[role]}") for role in roles] for e in range(known.experts)]
        frees = linears[0][0].weight.requires_grad
        for kind, suffix in (("weight", ""), ("bias", "_bias"))[: 1 + known.biased]:
            whole: Any = None
            for number, parts in enumerate(linears):
                shares = [getattr(part, kind).detach() for part in parts]
                if len(shares) == 1 or known.concatenated:
                    one = torch.cat(shares)
                else:
                    one = torch.stack(shares, 1).flatten(0, 1)
                one = one.T if known.transposed and kind == "weight" else one
                whole = one.new_empty(known.experts, *one.shape) if whole is None else whole
                whole[number] = one
            module.register_parameter(f"{parameter}{suffix}", nn.Parameter(whole, requires_grad=frees))
        for number in range(known.experts):
            for role in roles:
                delattr(module.get_submodule(str(number)), known.names[role])
    for number in range(known.experts):
        delattr(module, str(number))
    delattr(module, _LAYOUT)
    vars(module).pop(GROUPS, None)
    del module.forward


def _linears(module: Any, known: Layout, number: int) -> dict[str, Any]:
    """The linears of one expert by role."""
    children = module._modules[str(number)]._modules
    return {role: children[name] for role, name in known.names.items()}


def _expert(module: Any, known: Layout, linears: Mapping[str, Callable[..., Any]], x: torch.Tensor) -> torch.Tensor:
    """What an expert with these linears, by role, makes of its tokens [..., hidden]."""
    if not known.gated:
        y = module.act_fn(linears["up"](x))
    else:
        gate, up = linears["gate"](x), linears["up"](x)
        if known.blocks or type(module)._apply_gate is moe._default_apply_gate:
            y = module.act_fn(gate) * up
        elif known.concatenated:
            y = module._apply_gate(torch.cat((gate, up), -1))
        else:
            y = module._apply_gate(torch.stack((gate, up), -1).flatten(-2))
    y = linears["down"](y)
    return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y


def _one(module: Any, known: Layout, number: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert, by its number, makes of its tokens."""
    return _expert(module, known, _linears(module, known, number), x)


def _run(module: Any, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts of every token, weighed and added up, [tokens, hidden].

    Args:
        module: unfused.
        hidden_states: [tokens, hidden].
        indices: of the experts of every token, int [tokens, k]; those from E on stand for none.
        weights: of their outputs, [tokens, k].
    """
    known: Layout = vars(module)[_LAYOUT]
    chosen = indices.reshape(-1)
    if hidden_states.is_meta:  # nobody knows which are hit
        return sum(_one(module, known, number, hidden_states) for number in range(known.experts))  # type: ignore[return-value]
    alone = len(hidden_states) == 1 and not _ALL_TOKENS.get() and not vars(module).get(GROUPS)
    if alone and max(numbers := chosen.tolist()) < known.experts:
        y = torch.cat([_one(module, known, number, hidden_states) for number in numbers])  # nothing to sort
        return (y * weights.reshape(-1, 1)).sum(0, keepdim=True).to(hidden_states.dtype)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=known.experts)[: known.experts].tolist()
    rows = (order // indices.shape[-1])[: sum(counts)]
    if _ALL_TOKENS.get():
        every = zip(rows.split(counts), range(known.experts), strict=True)
        y = torch.cat([_one(module, known, number, hidden_states)[mine] for mine, number in every])
    else:
        y = _hit(module, known, counts, hidden_states.index_select(0, rows))
    y = y * weights.reshape(-1)[order[: len(rows)], None]
    if len(rows) < len(order):
        y = torch.cat((y, y.new_zeros(len(order) - len(rows), y.shape[1])))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y.index_select(0, back).view(*indices.shape, -1).sum(1).to(hidden_states.dtype)


def _together(module: Any, known: Layout, counts: list[int], x: torch.Tensor) -> dict[str, Callable[..., Any]] | None:
    """By role what runs that linear of all experts at once; None where they cannot, or one by one is faster."""
    hit = sum(map(bool, counts))
    if max(counts) > ROWS or 2 * hit < len(counts) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    linears = [_linears(module, known, number) for number in range(known.experts)]
    found = {role: run for role in known.names if (run := together([one[role] for one in linears], x.dtype, hit))}
    return found if len(found) == len(known.names) else None


def _hit(module: Any, known: Layout, counts: list[int], x: torch.Tensor) -> torch.Tensor:
    """Outputs of the experts for inputs [rows, hidden], `counts` of them for each expert in order, [rows, hidden]."""
    if (grouped := _grouped(module, known, counts, x)) is not None:
        return _expert(module, known, grouped, x)
    if (linears := _together(module, known, counts, x)) is not None:
        slots = [number * max(counts) + row for number, count in enumerate(counts) for row in range(count)]
        places = torch.tensor(slots, device=x.device)
        padded = x.new_zeros(known.experts * max(counts), x.shape[1]).index_copy_(0, places, x)
        y = _expert(module, known, linears, padded.view(known.experts, -1, x.shape[1]))
        return y.flatten(0, 1).index_select(0, places)
    hit = ((number, rows) for number, rows in enumerate(x.split(counts)) if len(rows))
    outputs = [_one(module, known, number, rows) for number, rows in hit]
    return torch.cat(outputs) if outputs else x


def _grouped(module: Any, known: Layout, counts: list[int], x: torch.Tensor) -> dict[str, Callable[..., Any]] | None:
    """By role what runs that linear of all experts on a GPU, integers of one grid at once; None without any."""
    groups = vars(module).get(GROUPS)
    if not groups or not len(x) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    linears = [_linears(module, known, number) for number in range(known.experts)]
    return {role: in_groups([one[role] for one in linears], groups[role], counts) for role in known.names}


def stack_experts(model: nn.Module) -> None:
    """Put weights of one kind of all experts of a layer side by side, so that tokens run through all at once."""
    for module in model.modules():
        if not unfused(module):
            continue
        known: Layout = vars(module)[_LAYOUT]
        linears = [_linears(module, known, number) for number in range(known.experts)]
        groups = {}
        for role in known.names:
            each = [one[role] for one in linears]
            stack(each)
            groups[role] = group(each)
        vars(module).pop(GROUPS, None)
        if any(groups.values()):
            setattr(module, GROUPS, groups)


def _run_blocks(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The same where every expert has a block of all tokens, [E · tokens, hidden] in and out, zeros for others."""
    known: Layout = vars(module)[_LAYOUT]
    if hidden_states.is_meta or _ALL_TOKENS.get():
        blocks = hidden_states.view(known.experts, -1, hidden_states.shape[-1])
        # A token that did not choose an expert is read as those that it chose have it.
        hits, others = blocks.detach().any(-1, keepdim=True), blocks.sum(0)
        pairs = enumerate(zip(hits, blocks, strict=True))
        return torch.cat([_one(module, known, number, x.where(hit, others)) * hit for number, (hit, x) in pairs])
    hit = hidden_states.detach().any(-1)
    counts, rows = hit.view(known.experts, -1).sum(1).tolist(), hit.nonzero()[:, 0]
    y = _hit(module, known, counts, hidden_states.index_select(0, rows))
    return torch.zeros_like(hidden_states).index_copy(0, rows, y)
