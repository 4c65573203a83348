"""Moments of experts, drawn towards the mean of their layer where they saw few tokens (docs/methods.md, section 11)."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from spectrim.calibrate.moments import GradMoment, Moment, OutputMoment, held
from spectrim.calibrate.statistics import Statistics
from spectrim.linear import Linear
from spectrim.maths.sums import Gram
from spectrim.samples import Modality

SHRINKAGE = 0.0005  # tokens of the layer's mean for each input of the linear

_T = TypeVar("_T", Moment, GradMoment, OutputMoment)


class ExpertStatistics(Statistics):
    """Statistics in which the moment of every expert of a layer is its own, blended with κ tokens of the layer's mean.

    It keeps its trace and the weight of its own tokens: an expert that few tokens choose counts for little. One
    that no token of any modality chose has the layer's moments and the weight of one token; one that a single modality
    chose has nothing of the others. ``names`` are the linears of one role of all experts of a layer.
    """

    def __init__(self, statistics: Statistics, names: list[str], kappa: float) -> None:
        super().__init__(statistics.path, statistics.manifest)
        self._whole, self._names, self._kappa = statistics, names, kappa
        self._means: dict[tuple[str, Modality], Any] = {}

    def moment(self, linear: str, modality: Modality) -> Moment | None:
        """What the expert read; None where the modality reached no expert, or another one this expert."""
        if (found := self._found("moment", linear, modality, self._whole.moment, _add_moments)) is None:
            return None
        mean, own = found
        if own is None:
            return Moment(Gram.of(mean.second / mean.count), mean.abs_sum / mean.count, 1)
        a, b = self._shares(own.count, own.gram.trace(), mean.gram.trace())
        return Moment(Gram.of(own.second * a + mean.second * b), own.abs_sum, own.count)

    def positions(self, linear: str, modality: Modality) -> int:
        """Tokens that the moment of the expert weighs as much as: its own, one where none of any modality chose it."""
        return self._whole.positions(linear, modality) or int(not self._chosen(linear))

    def labels(self, linear: str, modality: Modality) -> int:
        """Labelled tokens behind the expert's output gradients."""
        return self._whole.labels(linear, modality)

    def gradient(self, linear: str, modality: Modality) -> GradMoment | None:
        """Gradient statistic of the expert; None where none was gathered of any expert.

        It is a sum over samples: the mean is that of all experts, by their tokens.
        """
        if (found := self._found("gradient", linear, modality, self._whole.gradient, _add_gradients)) is None:
            return None
        (mean, own), positions = found, self._whole.positions
        if own is None:
            every = max(1, sum(positions(name, modality) for name in self._names))
            return GradMoment(mean.fisher_cols / every, mean.count)
        a, b = self._shares(positions(linear, modality), own.fisher_cols.sum(), mean.fisher_cols.sum())
        return GradMoment(own.fisher_cols * a + mean.fisher_cols * b, own.count)

    def output(self, linear: str, modality: Modality) -> OutputMoment | None:
        """Moment of the expert's output gradients; None where none was gathered of any expert."""
        if (found := self._found("output", linear, modality, self._whole.output, _add_outputs)) is None:
            return None
        mean, own = found
        if own is None:
            sums = {part: value / mean.count for part, value in mean.sums.items()}
            return OutputMoment(mean.form, held(mean.form, sums), mean.traces / mean.count, 1, mean.labels)
        a, b = self._shares(own.count, own.traces[2].sum(), mean.traces[2].sum())
        layer = mean.sums
        sums = {part: value * a + layer[part] * b for part, value in own.sums.items()}
        return OutputMoment(own.form, held(own.form, sums), own.traces, own.count, own.labels)

    def lean(self, linear: str) -> float:
        """How much more of the images' tokens than of the text's an expert has: the ratio of both shares."""
        if not self._chosen(linear):
            return 1.0
        shares = []
        for modality in ("image", "text"):
            every = sum(self._whole.positions(name, modality) for name in self._names)
            shares.append(self.positions(linear, modality) / max(1, every))
        return shares[0] / shares[1] if all(shares) else 1.0

    def _chosen(self, linear: str) -> bool:
        """Whether any token chose the expert."""
        return any(self._whole.positions(linear, modality) for modality in self.manifest.data.modalities)

    def _shares(self, count: int, own: torch.Tensor | float, layer: torch.Tensor | float) -> tuple[float, float]:
        """Factors of the sum of an expert with `count` tokens and of its layer's, from the traces of both."""
        share = self._kappa / (count + self._kappa)
        return 1 - share, share * float(own) / max(float(layer), 1e-300)

    def _found(
        self,
        kind: str,
        linear: str,
        modality: Modality,
        read: Callable[[str, Modality], _T | None],
        add: Callable[[_T, _T], _T],
    ) -> tuple[_T, _T | None] | None:
        """The layer's sum and the expert's own; None where no expert has one, or the expert has others alone."""
        mean, own = self._mean(kind, modality, read, add), read(linear, modality)
        return None if mean is None or (own is None and self._chosen(linear)) else (mean, own)

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


def expert_statistics(statistics: Statistics, linear: Linear) -> "Statistics | ExpertStatistics":
    """The statistics in which to read the moments of `linear`: of an expert those with its layer's mean, else as given.

    A counterpart in another expert has the same name but for the expert's number, the same shape, and the same form of
    output moment.
    """
    if (span := linear.expert_span) is None:
        return statistics
    before, after, block = linear.name[: span[0]], linear.name[span[1] :], linear.block
    if not any(key.startswith(f"{block}.") for key in statistics.means):
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
        statistics.means[key] = ExpertStatistics(statistics, names, SHRINKAGE * linear.in_features)
    found: ExpertStatistics = statistics.means[key]
    return found


def tokens_by_expert(statistics: Statistics | None, linears: tuple[Linear, ...]) -> dict[str, dict[int, int]]:
    """By block with experts, or list of them where a block has several: tokens of all modalities that each saw."""
    found: dict[str, dict[int, int]] = {}
    if statistics is None:
        return found
    lists = Counter(block for block, experts in {(x.block, x.experts) for x in linears} if experts is not None)
    for linear in linears:
        if linear.block is None or linear.experts is None or linear.expert is None:
            continue
        tokens = sum(statistics.positions(linear.name, m) for m in statistics.manifest.data.modalities)
        seen = found.setdefault(linear.block if lists[linear.block] == 1 else linear.experts, {})
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
    return Moment(Gram.of(a.second + b.second), a.abs_sum + b.abs_sum, a.count + b.count)


def _add_gradients(a: GradMoment, b: GradMoment) -> GradMoment:
    return GradMoment(a.fisher_cols + b.fisher_cols, a.count)


def _add_outputs(a: OutputMoment, b: OutputMoment) -> OutputMoment:
    more = b.sums
    sums = {part: value + more[part] for part, value in a.sums.items()}
    return OutputMoment(a.form, held(a.form, sums), a.traces + b.traces, a.count + b.count, a.labels)
