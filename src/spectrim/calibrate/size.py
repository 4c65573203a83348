"""How large the statistics of a model get, before samples run: of its shapes alone."""

from collections.abc import Sequence

from spectrim.anatomy import Anatomy
from spectrim.calibrate.forms import choose_forms
from spectrim.linear import Linear
from spectrim.samples import Modality
from spectrim.settings import CalibrationSettings

_TOGETHER = {"q": "attention", "k": "attention", "v": "attention", "gate": "gated", "up": "gated"}  # read one input


def input_bytes(linears: Sequence[Linear]) -> int:
    """Of the input moments of one modality, float64; linears that usually read one input share a moment."""
    widths = {(x.block, _TOGETHER.get(x.role, x.name), x.in_features) for x in linears}
    return sum(8 * width * (width + 1) for *_, width in widths)


def statistics_bytes(parts: Anatomy, settings: CalibrationSettings, modalities: tuple[Modality, ...]) -> int:
    """Of all files of statistics of samples of these modalities; text reaches the backbone alone.

    Raises RecipeError as `choose_forms` does.
    """
    reached = {"text": parts.in_place("backbone"), "image": parts.linears}
    total = sum(input_bytes(reached[modality]) for modality in modalities)
    if settings.curvature:
        limit = int(settings.curvature_gib * 2**30)
        forms, _ = choose_forms(parts.linears, limit, settings.curvature_passes, settings.curvature_forms)
        total += sum(forms[x.name].nbytes(x.out_features) for modality in modalities for x in reached[modality])
    if settings.gradients and "text" in modalities:
        total += sum(8 * x.in_features for x in reached["text"])
    return total
