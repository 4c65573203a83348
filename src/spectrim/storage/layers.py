"""The layer of two factors, of floats or integers.

The factors of a layer are plain ``nn.Linear`` modules: LoRA, GPTQ, vLLM and ``torch.compile`` see what they know.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.errors import ModelError
from spectrim.kernels.heads import ROWS, by_head, columns, heads_together
from spectrim.kernels.stacked import is_plain
from spectrim.maths.decompose import Rank, head_ranks
from spectrim.maths.pivots import pivoted as pivoted_factors
from spectrim.maths.pivots import row_order
from spectrim.maths.rounding import Grid
from spectrim.storage.base import StoredLayer
from spectrim.storage.packed import PackedLinear


class LowRankLinear(StoredLayer):
    """A linear layer whose weight is the product of two factors: ``y = A (B x) + bias``.

    Children ``A`` (``A.weight`` [out, rank]) and ``B`` (``B.weight`` [rank, in]) are bias-free ``nn.Linear`` modules;
    ``bias`` [out] is a parameter or None. Factors and bias start as NaN, so that a layer that nobody filled shows in
    the first logits. ``weight`` is no parameter: it is there for code that asks for its dtype or device.

    With a tuple of H ranks, the rows of each head h are factored by themselves (LASER; docs/methods.md, section 5):
    ``A`` is an ``nn.ModuleList`` of H linears, ``A[h].weight`` [out / H, rank[h]], and ``B`` stays one linear,
    ``B.weight`` [sum(rank), in], which holds the heads' rows one after another. Its output is all that a key/value
    cache has to keep.

    Pivoted (docs/methods.md, section 5), the rank is that of the whole layer: ``B.weight`` [rank, in] are rows of the
    weight itself, those at ``pivots`` (a buffer, int32 [rank]), and ``A.weight`` [out - rank, rank] has the
    coefficients of the other rows, ascending. The outputs of B and of A are written to their places, ``order``.

    Factors may be PackedLinear layers, and a whole layer may have a third child ``R``, a PackedLinear [out, in] that
    holds the rest of the weight: ``y = A (B x) + R x + bias``; `pack` makes both.

    Raises ModelError for a rank below 1, for outputs that are no H equal heads, and for pivots with ranks by head or
    with a rank of all outputs.
    """

    pivots: torch.Tensor | None
    order: torch.Tensor | None  # int64 [out], follows from the pivots and is not stored
    together: torch.Tensor | None  # A of all heads, [heads, out / heads, largest rank], by `run_as`
    places: torch.Tensor | None  # of latents in its rows

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Rank,
        bias: bool = True,
        *,
        pivoted: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ranks = head_ranks(rank)
        if min(ranks, default=0) < 1:
            raise ModelError(f"a low-rank layer needs a rank of at least 1, not {rank}; keep the layer dense instead")
        if out_features % len(ranks):
            raise ModelError(f"{out_features} outputs are not {len(ranks)} equal heads; give one rank to each head")
        if pivoted and not isinstance(rank, int):
            raise ModelError("pivots are rows of a whole layer; a layer that is factored head by head has none")
        if pivoted and ranks[0] >= out_features:
            raise ModelError(f"{ranks[0]} pivots of {out_features} rows are the dense weight; keep the layer dense")
        device = torch.get_default_device() if device is None else torch.device(device)
        factor = partial(skip_init, nn.Linear, bias=False, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.B = factor(in_features, sum(ranks))
        heads = [factor(k, out_features // len(ranks) - pivoted * k) for k in ranks]
        self.A: Any = heads[0] if isinstance(rank, int) else nn.ModuleList(heads)
        self.R: PackedLinear | None = None
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(torch.nan)
        if pivoted:
            self.register_buffer("pivots", torch.arange(sum(ranks), dtype=torch.int32, device=device))
            self.register_buffer("order", torch.arange(out_features, device=device), persistent=False)
        else:  # no buffers without values: accelerate moves all that there are
            self.pivots = self.order = None
        self.together = self.places = None
        if not isinstance(rank, int):
            self.register_state_dict_post_hook(_contiguous)

    @property
    def form(self) -> str:
        """By the parts that are integers."""
        if self.R is not None:
            return "integers+factors"
        return "low-rank" if isinstance(self.B, nn.Linear) else "integer-factors"

    @property
    def spec(self) -> dict[str, Any]:
        """Rank, and pivots or grids."""
        rank = self.rank if isinstance(self.rank, int) else list(self.rank)
        grids = {name: part.grid.spec for name, part in self.named_modules() if isinstance(part, PackedLinear)}
        return {"rank": rank, "grids": grids} if grids else {"rank": rank, "pivoted": self.pivots is not None}

    def pack(self, part: str, grid: Grid) -> None:
        """Put an empty PackedLinear in the place of a factor (A, A.0, …, B), or add one for the rest of the weight (R).

        Raises ModelError for another name, for pivots, and for a grid that does not fit.
        """
        if self.pivots is not None:
            raise ModelError(
                "it is stored by pivots, whose factors cannot be integers; take the pivots or the grids out"
            )
        parts = {name: (m.in_features, m.out_features) for name, m in self.named_modules() if isinstance(m, nn.Linear)}
        shape = (self.in_features, self.out_features) if part == "R" else parts.get(part)
        if shape is None:
            raise ModelError(f"a layer of factors has no part {part!r}; its parts are {', '.join(parts)} and R")
        self.run_as("reference")
        like = self.some_float()
        packed = PackedLinear(*shape, grid, bias=False, device=like.device, dtype=like.dtype)
        parent, _, child = part.rpartition(".")
        setattr(self.get_submodule(parent), child, packed.train(self.training))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Linear calls it
        """Map inputs [..., in] to [..., out] in the dtype of the factors."""
        held: dict[str, Any] = self._modules  # from which a factor is read in less time than as an attribute
        latent: torch.Tensor = held["B"](input)  # [..., sum of the ranks]
        if isinstance(self.rank, int):
            A = held["A"]
            # Of floats of 16 bits, whose product may add the bias before it is rounded.
            if self.R is None and self.order is None and is_plain(A) and latent.dtype.itemsize == 2:
                return nn.functional.linear(latent, A._parameters["weight"], self.bias)
            y: torch.Tensor = self.A(latent)
            if self.order is not None:  # one copy of each output, where joining and sorting would take two
                p, others = self.order.split((latent.shape[-1], y.shape[-1]))
                whole = y.new_empty(*y.shape[:-1], self.out_features)
                y = whole.index_copy_(-1, p, latent).index_copy_(-1, others, y)
        elif self.together is not None and self._is_together(latent):
            y = by_head(latent, self.together, self.places)
        else:
            parts = latent.split(self.rank, dim=-1)
            y = torch.cat([A(part) for A, part in zip(self.A, parts, strict=True)], dim=-1)
        if self.R is not None:
            y = y + self.R(input)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def run_as(self, runtime: str) -> str | None:
        """With ranks by head in 16 bits: A of all heads in one tensor, zero beyond a head's rank, for one product.

        Weights of float heads become views of it, so that whoever writes into them writes there; integers are unpacked
        there once, beside the packed words. ``memory``: only where that takes no more room. ``reference``: every head
        by itself.
        """
        self._apart()
        self.runtime = runtime
        heads = [] if isinstance(self.rank, int) else list(self.A)
        if runtime == "reference" or not heads or not all(type(head) in (nn.Linear, PackedLinear) for head in heads):
            return None
        more = any(isinstance(head, PackedLinear) for head in heads) or len(set(head_ranks(self.rank))) > 1
        held = next(tensor for tensor in (*heads[0].parameters(), *heads[0].buffers()) if tensor.is_floating_point())
        if held.dtype.itemsize != 2 or held.is_meta or (runtime == "memory" and more):
            return None
        del self.together, self.places
        self.register_buffer("together", heads_together([_values(head) for head in heads]), persistent=False)
        assert self.together is not None
        self.register_buffer("places", columns(head_ranks(self.rank), self.together.device), persistent=False)
        for head, slot in zip(heads, self.together, strict=True):
            if isinstance(head, nn.Linear):
                head.weight.data = slot[:, : head.in_features]
        return "heads together"

    def _apart(self) -> None:
        """Give every head a weight of its own again."""
        if self.together is not None:
            del self.together, self.places
            self.together = self.places = None
            for head in self.A:
                if isinstance(head, nn.Linear):
                    head.weight.data = head.weight.data.contiguous()

    def _is_together(self, latent: torch.Tensor) -> bool:
        """Whether one product serves: few rows, heads as `run_as` left them, nobody to train, trace or watch one."""
        together = self.together
        few = latent.numel() <= ROWS * latent.shape[-1]
        if together is None or not few or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        start, step = together.data_ptr(), together.stride(0) * together.itemsize
        return all(
            is_plain(head, PackedLinear)
            or (is_plain(head, nn.Linear) and head.weight.data_ptr() == start + number * step)
            for number, head in enumerate(self.A._modules.values())
        )

    @torch.no_grad()
    def load_factors(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Copy A [out, k] and B [k, in], of any floating dtype and device, into the factors; k is the sum of the ranks.

        With ranks by head, the columns of A and the rows of B are ordered head by head, and a column of A is zero
        outside the rows of its head. A pivoted layer finds its pivots itself. Raises ModelError for other shapes, for
        an A that is not zero there, and for factors that `to_dense` refuses, too; NumericalError for factors that are
        not finite, of which no pivots can be found.
        """
        heads, ranks = self._heads(), head_ranks(self.rank)
        if any(isinstance(factor, PackedLinear) for factor in (*heads, self.B)):
            raise ModelError("packed factors take codes, not numbers; load factors before they are packed")
        k = sum(ranks)
        if A.shape != (self.out_features, k) or B.shape != (k, self.in_features):
            raise ModelError(
                f"factors of shapes {list(A.shape)} and {list(B.shape)} do not fit a layer that takes "
                f"{[self.out_features, k]} and {[k, self.in_features]}"
            )
        self.check_values()
        if self.pivots is not None:
            pivots, A, B = pivoted_factors(A, B)
            self.pivots.copy_(pivots)
            self.loaded()
        blocks = [columns.chunk(len(ranks))[h] for h, columns in enumerate(A.split(ranks, dim=1))]  # [out / H, k_h]
        if A.count_nonzero() != sum(block.count_nonzero() for block in blocks):
            raise ModelError("a column of A is not zero outside the rows of its head; factor every head by itself")
        for head, block in zip(heads, blocks, strict=True):
            head.weight.copy_(block)
        self.B.weight.copy_(B)

    @torch.no_grad()
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of A [out, k] and B [k, in] as `load_factors` takes them; of a layer without pivots."""
        return torch.block_diag(*(head.weight for head in self._heads())), self.B.weight.clone()

    @property
    def latent_ranks(self) -> tuple[int, ...] | None:
        """Its ranks by head, where the outputs are the factors A of what B gives and no more; None where they are not.

        A cache may then keep the outputs of B in place of the layer's own (``spectrim.latent``).
        """
        return head_ranks(self.rank) if self.pivots is None and self.R is None else None

    @property
    def reader(self) -> nn.Module | None:
        """The factor B, where it alone reads the inputs; None where there is more to the layer."""
        return self.B if self.R is None else None

    @property
    def factors_alone(self) -> tuple[nn.Module, ...] | None:
        """B and A, where both are plain, and calling the layer is their product with its ``order`` and bias."""
        held: dict[str, Any] = self._modules  # from which they are read in less time than as attributes
        factors = (held["B"], held["A"])
        plain = is_plain(self, LowRankLinear) and all(map(is_plain, factors)) and held.get("R") is None
        return factors if plain else None

    @torch.no_grad()
    def head_weights(self) -> list[torch.Tensor]:
        """The factors A of the heads, [out / H, rank[h]] each, not copied unless they are integers.

        Raises ModelError where they have no values (offloaded) or carry an adapter.
        """
        heads = self._heads()
        self.check_values()
        return [_values(head).detach() for head in heads]

    @torch.no_grad()
    def loaded(self) -> None:
        """Bring the order of the outputs up to date with the pivots; needed after `pivots` was written to.

        Raises ModelError for pivots that are not different rows of the layer, or that are on the meta device.
        """
        if self.pivots is None or self.order is None:
            return
        if self.pivots.is_meta or self.order.is_meta:
            raise ModelError("pivots on the meta device have no values; load the model without offloading its buffers")
        try:
            self.order.copy_(row_order(self.pivots, self.out_features))
        except ValueError as error:
            raise ModelError(f"pivots: {error}") from None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.pivots is not None and not self.pivots.is_meta:
            self.loaded()

    def product(self) -> torch.Tensor:
        """The weight [out, in] in the dtype of the factors; gradients flow to them.

        It is formed in float32 (float64 for float64 factors) and rounded once. Raises ModelError for factors that are
        offloaded (on the meta device) or carry an adapter: both would be lost.
        """
        heads = self._heads()
        self.check_values()
        B = _values(self.B)  # [k, in]
        wide = torch.promote_types(B.dtype, torch.float32)
        parts = B.split(head_ranks(self.rank))  # [k_h, in]
        found = torch.cat([_values(A).to(wide) @ part.to(wide) for A, part in zip(heads, parts, strict=True)])
        if self.R is not None:
            found = found + self.R.dense().to(wide)
        found = found.to(B.dtype)
        return found if self.order is None else torch.cat([B, found])[self.order.argsort()]

    def _heads(self) -> list[nn.Linear]:
        """The linears of A, one by one; ModelError unless all factors are plain or packed linears."""
        heads: dict[str, Any] = (
            {"A": self.A} if isinstance(self.rank, int) else {f"A.{h}": A for h, A in enumerate(self.A)}
        )
        for name, factor in {**heads, "B": self.B}.items():
            if not isinstance(factor, nn.Linear | PackedLinear):
                raise ModelError(
                    f"factor {name} is a {type(factor).__name__}, not a plain linear; merge its adapter first"
                )
        return list(heads.values())

    def extra_repr(self) -> str:
        """Shape of the layer, as ``nn.Linear`` shows its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}" + ", pivoted=True" * (self.pivots is not None)
        )


def _values(factor: nn.Linear | PackedLinear) -> torch.Tensor:
    return factor.dense() if isinstance(factor, PackedLinear) else factor.weight


def _contiguous(layer: LowRankLinear, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Files take no views: give the weights of heads that are one tensor as tensors of their own."""
    if layer.together is not None:
        for name in [f"{prefix}A.{h}.weight" for h in range(len(layer.together))]:
            if name in state:
                state[name] = state[name].contiguous()
