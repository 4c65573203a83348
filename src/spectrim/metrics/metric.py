"""From calibration moments to the metrics (L, R) of each linear, as the recipe says (docs/methods.md, section 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Moment, Statistics
from spectrim.calibrate.experts import ExpertStatistics, expert_statistics
from spectrim.errors import RecipeError
from spectrim.linear import Linear
from spectrim.maths.decompose import OutputMetric
from spectrim.maths.roots import check_finite
from spectrim.metrics.curvature import output_metric
from spectrim.recipe import MetricPart
from spectrim.samples import Modality

_T = TypeVar("_T")
_ORDER: tuple[Modality, ...] = ("text", "image")
MetricSource = Literal["text", "image", "joint", "identity", "experts", "unreached"]


@dataclass(frozen=True)
class Metric:
    """The metrics of one linear, and the modalities that they came from.

    ``value``, the input metric ``R Rᵀ``, is None for the identity, [in] for a diagonal, [in, in] for a matrix; float64.
    ``source`` is "identity" if no sample of the recipe's modality reached the linear but others did, "unreached" if no
    sample did at all, and "experts" if the moments are the mean over other experts of its layer alone. ``output`` is
    None if the recipe has no output metric.
    """

    value: torch.Tensor | None
    source: MetricSource
    output: OutputMetric | None = None


def layer_metric(
    part: MetricPart,
    linear: Linear,
    statistics: Statistics | None,
    device: torch.device | str = "cpu",
    *,
    inputs: bool = True,
) -> Metric:
    """The metrics of one linear on `device`, where the roots of its output metric are computed, too.

    Without `inputs` a second moment, which may be gigabytes, is not formed: ``value`` is None then.

    Raises:
        RecipeError: the recipe needs statistics that were not gathered; says how to gather them.
        NumericalError: the moments hold NaN or infinity; names the linear.
    """
    if part.kind == "identity":
        return Metric(None, "identity")
    if statistics is None:
        raise RecipeError(f"metric '{part.kind}' needs calibration statistics; give a statistics directory or samples")
    _check_gathered(part, statistics)
    read = expert_statistics(statistics, linear)
    metric = _gathered(_leaned(part, linear, read), linear, read, device, inputs)
    if metric is not None and read is statistics:
        return metric
    reached = any(statistics.positions(linear.name, m) for m in statistics.manifest.data.modalities)
    if metric is not None:
        return metric if reached else replace(metric, source="experts")
    return Metric(None, "identity" if reached else "unreached")


def _leaned(part: MetricPart, linear: Linear, read: Statistics) -> MetricPart:
    """The same, in which modalities weigh as the losses of an expert do: by its share of their tokens."""
    if not isinstance(read, ExpertStatistics) or part.modality != "joint":
        return part
    lean = read.lean(linear.name)
    return part.model_copy(update={"gamma": part.gamma * lean, "beta": part.beta * lean})


def _gathered(
    part: MetricPart, linear: Linear, statistics: Statistics, device: torch.device | str, inputs: bool
) -> Metric | None:
    """The metric from a linear's own moments; None where no sample of the modality reached it."""
    if part.kind == "fisher-rows":
        return _fisher_rows(linear, statistics, device)
    by_modality = _moments(part, linear, statistics)
    if not by_modality:
        return None
    source: MetricSource = "joint" if len(by_modality) == 2 else by_modality[0][0]
    moments = [moment for _, moment in by_modality]
    if part.kind == "activation-diagonal":
        # ASVD (Yuan et al., arXiv 2312.05821), section 3.2: S = diag(mean |x|)^α, so R Rᵀ = S².
        means = torch.stack([m.abs_sum for m in moments]).sum(0) / sum(m.count for m in moments)
        check_finite(f"the mean input of {linear.name}", means)
        floor = means.max() * 1e-6  # a channel that is always zero keeps its column
        return Metric((means.clamp_min(floor) ** (2 * part.alpha)).to(device), source)
    traces = [moment.gram.trace() / moment.count for moment in moments]
    weights = joint_weights(traces, part.gamma)
    value = output = None
    if part.kind == "curvature":
        trace = sum(weight * each for weight, each in zip(weights, traces, strict=True))
        output = output_metric(part, linear, statistics, by_modality, trace, device)
    if inputs:
        joint = joint_second_moment(moments, weights)
        value = check_finite(f"the second moment of {linear.name}", joint).to(device)
    return Metric(value, source, output)


def joint_second_moment(moments: Sequence[Moment], weights: Sequence[float]) -> torch.Tensor:
    """``C_T + γ α C_I`` with ``α = tr C_T / tr C_I``, of means over positions; [in, in] float64.

    JW-SVD (Li et al., ACL 2026), section 4.1: the trace ratio gives both modalities one scale, γ weighs them; `weights`
    are those of `joint_weights`. One moment alone is returned as its mean.
    """
    first, *others = moments
    joint = first.second.div_(first.count)  # in place: it may be gigabytes
    for moment, weight in zip(others, weights[1:], strict=True):
        moment.gram.add_to(joint, moment.count, weight)
    return joint


