"""What one linear of a model is, apart from the model."""

import re
from dataclasses import dataclass
from typing import Literal

import torch

Place = Literal["tower", "connector", "backbone"]
PLACES: tuple[Place, ...] = ("tower", "connector", "backbone")
_EXPERT = re.compile(r".*?(?<!shared_)expert[^.\d]*\.?(?:expert_?)?(\d+)\.")  # behind the name of a block


@dataclass(frozen=True)
class Linear:
    """One compressible ``nn.Linear``: ``model.get_submodule(name)``.

    Also a matrix that is no such linear and may be integers all the same (see `Anatomy.tables`): an input embedding, of
    the role ``embedding`` or, where an output head is tied to it, ``embedding+head``; and an output head, ``head``.
    ``block`` is the transformer block that holds it (None outside blocks and in the connector). ``heads`` counts query
    heads for roles q, qkv and o (its input side) and key/value heads for k and v; None elsewhere, and where the model
    does not tell.
    """

    name: str
    place: Place
    block: str | None
    role: str
    out_features: int
    in_features: int
    heads: int | None
    dtype: torch.dtype

    @property
    def per_head(self) -> int | None:
        """Number of heads that the outputs are made of (q, k and v with known heads); None for other linears."""
        return self.heads if self.role in ("q", "k", "v") else None

    @property
    def expert(self) -> int | None:
        """Number of the expert that it belongs to: its place in a list of experts; None for other linears."""
        return None if (span := self.expert_span) is None else int(self.name[slice(*span)])

    @property
    def expert_span(self) -> tuple[int, int] | None:
        """Where in the name that number stands."""
        return expert_span(self.name, self.block)

    @property
    def experts(self) -> str | None:
        """The list that holds its expert, by name; None for other linears."""
        return None if (span := self.expert_span) is None else self.name[: span[0]].rstrip("._")

    @property
    def shared(self) -> bool:
        """Whether an input embedding is the output head as well."""
        return self.role == "embedding+head"

    @property
    def params(self) -> int:
        """Number of weights, bias not counted."""
        return self.out_features * self.in_features

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the model's dtype, bias not counted."""
        return self.params * self.dtype.itemsize


def expert_span(name: str, block: str | None) -> tuple[int, int] | None:
    """Where in the name of a linear of a block the number of its expert stands; None for other linears."""
    match = _EXPERT.match(name, len(block)) if block else None
    return None if match is None else match.span(1)
