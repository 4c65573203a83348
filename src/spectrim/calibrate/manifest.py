"""``manifest.json``: what a statistics directory holds, of which model and data, and how far it has come."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from spectrim.calibrate.forms import CurvatureForm
from spectrim.errors import RecipeError, StatisticsError
from spectrim.files import parse_json
from spectrim.samples import Modality
from spectrim.settings import CalibrationSettings

MANIFEST = "manifest.json"
COST_FILE = "cost.json"  # beside it: what the calibration was to take and took; no part of the statistics
FORMAT: Literal["spectrim-statistics"] = "spectrim-statistics"
VERSION: Literal[5] = 5
_READ = (4, 5)  # 4 kept every moment as a whole matrix


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPrint(_Record):
    """What makes a model this model: a digest of its config, and shape, dtype and digest of each parameter."""

    config: str
    tensors: dict[str, Annotated[str, StringConstraints(pattern=r"^\w+\[[\d, ]*\]:[0-9a-f]{16}$")]]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of one parameter."""
        return tuple(json.loads(self.tensors[parameter].partition("[")[2].partition("]")[0].join("[]")))

    def dtype(self, parameter: str) -> torch.dtype:
        """Dtype of one parameter."""
        found: torch.dtype = getattr(torch, self.tensors[parameter].partition("[")[0])
        return found

    def difference(self, other: Self) -> str | None:
        """What differs in ``other``, in words; None when nothing does."""
        if missing := sorted(self.tensors.keys() ^ other.tensors.keys()):
            return f"parameter {missing[0]} is in one of them only"
        for name, tensor in self.tensors.items():
            if tensor != other.tensors[name]:
                return f"parameter {name} is {tensor} in one and {other.tensors[name]} in the other"
        return None if self.config == other.config else "their configs differ"


