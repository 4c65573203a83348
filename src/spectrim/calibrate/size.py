"""How large the statistics of a model get, before samples run: of its shapes alone."""

from spectrim.anatomy import Anatomy
from spectrim.calibrate.forms import choose_forms
from spectrim.calibrate.groups import shares, total
from spectrim.calibrate.manifest import kinds
from spectrim.samples import Modality
from spectrim.settings import CalibrationSettings


def statistics_bytes(parts: Anatomy, settings: CalibrationSettings, modalities: tuple[Modality, ...]) -> int:
    """Of all files of statistics of samples of these modalities; text reaches the backbone alone.

    Raises RecipeError as `choose_forms` does.
    """
    forms = choose_forms(parts.linears, settings.curvature_forms) if settings.curvature else {}
    return sum(total(shares(parts, kind, forms, settings)) for kind in kinds(settings, modalities))
