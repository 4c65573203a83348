"""An opened statistics directory."""

from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from spectrim.calibrate.fingerprint import model_print
from spectrim.calibrate.forms import Form
from spectrim.calibrate.manifest import Gathered, Manifest
from spectrim.calibrate.moments import GradMoment, Moment, OutputMoment
from spectrim.errors import StatisticsError
from spectrim.samples import Modality


def tensor_names(gathered: Gathered, manifest: Manifest) -> dict[str, str]:
    """Tensor name → block, of everything that one unit must have on disk."""
    wanted = {owner: ["second", "abs_sum"] for owner in gathered.counts}
    for linear in gathered.fisher:
        wanted.setdefault(linear, []).append("fisher_cols")
    for linear in gathered.outputs:
        wanted.setdefault(linear, []).extend(["traces", *Form.read(manifest.forms[linear]).parts])
    return {f"{name}.{part}": manifest.blocks[name] for name, parts in wanted.items() for part in parts}


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
        names = tensor_names(gathered, manifest)
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
        for gathered in self._units(linear, modality, gradients=False):
            if (owner := gathered.owners.get(linear)) is not None:
                second = self._read(gathered, owner, "second")
                second = (second + second.T) / 2  # products of float32 are symmetric up to rounding only
                return Moment(second, self._read(gathered, owner, "abs_sum"), gathered.counts[owner])
        return None

    def positions(self, linear: str, modality: Modality) -> int:
        """How many token positions of a modality a linear read."""
        units = self._units(linear, modality, gradients=False)
        return sum(unit.counts[unit.owners[linear]] for unit in units if linear in unit.owners)

    def gradient(self, linear: str, modality: Modality) -> GradMoment | None:
        """Gradient statistic of a linear; None when none was gathered from that modality.

        Raises:
            StatisticsError: the calibrated model has no such linear, or the file is damaged.
        """
        for gathered in self._units(linear, modality, gradients=True):
            if linear in gathered.fisher:
                return GradMoment(self._read(gathered, linear, "fisher_cols"), gathered.samples)
        return None

    def output(self, linear: str, modality: Modality) -> OutputMoment | None:
        """Moment of a linear's output gradients; None when none was gathered from that modality.

        Raises:
            StatisticsError: the calibrated model has no such linear, or the file is damaged.
        """
        for gathered in self._units(linear, modality, gradients=True):
            if (count := gathered.outputs.get(linear)) is not None:
                form = Form.read(self.manifest.forms[linear])
                sums = {part: self._read(gathered, linear, part) for part in form.parts}
                return OutputMoment(form, sums, self._read(gathered, linear, "traces"), count, gathered.labels)
        return None

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises StatisticsError that names what differs when these are another model's statistics."""
        if (difference := self.manifest.model.difference(model_print(model))) is not None:
            raise StatisticsError(
                f"the statistics in {self.path} are of another model ({difference}); calibrate this model"
            )

    def _units(self, linear: str, modality: Modality, *, gradients: bool) -> list[Gathered]:
        if linear not in self.manifest.blocks:
            raise StatisticsError(f"the statistics in {self.path} know no linear {linear}; calibrate this model")
        units = (u for u in self.manifest.units if u.modality == modality and u.gradients == gradients)
        return [self.manifest.gathered[unit.name] for unit in units]

    def _read(self, gathered: Gathered, linear: str, part: str) -> torch.Tensor:
        return read_tensor(self.path, gathered, self.manifest.blocks[linear], f"{linear}.{part}")