def summed(
    part: MetricPart, parts: Anatomy, sources: Mapping[str, str], statistics: Statistics | None, name: str
) -> int:
    """The factor from the input metric of a linear, a mean over positions, to the one that is a sum over positions.

    It is the number of positions: those of text for a joint metric as well, which is scaled to the text moment. It is
    1 for metrics that are means by definition (ASVD) and for the identity.
    """
    linear, source = parts.linear(name), sources[name]
    if statistics is None or source == "identity" or part.kind not in ("whitening", "curvature"):
        return 1
    read = expert_statistics(statistics, linear)
    return read.positions(name, "image" if source == "image" else "text")


def positions_behind(part: MetricPart, linear: Linear, statistics: Statistics | None) -> tuple[float, float]:
    """How many positions the metrics of a linear's inputs and outputs are estimated from; 0 where there are none.

    A gradient comes from the labels, so that outputs have no more positions than there are of these. Of two modalities
    it is the number whose mean would be as noisy as theirs: ``(1 + γ)² / (1/n_T + γ²/n_I)``, and β for outputs.
    """
    if statistics is None or part.kind == "identity":
        return 0, 0
    read, gathered = expert_statistics(statistics, linear), statistics.manifest.data.modalities
    seen = {m: n for m in gathered if (n := read.positions(linear.name, m))}
    inputs = chosen(part, seen)
    outputs = chosen(part, {m: min(n, read.labels(linear.name, m) or n) for m, n in seen.items()})
    part = _leaned(part, linear, read)
    return _as_noisy(inputs, part.gamma), _as_noisy(outputs, part.beta)


def _as_noisy(counts: Sequence[int], weight: float) -> float:
    if len(counts) < 2:
        return counts[0] if counts else 0
    text, image = counts
    return (1 + weight) ** 2 / (1 / text + weight**2 / image)


def joint_weights(traces: Sequence[float], gamma: float) -> list[float]:
    """Weights of the means of one modality, or of text and image, in a joint moment, from the traces of their means."""
    if len(traces) == 1 or 0 in traces:  # where the inputs of one modality are zero, the other's moment is the metric
        return [1.0] * len(traces)
    return [1.0, gamma * (traces[0] / traces[1])]


def chosen(part: MetricPart, found: Mapping[Modality, _T]) -> list[_T]:
    """The entries of `found` whose modality the metric uses, text before image; empty if there are none."""
    order: tuple[Modality, ...] = ("text", "image")
    taken = [found[modality] for modality in order if modality in found and part.modality in (modality, "joint")]
    return taken or ([found["image"]] if part.unreached == "image" and "image" in found else [])


def _check_gathered(part: MetricPart, statistics: Statistics) -> None:
    """RecipeError where the statistics lack the samples or gradients that the metric needs."""
    if part.kind == "fisher-rows":
        if not statistics.manifest.settings.gradients:
            raise RecipeError(
                f"metric 'fisher-rows' needs gradients and {statistics.path} has none; calibrate with --gradients"
            )
        return
    # "joint" takes what there is: a language model has no images, and a vision model may be given text alone.
    if part.modality != "joint" and part.modality not in statistics.manifest.data.modalities:
        raise RecipeError(
            f"the recipe needs {part.modality} moments and {statistics.path} has none; "
            f"calibrate with a source of {part.modality} samples"
        )


def _moments(part: MetricPart, linear: Linear, statistics: Statistics) -> list[tuple[Modality, Moment]]:
    """Moments of the wanted modalities that reached the linear; text before image."""
    gathered = statistics.manifest.data.modalities
    wanted = [m for m in _ORDER if part.modality in (m, "joint") and m in gathered]
    moments = [(m, moment) for m in wanted if (moment := statistics.moment(linear.name, m)) is not None]
    if not moments and part.unreached == "image" and "image" in gathered:
        moments = [("image", moment)] if (moment := statistics.moment(linear.name, "image")) is not None else []
    return moments


def _fisher_rows(linear: Linear, statistics: Statistics, device: torch.device | str) -> Metric | None:
    """FWSVD (Hsu et al., ICLR 2022), section 3: input i weighs Σ_out (∂L/∂W_oi)², averaged over samples."""
    gradient = statistics.gradient(linear.name, "text")
    if gradient is None:
        return None
    value = check_finite(f"the Fisher diagonal of {linear.name}", gradient.fisher_cols / gradient.count)
    if float(value.max()) == 0:
        return Metric(None, "identity")
    return Metric(value.clamp_min(value.max() * 1e-12).to(device), "text")
