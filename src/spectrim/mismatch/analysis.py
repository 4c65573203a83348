"""The mismatch analysis of JW-SVD: how far directions that serve text are from those that images need.

JW-SVD (Li et al., ACL 2026), section 3. Every linear that both modalities reach is decomposed by text moments alone;
then the loss that images suffer in the dropped directions is set against the loss of text.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy, anatomy
from spectrim.away import values
from spectrim.calibrate import Statistics
from spectrim.checks import check_retain
from spectrim.errors import StatisticsError
from spectrim.linear import PLACES, Linear, Place
from spectrim.maths.decompose import decompose, sides
from spectrim.maths.roots import check_finite

ENERGY = 0.9  # share of the energy that the effective rank holds
POINTS = 65  # of a curve, at most


@dataclass(frozen=True)
class Mismatch:
    """One weight in the directions u_i of its text-only decomposition; tensors [m] float64, m = min(out, in).

    ``s``: loss of text where direction i is dropped, per position. ``q``: the same of images, ``α u_iᵀ W C_I Wᵀ u_i``;
    thus ``λ_i = q_i / s_i``. ``alpha = tr C_T / tr C_I`` gives both modalities one scale; 1 where either is zero.
    """

    s: torch.Tensor
    q: torch.Tensor
    alpha: float

    def text_loss(self) -> torch.Tensor:
        """``L_T(k) = Σ_{i>k} s_i = ‖(W − Ŵ_k) X_T‖²`` per position, k = 0 … m; [m + 1]."""
        return _tails(self.s)

    def image_loss(self) -> torch.Tensor:
        """``L_I(k) = Σ_{i>k} s_i λ_i = α ‖(W − Ŵ_k) X_I‖²`` per position, k = 0 … m; [m + 1]."""
        return _tails(self.q)


def mismatch(W: torch.Tensor, text: torch.Tensor, image: torch.Tensor) -> Mismatch:
    """Text-only decomposition of one weight, and what dropping its directions costs images.

    Args:
        W: [out, in], any floating dtype.
        text: C_T, mean of x xᵀ over text positions, [in, in] float64.
        image: C_I, the same over image positions.
    """
    spectrum = decompose(W, text)
    trace_text, trace_image = float(text.trace()), float(image.trace())
    alpha = trace_text / trace_image if trace_text > 0 and trace_image > 0 else 1.0
    _, rows = sides(W, spectrum.P, spectrum.Q)
    q = alpha * ((rows @ image) * rows).sum(1).clamp_min(0)
    return Mismatch(spectrum.s, q, alpha)


def effective_rank(s: torch.Tensor) -> int:
    """The least k with ``Σ_{i≤k} s_i ≥ ENERGY · Σ s_i``, s [m] squared singular values; 0 where all vanish."""
    return int((_tails(s)[:-1] > (1 - ENERGY) * s.sum()).sum())


@dataclass(frozen=True)
class LinearMismatch:
    """One linear that text and images reach.

    ``text`` and ``image`` are ``L(k) / L(0)`` at the ranks ``ranks``; ``text_total`` and ``image_total`` are ``L(0)``,
    the image's with α in it. ``lambdas[j]`` is λ of the directions from ``ranks[j]`` to ``ranks[j + 1]``, weighted by s
    (λ_i itself where these ranks are neighbours); None where text has no energy. ``rho`` is image over text at rank
    ``rank``, the one that has the asked share of the parameters; None where text loses nothing there, or images reach
    the linear with zeros only. ``text_loss`` and ``image_loss`` are the losses themselves at that rank, ``L(k)`` per
    position, the image's with α in it. ``layer`` counts the blocks of a place from 0.
    """

    name: str
    place: Place
    layer: int | None
    role: str
    rank: int
    rho: float | None
    alpha: float
    text_total: float
    image_total: float
    ranks: tuple[int, ...]
    text: tuple[float, ...]
    image: tuple[float, ...]
    lambdas: tuple[float | None, ...]
    text_loss: float | None = None  # files of earlier releases lack them
    image_loss: float | None = None


@dataclass(frozen=True)
class ModuleRho:
    """ρ over the ``count`` linears of one place and role that have one: arithmetic mean, least and largest.

    ``raw`` is the ratio of sums ``Σ L_I / Σ L_T`` over the same linears, in which those with large outputs count most.
    """

    place: Place
    role: str
    count: int
    mean: float
    least: float
    most: float
    raw: float | None = None


@dataclass(frozen=True)
class EffectiveRank:
    """Directions that hold the energy of one linear's output, of ``full`` = min(out, in); None: not reached.

    ``joint`` is that of the joint moment ``C_T + α C_I`` of JW-SVD; None where one of the modalities does not come.
    """

    name: str
    place: Place
    layer: int | None
    role: str
    full: int
    text: int | None
    image: int | None
    joint: int | None = None


@dataclass(frozen=True)
class LayerRank:
    """Effective rank over full rank, averaged over the linears of one block; None: the modality reaches none."""

    place: Place
    layer: int
    text: float | None
    image: float | None
    joint: float | None = None


@dataclass(frozen=True)
class Eta:
    """η of one linear and modality, the trace-ratio correction of LASER, by head: by token and by sequence.

    Linears other than q, k and v have one value each.
    """

    name: str
    place: Place
    layer: int | None
    role: str
    modality: str
    token: tuple[float, ...]
    sequence: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    """The whole analysis of one model; ``data`` says which samples the statistics are of."""

    retain: float
    energy: float
    data: dict[str, Any]
    notes: tuple[str, ...]
    modules: tuple[ModuleRho, ...]
    layers: tuple[LayerRank, ...]
    effective_ranks: tuple[EffectiveRank, ...]
    linears: tuple[LinearMismatch, ...]
    etas: tuple[Eta, ...] = ()  # none without curvature

    def to_json(self) -> str:
        """JSON with one line per row of a table; floats have six significant digits."""
        fields = []
        for key, value in asdict(self).items():
            if isinstance(value, tuple) and value:
                text = "[\n    " + ",\n    ".join(_dump(row) for row in value) + "\n  ]"
            else:
                text = _dump(value)
            fields.append(f'  "{key}": {text}')
        return "{\n" + ",\n".join(fields) + "\n}\n"


@torch.no_grad()
def inspect(
    model: PreTrainedModel,
    statistics: Statistics | str | Path,
    *,
    retain: float = 0.4,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Analyse a dense model; one linear at a time is in memory.

    Statistics without images (of a language model) give effective ranks only, and a note that says so.

    Args:
        model: the model that was calibrated, on any device.
        statistics: with text moments, and for λ and ρ with image moments.
        retain: share of a linear's parameters at which ρ is taken, in (0, 1]: ``k = ⌊retain · in · out / (in + out)⌋``,
            and 1 at least.
        progress: called with linears done and linears in all.

    Raises:
        BudgetError: `retain` is not in (0, 1].
        StatisticsError: the statistics are of another model or hold no text moments.
        NumericalError: a weight or a moment holds NaN or infinity; names the linear.
    """
    check_retain(retain)
    statistics = statistics if isinstance(statistics, Statistics) else Statistics.open(statistics)
    parts = anatomy(model)  # which names experts as the statistics do
    statistics.check_model(model)
    check_text(statistics)
    layers = _layers(parts)
    mismatches: list[LinearMismatch] = []
    ranks: list[EffectiveRank] = []
    etas: list[Eta] = []
    for done, linear in enumerate(parts.linears):
        W = check_finite(f"the weight of {linear.name}", values(model.get_submodule(linear.name)))
        text, image = (_mean(statistics, linear, modality, W.device) for modality in ("text", "image"))
        gap = None if text is None or image is None else mismatch(W, text, image)
        if gap is not None:
            mismatches.append(_row(linear, layers[linear.name], gap, retain))
        found = {
            "text": gap.s if gap is not None else None if text is None else decompose(W, text).s,
            "image": None if image is None else decompose(W, image).s,
            "joint": None if text is None or image is None or gap is None else decompose(W, text + gap.alpha * image).s,
        }
        ranks.append(_ranks(linear, layers[linear.name], found))
        etas += _etas(statistics, linear, layers[linear.name])
        if progress is not None:
            progress(done + 1, len(parts.linears))
    return Inspection(
        retain=retain,
        energy=ENERGY,
        data=statistics.manifest.data.model_dump(mode="json"),
        notes=tuple(_notes(statistics, mismatches, ranks)),
        modules=tuple(_modules(mismatches)),
        layers=tuple(_layer_ranks(ranks)),
        effective_ranks=tuple(ranks),
        linears=tuple(mismatches),
        etas=tuple(etas),
    )


