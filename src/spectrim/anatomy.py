"""What a model is made of: vision tower, connector, language backbone, transformer blocks, linears, heads, ties.

Everything is read from the module tree, its parameters and its config, and one short forward, never from a name:

- The tower is the outermost submodel whose config class is that of ``config.vision_config``; the backbone likewise for
  ``config.text_config``. A model without a text sub-config is all backbone.
- The connector is what lies outside both, and also what lies inside the tower but already speaks the backbone's width
  (the patch mergers of the Qwen-VL models, DeepStack mergers included).
- Blocks are the items of the outermost ``nn.ModuleList`` of modules that hold linears.
- Experts that are fused in parameters of one module are linears of their own first (`experts.unfuse`).
- A linear can be compressed when its class is exactly ``nn.Linear``, its weight belongs to it alone and is used by its
  own forward alone (which a forward pass over three tokens tells), and it is neither an output head nor an expert
  router. All other matrices are listed with the reason why they are kept.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spectrim.errors import ModelError
from spectrim.experts import unfuse, unfused
from spectrim.linear import PLACES, Linear, Place
from spectrim.trace import used_outside

# Last component of a linear's name → role; every other name is "proj", except the output projection of an attention
# module, which `_role` also finds by its neighbours.
ROLES = {
    **dict.fromkeys(("q_proj", "query", "wq", "to_q"), "q"),
    **dict.fromkeys(("k_proj", "key", "wk", "to_k"), "k"),
    **dict.fromkeys(("v_proj", "value", "wv", "to_v"), "v"),
    **dict.fromkeys(("qkv", "qkv_proj", "query_key_value", "wqkv", "Wqkv"), "qkv"),
    **dict.fromkeys(("o_proj", "out_proj", "wo"), "o"),
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3"), "up"),
    **dict.fromkeys(("down_proj", "w2"), "down"),
    "gate_up_proj": "gate_up",
    **dict.fromkeys(("fc1", "linear_fc1", "linear_1", "lin1", "c_fc", "dense_h_to_4h"), "fc1"),
    **dict.fromkeys(("fc2", "linear_fc2", "linear_2", "lin2", "dense_4h_to_h"), "fc2"),
}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Kept:
    """A module that holds parameters of two or more dimensions and stays as it is.

    ``params`` counts the elements of those parameters once: it is 0 for a module that only re-uses another's.
    """

    name: str
    params: int
    reason: str


@dataclass(frozen=True)
class LinearGroup:
    """Linears of equal place, role and shape, for display: how many, and their weights in all."""

    place: Place
    role: str
    out_features: int
    in_features: int
    heads: int | None
    count: int
    params: int


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    ``linears`` run tower, connector, backbone, and in the order of the module tree within each. ``tower`` (None if
    there is none), ``connector`` and ``backbone`` are dotted prefixes; a backbone of ``""`` is the model itself.
    ``tables`` are input embedding and output head of the backbone where they can be integers; they stand among ``kept``
    all the same.
    """

    linears: tuple[Linear, ...]
    kept: tuple[Kept, ...]
    tower: str | None
    connector: tuple[str, ...]
    backbone: str
    tables: tuple[Linear, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears}

    def linear(self, name: str) -> Linear:
        """The compressible linear of that name; ModelError if there is none."""
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelError(
                f"the model has no compressible linear {name!r}; `spectrim anatomy MODEL` lists those it has"
            ) from None

    def in_place(self, place: Place) -> tuple[Linear, ...]:
        """The linears of one place, in order."""
        return tuple(linear for linear in self.linears if linear.place == place)

    def blocks(self, place: Place | None = None) -> tuple[str, ...]:
        """Names of the transformer blocks that hold compressible linears, in order; of one place if asked."""
        names = (x.block for x in self.linears if x.block is not None and place in (None, x.place))
        return tuple(dict.fromkeys(names))

    def describe(self) -> tuple[LinearGroup, ...]:
        """Linears of equal place, role, shape and heads, counted, in order of first appearance."""
        counts = Counter((x.place, x.role, x.out_features, x.in_features, x.heads) for x in self.linears)
        return tuple(LinearGroup(*key, count=n, params=n * key[2] * key[3]) for key, n in counts.items())

    def params(self, place: Place) -> int:
        """Weights of the compressible linears of one place."""
        return sum(linear.params for linear in self.in_place(place))

    @property
    def kept_params(self) -> int:
        """Elements of all parameters of two or more dimensions that are kept; shared ones count once."""
        return sum(kept.params for kept in self.kept)

    def share(self, kept: Kept) -> float:
        """Its part of all parameters of two or more dimensions."""
        return kept.params / (self.kept_params + sum(linear.params for linear in self.linears))

    def left_out(self) -> list[str]:
        """What is no plain linear and takes 1 % and more, though it is no table and no router: a phrase each."""
        plain = ("embedding", "output head", "expert router", "tied to", "convolution")
        by_reason: dict[str, list[Kept]] = {}
        for kept in self.kept:
            if not kept.reason.startswith(plain):
                by_reason.setdefault(kept.reason, []).append(kept)
        found = []
        for reason, each in by_reason.items():
            if (share := sum(map(self.share, each))) >= 0.01:
                found.append(f"{each[0].name}{f' and {len(each) - 1} more' * (len(each) > 1)} ({reason}), {share:.0%}")
        return found


