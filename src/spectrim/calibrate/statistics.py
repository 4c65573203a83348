"""An opened statistics directory."""

from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from spectrim.calibrate.fingerprint import model_print
from spectrim.calibrate.manifest import Gathered, Manifest
from spectrim.calibrate.moments import GradMoment, Moment
from spectrim.errors import StatisticsError
from spectrim.samples import Modality


def tensor_names(gathered: Gathered, blocks: dict[str, str]) -> dict[str, str]:
    """Tensor name → block, of everything that one modality must have on disk."""
    moments = {f"{owner}.{part}": blocks[owner] for owner in gathered.counts for part in ("second", "abs_sum")}
    return moments | {f"{linear}.fisher_cols": blocks[linear] for linear in gathered.fisher}


def read_tensor(directory: Path, gathered: Gathered, block: str, name: str) -> torch.Tensor:
    """One float64 tensor of a block's file; StatisticsError when the file is gone or damaged."""
    path = directory / gathered.files[block].name
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise StatisticsError(f"{path} cannot be read ({error}); delete {directory} and calibrate again") from error


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare size and header of every file with the manifest.

    Raises:
        StatisticsError: a file is missing, truncated, or lacks a tensor; names the file.
    """
    for gathered in manifest.gathered.values():
        names = tensor_names(gathered, manifest.blocks)
        for block in set(names.values()) | gathered.files.keys():
            path = directory / (gathered.files[block].name if block in gathered.files else f"the file of {block}")
            try:
                with safe_open(path, framework="pt") as file:
                    held = set(file.keys())
                whole = path.stat().st_size == gathered.files[block].size
            except (OSError, SafetensorError, KeyError):
                held, whole = set(), False
            if not whole or not held >= {name for name, place in names.items() if place == block}:
                raise StatisticsError(f"{path} is missing or truncated; delete {directory} and calibrate again")


class Statistics:
    """The moments in a complete statistics directory; tensors are read when asked for."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a directory that ``calibrate`` has finished.

        Raises:
            StatisticsError: it is no statistics directory, or unfinished, truncated or damaged.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            raise StatisticsError(
                f"the calibration in {path} was interrupted; run the same spectrim calibrate command to finish it"
            )
        check_files(path, manifest)
        return cls(path, manifest)

    def moment(self, linear: str, modality: Modality) -> Moment | None:
        """Moment of what a linear read; None when that modality never reached it.

        Raises:
            StatisticsError: the calibrated model has no such linear, or the file is damaged.
        """
        gathered = self._gathered(linear, modality)
        owner = gathered.owners.get(linear) if gathered else None
        if gathered is None or owner is None:
            return None
        block = self.manifest.blocks[owner]
        second = read_tensor(self.path, gathered, block, f"{owner}.second")
        second = (second + second.T) / 2  # products of float32 are symmetric up to rounding only
        abs_sum = read_tensor(self.path, gathered, block, f"{owner}.abs_sum")
        return Moment(second, abs_sum, gathered.counts[owner])

    def gradient(self, linear: str, modality: Modality) -> GradMoment | None:
        """Gradient statistic of a linear; None when none was gathered from that modality.

        Raises:
            StatisticsError: the calibrated model has no such linear, or the file is damaged.
        """
        gathered = self._gathered(linear, modality)
        if gathered is None or linear not in gathered.fisher:
            return None
        columns = read_tensor(self.path, gathered, self.manifest.blocks[linear], f"{linear}.fisher_cols")
        return GradMoment(columns, gathered.samples)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises StatisticsError that names what differs when these are another model's statistics."""
        if (difference := self.manifest.model.difference(model_print(model))) is not None:
            raise StatisticsError(
                f"the statistics in {self.path} are of another model ({difference}); calibrate this model"
            )

    def _gathered(self, linear: str, modality: Modality) -> Gathered | None:
        if linear not in self.manifest.blocks:
            raise StatisticsError(f"the statistics in {self.path} know no linear {linear}; calibrate this model")
        return self.manifest.gathered.get(modality)