def check_text(statistics: Statistics) -> None:
    """StatisticsError where statistics lack text moments."""
    if "text" not in statistics.manifest.data.modalities:
        raise StatisticsError(
            f"{statistics.path} has no text moments, which the analysis starts from; calibrate with a text source"
        )


def _tails(values: torch.Tensor) -> torch.Tensor:
    """``Σ_{i>k}`` for k = 0 … m; summed from the small end, so that no tail is a difference of large numbers."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _mean(statistics: Statistics, linear: Linear, modality: Any, device: torch.device) -> torch.Tensor | None:
    moment = statistics.moment(linear.name, modality)
    if moment is None:
        return None
    return check_finite(f"the {modality} moment of {linear.name}", moment.second / moment.count).to(device)


def _layers(parts: Anatomy) -> dict[str, int | None]:
    numbers = {block: i for place in PLACES for i, block in enumerate(parts.blocks(place))}
    return {linear.name: None if linear.block is None else numbers[linear.block] for linear in parts.linears}


def _row(linear: Linear, layer: int | None, gap: Mismatch, retain: float) -> LinearMismatch:
    text, image = gap.text_loss().cpu(), gap.image_loss().cpu()
    text_total, image_total = float(text[0]), float(image[0])
    text_share, image_share = text / (text_total or 1.0), image / (image_total or 1.0)
    rank = max(1, int(retain * linear.params / (linear.out_features + linear.in_features)))
    seen = float(text[rank]) > 0 and image_total > 0
    full = len(gap.s)
    marks = sorted({round(i * full / (POINTS - 1)) for i in range(POINTS)})
    spans = [slice(a, b) for a, b in pairwise(marks)]
    energies = [(float(gap.q[span].sum()), float(gap.s[span].sum())) for span in spans]
    return LinearMismatch(
        name=linear.name,
        place=linear.place,
        layer=layer,
        role=linear.role,
        rank=rank,
        rho=float(image_share[rank] / text_share[rank]) if seen else None,
        alpha=gap.alpha,
        text_total=text_total,
        image_total=image_total,
        ranks=tuple(marks),
        text=tuple(text_share[marks].tolist()),
        image=tuple(image_share[marks].tolist()),
        lambdas=tuple(q / s if s > 0 else None for q, s in energies),
        text_loss=float(text[rank]),
        image_loss=float(image[rank]),
    )


def _ranks(linear: Linear, layer: int | None, found: Mapping[str, torch.Tensor | None]) -> EffectiveRank:
    return EffectiveRank(
        name=linear.name,
        place=linear.place,
        layer=layer,
        role=linear.role,
        full=min(linear.out_features, linear.in_features),
        **{samples: None if s is None else effective_rank(s) for samples, s in found.items()},
    )


def _etas(statistics: Statistics, linear: Linear, layer: int | None) -> Iterable[Eta]:
    """η of each modality whose gradients reached the linear."""
    for modality in statistics.manifest.data.modalities if statistics.manifest.settings.curvature else ():
        output = statistics.output(linear.name, modality)
        if output is not None and float(output.traces[2].sum()) > 0:
            token, sequence = output.eta()
            where = (linear.name, linear.place, layer, linear.role, str(modality))
            yield Eta(*where, tuple(token.tolist()), tuple(sequence.tolist()))


def _mean_share(ranks: Iterable[int | None], full: Iterable[int]) -> float | None:
    known = [rank / most for rank, most in zip(ranks, full, strict=True) if rank is not None]
    return sum(known) / len(known) if known else None


def _layer_ranks(ranks: list[EffectiveRank]) -> Iterable[LayerRank]:
    for place, layer in dict.fromkeys((r.place, r.layer) for r in ranks):
        if layer is not None:
            rows = [r for r in ranks if (r.place, r.layer) == (place, layer)]
            full = [row.full for row in rows]
            ranks_by_samples = ([r.text for r in rows], [r.image for r in rows], [r.joint for r in rows])
            yield LayerRank(place, layer, *(_mean_share(found, full) for found in ranks_by_samples))


def _modules(rows: list[LinearMismatch]) -> Iterable[ModuleRho]:
    for place, role in dict.fromkeys((row.place, row.role) for row in rows):
        own = [row for row in rows if (row.place, row.role) == (place, role) and row.rho is not None]
        if rhos := [row.rho for row in own if row.rho is not None]:
            raw = sum(row.image_loss or 0.0 for row in own) / sum(row.text_loss or 0.0 for row in own)
            yield ModuleRho(place, role, len(rhos), sum(rhos) / len(rhos), min(rhos), max(rhos), raw)


def _notes(statistics: Statistics, rows: list[LinearMismatch], ranks: list[EffectiveRank]) -> Iterable[str]:
    if "image" not in statistics.manifest.data.modalities:
        yield "the statistics hold no image moments, so there is no λ and no ρ; only effective ranks are given"
    elif not rows:
        yield "no linear is reached by text and by images, so there is no λ and no ρ; only effective ranks are given"
    if undefined := sum(row.rho is None for row in rows):
        yield f"ρ is undefined for {undefined} linears, where text loses nothing at that rank or images are zero"
    if unreached := sum(r.text is None and r.image is None for r in ranks):
        yield f"no sample reached {unreached} linears, which have no effective rank"


def _dump(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False, allow_nan=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, tuple | list) else value