def anatomy(model: nn.Module) -> Anatomy:
    """Take a model, in memory or on the meta device, apart into compressible linears and kept matrices.

    Every parameter of two or more dimensions belongs to exactly one entry of ``linears`` or ``kept``. Fused experts of
    the model become linears, in place; it computes the same as before.

    Raises:
        ModelError: when nothing can be compressed.

    """
    unfuse(model)
    tree = dict(model.named_modules(remove_duplicate=False))
    config = getattr(model, "config", None)
    tower = _submodel(model, getattr(config, "vision_config", None))
    backbone = _submodel(model, getattr(config, "text_config", None)) or ""
    heads = _output_heads(tree)
    connector = (*_tower_exits(tree, tower, backbone), *_bridges(tree, tower, backbone, heads))
    roots: list[tuple[Place, str]] = [("connector", name) for name in connector]
    roots += [("tower", tower)] if tower is not None else []
    roots += [("backbone", backbone)]
    blocks = [b for place, root in roots if place != "connector" for b in _blocks(tree, root, {r for _, r in roots})]
    routers = {name for block in blocks for name in _routers(tree, block)}
    holders = _holders(tree)
    plain = [name for name, module in tree.items() if _matrices(module) and _foreign(module, None) is None]
    outside = used_outside(model, plain) if isinstance(model, PreTrainedModel) and plain else set()

    linears: list[Linear] = []
    kept: list[Kept] = []
    for name, module in tree.items():
        matrices = _matrices(module)
        if not matrices:
            continue
        block = next((b for b in blocks if _within(name, b)), None)
        sharers = max((holders[id(p)] for p in matrices), key=len)
        if sharers[0] != name:
            reason: str | None = f"tied to {sharers[0]}"
        elif any(_within(name, head) for head in heads):
            reason = "output head"
        elif name in routers:
            reason = "expert router (not compressed)"
        elif name in outside:
            reason = "its matrix is used outside its own forward"
        else:
            # One pair of factors cannot stand for a matrix that another module reads as well.
            reason = _foreign(module, block) or (f"shared with {sharers[1]}" if len(sharers) > 1 else None)
        if reason:
            kept.append(Kept(name, sum(p.numel() for p in matrices if holders[id(p)][0] == name), reason))
            continue
        place, root = next((place, root) for place, root in roots if _within(name, root))
        out_features, in_features = matrices[0].shape
        parent, last = tree[name.rpartition(".")[0]], name.rpartition(".")[2]
        role = _role(last, parent)
        count = _heads(role, out_features, parent, getattr(tree[root], "config", None))
        linears.append(Linear(name, place, block, role, out_features, in_features, count, matrices[0].dtype))
    if not linears:
        raise ModelError(
            f"{type(model).__name__} has no plain nn.Linear to compress; choose a model whose projections are nn.Linear"
        )
    linears.sort(key=lambda linear: PLACES.index(linear.place))
    return Anatomy(tuple(linears), tuple(kept), tower, connector, backbone, tuple(_tables(model, tree, holders)))


