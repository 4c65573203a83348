"""What a calibration will take, before its model is loaded: of shapes, and of the speed of one product here."""

import time
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate.data import Data
from spectrim.calibrate.forms import choose_forms
from spectrim.calibrate.groups import Sizes, input_shares, shares, total
from spectrim.calibrate.manifest import kinds
from spectrim.calibrate.memory import Positions, batch_bytes, batch_positions, expert_share, fit, limit_bytes
from spectrim.calibrate.size import statistics_bytes
from spectrim.estimate import WRITE, Estimate
from spectrim.linear import Linear, Place
from spectrim.samples import Modality
from spectrim.settings import CalibrationOptions

LIBRARIES = 900 * 2**20  # bytes that Python, torch and transformers hold, measured once
_IMAGE = 1024  # tokens of an image that is not at hand


def outlook(
    model: PreTrainedModel, parts: Anatomy, data: Data | None, options: CalibrationOptions
) -> tuple[dict[str, int], Estimate]:
    """Passes by kind of unit, and what all of them take on the CPU of this machine.

    Args:
        model: on the meta device.
        parts: of it.
        data: the samples; None where they are not at hand, and an image then counts as 1024 tokens.
        options: of the calibration.

    Raises:
        UsageError: the memory is too little.
        RecipeError: a form of output moments is none.
    """
    cpu = torch.device("cpu")
    limit, weights = limit_bytes(options.memory, cpu), sum(x.nbytes for x in model.parameters())
    linears = sum(x.nbytes for x in parts.linears if x.block is not None)
    held = LIBRARIES + (weights if weights <= limit / 2 or options.memory is None else weights - linears)
    positions, counts = _positions(model, parts, data, options)
    forms = choose_forms(parts.linears, options.curvature_forms) if options.curvature else {}
    found = fit(
        model, parts, positions, counts, options, forms, lambda batch: limit - held - batch, away=held < weights
    )
    work, share, sums = 0.0, expert_share(model, parts, options), 0
    for kind in kinds(options.settings, [*positions]):
        size = min(counts[kind.modality], options.batch_size)
        tokens = {place: n * counts[kind.modality] / size for place, n in positions[kind.modality].items()}
        for group in found.groups[kind.name]:
            chosen = [parts.linear(name) for name in group if parts.linear(name).place in tokens]
            work += _work(parts, chosen, tokens, share=share, gradients=kind.gradients, again=found.recomputes)
            sizes = Sizes(found.expected[kind.modality])
            sums = max(sums, total(shares(chosen, kind, forms, options.settings, sizes)))
    disk = statistics_bytes(parts, options.settings, tuple(positions), found.expected)
    passes = {name: len(groups) for name, groups in found.groups.items()}
    batch = batch_bytes(model, parts, positions, options, recomputes=found.recomputes)
    memory = limit if max(passes.values()) > 1 else min(limit, held + batch + sums)
    return passes, Estimate(work / product_rate() + disk / WRITE, memory, disk)


def _positions(
    model: PreTrainedModel, parts: Anatomy, data: Data | None, options: CalibrationOptions
) -> tuple[Positions, dict[Modality, int]]:
    """Of a batch of each modality, and how many samples each has."""
    if data is not None:
        return batch_positions(model, data, options), data.samples
    size, found = min(options.samples, options.batch_size), dict[Modality, Mapping[Place, int]]()
    if options.text is not None:
        found["text"] = {"backbone": size * options.seqlen}
    if options.images is not None and parts.tower is not None:
        found["image"] = {"backbone": size * _IMAGE, "tower": 4 * size * _IMAGE, "connector": size * _IMAGE}
    return found, dict.fromkeys(found, options.samples)


def _work(
    parts: Anatomy,
    group: list[Linear],
    tokens: Mapping[Place, float],
    *,
    share: float,
    gradients: bool,
    again: bool,
) -> float:
    """Multiplications and additions of one pass for the moments of a group; experts read a `share` of the tokens.

    It ends behind the group's blocks, and goes back through these alone.
    """

    def read(x: Linear) -> float:
        return tokens.get(x.place, 0.0) * (share if x.expert is not None else 1.0)

    def forward(linears: Iterable[Linear]) -> float:
        return sum(2 * x.params * read(x) for x in linears)

    if not group:
        return 0.0
    blocks = {name: number for number, name in enumerate(parts.blocks())}
    at = [blocks[x.block] for x in group if x.block is not None] or [0]
    before = forward(x for x in parts.linears if x.block is None or blocks[x.block] <= max(at))
    if not gradients:
        return before + sum(2 * s.linears[0].in_features ** 2 * read(s.linears[0]) for s in input_shares(group))
    own = forward(x for x in parts.linears if x.block is not None and min(at) <= blocks[x.block] <= max(at))
    return before + (2 if again else 1) * own + sum(2 * x.out_features**2 * read(x) for x in group)


def product_rate(size: int = 768) -> float:
    """Multiplications and additions of float32 products in a second, on the CPU; a few hundredths of a second."""
    x = torch.ones(size, size)
    x @ x
    began, count = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < 0.05:
        x @ x
        count += 1
    return 2 * size**3 * count / took
