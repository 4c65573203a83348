"""From the moments of output gradients to the output metric G of each linear, and to nats (docs/methods.md, section 3).

The loss of a labelled token rises by ``δL ≈ ½ η (positions/labels) tr(G ΔW C ΔWᵀ)`` when a weight changes by ΔW, with
means ``G = E[g gᵀ]`` and ``C = E[x xᵀ]`` over positions (K-FAC, Martens and Grosse 2015, with all positions of a shared
weight independent; LASER, section 3). Losses are nats per labelled token, and add up over linears.
"""

from collections.abc import Sequence

import torch

from spectrim.calibrate import Moment, OutputMoment, Statistics
from spectrim.calibrate.moments import sketch_test
from spectrim.errors import RecipeError
from spectrim.linear import Linear
from spectrim.maths.decompose import OutputMetric
from spectrim.maths.roots import BlockRoot, LowRankRoot, OutputRoot, check_finite, nystrom
from spectrim.maths.sums import Gram, few_rows
from spectrim.recipe import MetricPart
from spectrim.samples import Modality


def output_metric(
    part: MetricPart,
    linear: Linear,
    statistics: Statistics,
    inputs: Sequence[tuple[Modality, Moment]],
    input_trace: float,
    device: torch.device | str = "cpu",
) -> OutputMetric:
    """The output metric of one linear, of the modalities whose input moments are given.

    With both, ``G = G_T + β (tr G_T / tr G_I) G_I``. A change with the error ``tr G · tr C`` in the joint metrics is
    predicted to cost ``Σ_m p_m ½ η_m (positions_m / labels_m) tr G_m tr C_m`` nats over the modalities m, with p_T = 1
    and p_I = ``image_price`` (docs/methods.md, section 3); β and γ do not occur in it.

    Args:
        inputs: input moments by modality.
        input_trace: of the input metric that is made of them.
        device: where the roots are taken and kept.

    Raises:
        RecipeError: the statistics have no curvature.
        NumericalError: the moments hold NaN or infinity; names the linear.
    """
    if not statistics.manifest.settings.curvature:
        raise RecipeError(
            f"metric 'curvature' needs output gradients and {statistics.path} has none; "
            "calibrate again without --no-curvature"
        )
    parts = (linear.per_head or 1) if part.per_head else 1
    prices = {"text": 1.0, "image": part.image_price}
    gathered = [(prices[modality], moment, statistics.output(linear.name, modality)) for modality, moment in inputs]
    moments = [(price, moment, output) for price, moment, output in gathered if output is not None and _trace(output)]
    if not moments:
        return OutputMetric((None,) * parts, torch.zeros(parts, dtype=torch.float64))
    outputs = [output for _, _, output in moments]
    for output in outputs:
        check_finite(f"the output moment of {linear.name}", output.traces)
    first = outputs[0]
    weights = [1.0, *(part.beta * _trace(first) / _trace(output) for output in outputs[1:])]
    shares = [weight / output.count for weight, output in zip(weights, outputs, strict=True)]
    damping = part.damping * sum(w * _trace(o) for w, o in zip(weights, outputs, strict=True)) / linear.out_features
    if parts == 1 and (rows := _few_rows(outputs, shares)) is not None:
        V = rows.T.to(device)
        roots: tuple[OutputRoot, ...] = (LowRankRoot(V.new_full((len(V),), damping), V),)
    else:
        held = {name: [output.held[name] for output in outputs] for name in first.form.parts}
        sums = {name: _weighted(shares, several).to(device) for name, several in held.items()}
        roots = _roots(first, sums, damping, linear.out_features, parts)
    joint = _weighted(shares, [_by_part(output, parts) for output in outputs])
    losses = [price * predicted_trace(part.eta, moment, output, parts) for price, moment, output in moments]
    costs = torch.stack(losses).sum(0)
    return OutputMetric(roots, torch.where(joint > 0, costs / (joint * input_trace).clamp_min(1e-300), 0.0))


def predicted_trace(eta: str, moment: Moment, output: OutputMoment, parts: int = 1) -> torch.Tensor:
    """``½ η (positions/labels) tr G tr C`` of one modality, [parts] float64: nats per labelled token.

    The trace-ratio correction is ``η = tr F / (tr G tr C)``. By token, ``tr F`` is the mean of ‖g‖²‖x‖² over positions:
    η corrects for the dependence of g and x. By sequence it comes from ‖Σ g xᵀ‖² over the positions of a sample, and η
    corrects for the dependence of positions as well. Both numerators are divided by the same number of labels, so that
    lengths of samples cancel.
    """
    token, sequence = output.eta(whole=parts == 1)
    gradients = output.traces[2].sum() if parts == 1 else output.traces[2]
    correction = {"none": torch.ones_like(token), "token": token, "sequence": sequence}[eta]
    energy = moment.gram.trace() / moment.count
    return (0.5 * correction * gradients / output.labels * energy).reshape(-1)


