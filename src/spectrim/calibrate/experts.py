"""Moments of experts, each drawn towards the mean of its layer where it saw few tokens (docs/methods.md, section 9)."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from spectrim.calibrate.moments import GradMoment, Moment, OutputMoment
from spectrim.calibrate.statistics import Statistics
from spectrim.linear import Linear
from spectrim.samples import Modality

SHRINKAGE = 0.125  # tokens of the layer's mean for each input of the linear

_T = TypeVar("_T", Moment, GradMoment, OutputMoment)


class ExpertStatistics(Statistics):
    """Statistics in which the moments of every expert of a layer have κ tokens of the layer's mean besides their own.

    An expert that no token chose has those alone. ``names`` are the linears of one role of all experts of a layer.
    """

    def __init__(self, statistics: Statistics, names: list[str], kappa: int) -> None:
        super().__init__(statistics.path, statistics.manifest)
        self._whole, self._names, self._kappa = statistics, names, kappa
        self._means: dict[tuple[str, Modality], Any] = {}

    def moment(self, linear: str, modality: Modality) -> Moment | None:
        """What the expert read; None where the modality reached no expert."""
        mean = self._mean("moment", modality, self._whole.moment, _add_moments)
        if mean is None:
            return None
        share, own = self._kappa / mean.count, self._whole.moment(linear, modality)
        drawn = Moment(mean.second * share, mean.abs_sum * share, self._kappa)
        return drawn if own is None else _add_moments(drawn, own)

    def positions(self, linear: str, modality: Modality) -> int:
        """Tokens of the expert, and those of the mean."""
        return super().positions(linear, modality) + self._kappa

    def gradient(self, linear: str, modality: Modality) -> GradMoment | None:
        """Gradient statistic of the expert; None where none was gathered of any expert.

        It is a sum over samples: the mean is that of all experts, by their tokens.
        """
        mean = self._mean("gradient", modality, self._whole.gradient, _add_gradients)
        if mean is None:
            return None
        tokens = sum(self._whole.positions(name, modality) for name in self._names)
        columns, own = mean.fisher_cols * (self._kappa / max(tokens, 1)), self._whole.gradient(linear, modality)
        return GradMoment(columns if own is None else columns + own.fisher_cols, mean.count)

    def output(self, linear: str, modality: Modality) -> OutputMoment | None:
        """Moment of the expert's output gradients; None where none was gathered of any expert."""
        mean = self._mean("output", modality, self._whole.output, _add_outputs)
        if mean is None:
            return None
        share, own = self._kappa / mean.count, self._whole.output(linear, modality)
        sums = {part: value * share for part, value in mean.sums.items()}
        drawn = OutputMoment(mean.form, sums, mean.traces * share, self._kappa, mean.labels)
        return drawn if own is None else _add_outputs(drawn, own)

    def _mean(
        self, kind: str, modality: Modality, read: Callable[[str, Modality], _T | None], add: Callable[[_T, _T], _T]
    ) -> _T | None:
        """The sum over all experts, computed once for all of them."""
        if (kind, modality) not in self._means:
            total: _T | None = None
            for name in self._names:
                if (moment := read(name, modality)) is not None:
                    total = moment if total is None else add(total, moment)
            self._means[kind, modality] = total
        mean: _T | None = self._means[kind, modality]
        return mean


def expert_statistics(statistics: Statistics, linear: Linear) -> Statistics:
    """The statistics in which to read the moments of `linear`: of an expert those with its layer's mean, else as given.

    A counterpart in another expert has the same name but for the expert's number, the same shape, and the same form of
    output moment.
    """
    block = linear.block or ""
    match = re.match(r"(.*?\.(?:expert_?)?)\d+(\..+)", linear.name[len(block) :])
    if linear.expert is None or match is None:
        return statistics
    before, after = block + match[1], match[2]
    if not any(key.startswith(block + ".") for key in statistics.means):
        statistics.means.clear()  # one block at a time is in memory
    if (key := f"{before}*{after}") not in statistics.means:
        manifest = statistics.manifest
        pattern = re.compile(re.escape(before) + r"\d+" + re.escape(after))

        def alike(name: str) -> bool:
            shape = manifest.model.shape(f"{name}.weight")
            return shape == (linear.out_features, linear.in_features) and (
                manifest.forms.get(name) == manifest.forms.get(linear.name)
            )

        names = [name for name in manifest.blocks if pattern.fullmatch(name) and alike(name)]
        kappa = max(1, round(SHRINKAGE * linear.in_features))
        statistics.means[key] = ExpertStatistics(statistics, names, kappa)
    found: Statistics = statistics.means[key]
    return found


def tokens_by_expert(statistics: Statistics | None, linears: tuple[Linear, ...]) -> dict[str, dict[int, int]]:
    """By block with experts, how many tokens of all modalities each expert saw."""
    found: dict[str, dict[int, int]] = {}
    for linear in linears if statistics is not None else ():
        if linear.expert is not None and linear.block is not None:
            assert statistics is not None
            tokens = sum(statistics.positions(linear.name, m) for m in statistics.manifest.data.modalities)
            seen = found.setdefault(linear.block, {})
            seen[linear.expert] = max(tokens, seen.get(linear.expert, 0))
    return found


def described(tokens: Mapping[str, Mapping[int, int]]) -> str:
    """A line on what the experts saw, those with the fewest tokens by name; "" of a model without experts."""
    seen = sorted(
        (count, f"{block} expert {number}") for block, each in tokens.items() for number, count in each.items()
    )
    if not seen:
        return ""
    fewest = ", ".join(f"{name} ({count})" for count, name in seen[:5])
    none = sum(not count for count, _ in seen)
    return (
        f"{len(seen)} experts saw {seen[0][0]} to {seen[-1][0]} tokens each, half of them {seen[len(seen) // 2][0]} or "
        f"more, and {none} none; fewest: {fewest}"
    )


def _add_moments(a: Moment, b: Moment) -> Moment:
    return Moment(a.second + b.second, a.abs_sum + b.abs_sum, a.count + b.count)


def _add_gradients(a: GradMoment, b: GradMoment) -> GradMoment:
    return GradMoment(a.fisher_cols + b.fisher_cols, a.count)


def _add_outputs(a: OutputMoment, b: OutputMoment) -> OutputMoment:
    sums = {part: value + b.sums[part] for part, value in a.sums.items()}
    return OutputMoment(a.form, sums, a.traces + b.traces, a.count + b.count, a.labels)
