"""How allocation rules score the options of a linear (docs/methods.md, section 4)."""

import numpy as np
import torch

from spectrim.plan.options import Menu
from spectrim.plan.spend import Curve
from spectrim.recipe import AllocationPart
from spectrim.storage.low_rank import factor_bytes


def curve(part: AllocationPart, menu: Menu, wanted: torch.Tensor | float | None = None) -> Curve:
    """The options of one linear with the costs that a rule gives them; comparable across linears.

    ``loss-aware``: the predicted loss in nats (LASER, section 3). ``global-energy``: the error as a share of the
    linear's energy. ``global-sigma``, ``global-sigma-mean`` and ``sensitivity``: one threshold on a value of each
    direction, `wanted` [m]: singular values (JW-SVD, section 4.2) or measured losses (ASVD). A direction that is left
    out then costs its value times its bytes in float factors, so that the step to it gains just that value by the byte;
    any other option costs what the rank of equal error costs. ``uniform``: every linear has the same share of its
    bytes. ``adacr``: its share follows AdaSVD's line ``floor + I (target − floor)``, where `wanted` is its importance
    I; below the floor all grow alike.
    """
    if part.rule == "loss-aware":
        return Curve(menu.bytes, menu.error)
    if part.rule == "global-energy":
        return Curve(menu.bytes, menu.error / max(float(menu.left[0]), 1e-300))
    if part.rule in ("global-sigma", "global-sigma-mean", "sensitivity"):
        assert isinstance(wanted, torch.Tensor)
        return Curve(menu.bytes, _by_direction(menu, wanted.double().cpu().numpy()))
    reach = menu.bytes / menu.linear.nbytes
    if part.rule == "adacr":
        assert isinstance(wanted, float)
        # An importance of zero never leaves the floor before all others are dense.
        line = part.floor + (reach - part.floor) / max(wanted, 1e-6)
        reach = np.where(reach <= part.floor, reach, line)
    return Curve(menu.bytes, menu.error, reach)


def _by_direction(menu: Menu, wanted: np.ndarray) -> np.ndarray:
    """Cost of each option where directions are bought by a threshold, [n]."""
    linear, left = menu.linear, menu.left
    sizes = factor_bytes(linear, np.arange(len(left)), menu.heads)
    if menu.pivoted:
        sizes = np.minimum(sizes, factor_bytes(linear, np.arange(len(left)), pivoted=True))
    smaller = menu.error[(menu.bytes < linear.nbytes) & (menu.error > 0)]
    # The dense weight takes the place of the first direction that no option has.
    last = max(1, int(np.searchsorted(-left, -smaller.min(initial=np.inf), side="right")))
    falling = np.maximum(wanted[:last], 1e-30)  # what was measured to be worth nothing is bought last
    falling[menu.heads :] = np.minimum.accumulate(falling[menu.heads :])  # each head's first come before all others
    costs = np.append(np.cumsum((falling * np.diff(sizes)[:last])[::-1])[::-1], 0.0)  # after 0, 1, … `last` directions
    errors = np.append(left[: len(falling)], 0.0)
    falls = np.append(np.diff(errors) < 0, True)  # not by the directions of a dead head
    return np.interp(menu.error, errors[falls][::-1], costs[falls][::-1])