def _within(name: str, prefix: str) -> bool:
    return prefix in ("", name) or name.startswith(prefix + ".")


def _children(tree: dict[str, nn.Module], name: str) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in tree[name].named_children():
        yield (f"{name}.{child_name}" if name else child_name), child


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters of two or more dimensions."""
    return [p for p in module.parameters(recurse=False) if p.ndim >= 2]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _output_heads(tree: dict[str, nn.Module]) -> set[str]:
    """Names of the output embeddings of the model and of its submodels."""
    getters: list[Any] = [m.get_output_embeddings for m in tree.values() if isinstance(m, PreTrainedModel)]
    heads = [getter() for getter in getters]
    return {name for name, module in tree.items() if any(module is head for head in heads)}


def _tables(model: nn.Module, tree: dict[str, nn.Module], holders: dict[int, list[str]]) -> Iterator[Linear]:
    """The model's input embedding and output head, where they are plain and share weights with nothing else."""
    if not isinstance(model, PreTrainedModel):
        return
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    pair: list[tuple[Any, Any, str]] = [(first, nn.Embedding, "embedding"), (last, nn.Linear, "head")]
    for module, kind, role in pair:
        name = next((name for name, other in tree.items() if other is module), None)
        if name is None or type(module) is not kind or getattr(module, "max_norm", None) is not None:
            continue
        sharers = holders.get(id(module.weight), [])
        tied = role == "embedding" and len(sharers) == 2 and tree[sharers[1]] is last and last.bias is None
        if sharers == [name] or (sharers[:1] == [name] and tied):
            rows, size = module.weight.shape
            yield Linear(name, "backbone", None, role + "+head" * tied, rows, size, None, module.weight.dtype)


def _submodel(model: nn.Module, config: Any) -> str | None:
    """Name of the outermost submodel built from a config of this class (the model copies configs, so not identity)."""
    if config is None:
        return None
    names = (
        n for n, m in model.named_modules() if n and isinstance(m, PreTrainedModel) and type(m.config) is type(config)
    )
    return next(names, None)


def _tower_exits(tree: dict[str, nn.Module], tower: str | None, backbone: str) -> list[str]:
    """Parts of the tower module that belong to the connector: off the block path, and ending in the backbone's width.

    A part that maps the tower's width to itself (a pooling head) stays in the tower even where both widths are equal.
    """
    text_width = getattr(getattr(tree[backbone], "config", None), "hidden_size", None)
    lists = [m for m in tree[tower].modules() if isinstance(m, nn.ModuleList)] if tower is not None else []
    # Transformer blocks keep their width; lists of mergers do not.
    trunks = [m for m in lists if (x := _linears(m[:1])) and x[0].in_features == x[-1].out_features]
    if tower is None or not trunks:
        return []
    trunk, width = trunks[0], _linears(trunks[0])[0].in_features

    def walk(name: str) -> Iterator[str]:
        for child_name, child in _children(tree, name):
            linears = _linears(child)
            if child is trunk or not linears:
                continue
            if any(m is trunk for m in child.modules()):
                yield from walk(child_name)
            elif linears[-1].out_features == text_width and (linears[0].in_features, text_width) != (width, width):
                yield child_name

    return list(walk(tower))


def _bridges(tree: dict[str, nn.Module], tower: str | None, backbone: str, heads: set[str]) -> list[str]:
    """Topmost modules with matrices outside tower, backbone and output heads."""

    def walk(name: str) -> Iterator[str]:
        for child_name, child in _children(tree, name):
            if child_name in (tower, backbone) or child_name in heads:
                continue
            if any(part is not None and _within(part, child_name) for part in (tower, backbone)):
                yield from walk(child_name)
            elif any(_matrices(m) for m in child.modules()):
                yield child_name

    return list(walk("")) if backbone else []


def _blocks(tree: dict[str, nn.Module], name: str, parts: set[str]) -> Iterator[str]:
    """Items with linears of the outermost module lists below ``name``, outside the other parts."""
    for child_name, child in _children(tree, name):
        if child_name in parts:
            continue
        if isinstance(child, nn.ModuleList):
            yield from (n for n, m in _children(tree, child_name) if not isinstance(m, nn.Linear) and _linears(m))
        else:
            yield from _blocks(tree, child_name, parts)