class DataPrint(_Record):
    """The samples: where they came from, with weights where there are several sources, and SHA-256 of what was used."""

    text: str | tuple[str, ...] | None
    images: str | tuple[str, ...] | None
    fingerprint: str

    def __str__(self) -> str:
        parts = (("text", self.text), ("images", self.images))
        return ", ".join(f"{kind} {' + '.join(x) if isinstance(x, tuple) else x}" for kind, x in parts)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities that have samples, text first."""
        sources: dict[Modality, str | tuple[str, ...] | None] = {"text": self.text, "image": self.images}
        return tuple(modality for modality, source in sources.items() if source is not None)


class TensorFile(_Record):
    """A safetensors file of one block, beside the manifest and nowhere else."""

    name: str = Field(pattern=r"^[^/\\.][^/\\]*\.safetensors$")
    size: int  # bytes
    sha256: str


class Gathered(_Record):
    """The state of one unit: how far it is, which linear uses whose moment, and the files of moments."""

    batches: NonNegativeInt = 0  # gathered so far
    samples: NonNegativeInt = 0
    labels: NonNegativeInt = 0  # labelled tokens of gradient passes
    owners: dict[str, str] = {}
    counts: dict[str, PositiveInt] = {}  # by owner: positions
    fisher: tuple[str, ...] = ()  # linears with a gradient statistic
    outputs: dict[str, PositiveInt] = {}  # by linear with an output moment: positions
    files: dict[str, TensorFile] = {}  # by block; "other" outside blocks


class CalibrationUnit(_Record):
    """A part of a calibration that is gathered and kept by itself: one modality, forward only or a gradient pass."""

    modality: Modality
    gradients: bool
    group: int | None = None  # of the linears, where they need several passes

    @property
    def kind(self) -> str:
        """All units of a modality that gather the same of different linears."""
        return f"{self.modality}-gradients" if self.gradients else self.modality

    @property
    def name(self) -> str:
        """Key in the manifest and beginning of file names."""
        return self.kind if self.group is None else f"{self.kind}-{self.group}"

    @property
    def words(self) -> str:
        """A description of its samples, for messages."""
        return f"{self.modality} samples{' with gradients' if self.gradients else ''}"


def kinds(settings: CalibrationSettings, modalities: Sequence[Modality]) -> list[CalibrationUnit]:
    """What is gathered, in order, each over all linears: forward passes, then gradient passes."""
    found = [CalibrationUnit(modality=m, gradients=False) for m in modalities]
    graded = modalities if settings.curvature else [m for m in modalities if m == "text" and settings.gradients]
    return found + [CalibrationUnit(modality=m, gradients=True) for m in graded]


class Manifest(_Record):
    """The whole directory. A file that it does not name is no part of the statistics."""

    format: Literal["spectrim-statistics"] = FORMAT
    version: Literal[4, 5] = VERSION
    generation: int = 0  # snapshots written
    complete: bool = False
    model: ModelPrint
    data: DataPrint
    settings: CalibrationSettings
    versions: dict[str, str]
    blocks: dict[str, str]  # linear → block, "other" outside blocks
    forms: dict[str, str]  # linear → form of its output moment; empty without curvature
    heads: dict[str, PositiveInt]  # linear → heads that its outputs are made of; empty without curvature
    groups: dict[str, tuple[tuple[str, ...], ...]]  # by kind of unit: linears of each pass
    gathered: dict[str, Gathered]  # by unit

    def _lost(self) -> str | None:
        """A name that is missing from a part of the manifest that must have it; None where all is consistent."""
        lost = self.gathered.keys() ^ {unit.name for unit in self.units}
        lost |= {name for name in self.blocks if f"{name}.weight" not in self.model.tensors}
        lost |= self.groups.keys() ^ {kind.name for kind in kinds(self.settings, self.data.modalities)}
        for groups in self.groups.values():
            lost |= self.blocks.keys() ^ {name for group in groups for name in group}
        for gathered in self.gathered.values():
            lost |= {*gathered.owners, *gathered.counts, *gathered.fisher, *gathered.outputs, *self.forms} - {
                *self.blocks
            }
            lost |= {*gathered.owners.values()} - gathered.counts.keys()
            lost |= gathered.outputs.keys() - self.forms.keys()
        return min(lost, default=None)

    @property
    def output_forms(self) -> dict[str, CurvatureForm]:
        """``forms`` as objects."""
        return {name: CurvatureForm.read(form) for name, form in self.forms.items()}

    @property
    def units(self) -> tuple[CalibrationUnit, ...]:
        """What is gathered, in order: forward passes, then gradient passes."""
        return tuple(
            kind.model_copy(update={"group": None if len(groups) == 1 else number})
            for kind in kinds(self.settings, self.data.modalities)
            for groups in [self.groups.get(kind.name, ((),))]
            for number in range(len(groups))
        )

    def linears(self, unit: CalibrationUnit) -> tuple[str, ...]:
        """The linears that a unit watches."""
        return self.groups[unit.kind][unit.group or 0]

    def regrouped(self, wanted: Self, samples: Mapping[Modality, int]) -> Self:
        """The same state, with what is not gathered yet grouped as in `wanted`, which may be under another limit.

        Units that have all of their `samples` stay as they are, and so do those that are the same in both.
        """
        groups: dict[str, tuple[tuple[str, ...], ...]] = {}
        kept: dict[tuple[str, tuple[str, ...]], Gathered] = {}
        for unit in self.units:
            state, names = self.gathered[unit.name], self.linears(unit)
            if state.samples == samples[unit.modality]:
                groups[unit.kind] = (*groups.get(unit.kind, ()), names)
            kept[unit.kind, names] = state
        for kind, fresh in wanted.groups.items():
            done = {name for group in groups.get(kind, ()) for name in group}
            rest = (tuple(name for name in group if name not in done) for group in fresh)
            groups[kind] = (*groups.get(kind, ()), *(group for group in rest if group))
        changed = self.model_copy(update={"groups": groups})
        gathered = {unit.name: kept.get((unit.kind, changed.linears(unit)), Gathered()) for unit in changed.units}
        return changed.model_copy(update={"gathered": gathered})

    def json(self) -> bytes:  # type: ignore[override]
        """The content of the file; its last entry is the digest of all others."""
        content = self.model_dump(mode="json")
        return json.dumps(content | {"digest": _digest(content)}, indent=1).encode()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest of a directory.

        Raises:
            StatisticsError: there is none, or it is truncated, foreign, changed or of another format version.
        """
        path = directory / MANIFEST
        again = f"delete {directory} and calibrate again"
        try:
            content = parse_json(path.read_bytes())
        except FileNotFoundError as error:
            raise StatisticsError(
                f"{directory} holds no {MANIFEST}, so it is no statistics directory; write one with spectrim calibrate"
            ) from error
        except OSError as error:
            raise StatisticsError(f"{path} cannot be read ({error}); give a statistics directory") from error
        except ValueError as error:
            raise StatisticsError(f"{path} {error}, so it cannot be read; {again}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StatisticsError(f"{path} was not written by spectrim calibrate; give a statistics directory")
        if content.get("version") not in _READ:
            raise StatisticsError(
                f"{directory} has statistics format {content.get('version')} and this spectrim reads {VERSION}; {again}"
            )
        digest = content.pop("digest", None)
        try:
            manifest = cls.model_validate(content)
            _ = manifest.output_forms
        except RecipeError as error:
            raise StatisticsError(f"{path} is damaged ({error}); {again}") from error
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise StatisticsError(f"{path} is damaged at '{where}' ({error.errors()[0]['msg']}); {again}") from error
        if (lost := manifest._lost()) is not None:
            raise StatisticsError(f"{path} is damaged ({lost} is missing from a part of it); {again}")
        if digest != _digest(content):
            raise StatisticsError(f"{path} has changed since it was written; restore it, or {again}")
        return manifest

    def check_fits(self, wanted: "Manifest", directory: Path) -> None:
        """Refuse to continue with another model, other data or other settings.

        Raises:
            StatisticsError: names what differs.
        """
        differences = []
        if (difference := self.model.difference(wanted.model)) is not None:
            differences.append(f"of another model ({difference})")
        settings = [
            f"with {name} {value!r} (now {now!r})"
            for name, value in self.settings
            if value != (now := getattr(wanted.settings, name))
        ]
        data, now = self.data, wanted.data
        if data.fingerprint != now.fingerprint:
            if (data.text, data.images) != (now.text, now.images):
                differences.append(f"of other samples ({data}; now {now})")
            elif not settings:  # which may have chosen other samples
                differences.append(f"of other samples than {now} give now")
        differences += settings
        if differences:
            raise StatisticsError(
                f"{directory} holds statistics {' and '.join(differences)}; "
                "choose another output directory or delete it"
            )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
