"""How the latents get from a model's own forward pass into its cache, and its attention over them.

An attention module calls its projections of keys and values, then ``Cache.update``, then the attention function that
its config names. Hooks tell the three of each other: a call of the module whose cache keeps latents is on a stack of
the running thread while it lasts; the outputs of the factors B are written down there, the cache takes them, and the
attention function reads the cache. Without such a cache the hooks do nothing and the function is that from before.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spectrim.errors import ModelError
from spectrim.kernels import cuda
from spectrim.kernels import latent_decode as reference

PREFIX = "latent-"  # of the names of attention functions; the function from before follows
BASES = ("sdpa", "eager")
PROBED = 8  # first tokens of a layer, of which what the model computes is compared with what latents would give


class HasLatents(Protocol):
    """A linear layer in factors, ``y = A (B x) + bias``, such as `storage.layers.LowRankLinear`."""

    out_features: int
    B: nn.Module
    bias: Any

    @property
    def latent_ranks(self) -> tuple[int, ...] | None:
        """Ranks of the heads, whose parts of ``B x`` lie one after another; None where there is more to the layer."""

    def head_weights(self) -> list[torch.Tensor]:
        """A of each head, [out / H, rank]. Raises ModelError where it has no values."""


@dataclass(frozen=True, eq=False)
class Whole:
    """Keys or values in any other form, beside latents of the other: all of them are kept, before norm and rotation."""

    B: nn.Module
    out_features: int
    width: int
    bias: None = None  # is in what is kept

    @property
    def latent_ranks(self) -> tuple[int, ...]:
        """The width of every head."""
        return (self.width,) * (self.out_features // self.width)

    def head_weights(self) -> list[None]:
        """No factors."""
        return [None] * len(self.latent_ranks)


@dataclass(frozen=True)
class Factors:
    """What turns the latents of one layer into keys and values; tensors as `latent_attention` takes them."""

    A_k: list[torch.Tensor | None]
    A_v: list[torch.Tensor | None]
    b_k: torch.Tensor | None
    b_v: torch.Tensor | None
    norm: torch.Tensor | None  # float32 [D]
    epsilon: float  # of the root mean square
    width: int  # D
    rotated: int  # numbers of a key

    @cached_property
    def ready(self) -> reference.Factors:
        """The same as the reference reads them."""
        like = next(A for A in (*self.A_k, *self.A_v) if A is not None)
        parts = self.A_k, self.A_v, self.b_k, self.b_v, self.norm
        return reference.Factors.of(*parts, like=like, width=self.width, rotated=self.rotated)

    @cached_property
    def packed(self) -> Any:
        """The same as the kernel for a GPU reads them."""
        kernels = cuda.latent_kernels()
        assert kernels is not None
        return kernels.Factors.of(self.A_k, self.A_v, self.b_k, self.b_v, self.norm)


@dataclass(frozen=True, eq=False)
class Site:
    """An attention module whose keys and values are factored head by head; a copy of a cache is for the same one."""

    module: Any
    k: Any  # HasLatents
    v: Any
    ranks: tuple[tuple[int, ...], tuple[int, ...]]  # of keys and of values, by head

    def __deepcopy__(self, memo: Any) -> "Site":
        return self

    def factors(self, rotated: int = 0) -> Factors:
        """As they are now, of keys of which so many numbers are rotated.

        Raises ModelError where they have no values or carry an adapter, and for other key norms.
        """
        norm, epsilon, width = None, 0.0, self.k.out_features // len(self.ranks[0])
        if (layer := getattr(self.module, "k_norm", None)) is not None:
            found = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
            weight = getattr(layer, "weight", None)
            if found is None or weight is None or weight.shape != (width,):
                raise ModelError(
                    f"{type(self.module).__name__} normalises its keys by {type(layer).__name__}, not each head by its "
                    "root mean square; a latent cache cannot hold them"
                )
            epsilon = float(found)
            with torch.no_grad():  # some multiply by the weight, others by 1 + weight
                norm = layer(torch.ones(width, dtype=torch.float32, device=weight.device)) * (1 + epsilon) ** 0.5
        b_k, b_v = (None if bias is None else bias.detach() for bias in (self.k.bias, self.v.bias))
        return Factors(self.k.head_weights(), self.v.head_weights(), b_k, b_v, norm, epsilon, width, rotated)


@dataclass(eq=False)
class Call:
    """One call of an attention module whose cache keeps latents."""

    cache: Any
    layer: Any
    turns: tuple[torch.Tensor, torch.Tensor] | None  # cos and sin of the new tokens
    taken: dict[int, torch.Tensor] = field(default_factory=dict)  # outputs by the identity of B
    attended: bool = False
    given: torch.Tensor | None = None  # the last of what attention over whole values gave, [B, few, Hq · D]
    read: bool = False  # by a product that A_v is folded into


_CALLS: ContextVar[tuple[tuple[nn.Module, Call | None], ...]] = ContextVar("calls", default=())


def running() -> Call | None:
    """The innermost call of an attention module, where its cache keeps latents."""
    stack = _CALLS.get()
    return stack[-1][1] if stack else None


def _begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call of an attention module."""
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    layers = [] if cache is None else cache.layers
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    call = None
    if (site := getattr(layer, "site", None)) is not None:
        if site.module is not module:
            raise ModelError("this LatentCache was made for another model; make one with LatentCache(model)")
        turns = kwargs.get("position_embeddings") if getattr(module, "use_rope", True) else None
        call = Call(cache, layer, turns)
    _CALLS.set((*_CALLS.get(), (module, call)))


