"""An opened statistics directory."""

from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from spectrim.calibrate.fingerprint import model_print
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.manifest import COST_FILE, Gathered, Manifest
from spectrim.calibrate.moments import GradMoment, Moment, OutputMoment
from spectrim.calibrate.tensors import check_files, read_gram, read_tensor
from spectrim.errors import StatisticsError
from spectrim.files import read_object
from spectrim.maths.roots import check_finite
from spectrim.maths.sums import Gram
from spectrim.samples import Modality


class Statistics:
    """The moments in a complete statistics directory; tensors are read when asked for."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.means: dict[str, Any] = {}  # kept by calibrate.experts

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
                f"the calibration in {path} is still running or was interrupted; run the same spectrim "
                "calibrate command to finish it"
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
                gram = self._gram(gathered, owner, "second")
                return Moment(gram, self._read(gathered, owner, "abs_sum"), gathered.counts[owner])
        return None

    def positions(self, linear: str, modality: Modality) -> int:
        """How many token positions of a modality a linear read."""
        units = self._units(linear, modality, gradients=False)
        return sum(unit.counts[unit.owners[linear]] for unit in units if linear in unit.owners)

    def labels(self, linear: str, modality: Modality) -> int:
        """From how many labelled tokens of a modality a linear's output gradients come; 0 where none were gathered."""
        units = self._units(linear, modality, gradients=True)
        return sum(unit.labels for unit in units if linear in unit.outputs)

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
                form = CurvatureForm.read(self.manifest.forms[linear])
                read = self._gram if form.kind == "full" else self._read
                held = {part: read(gathered, linear, part) for part in form.parts}
                return OutputMoment(form, held, self._read(gathered, linear, "traces"), count, gathered.labels)
        return None

    def cost(self) -> dict[str, Any] | None:
        """What the calibration was to take and took; None where that was not asked for, or is gone."""
        try:
            return read_object(self.path / COST_FILE)
        except ValueError:
            return None

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises StatisticsError that names what differs when these are another model's statistics."""
        if (difference := self.manifest.model.difference(model_print(model))) is not None:
            raise StatisticsError(
                f"the statistics in {self.path} are of another model ({difference}); calibrate this model"
            )

    def _units(self, linear: str, modality: Modality, *, gradients: bool) -> list[Gathered]:
        if linear not in self.manifest.blocks:
            raise StatisticsError(f"the statistics in {self.path} have no linear {linear}; calibrate this model")
        units = (u for u in self.manifest.units if u.modality == modality and u.gradients == gradients)
        return [self.manifest.gathered[unit.name] for unit in units]

    def _gram(self, gathered: Gathered, linear: str, part: str) -> Gram:
        block, name = self.manifest.blocks[linear], f"{linear}.{part}"
        gram = read_gram(self.path, gathered, block, name)
        for tensor in gram.parts:
            check_finite(f"the moment {name} in {self.path}", tensor)
        self._check_sum(gathered, linear, part, gram.diagonal())
        return gram

    def _read(self, gathered: Gathered, linear: str, part: str) -> torch.Tensor:
        block, name = self.manifest.blocks[linear], f"{linear}.{part}"
        moment = check_finite(f"the moment {name} in {self.path}", read_tensor(self.path, gathered, block, name))
        if part != "output":
            self._check_sum(gathered, linear, part, moment)
        elif moment.ndim == 3:  # blocks; a sketch may be negative
            self._check_sum(gathered, linear, part, moment.diagonal(dim1=1, dim2=2))
        return moment

    def _check_sum(self, gathered: Gathered, linear: str, part: str, squares: torch.Tensor) -> None:
        """StatisticsError where what must be sums of squares is negative."""
        if bool((squares < 0).any()):
            file = self.path / gathered.files[self.manifest.blocks[linear]].name
            raise StatisticsError(
                f"{file} holds no sum of squares in {linear}.{part}; delete {self.path} and calibrate again"
            )
