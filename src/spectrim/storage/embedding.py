"""An input embedding in integers, of which a look-up unpacks the rows that are asked for; shared with the output head
where both are tied."""

from typing import Any

import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.kernels.bits import unpack
from spectrim.kernels.cpu import int4_codes_of, int8_codes
from spectrim.linear import Linear
from spectrim.maths.rounding import Grid
from spectrim.recipe import QuantizePart
from spectrim.storage.base import Options, Spec, register
from spectrim.storage.integers import Integers, checked_grid
from spectrim.storage.packed import PackedLinear, numbers
from spectrim.storage.problem import Problem

_PAIRS = "_tied_weights_keys"  # transformers' pairs of tied weights, of a class; those of a model may differ


class PackedEmbedding(PackedLinear):
    """An embedding [out tokens, in numbers] of integers, in the tensors of a :class:`PackedLinear`.

    `shared` says that the model's output head multiplies with the same integers (see `share`). Rows are looked up in
    the layout in which it does; those of a GPU, which have no rows, keep the packed words beside them.
    """

    rows: torch.Tensor | None  # packed words beside a layout without rows

    def __init__(
        self,
        tokens: int,
        size: int,
        grid: Grid,
        *,
        shared: bool,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, tokens, grid, bias=False, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx, self.shared = tokens, size, padding_idx, shared
        self.register_buffer("rows", None, persistent=False)

    @property
    def form(self) -> str:
        """Its form."""
        return "integer-embedding"

    @property
    def spec(self) -> dict[str, Any]:
        """The grid, and whether the output head is the same."""
        return {**self.grid.spec, "shared": self.shared}

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Embedding calls it
        """Rows [..., size] of token ids [...], in the dtype of the scales."""
        ids = input.flatten()
        scale = self.weight_scale[ids]
        found = numbers(self._codes_of(ids).to(scale.dtype), scale, self._zeros_of(ids))
        return found.view(*input.shape, self.embedding_dim)

    def _codes_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The integers int8 [n, size] of token ids [n]."""
        codes = self._buffers.get("layout_codes")
        if codes is not None and self.layout == "int8":
            return int8_codes(codes[:, ids])
        if codes is not None and self.layout == "int4":
            return int4_codes_of(codes, ids, self.embedding_dim)
        words = self._words() if self.rows is None else self.rows
        return unpack(words[ids], self.grid.bits, self.embedding_dim)

    def _zeros_of(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The zero points int8 [n, groups] of token ids [n]; None where all are zero."""
        bits, zero = self.grid.bits, self.weight_zero_point
        if zero is None or 32 % bits:  # across words
            zeros = self.zeros()
            return None if zeros is None else zeros[ids]
        found = zero[ids * bits // 32] >> (ids * bits % 32)[:, None].int() & (1 << bits) - 1
        return (found - (1 << bits - 1)).to(torch.int8)

    def product_with(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., tokens] of x [..., size]: what a shared output head computes."""
        return super().forward(x)

    @torch.no_grad()
    def run_as(self, runtime: str) -> str:
        """As of a PackedLinear where the head is shared; a look-up alone has no other layout."""
        self._pack_again()
        self.rows, words = None, self.weight_packed
        layout = super().run_as(runtime if self.shared else "reference")
        if layout == "humming":
            self.rows = words
        return layout

    def to_dense(self) -> nn.Embedding:  # type: ignore[override]
        """The embedding of the same rows."""
        W = self.product()
        dense = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device=W.device, dtype=W.dtype, _weight=W
        )
        return dense.requires_grad_(self.training)


class SharedHead(nn.Module):
    """An output head without tensors of its own: logits by the integers of the embedding that it is tied to."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # no submodule: its tensors are the embedding's
        self.in_features, self.out_features, self.bias = embedding.in_features, embedding.out_features, None

    @property
    def weight(self) -> torch.Tensor:
        """The weight [tokens, size], for code that asks for it."""
        return self._embedding[0].weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [..., tokens] of hidden states [..., size]."""
        return self._embedding[0].product_with(input)


class IntegerEmbedding(Integers):
    """``bits``, ``group`` and ``symmetric`` as of integers, and whether the output head is ``shared``.

    No linear is stored so: there are no options, and what an embedding costs is measured (see ``pipeline.tables``).
    """

    name = "integer-embedding"
    searches = False
    replaces = nn.Embedding

    def options(self, problem: Problem) -> Options:
        """None."""
        return Options.listed(self.name, [])

    def build(self, linear: Any, spec: Spec) -> PackedEmbedding:
        """An empty PackedEmbedding in the place of an nn.Embedding, or of a linear of its shape."""
        (tokens, size), grid = linear.weight.shape, self.grid(spec)
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        like |= {"shared": spec["shared"], "padding_idx": getattr(linear, "padding_idx", None)}
        return PackedEmbedding(tokens, size, grid, **like).train(linear.training)

    def grid(self, spec: Spec) -> Grid:
        """The grid of a spec that also says what is shared. Raises ModelError for what is none."""
        if type(spec.get("shared")) is not bool:
            raise ModelError(
                f"{dict(spec)} does not say whether the output head is shared; give shared (true or false)"
            )
        if spec.get("rotated"):
            raise ModelError("an embedding has no inputs that could be rotated; take the rotation out")
        return checked_grid({key: value for key, value in spec.items() if key != "shared"})

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """None of its options is a linear's."""
        return linear.nbytes


def share(model: Any) -> None:
    """Let the output head of a transformers model read a shared embedding; after its exchange, once or more often."""
    embeddings = [module for module in model.modules() if isinstance(module, PackedEmbedding) and module.shared]
    if not embeddings:
        return
    head = model.get_output_embeddings()
    if isinstance(head, SharedHead):
        return
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or len(embeddings) > 1:
        raise ModelError(f"{type(model).__name__} has no output head that could share its embedding; keep it dense")
    model.set_submodule(name, SharedHead(embeddings[0]))
    vars(model)[_PAIRS] = {}
    vars(model)["all_tied_weights_keys"] = {}


def unshare(model: Any) -> None:
    """Tie a dense output head to a dense embedding again; the inverse of `share`, after the embedding's exchange."""
    head = model.get_output_embeddings()
    if not isinstance(head, SharedHead) or isinstance(model.get_input_embeddings(), PackedEmbedding):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    weight = model.get_input_embeddings().weight
    dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta", dtype=weight.dtype)
    dense.weight = weight
    model.set_submodule(name, dense.train(model.training))
    vars(model).pop(_PAIRS, None)
    vars(model)["all_tied_weights_keys"] = model.get_expanded_tied_weights_keys(all_submodels=True)


register(IntegerEmbedding())
