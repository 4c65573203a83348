"""How large the statistics of a model get, before samples run: of its shapes alone."""

from collections.abc import Mapping, Sequence

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


def handed_bytes(parts: Anatomy, groups: Mapping[str, Sequence[object]], expected: Expected) -> int:
    """Bytes that wait on disk while gradient passes go on: gradients at the outputs of two blocks (see `Relay`)."""
    if all(len(several) == 1 for kind, several in groups.items() if kind.endswith("gradients")):
        return 0
    sizes = {x.place: x.out_features * x.dtype.itemsize for x in parts.linears if x.block is not None}  # of the last
    return max(2 * count * sizes.get(place, 0) for places in expected.values() for place, count in places.items())