def predicted_loss(eta: str, change: torch.Tensor, moment: Moment, output: OutputMoment) -> float:
    """Predicted increase of one modality's loss when a weight changes by `change` [out, in]; nats per labelled token.

    It uses the moments of that modality alone, without dampening, also for a plan that was made in a joint metric.
    """
    D, held = change.double().cpu(), output.held.get("output")
    if isinstance(held, Gram) and held.rows is not None:  # tr(G D C Dᵀ) = tr(E C Eᵀ) with E = rows · D
        D = GD = held.rows.double() @ D
    elif isinstance(held, Gram):
        GD = held.times(D)
    elif held is not None and output.form.kind == "blocks":
        GD = (held @ D.reshape(len(held), held.shape[1], -1)).reshape(D.shape)
    else:
        diagonal, V = _low_rank(output, output.sums)
        GD = diagonal[:, None] * D + V @ (V.T @ D)
    CD = moment.gram.times(D.T).T / moment.count
    traces = float(output.traces[2].sum()) * moment.gram.trace() / moment.count
    share = float((GD * CD).sum()) / traces if traces > 0 else 0.0
    return share * float(predicted_trace(eta, moment, output))


def _weighted(shares: Sequence[float], tensors: Sequence[torch.Tensor | Gram]) -> torch.Tensor:
    """Their sum; of Grams no more than the sum is made, since it may be gigabytes."""
    first = tensors[0]
    total = first.dense().mul_(shares[0]) if isinstance(first, Gram) else shares[0] * first
    for share, each in zip(shares[1:], tensors[1:], strict=True):
        if isinstance(each, Gram):
            each.add_to(total, weight=share)
        else:
            total.add_(each, alpha=share)
    return total


def _few_rows(outputs: Sequence[OutputMoment], shares: Sequence[float]) -> torch.Tensor | None:
    """Rows [n, out] float64 whose products sum up to the joint moment; None where they are not few, or not kept."""
    grams = [output.held.get("output") for output in outputs]
    rows = [gram.rows for gram in grams if isinstance(gram, Gram) and gram.rows is not None]
    if len(rows) < len(outputs) or sum(map(len, rows)) > few_rows(rows[0].shape[1]):
        return None
    return torch.cat([one.double() * share**0.5 for one, share in zip(rows, shares, strict=True)])


def _trace(output: OutputMoment) -> float:
    """tr of the mean G."""
    return float(output.traces[2].sum()) / output.count


def _by_part(output: OutputMoment, parts: int) -> torch.Tensor:
    """Traces of the summed G, of the whole or by head, [parts]."""
    return output.traces[2] if parts > 1 else output.traces[2].sum()[None]


def _roots(
    moment: OutputMoment, sums: dict[str, torch.Tensor], damping: float, out: int, parts: int
) -> tuple[OutputRoot, ...]:
    form, size = moment.form, out // parts
    if form.kind in ("full", "blocks"):
        if form.kind == "full":
            blocks = sums["output"][None]  # symmetric to the bit
        else:
            blocks = (sums["output"] + sums["output"].mT).div_(2)
        if parts > 1:
            blocks = _diagonal_blocks(blocks, size)
        blocks.diagonal(dim1=1, dim2=2).add_(damping)
        return (BlockRoot(blocks),) if parts == 1 else tuple(BlockRoot(block[None]) for block in blocks)
    diagonal, V = _low_rank(moment, sums)
    pairs = zip((diagonal + damping).split(size), V.split(size), strict=True)
    return tuple(LowRankRoot(d, rows) for d, rows in pairs)


def _low_rank(moment: OutputMoment, sums: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """d [out] and V [out, r] of ``G ≈ diag(d) + V Vᵀ`` in the forms sketch and diagonal; r is 0 for the latter."""
    diagonal = sums["output_diagonal"]
    if moment.form.kind == "diagonal":
        return diagonal, diagonal.new_zeros(len(diagonal), 0)
    V = nystrom(sums["output"], sketch_test(len(diagonal), moment.form.size).to(diagonal))
    return (diagonal - V.square().sum(1)).clamp_min(0), V


def _diagonal_blocks(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """Diagonal blocks of `size` of a block-diagonal matrix [n, b, b]; [n b / size, size, size]."""
    count, width, _ = blocks.shape
    if width % size:
        raise RecipeError(f"blocks of {width} outputs do not hold whole heads of {size}; choose another curvature form")
    split = blocks.reshape(count, width // size, size, width // size, size)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, size, size)
