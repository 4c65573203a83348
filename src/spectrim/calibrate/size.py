"""How large the statistics of a model get, before samples run: of its shapes alone."""

from spectrim.anatomy import Anatomy
from spectrim.calibrate.forms import choose_forms
from spectrim.calibrate.groups import Expected, Sizes, shares, total
from spectrim.calibrate.manifest import kinds
from spectrim.samples import Modality
from spectrim.settings import CalibrationSettings


def statistics_bytes(
    parts: Anatomy,
    settings: CalibrationSettings,
    modalities: tuple[Modality, ...],
    expected: Expected | None = None,
) -> int:
    """Of all files of statistics of samples of these modalities; text reaches the backbone alone.

    Raises RecipeError as `choose_forms` does.
    """
    forms = choose_forms(parts.linears, settings.curvature_forms) if settings.curvature else {}

    def sizes(modality: Modality) -> Sizes:
        return Sizes((expected or {}).get(modality, {}), on_disk=True)

    several = kinds(settings, modalities)
    return sum(total(shares(parts.linears, kind, forms, settings, sizes(kind.modality))) for kind in several)