def _end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it, also where it raised (then without output)."""
    stack = _CALLS.get()
    if not stack or stack[-1][0] is not module:
        return  # it raised before it began
    call = stack[-1][1]
    _CALLS.set(stack[:-1])
    if call is not None and output is not None:
        if not call.attended:
            raise ModelError(
                f"{type(module).__name__} does not call the attention function that its config names; it cannot use a "
                "latent cache"
            )
        if call.layer.folded is not None and not call.read:
            raise ModelError(f"{type(module).__name__} does not hand to o_proj what attention gives; leave folding out")
        call.layer.settle()


def _take(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    """After a call of a factor B."""
    if (call := running()) is not None:
        call.taken[id(module)] = output


def attend(
    base: Callable[..., Any] | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention as transformers calls it: over latents where the cache has tokens from before, else that of `base`.

    `base` None is the eager attention of the module's own file. Key and value are those of the new tokens alone.
    Raises ModelError for options that attention over latents does not have.
    """
    call, steps = running(), query.shape[2]
    if call is not None and call.layer.site.module is module:
        call.attended = True
        _check(module, kwargs)
    else:
        call = None
    if call is None or call.layer.get_seq_length() == steps:
        function = eager_of(module) if base is None else base
        how = {"scaling": scaling, **({} if softcap is None else {"softcap": softcap}), **kwargs}
        output, weights = function(module, query, key, value, attention_mask, **how)
        if call is not None and call.layer.folded is not None:
            call.given = output[:, -PROBED:].flatten(2).clone()
        return output, weights
    mask, count = attention_mask, call.layer.visible(steps)
    if mask is None and steps > 1:
        mask = query.new_ones(steps, count, dtype=torch.bool).tril(count - steps)[None, None]
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] < count):
        raise ModelError(f"a latent cache of {count} tokens does not take a mask of the shape {list(mask.shape)}")
    if mask is not None:
        mask = mask[:, 0, :, :count]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    how = {**call.layer.arguments(count, call.cache), "scaling": scaling, "softcap": softcap}
    found = _one_step(query, call.layer.factors, mask, how)
    if found is None:
        if "cos" in how:  # as the kernel for a GPU reads them
            how["turns"] = reference.turned(how.pop("cos"), how.pop("sin"))
        found = reference.attend(query, factors=call.layer.factors.ready, mask=mask, **how)
    return found[:, :, None] if call.layer.folded is not None else found.transpose(1, 2), None


