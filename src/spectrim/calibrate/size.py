"""How large the statistics of a model get, before samples run: of its shapes alone."""

from spectrim.anatomy import Anatomy
from spectrim.calibrate.forms import choose_forms
from spectrim.samples import Modality
from spectrim.settings import CalibrationSettings

_TOGETHER = {"q": "attention", "k": "attention", "v": "attention", "gate": "gated", "up": "gated"}  # read one input


def input_bytes(parts: Anatomy) -> int:
    """Of the input moments of one modality, float64; linears that usually read one input share a moment."""
    widths = {(x.block, _TOGETHER.get(x.role, x.name), x.in_features) for x in parts.linears}
    return sum(8 * width * (width + 1) for *_, width in widths)


def statistics_bytes(parts: Anatomy, settings: CalibrationSettings, modalities: tuple[Modality, ...]) -> int:
    """Of all files of statistics of samples of these modalities. Raises RecipeError as `choose_forms` does."""
    total = len(modalities) * input_bytes(parts)
    if settings.curvature:
        limit = int(settings.curvature_gib * 2**30)
        forms, _ = choose_forms(parts.linears, limit, settings.curvature_passes, settings.curvature_forms)
        total += len(modalities) * sum(forms[x.name].nbytes(x.out_features) for x in parts.linears)
    if settings.gradients and "text" in modalities:
        total += sum(8 * x.in_features for x in parts.linears)
    return total
