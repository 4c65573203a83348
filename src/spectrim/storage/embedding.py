"""An input embedding in integers, of which a look-up unpacks the rows that are asked for; shared with the output head
where both are tied."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from spectrim.errors import ModelError
from spectrim.kernels.bits import unpack
from spectrim.linear import Linear
from spectrim.maths.rounding import Grid
from spectrim.recipe import QuantizePart
from spectrim.storage.base import Form, Options, Problem, Spec, Tensors, register
from spectrim.storage.integers import checked_grid, rounded
from spectrim.storage.packed import PackedLinear

_PAIRS = "_tied_weights_keys"  # transformers' pairs of tied weights, of a class; those of a model may differ


class PackedEmbedding(PackedLinear):
    """An embedding [out tokens, in numbers] of integers, in the tensors of a :class:`PackedLinear`.

    `shared` says that the model's output head multiplies with the same integers (see `share`). Rows are always looked
    up in the packed words; a head that runs in another layout keeps these beside it.
    """

    rows: torch.Tensor | None  # packed words, where the product runs in another layout

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
        return {**asdict(self.grid), "shared": self.shared}

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # as nn.Embedding calls it
        """Rows [..., size] of token ids [...], in the dtype of the scales."""
        ids = input.flatten()
        words = self.rows if self.rows is not None else self._words()
        scale = self.weight_scale[ids]
        codes = unpack(words[ids], self.grid.bits, self.embedding_dim, scale.dtype).unflatten(1, (scale.shape[1], -1))
        if (zeros := self.zeros()) is not None:
            codes = codes - zeros[ids][..., None].to(scale.dtype)
        return (codes * scale[..., None]).view(*input.shape, self.embedding_dim)

    def product_with(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., tokens] of x [..., size]: what a shared output head computes."""
        return super().forward(x)

    @torch.no_grad()
    def run_as(self, runtime: str) -> str:
        """As of a PackedLinear where the head is shared; a look-up alone has no other layout."""
        self._pack_again()
        self.rows, words = None, self.weight_packed
        layout = super().run_as(runtime if self.shared else "reference")
        if layout != "packed":
            self.rows = words
        return layout

    def to_dense(self) -> nn.Embedding:  # type: ignore[override]
        """The embedding of the same rows."""
        W = self.product()
        dense = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device=W.device, dtype=W.dtype, _weight=W
        )
        return dense.requires_grad_(self.training)

    def expected(self) -> Tensors:
        """As of every stored layer, of an embedding."""
        shape = torch.nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        return IntegerEmbedding().build(shape.to(self.some_float().dtype), self.spec).state_dict()


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


class IntegerEmbedding(Form):
    """``bits``, ``group`` and ``symmetric`` as of integers, and whether the output head is ``shared``."""

    name = "integer-embedding"
    marker = "weight_packed"
    replaces = nn.Embedding

    def options(self, problem: Problem) -> Options:
        """None: no linear is stored so; what an embedding costs is measured (see ``pipeline.tables``)."""
        return Options.listed(self.name, [])

    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The rows rounded to nearest in ranges of least squared error."""
        grid, _ = _checked(spec)
        layer = PackedLinear(problem.linear.in_features, problem.linear.out_features, grid, bias=False)
        layer = layer.to(problem.W.device, problem.linear.dtype)
        layer.load(rounded(problem, problem.W, grid, None, None, problem.linear.dtype))
        return layer.state_dict()

    def build(self, linear: Any, spec: Spec) -> PackedEmbedding:
        """An empty PackedEmbedding in the place of an nn.Embedding."""
        grid, shared = _checked(spec)
        tokens, size = linear.weight.shape
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        padding = getattr(linear, "padding_idx", None)
        return PackedEmbedding(tokens, size, grid, shared=shared, padding_idx=padding, **like).train(linear.training)

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """None of its options is a linear's."""
        return linear.nbytes

    def nbytes(self, linear: Linear, spec: Spec) -> int:
        """Bytes of codes, scales, zero points and the shape."""
        return _checked(spec)[0].nbytes(linear.out_features, linear.in_features, linear.dtype.itemsize)

    def params(self, linear: Linear, spec: Spec) -> int:
        """As many numbers as the embedding has."""
        return linear.params


def _checked(spec: Spec) -> tuple[Grid, bool]:
    """Grid and sharing of a spec. Raises ModelError for what is none."""
    shared = spec.get("shared")
    if type(shared) is not bool:
        raise ModelError(f"{dict(spec)} does not say whether the output head is shared; give shared (true or false)")
    return checked_grid({key: value for key, value in spec.items() if key != "shared"}), shared


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