def _experts(module: nn.Module) -> int:
    """How many experts the module stacks in one parameter or lists; (1, …) stacks are position embeddings."""
    if isinstance(module, nn.ModuleList):
        return len(module) if _linears(module) else 0
    if count := unfused(module):
        return count
    stacks = [p for p in _matrices(module) if p.ndim >= 3 and min(p.shape) > 1]
    return stacks[0].shape[0] if stacks and not isinstance(module, _CONVOLUTIONS) else 0


def _routers(tree: dict[str, nn.Module], block: str) -> Iterator[str]:
    """What chooses beside experts: the owner of a lone matrix with one output for each (the router) or one in all (a
    gate), and all matrices of a module that is called so.
    """
    for name in tree:
        children = list(_children(tree, name)) if _within(name, block) else []
        widths = {n for _, m in children if (n := _experts(m))}
        for child_name, child in children if widths else []:
            owners = [(n, p) for n, m in child.named_modules(prefix=child_name) for p in _matrices(m)]
            if not owners or _experts(child):
                continue
            alone = len(owners) == 1 and owners[0][1].shape[0] in widths | {1}
            if alone or child_name.rpartition(".")[2] in ("gate", "router"):
                yield from (owner for owner, _ in owners)


def _holders(tree: dict[str, nn.Module]) -> dict[int, list[str]]:
    """For each matrix, by id, the modules that hold it, an embedding first: the one that the others are tied to."""
    holders: dict[int, list[str]] = {}
    for name, module in tree.items():
        for parameter in _matrices(module):
            holders.setdefault(id(parameter), []).append(name)
    return {key: sorted(names, key=lambda n: not isinstance(tree[n], nn.Embedding)) for key, names in holders.items()}


def _foreign(module: nn.Module, block: str | None) -> str | None:
    """What a module is instead of a plain ``nn.Linear``; None for a plain one.

    A subclass is kept: it may compute something else, or its weight may be read past its forward, as
    ``nn.MultiheadAttention`` does with its output projection.
    """
    if type(module) is nn.Linear:
        computed = "weight" not in module._parameters  # by weight norm, spectral norm or pruning, before each forward
        return "its weight is computed from other parameters" if computed else None
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    if isinstance(module, nn.Linear):
        return f"{kind}, a subclass of nn.Linear"
    if block is not None and _experts(module):
        return f"fused experts of a kind that is not known, {kind} (not compressed)"
    return f"parameter of {kind}, not an nn.Linear"


def _role(last: str, parent: nn.Module) -> str:
    """Role by name; the one unnamed linear beside q, k and v (or qkv) is the attention's output projection."""
    if last in ROLES:
        return ROLES[last]
    names = [n for n, m in parent.named_children() if isinstance(m, nn.Linear)]
    roles = {ROLES.get(n) for n in names}
    alone = sum(n not in ROLES for n in names) == 1
    return "o" if alone and "o" not in roles and ("qkv" in roles or {"q", "k", "v"} <= roles) else "proj"


def _heads(role: str, out_features: int, attention: nn.Module, config: Any) -> int | None:
    """Heads of q, k, v, o or qkv: queries as the module or config says, k and v by the width of one query head."""
    siblings = {_role(n, attention): m for n, m in attention.named_children() if isinstance(m, nn.Linear)}
    query = siblings.get("q", siblings.get("qkv"))
    sources = (attention, getattr(attention, "config", None), config)
    counts = (getattr(s, key, None) for s in sources for key in ("num_heads", "num_attention_heads"))
    queries = next((n for n in counts if isinstance(n, int)), None)
    if role not in ("q", "k", "v", "o", "qkv") or query is None or not queries:
        return None
    if role not in ("k", "v"):
        return queries
    # The output projection reads heads × width; the query projection may be wider (a gate beside each query).
    width = (siblings["o"].in_features if "o" in siblings else query.out_features) // queries
    return out_features // width if width and out_features % width == 0 else None
