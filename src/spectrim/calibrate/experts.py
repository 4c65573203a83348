"""Moments for an expert that no token chose: the mean over the other experts of its layer."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from spectrim.calibrate.moments import GradMoment, Moment, OutputMoment
from spectrim.calibrate.statistics import Statistics
from spectrim.linear import Linear
from spectrim.samples import Modality

_T = TypeVar("_T", Moment, GradMoment, OutputMoment)


class ExpertMean(Statistics):
    """Statistics in which every linear has the mean moment of the linears `names`, as far as they have one."""

    def __init__(self, statistics: Statistics, names: list[str]) -> None:
        super().__init__(statistics.path, statistics.manifest)
        self._whole, self._names = statistics, names
        self._found: dict[tuple[str, Modality], Any] = {}

    def moment(self, linear: str, modality: Modality) -> Moment | None:
        """Mean moment of what the experts read; None where the modality reached none."""

        def add(total: Moment, expert: Moment) -> Moment:
            return Moment(total.second + expert.second, total.abs_sum + expert.abs_sum, total.count + expert.count)

        def divide(total: Moment, number: int) -> Moment:
            count, share = _share(total.count, number)
            return Moment(total.second * share, total.abs_sum * share, count)

        return self._mean("moment", modality, self._whole.moment, add, divide)

    def gradient(self, linear: str, modality: Modality) -> GradMoment | None:
        """Mean gradient statistic of the experts; None where none was gathered."""

        def add(total: GradMoment, expert: GradMoment) -> GradMoment:
            return GradMoment(total.fisher_cols + expert.fisher_cols, total.count)

        def divide(total: GradMoment, number: int) -> GradMoment:
            return GradMoment(total.fisher_cols / number, total.count)

        return self._mean("gradient", modality, self._whole.gradient, add, divide)

    def output(self, linear: str, modality: Modality) -> OutputMoment | None:
        """Mean moment of the experts' output gradients; None where none was gathered."""

        def add(total: OutputMoment, expert: OutputMoment) -> OutputMoment:
            sums = {part: value + expert.sums[part] for part, value in total.sums.items()}
            return OutputMoment(
                total.form, sums, total.traces + expert.traces, total.count + expert.count, total.labels
            )

        def divide(total: OutputMoment, number: int) -> OutputMoment:
            count, share = _share(total.count, number)
            sums = {part: value * share for part, value in total.sums.items()}
            return OutputMoment(total.form, sums, total.traces * share, count, total.labels)

        return self._mean("output", modality, self._whole.output, add, divide)

    def _mean(
        self,
        kind: str,
        modality: Modality,
        read: Callable[[str, Modality], _T | None],
        add: Callable[[_T, _T], _T],
        divide: Callable[[_T, int], _T],
    ) -> _T | None:
        """The mean, computed once for all experts."""
        if (kind, modality) not in self._found:
            total: _T | None = None
            number = 0
            for name in self._names:
                if (moment := read(name, modality)) is not None:
                    total, number = moment if total is None else add(total, moment), number + 1
            self._found[kind, modality] = None if total is None else divide(total, number)
        mean: _T | None = self._found[kind, modality]
        return mean


def expert_mean(statistics: Statistics, linear: Linear) -> ExpertMean | None:
    """The mean statistics of `linear` and its counterparts in other experts; None where it has none.

    A counterpart has the same name but for the expert's number, the same shape, and the same form of output moment.
    """
    block = linear.block or ""
    match = re.match(r"(.*?\.(?:expert_?)?)\d+(\..+)", linear.name[len(block) :])
    if not block or match is None:
        return None
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
        statistics.means[key] = ExpertMean(statistics, names)
    return statistics.means[key]


def _share(count: int, number: int) -> tuple[int, float]:
    """A whole number of positions near the mean, and the factor for sums that keeps their means exact."""
    mean = max(1, count // number)
    return mean, mean / count
