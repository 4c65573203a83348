"""Which linears are gathered together in one pass over the samples, so that their moments fit a limit of memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from spectrim.anatomy import Anatomy
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.manifest import CalibrationUnit, kinds
from spectrim.errors import UsageError
from spectrim.estimate import amount
from spectrim.linear import Linear, Place
from spectrim.maths.sums import gram_bytes, packed_bytes
from spectrim.samples import Modality
from spectrim.settings import CalibrationSettings

_TOGETHER = {"q": "attention", "k": "attention", "v": "attention", "gate": "gated", "up": "gated"}  # read one input


@dataclass(frozen=True)
class Share:
    """Linears that no group divides, and the bytes of their moments."""

    linears: tuple[Linear, ...]
    nbytes: int

    @property
    def block(self) -> str | None:
        """That all of them are in."""
        return self.linears[0].block


Expected = Mapping[Modality, Mapping[Place, int]]
"""How many positions of all samples linears of each place are expected to read; a place that is not known is absent."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the moments of one modality: in memory while they grow or, finished, on disk."""

    positions: Mapping[Place, int] = field(default_factory=dict)
    on_disk: bool = False

    def full(self, x: Linear, width: int) -> int:
        """Of all products of `width` inputs or outputs of a linear; nobody knows how many tokens an expert reads."""
        rows = self.positions.get(x.place) if x.expert is None else None
        itemsize = torch.promote_types(x.dtype, torch.float32).itemsize
        return (packed_bytes if self.on_disk else gram_bytes)(width, rows, itemsize)


_MANY = Sizes()  # where nobody knows how few positions there are


def input_shares(linears: Sequence[Linear], sizes: Sizes = _MANY) -> list[Share]:
    """Input moments of one modality; linears that usually read one input share a moment."""
    found: dict[tuple[str | None, str, int], list[Linear]] = {}
    for x in linears:  # each expert has tokens of its own, and so has an MLP beside experts
        readers = f"{x.name.rpartition('.')[0]}.{_TOGETHER[x.role]}" if x.role in _TOGETHER else x.name
        found.setdefault((x.block, readers, x.in_features), []).append(x)
    return [Share(tuple(same), sizes.full(same[0], width) + 8 * width) for (_, _, width), same in found.items()]


def output_shares(
    linears: Sequence[Linear], forms: Mapping[str, CurvatureForm], *, fisher: bool, sizes: Sizes = _MANY
) -> list[Share]:
    """Moments of output gradients in these forms (none where a linear has no form), and gradient statistics."""

    def nbytes(x: Linear) -> int:
        form, output = forms.get(x.name), 0
        if form is not None:
            output = sizes.full(x, x.out_features) if form.kind == "full" else form.nbytes(x.out_features)
        return output + 8 * x.in_features * fisher

    return [Share((x,), nbytes(x)) for x in linears]


def shares(
    linears: Sequence[Linear],
    kind: CalibrationUnit,
    forms: Mapping[str, CurvatureForm],
    settings: CalibrationSettings,
    sizes: Sizes = _MANY,
) -> list[Share]:
    """What linears take in one kind of unit. Text reaches the backbone alone: the others take nothing there."""
    if kind.gradients:
        fisher = settings.gradients and kind.modality == "text"
        found = output_shares(linears, forms, fisher=fisher, sizes=sizes)
    else:
        found = input_shares(linears, sizes)
    if kind.modality == "image":
        return found
    return [share if share.linears[0].place == "backbone" else replace(share, nbytes=0) for share in found]


def total(shares: Sequence[Share]) -> int:
    """Bytes of all of them."""
    return sum(share.nbytes for share in shares)


def passes(
    parts: Anatomy,
    settings: CalibrationSettings,
    modalities: Sequence[Modality],
    forms: Mapping[str, CurvatureForm],
    limit: int,
    rows: int = 0,
    expected: Expected | None = None,
    routed: float = 1.0,
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """By kind of unit, the names of the linears of each pass, whose moments fit into `limit` bytes.

    In gradient passes the inputs of these linears, of so many `rows`, are kept besides until the backward pass; of an
    expert a `routed` share of them.

    Raises UsageError as :func:`grouped`.
    """
    found = {}
    for kind in kinds(settings, modalities):
        several = shares(parts.linears, kind, forms, settings, Sizes((expected or {}).get(kind.modality, {})))
        if kind.gradients:
            several = [replace(x, nbytes=x.nbytes + _inputs(x, rows, routed)) if x.nbytes else x for x in several]
        groups = grouped(several, limit, outputs=kind.gradients)
        found[kind.name] = tuple(tuple(linear.name for linear in group) for group in groups)
    return found


def _inputs(share: Share, rows: int, routed: float) -> int:
    """Bytes of what its linears read."""
    return sum(
        int(rows * (1.0 if x.expert is None else routed)) * x.in_features * x.dtype.itemsize for x in share.linears
    )


def grouped(shares: Sequence[Share], limit: int, *, outputs: bool = False) -> list[list[Linear]]:
    """Neighbouring blocks together, as many as fit into `limit` bytes; a block that is larger is divided.

    `outputs` says that these are moments of output gradients, which have smaller forms.

    Raises:
        UsageError: one share alone is larger.
    """
    groups: list[list[Linear]] = []
    room = -1

    def put(several: Sequence[Share]) -> None:
        nonlocal room
        if room < (size := total(several)):
            groups.append([])
            room = limit
        groups[-1] += [linear for share in several for linear in share.linears]
        room -= size

    largest = max(shares, key=lambda share: share.nbytes, default=None)
    if largest is not None and largest.nbytes > limit:
        form = f", or keep them in a smaller form, such as --curvature-form {largest.linears[0].role}=sketch:256"
        raise UsageError(
            f"{'output ' if outputs else ''}moments of {largest.linears[0].name} take {amount(largest.nbytes)} and the "
            f"memory leaves {amount(max(0, limit))} beside the model and a batch; raise --memory or lower --batch-size"
            f"{form if outputs else ''}"
        )
    for _, block in groupby(shares, key=lambda share: share.block):
        whole = list(block)
        if total(whole) <= limit:
            put(whole)
            continue
        for share in whole:
            put([share])
    return groups
