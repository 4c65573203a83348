"""Linears exchanged for empty layers of factors and integers, by ranks and grids."""

from collections.abc import Collection, Mapping

from torch import nn

from spectrim.errors import ModelError
from spectrim.maths.decompose import Rank
from spectrim.maths.rounding import Grid
from spectrim.storage import exchange
from spectrim.storage.layers import LowRankLinear


def replace_linears(model: nn.Module, ranks: Mapping[str, Rank], pivoted: Collection[str] = ()) -> None:
    """Exchange linears for factors of these ranks, of the whole or by head; some stored by pivots."""
    exchange(model, {name: ("low-rank", {"rank": rank, "pivoted": name in pivoted}) for name, rank in ranks.items()})


def pack_linears(model: nn.Module, grids: Mapping[str, Grid]) -> None:
    """Exchange dense linears for integers, or factors (``X.A``, ``X.A.0``, ``X.B``); ``X.R`` is added to factors."""
    for name, grid in grids.items():
        path = name.split(".")
        owners = [".".join(path[:-parts]) for parts in (1, 2)]
        layers = [owner for owner in owners if isinstance(_module(model, owner), LowRankLinear)]
        if layers:
            try:
                model.get_submodule(layers[0]).pack(name.removeprefix(f"{layers[0]}."), grid)
            except ModelError as error:
                raise ModelError(f"{name!r}: {error}") from error
        else:
            exchange(model, {name: ("integers", grid.spec)})


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
