"""Experts of a layer that are stored alike: one row of the allocation for the linears of one role."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from spectrim.linear import Linear
from spectrim.plan.options import Menu
from spectrim.plan.spend import Curve


class Teams:
    """The linears that share one option: those of one role and shape in the experts of one list.

    An option of a team is one that every member has: the same form with the same spec, and so the same bytes.
    """

    def __init__(self, linears: Sequence[Linear], menus: Mapping[str, Menu]) -> None:
        teams: dict[tuple[object, ...], list[str]] = {}
        for x in linears:
            if x.expert is not None:
                teams.setdefault((x.experts, x.role, x.out_features, x.in_features), []).append(x.name)
        self._members = {names[0]: names for names in teams.values() if len(names) > 1}
        self._numbers: dict[str, np.ndarray] = {}  # by first member: the option of each member, [options, members]
        for first, names in self._members.items():
            tables = [_numbers(menus[name]) for name in names]
            shared = [key for key in tables[0] if all(key in table for table in tables[1:])]
            self._numbers[first] = np.array([[table[key] for table in tables] for key in shared], dtype=np.int64)

    def joined(self, curves: Mapping[str, Curve]) -> dict[str, Curve]:
        """One curve for each team, by its first member, with the bytes and costs of all; others as they are."""
        inside = {name for names in self._members.values() for name in names}
        found = {name: curve for name, curve in curves.items() if name not in inside or name in self._members}
        for first, names in self._members.items():
            pairs = list(zip(self._numbers[first].T, (curves[name] for name in names), strict=True))
            reach = [curve.reach[numbers] for numbers, curve in pairs if curve.reach is not None]
            found[first] = Curve(
                np.sum([curve.bytes[numbers] for numbers, curve in pairs], axis=0),
                np.sum([curve.cost[numbers] for numbers, curve in pairs], axis=0),
                np.mean(reach, axis=0) if reach else None,
            )
        return found

    def each(self, chosen: Mapping[str, int]) -> dict[str, int]:
        """The option of every linear, by number, from those of teams and of other linears."""
        found: dict[str, int] = {}
        for name, number in chosen.items():
            names = self._members.get(name, [name])
            numbers = self._numbers[name][number] if name in self._members else [number]
            found |= {member: int(own) for member, own in zip(names, numbers, strict=True)}
        return found


def _numbers(menu: Menu) -> dict[str, int]:
    """Numbers of the options by form and spec."""
    options = (menu.option(number) for number in range(len(menu.bytes)))
    return {json.dumps([form, dict(spec)], sort_keys=True): number for number, (form, spec) in enumerate(options)}
