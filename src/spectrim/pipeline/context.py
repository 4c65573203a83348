"""Bytes of the key/value cache under a plan, where a size is to hold it as well (docs/methods.md, section 10)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.errors import BudgetError
from spectrim.linear import Linear
from spectrim.plan.options import Menu
from spectrim.plan.plan import Plan
from spectrim.storage import DENSE, Spec


@dataclass(frozen=True)
class Context:
    """So many tokens of each of `batch` sequences in the cache."""

    tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        for name, number in (("context", self.tokens), ("batch", self.batch)):
            if number < 1:
                raise BudgetError(f"a {name} of {number} is impossible; give at least 1")

    def __str__(self) -> str:
        return f"{self.tokens} tokens" + f" of {self.batch} sequences" * (self.batch > 1)


class CacheBytes:
    """Of one model: what keys and values take, in its dtype, as latents where a plan factors them head by head.

    Layers whose attention slides over a window keep no more than that. Raises BudgetError for a model without separate
    linears for keys and values.
    """

    def __init__(self, model: PreTrainedModel, parts: Anatomy, context: Context) -> None:
        self._linears = [x for x in parts.in_place("backbone") if x.role in ("k", "v") and x.block is not None]
        if not self._linears:
            raise BudgetError(
                f"the cache of {type(model).__name__} cannot be counted, since it has no linears of keys and of "
                "values; leave out --context"
            )
        config, blocks = model.config.get_text_config(), parts.blocks("backbone")
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        self._tokens = {}
        for linear in self._linears:
            assert linear.block is not None
            number = blocks.index(linear.block)
            slides = kinds is not None and number < len(kinds) and kinds[number] == "sliding_attention"
            tokens = min(context.tokens, window) if slides and isinstance(window, int) else context.tokens
            self._tokens[linear.name] = tokens * context.batch

    def of(self, linear: Linear, kind: str = DENSE, spec: Spec | None = None) -> int:
        """Of one linear in a form: its outputs for every token, or the ranks of its heads; 0 of other roles."""
        rank = (spec or {}).get("rank")
        numbers = sum(rank) if kind == "low-rank" and isinstance(rank, list | tuple) else linear.out_features
        return self._tokens.get(linear.name, 0) * numbers * linear.dtype.itemsize

    def under(self, plan: Plan) -> int:
        """Of the whole cache under a plan."""
        rows = plan.linears
        return sum(self.of(x, rows[x.name].form, rows[x.name].spec) for x in self._linears)

    @property
    def dense(self) -> int:
        """Of the dense model's cache."""
        return sum(map(self.of, self._linears))

    def least(self, per_head: bool) -> int:
        """Below which no plan gets: one number a head where heads may be factored."""
        if not per_head:
            return self.dense
        return sum(self._tokens[x.name] * (x.per_head or x.out_features) * x.dtype.itemsize for x in self._linears)

    def added(self, menus: Mapping[str, Menu]) -> dict[str, Menu]:
        """Menus whose options of keys and values cost the bytes of the cache besides those of the weights."""
        return {name: self._added(menu) if name in self._tokens else menu for name, menu in menus.items()}

    def _added(self, menu: Menu) -> Menu:
        parts = []
        for part in menu.parts:
            more = [self.of(menu.linear, part.form, part.spec(number)) for number in range(len(part.bytes))]
            parts.append(replace(part, bytes=part.bytes + np.array(more, np.int64)))
        return replace(menu, parts=parts)