def _one_step(
    query: torch.Tensor, factors: Factors, mask: torch.Tensor | None, how: dict[str, Any]
) -> torch.Tensor | None:
    """The same by the kernel for one new token; None where it does not run (see `cuda.takes`)."""
    if query.shape[2] > 1 or not cuda.takes(query) or not (mask is None or mask.dtype == torch.bool):
        return None
    if (kernels := cuda.latent_kernels()) is None:
        return None
    found: torch.Tensor = kernels.decode(
        query[:, :, 0], factors=factors.packed, mask=None if mask is None else mask[:, 0], **how
    )
    return found[:, None] if how["folded"] else found[:, :, None]


def _check(module: Any, options: dict[str, Any]) -> None:
    """Raise ModelError for options of an attention function that attention over latents does not have."""
    for name in ("s_aux", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} attends with {name}, which a latent cache does not have")
    if options.get("dropout"):
        raise ModelError("attention over a latent cache has no dropout; call model.eval() before")
    if options.get("output_attentions"):
        raise ModelError("attention over a latent cache returns no weights; leave output_attentions out")


def eager_of(module: Any) -> Callable[..., Any]:
    """The eager attention in the file of a module. Raises ModelError where there is none."""
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise ModelError(f"{type(module).__name__} does not use transformers' attention functions; it has no latents")
    return found


AttentionInterface.register(f"{PREFIX}sdpa", partial(attend, ALL_ATTENTION_FUNCTIONS["sdpa"]))
AttentionInterface.register(f"{PREFIX}eager", partial(attend, None))
for _base in BASES:
    AttentionMaskInterface.register(f"{PREFIX}{_base}", ALL_MASK_ATTENTION_FUNCTIONS[_base])


def sites(model: PreTrainedModel) -> Iterator[Site]:
    """The attention modules of a model that rotate keys, and have keys or values or both factored head by head."""
    for module in model.modules():
        if type(getattr(module, "layer_idx", None)) is not int:
            continue
        pair: list[Any] = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
        width = getattr(module, "head_dim", None)
        if type(width) is not int or not all(isinstance(getattr(x, "out_features", None), int) for x in pair):
            continue
        # Cross-attention and models without rotary embedding do not take positions.
        if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
            continue
        k, v = (x if _by_head(x, width) else Whole(x, x.out_features, width) for x in pair)
        if not (isinstance(k, Whole) and isinstance(v, Whole)):
            yield Site(module, k, v, (k.latent_ranks, v.latent_ranks))


def _by_head(layer: Any, width: int) -> bool:
    """Whether a layer has latents of every head of this width."""
    ranks = getattr(layer, "latent_ranks", None)  # of a HasLatents
    return ranks is not None and len(ranks) * width == layer.out_features


def connect(model: PreTrainedModel) -> list[Site]:
    """Let a model's attention use latent caches; once or more often.

    Raises ModelError for a model without layers that are factored head by head, and for attention by other functions
    than `BASES`.
    """
    found = list(sites(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layer of rotated keys with keys or values factored head by head; compress "
            "it with the recipe laser"
        )
    for site in found:
        config = site.module.config
        name = str(config._attn_implementation)
        if name.removeprefix(PREFIX) not in BASES:
            raise ModelError(
                f"a latent cache works with the attention functions {' and '.join(BASES)}, not with {name}; load the "
                "model with attn_implementation='sdpa'"
            )
        if name.removeprefix(PREFIX) == "eager":
            eager_of(site.module)
        site.factors()
        if not name.startswith(PREFIX):
            config._attn_implementation = PREFIX + name
        if "_latent" not in vars(site.module):  # kept by copies of the module, as hooks are
            site.module.register_forward_pre_hook(_begin, with_kwargs=True)
            site.module.register_forward_hook(_end, with_kwargs=True, always_call=True)
            vars(site.module)["_latent"] = True
        for factor in (site.k.B, site.v.B):
            if "_latent" not in vars(factor):
                factor.register_forward_hook(_take)
                vars(factor)["_latent"] = True
    return found
