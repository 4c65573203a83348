"""The cache of a model: latents in layers that are factored head by head, keys and values in the others."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from spectrim.errors import ModelError
from spectrim.kernels import cuda
from spectrim.kernels.latent_decode import turned
from spectrim.latent.attention import PROBED, Call, Factors, Site, connect, running
from spectrim.latent.folding import Folded, fold
from spectrim.latent.rows import Rows

LATENT_DTYPES = (None, "int8")


class Table:
    """Rotations of all tokens, which layers share: complex numbers [batch or 1, tokens, Drot / 2].

    Where attention is a kernel on a GPU, these are cos and sin [batch or 1, tokens, Drot] in two.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Rows] = {}
        self.latest: torch.Tensor | None = None

    @staticmethod
    def kept(cos: torch.Tensor, sin: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of tokens with these cos and sin, by the names that attention has for it."""
        return {"cos": cos, "sin": sin} if cuda.takes(cos) else {"turns": turned(cos, sin)}

    def __len__(self) -> int:
        return len(next(iter(self.rows.values()), ()))

    def append(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Add tokens."""
        for name, new in self.kept(cos, sin).items():
            self.rows.setdefault(name, Rows()).append(new)
        self.latest = cos

    def ends_with(self, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether these are its last tokens."""
        if self.latest is cos:
            return True
        held = {name: rows.held[:, -cos.shape[1] :] for name, rows in self.rows.items()}
        return all(
            held[name].device == x.device and torch.equal(held[name], x) for name, x in self.kept(cos, sin).items()
        )


class LatentLayer(CacheLayerMixin):
    """The latents of one layer.

    Raises ModelError, from `update`, outside a call of its attention module, and for a module whose keys or values
    are not what the factors and the known norms and rotations make of its latents.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, site: Site, window: int | None, latent_dtype: str | None, folds: bool = False) -> None:
        super().__init__()
        self.site, self.window, self.latent_dtype, self.folds = site, window, latent_dtype, folds
        self.is_sliding, self.record_past = window is not None, False
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.z_k, self.z_v = Rows(), Rows()
        self.scale_k, self.scale_v = Rows(), Rows()  # of integers
        self.inverse_rms = Rows()  # of normalised keys
        self.table: int | None = None  # its number in the cache; None without rotation
        self.factors: Factors | None = None
        self.folded: Folded | None = None  # what o_proj makes of mean latents
        self.seen = self.probed = 0
        self.keys = self.values = None
        self.is_initialized = False

    @property
    def rows(self) -> tuple[Rows, ...]:
        """All that it keeps."""
        return self.z_k, self.z_v, self.scale_k, self.scale_v, self.inverse_rms

    @property
    def nbytes(self) -> int:
        """Bytes of latents, scales and inverse root mean squares."""
        return sum(rows.nbytes for rows in self.rows)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Read the factors of the model; keys and values, at which some models look, stay empty."""
        call = running()
        self.factors = self.site.factors(0 if call is None or call.turns is None else call.turns[0].shape[-1])
        self.folded = fold(self.site) if self.folds else None
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the latents of the tokens of these keys and values; returns the keys and values of these alone."""
        call = running()
        if call is None or call.layer is not self:
            raise ModelError("a latent cache is filled by the attention of its own model; pass it to model.generate")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        steps, kind = key_states.shape[2], type(self.site.module).__name__
        latents = [call.taken[id(x.B)] for x in (self.site.k, self.site.v) if id(x.B) in call.taken]
        if [z.shape[:2] for z in latents] != [(len(key_states), steps)] * 2:
            raise ModelError(f"{kind} computes keys or values in another way than by its factors; it has no latents")
        self.table = call.cache.add_turns(self, call, steps)
        if self.probed < PROBED:
            self._probe(kind, call, latents, key_states, value_states)
        for rows, scales, z, ranks in zip(
            (self.z_k, self.z_v), (self.scale_k, self.scale_v), latents, self.site.ranks, strict=True
        ):
            if self.latent_dtype is None:
                rows.append(z)
            else:
                codes, scales_of = quantized(z, ranks)
                rows.append(codes)
                scales.append(scales_of)
        assert self.factors is not None
        if self.factors.norm is not None:
            scale = self.scale_k.held[:, -steps:] if len(self.scale_k) else None
            ranks = self.site.ranks[0]
            K = rebuilt(self.z_k.held[:, -steps:], scale, self.factors.A_k, self.factors.b_k, ranks)
            self.inverse_rms.append(_inverse_rms(K, self.factors.epsilon))
        self.seen += steps
        return key_states, value_states

    def _probe(self, kind: str, call: Call, latents: list[torch.Tensor], K: torch.Tensor, V: torch.Tensor) -> None:
        """Compare the last new keys and values with what attention will rebuild."""
        assert self.factors is not None
        count = min(K.shape[2], PROBED)
        z_k, z_v = (z[:, -count:] for z in latents)
        ranks_k, ranks_v = self.site.ranks
        keys = rebuilt(z_k, None, self.factors.A_k, self.factors.b_k, ranks_k)  # [B, count, H, D]
        if self.factors.norm is not None:
            keys = keys * _inverse_rms(keys, self.factors.epsilon)[..., None] * self.factors.norm
        keys = keys.transpose(1, 2)
        if call.turns is not None:
            keys = _rotated(keys, turned(*(x[:, -count:] for x in call.turns)))
        values = rebuilt(z_v, None, self.factors.A_v, self.factors.b_v, ranks_v).transpose(1, 2)
        for name, found, own in (("keys", keys, K[:, :, -count:]), ("values", values, V[:, :, -count:])):
            near = torch.finfo(own.dtype).eps ** 0.5 * own.abs().max()  # half of the digits
            if found.shape != own.shape or bool(((found - own).abs() > near).any()):
                raise ModelError(
                    f"{kind} changes its {name} in a way that a latent cache does not know; use the ordinary cache"
                )
        self.probed += count

    def visible(self, steps: int) -> int:
        """Tokens that the last `steps` queries may see: all, or those of their windows."""
        return len(self.z_k) if self.window is None else min(len(self.z_k), self.window - 1 + steps)

    def arguments(self, count: int, cache: Any) -> dict[str, Any]:
        """What attention takes of the last `count` tokens."""
        names = ("z_k", "z_v", "scale_k", "scale_v", "inverse_rms")
        held = {n: rows.held[:, -count:] for n, rows in zip(names, self.rows, strict=True) if len(rows)}
        if self.table is not None:
            place = slice(self.seen - count, self.seen)
            held |= {name: rows.held[:, place] for name, rows in cache.tables[self.table].rows.items()}
        return held | {"folded": self.folded is not None}

    def settle(self) -> None:
        """After attention: keep no more than a window, unless tokens may be taken back."""
        if self.window is not None and not self.record_past:
            for rows in self.rows:
                rows.keep_last(self.window - 1)

    def activate_past_recording(self) -> None:
        """Keep tokens before the window until `crop`."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens that were seen."""
        return self.seen

    def get_max_length(self) -> int:
        """The window, or -1."""
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the next queries attend over, themselves included, and the number of the first of them."""
        before = self.seen if self.window is None else min(self.seen, self.window - 1)
        return before + query_length, self.seen - before

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, a negative number. Raises ValueError for a positive one.

        Raises RuntimeError where a window has been passed whose past was not recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, not {tokens_to_remove}")
        if self.window is not None and self.seen >= self.window and not self.record_past:
            raise RuntimeError("a window has been passed; call activate_past_recording before tokens are to be removed")
        for rows in self.rows:
            rows.drop_last(-tokens_to_remove)
            if self.window is not None:
                rows.keep_last(self.window - 1)
        self.seen = max(0, self.seen + tokens_to_remove)

    def choose(self, choice: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Exchange the sequences for others of them."""
        for rows in self.rows:
            rows.choose(choice)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Sequence i becomes a copy of sequence beam_idx[i]."""
        self.choose(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence as often, one after another."""
        self.choose(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences."""
        self.choose(lambda x: x[indices])

    def offload(self) -> None:
        """Raises ModelError: a latent cache stays where its model is."""
        raise ModelError("a latent cache is not offloaded; leave offloading out")

    prefetch = offload


class LatentCache(Cache):
    """A transformers cache that keeps latents: ``model.generate(..., past_key_values=LatentCache(model))``.

    Layers whose keys and values are factored head by head (recipe `laser`) keep the outputs of the factors B, of ranks
    r in place of the width of a head; normalised keys have one over their root mean square beside them, float32.
    Where only keys or only values are factored so, the others are kept whole. cos and sin of the tokens' positions are
    kept once for all layers that share them. All other layers, and cross-attention, keep keys and values as
    DynamicCache does. The first tokens attend with the keys and values that
    the model computed; all later ones with latents (`spectrim.kernels.latent_decode`).

    Args:
        model: the model that will use it; its attention is connected to latent caches, and works as before without
            one.
        latent_dtype: ``"int8"`` keeps integers with one scale for each token and head; None keeps the model's dtype.
        folded: multiply A_v into the output projection of each layer, in tensors besides it.

    Raises:
        ModelError: the model has no such layers, or its attention, its sharing of keys between layers or its kind of
            cache is one that latents do not work with, or its output projection one that nothing can be folded into;
            names it. Some are found by the first forward pass.
    """

    def __init__(self, model: PreTrainedModel, latent_dtype: str | None = None, folded: bool = False) -> None:
        if latent_dtype not in LATENT_DTYPES:
            raise ModelError(f"there are no latents of the dtype {latent_dtype!r}; choose int8 or None")
        if model.config.is_encoder_decoder:
            raise ModelError(f"{type(model).__name__} has an encoder and a decoder; it cannot use a latent cache")
        layers: list[Any] = list(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
        if any(
            not isinstance(layer, Cache | CacheLayerMixin) and not hasattr(layer, "conv_states") for layer in layers
        ):
            raise ModelError(f"{type(model).__name__} shares keys between layers; it cannot use a latent cache")
        for site in connect(model):
            index = site.module.layer_idx
            kind = type(layers[index]) if index < len(layers) else None
            if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
                name = "none" if kind is None else kind.__name__
                raise ModelError(f"layer {index} has the cache {name}, which cannot keep latents; use the ordinary one")
            if folded:
                fold(site)  # what it refuses is refused now
            layers[index] = LatentLayer(site, getattr(layers[index], "sliding_window", None), latent_dtype, folded)
        super().__init__(layers=layers)
        self.tables: list[Table] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens that are kept: latents, what is beside them, cos and sin, and others' keys and values."""
        kept = (layer.nbytes for layer in self.layers if isinstance(layer, LatentLayer))
        turns = (rows.nbytes for table in self.tables for rows in table.rows.values())
        return sum(kept) + sum(turns) + whole_bytes(self)

    def add_turns(self, layer: LatentLayer, call: Call, steps: int) -> int | None:
        """The number of the table that holds cos and sin of this call's tokens; they are added where they are not yet.

        Raises ModelError for tables of another shape than [batch, tokens, width].
        """
        if call.turns is None:
            return None
        cos, sin = call.turns
        if cos.ndim != 3 or cos.shape[1] != steps:
            raise ModelError(
                f"{type(layer.site.module).__name__} rotates keys by tables of the shape {list(cos.shape)}, which a "
                "latent cache does not know"
            )
        number, end = layer.table, layer.seen + steps
        if number is None:  # the first call of this layer: a table that another layer has begun with the same numbers
            same = (i for i, table in enumerate(self.tables) if len(table) == end and table.ends_with(cos, sin))
            number = next(same, len(self.tables))
            if number == len(self.tables):
                self.tables.append(Table())
        table = self.tables[number]
        if len(table) < end:
            table.append(cos, sin)
        return number

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, a negative number; see `LatentLayer.crop`."""
        super().crop(tokens_to_remove)
        for table in self.tables:
            for rows in table.rows.values():
                rows.drop_last(-tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.tables = []

    def reorder_cache(self, beam_idx: Any) -> None:
        """Sequence i becomes a copy of sequence beam_idx[i]."""
        super().reorder_cache(beam_idx)
        self._choose(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence as often, one after another."""
        super().batch_repeat_interleave(repeats)
        self._choose(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        self._choose(lambda x: x[indices])

    def _choose(self, choice: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The same for cos and sin, where they differ by sequence."""
        for table in self.tables:
            for rows in table.rows.values():
                if len(rows) and len(rows.held) > 1:
                    rows.choose(choice)


def whole_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache keeps as they are."""
    found = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.nbytes for x in found if isinstance(x, torch.Tensor))


def _rotated(K: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Keys [B, H, T, D] with their first numbers rotated, half against half, by complex ones [B or 1, T, Drot / 2]."""
    low, high, rest = K.split([turns.shape[2], turns.shape[2], K.shape[3] - 2 * turns.shape[2]], dim=3)
    found = torch.complex(low, high) * turns[:, None]
    return torch.cat([found.real, found.imag, rest], dim=3)


def rebuilt(
    z: torch.Tensor,
    scale: torch.Tensor | None,
    A: list[torch.Tensor | None],
    bias: torch.Tensor | None,
    ranks: tuple[int, ...],
) -> torch.Tensor:
    """Keys or values [B, T, H, D] of latents [B, T, Σ r_h], before norm and rotation; in float32 or wider."""
    wide = torch.promote_types(torch.float32, z.dtype if scale is None else scale.dtype)
    parts = z.to(wide).split(ranks, dim=2)
    if scale is not None:
        parts = tuple(part * scale[:, :, h, None] for h, part in enumerate(parts))
    pairs = zip(parts, A, strict=True)
    heads = torch.stack([part if up is None else part @ up.to(wide).T for part, up in pairs], dim=2)
    return heads if bias is None else heads + bias.to(wide).view(len(A), -1)


def quantized(z: torch.Tensor, ranks: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers int8 [B, T, Σ r_h] and scales [B, T, H] in the dtype of z, of which a head's largest number is 127."""
    parts = z.split(ranks, dim=2)
    scale = torch.stack([part.abs().amax(2) for part in parts], dim=2) / 127
    codes = [
        (part.float() / scale[..., h, None].float().masked_fill(scale[..., h, None] == 0, 1.0)).round().clamp(-127, 127)
        for h, part in enumerate(parts)
    ]
    return torch.cat(codes, dim=2).to(torch.int8), scale


def _inverse_rms(K: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One over the root mean square of each key [B, T, H, D], float32."""
    return (K.square().mean(-1) + epsilon).rsqrt().float()
