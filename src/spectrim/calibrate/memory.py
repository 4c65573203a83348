"""How much memory there is for moments: a limit, less what is held already and what a batch takes."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.away import is_away
from spectrim.calibrate.data import Data
from spectrim.calibrate.distributed import least, share
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.groups import Expected, passes
from spectrim.calibrate.probe import held_memory
from spectrim.errors import UsageError
from spectrim.linear import Linear, Place
from spectrim.maths.sums import SLAB
from spectrim.samples import Modality
from spectrim.settings import UNITS, CalibrationOptions, read_bytes

_MARGIN = 0.9  # of what is free that may be taken
_ROUGH = 1.25  # times what is counted of a batch: what libraries hold besides
_UNEVEN = 2.0  # times its even share of the tokens that an expert may be chosen by
_GROUP = Path("/sys/fs/cgroup")

Positions = Mapping[Modality, Mapping[Place, int]]
"""How many positions of a batch linears of each place read."""


def limit_bytes(memory: str | None, device: torch.device) -> int:
    """The bytes that a process may hold on a device: what was asked for, else what it has and nine tenths of the rest.

    The memory of a CUDA device is its own; elsewhere it is that of the machine, or of the control group.
    """
    if memory is not None:
        number, unit = read_bytes(memory)
        return int(number * UNITS[unit])
    sharing = 1 if device.type == "cuda" else share()[1]  # processes of one machine, as far as is known
    return held_memory(device) + int(_MARGIN * free_memory(device)) // sharing


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    try:
        most, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free
    return min(free, max(0, most - used + int(stat.get("inactive_file", 0))))


@dataclass(frozen=True)
class Fit:
    """How a calibration fits its memory: linears of each pass, by kind of unit, and whether blocks run again."""

    groups: dict[str, tuple[tuple[str, ...], ...]]
    recomputes: bool
    expected: Expected


def fitted(
    model: PreTrainedModel, parts: Anatomy, data: Data, options: CalibrationOptions, forms: Mapping[str, CurvatureForm]
) -> Fit:
    """What fits, the same in all processes; blocks run again in backward passes where several passes are needed else.

    Raises UsageError where the memory holds the model and a batch, and not the moments of one linear besides.
    """
    positions = batch_positions(model, data, options)
    given = positions, data.samples, options, forms
    return fit(model, parts, *given, partial(room, model, options), away=is_away(model))


def of_all(positions: Positions, samples: Mapping[Modality, int], options: CalibrationOptions) -> Expected:
    """The positions of all samples, of those of the largest batch."""
    return {
        modality: {
            place: -(-count * samples[modality] // min(samples[modality], options.batch_size))
            for place, count in places.items()
        }
        for modality, places in positions.items()
    }


def fit(
    model: PreTrainedModel,
    parts: Anatomy,
    positions: Positions,
    samples: Mapping[Modality, int],
    options: CalibrationOptions,
    forms: Mapping[str, CurvatureForm],
    room: Callable[[int], int],
    *,
    away: bool,
) -> Fit:
    """The same of shapes alone: `room` gives bytes for moments beside a batch of so many bytes.

    Where weights are `away`, blocks always run again: a graph would hold the weights of all of them.
    """
    rows = max(count for places in positions.values() for count in places.values())
    routed = min(1.0, _UNEVEN * expert_share(model, parts, options))
    settings, modalities, expected = options.settings, [*positions], of_all(positions, samples, options)
    for recomputes in (True,) if away else (False, True):
        limit = room(batch_bytes(model, parts, positions, options, recomputes=recomputes))
        try:
            groups = passes(parts, settings, modalities, forms, limit, rows if recomputes else 0, expected, routed)
        except UsageError:
            if recomputes:
                raise
            continue
        if recomputes or all(len(several) == 1 for several in groups.values()):
            break
    return Fit(groups, recomputes, expected)


def room(model: PreTrainedModel, options: CalibrationOptions, batch: int) -> int:
    """Bytes for moments, the same in all processes: the limit, less what is held now, and less what a batch takes."""
    return least(limit_bytes(options.memory, model.device) - held_memory(model.device) - batch)


def batch_positions(model: PreTrainedModel, data: Data, options: CalibrationOptions) -> Positions:
    """Of the largest batch of each modality, as the first image sample has it."""
    found: dict[Modality, dict[Place, int]] = {}
    for modality, samples in data.samples.items():
        size, inputs = min(samples, options.batch_size), next(data.batches(modality, 1)).inputs
        tokens = inputs["input_ids"].shape[1] + (options.answer_tokens if modality == "image" else 0)
        found[modality] = {"backbone": size * tokens}
        if (pixels := inputs.get("pixel_values")) is not None:
            vision: Any = getattr(model.config, "vision_config", None)
            side, frames = (getattr(vision, name, 1) or 1 for name in ("patch_size", "temporal_patch_size"))
            patches = pixels.numel() // (3 * int(side) ** 2 * int(frames)) if isinstance(side, int) else tokens
            found[modality] |= {"tower": size * patches, "connector": size * patches}
    return found


def expert_share(model: PreTrainedModel, parts: Anatomy, options: CalibrationOptions) -> float:
    """The share of all tokens that an expert reads, if tokens are spread evenly."""
    text: Any = getattr(model.config, "text_config", model.config)
    experts = max((x.expert or 0 for x in parts.linears), default=0) + 1
    chosen = experts if options.all_experts else getattr(text, "num_experts_per_tok", None) or experts
    return min(1.0, chosen / experts)


def batch_bytes(
    model: PreTrainedModel, parts: Anatomy, positions: Positions, options: CalibrationOptions, *, recomputes: bool
) -> int:
    """What a batch takes while it runs, of shapes alone: graphs, boundaries, logits, products.

    The graph is that of all blocks in gradient passes, unless a block `recomputes`.
    """
    size, graded = model.dtype.itemsize, options.gradients or options.curvature
    head = model.get_output_embeddings()
    words = int(getattr(head, "weight", torch.empty(0, 0)).shape[0])
    widest = max(max(x.in_features, x.out_features) for x in parts.linears)
    products = SLAB * widest * 12 + max(x.params for x in parts.linears) * 4  # float32 and float64; a gradient
    share, most = (1.0, expert_share(model, parts, options)), 0
    for places in positions.values():
        samples = min(options.samples, options.batch_size)
        graph = boundaries = 0
        for place, count in places.items():
            blocks: dict[str | None, list[Linear]] = {}
            for x in parts.in_place(place):
                blocks.setdefault(x.block, []).append(x)
            widths = [int(sum(x.out_features * share[x.expert is not None] for x in b)) for b in blocks.values()]
            if graded and not recomputes:
                graph += count * 2 * size * sum(widths)
            graph = max(graph, count * (4 * size + 8) * max(widths, default=0))
            boundaries += count * size * sum(block[-1].out_features for block in blocks.values())
            if model.config._attn_implementation == "eager":
                heads = max((x.heads or 1 for x in parts.in_place(place)), default=1)
                graph += 12 * heads * count**2 // samples
        tokens = places["backbone"]
        logits = 2 * size * words * tokens + 12 * words * tokens // samples  # with their gradients; one in float32
        most = max(most, graph + (boundaries + logits if graded else 0))
    coming = Counter[str | None]()  # the weights of a block that is elsewhere
    for x in parts.linears if is_away(model) else ():
        coming[x.block] += x.nbytes
    return int(_ROUGH * (most + products)) + max(coming.values(), default=0)
