"""``manifest.json``: what a statistics directory holds, of which model and data, and how far it has come."""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from spectrim.errors import StatisticsError
from spectrim.samples import Modality

MANIFEST = "manifest.json"
FORMAT: Literal["spectrim-statistics"] = "spectrim-statistics"
VERSION: Literal[1] = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelPrint(_Part):
    """What makes a model this model: a digest of its config, and shape, dtype and digest of each parameter."""

    config: str
    tensors: dict[str, str]

    def difference(self, other: Self) -> str | None:
        """What differs in ``other``, in words; None when nothing does."""
        if missing := sorted(self.tensors.keys() ^ other.tensors.keys()):
            return f"parameter {missing[0]} is in one of them only"
        for name, tensor in self.tensors.items():
            if tensor != other.tensors[name]:
                return f"parameter {name} is {tensor} in one and {other.tensors[name]} in the other"
        return None if self.config == other.config else "their configs differ"


class DataPrint(_Part):
    """The samples: where they came from, and SHA-256 of what was used."""

    text: str | None
    images: str | None
    fingerprint: str


class Settings(_Part):
    """The arguments of the calibration that the moments depend on."""

    samples: int
    seqlen: int
    batch_size: int
    seed: int
    instruction: str
    image_tokens_only: bool
    gradients: bool


class TensorFile(_Part):
    """A safetensors file of one block, beside the manifest."""

    name: str
    size: int  # bytes


class Gathered(_Part):
    """One modality: how far, which linear has whose moment, and where the moments are."""

    batches: int  # gathered so far
    samples: int
    owners: dict[str, str]
    counts: dict[str, int]  # by owner: positions
    fisher: tuple[str, ...]  # linears with a gradient statistic
    files: dict[str, TensorFile]  # by block; "other" outside blocks


class Manifest(_Part):
    """The whole directory. A file that it does not name is no part of the statistics."""

    format: Literal["spectrim-statistics"] = FORMAT
    version: Literal[1] = VERSION
    generation: int = 0  # snapshots written
    complete: bool = False
    model: ModelPrint
    data: DataPrint
    settings: Settings
    versions: dict[str, str]
    blocks: dict[str, str]  # linear → block, "other" outside blocks
    gathered: dict[Modality, Gathered]

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a directory.

        Raises:
            StatisticsError: there is none, or it is truncated, foreign or of another format version.
        """
        path = directory / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise StatisticsError(
                f"{directory} holds no {MANIFEST}, so it is no statistics directory; write one with spectrim calibrate"
            ) from error
        except (OSError, ValueError) as error:
            raise StatisticsError(f"{path} cannot be read ({error}); delete {directory} and calibrate again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StatisticsError(f"{path} was not written by spectrim calibrate; give a statistics directory")
        if content.get("version") != VERSION:
            raise StatisticsError(
                f"{directory} has statistics format {content.get('version')} and this spectrim reads {VERSION}; "
                "calibrate again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise StatisticsError(
                f"{path} is damaged at '{where}' ({error.errors()[0]['msg']}); delete {directory} and calibrate again"
            ) from error

    def check_fits(self, wanted: "Manifest", directory: Path) -> None:
        """Refuse to continue with another model, other data or other settings.

        Raises:
            StatisticsError: names what differs.
        """
        differences = []
        if (difference := self.model.difference(wanted.model)) is not None:
            differences.append(f"of another model ({difference})")
        if self.data.fingerprint != wanted.data.fingerprint:
            differences.append(
                f"of other samples (text {self.data.text}, images {self.data.images}; "
                f"now text {wanted.data.text}, images {wanted.data.images})"
            )
        for name, value in self.settings:
            if value != (now := getattr(wanted.settings, name)):
                differences.append(f"with {name} {value!r} (now {now!r})")
        if differences:
            raise StatisticsError(
                f"{directory} holds statistics {' and '.join(differences)}; "
                "choose another output directory or delete it"
            )
