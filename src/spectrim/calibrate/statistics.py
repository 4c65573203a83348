"""An opened statistics directory."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from spectrim.calibrate.fingerprint import model_print
from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.manifest import COST_FILE, Gathered, Manifest, TensorFile
from spectrim.calibrate.moments import GradMoment, Moment, OutputMoment
from spectrim.errors import StatisticsError
from spectrim.files import read_object
from spectrim.maths.roots import check_finite
from spectrim.samples import Modality


def _shapes(unit: str, manifest: Manifest) -> dict[str, dict[str, tuple[int, ...]]]:
    """By block and tensor name, the shapes of everything that one unit must have on disk, all float64."""
    gathered, wanted = manifest.gathered[unit], dict[str, dict[str, tuple[int, ...]]]()

    def want(linear: str, shapes: dict[str, tuple[int, ...]]) -> None:
        wanted.setdefault(manifest.blocks[linear], {}).update(
            {f"{linear}.{part}": shape for part, shape in shapes.items()}
        )

    sizes = {linear: manifest.model.shape(f"{linear}.weight") for linear in manifest.blocks}  # [out, in]
    for owner in gathered.counts:
        width = sizes[owner][1]
        want(owner, {"second": (width, width), "abs_sum": (width,)})
    for linear in gathered.fisher:
        want(linear, {"fisher_cols": (sizes[linear][1],)})
    for linear in gathered.outputs:
        shapes = manifest.output_forms[linear].shapes(sizes[linear][0])
        want(linear, shapes | {"traces": (4, manifest.heads.get(linear, 1))})
    return wanted


def read_tensor(directory: Path, gathered: Gathered, block: str, name: str) -> torch.Tensor:
    """One float64 tensor of a block's file; StatisticsError when the file is gone or damaged."""
    path = directory / gathered.files[block].name
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise StatisticsError(f"{path} cannot be read ({error}); delete {directory} and calibrate again") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 2 GB/s and more per core. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest: its digest, and the names and shapes of its tensors.

    Raises:
        StatisticsError: a file is missing, truncated or changed, or holds other tensors; names the file.
    """
    wanted = [
        (directory / gathered.files[block].name, gathered.files[block], shapes[block])
        if block in shapes and block in gathered.files
        else (directory / f"{unit}.{block}", None, {})
        for unit, gathered in manifest.gathered.items()
        for shapes in [_shapes(unit, manifest)]
        for block in sorted(shapes.keys() | gathered.files.keys())
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # which reads and hashes files side by side
        differences = pool.map(lambda file: _difference(*file), wanted)
        for (path, _, _), difference in zip(wanted, differences, strict=True):
            if difference is not None:
                raise StatisticsError(f"{path} {difference}; delete {directory} and calibrate again")


def _difference(path: Path, known: TensorFile | None, shapes: dict[str, tuple[int, ...]]) -> str | None:
    try:
        if known is None or path.stat().st_size != known.size:
            return "is missing or truncated"
        if path.is_symlink():
            return "is a link, which may lead to anything"
        if file_digest(path) != known.sha256:
            return "has changed since it was written"
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            held = {name: tuple(part.get_shape()) for name, part in parts.items()}
            kinds = {part.get_dtype() for part in parts.values()}
    except (OSError, SafetensorError):
        return "is missing or truncated"
    if strange := sorted(held.items() ^ shapes.items()):
        return f"does not hold the moments of this model ({strange[0][0]})"
    return None if kinds <= {"F64"} else f"holds moments in {min(kinds - {'F64'})}"


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
                form = CurvatureForm.read(self.manifest.forms[linear])
                sums = {part: self._read(gathered, linear, part) for part in form.parts}
                return OutputMoment(form, sums, self._read(gathered, linear, "traces"), count, gathered.labels)
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

    def _read(self, gathered: Gathered, linear: str, part: str) -> torch.Tensor:
        block, name = self.manifest.blocks[linear], f"{linear}.{part}"
        moment = check_finite(f"the moment {name} in {self.path}", read_tensor(self.path, gathered, block, name))
        if not _is_sum(part, moment, self.manifest.forms.get(linear, "")):
            raise StatisticsError(
                f"{self.path / gathered.files[block].name} holds no sum of squares in {name}; delete {self.path} and "
                "calibrate again"
            )
        return moment


def _is_sum(part: str, moment: torch.Tensor, form: str) -> bool:
    """Whether a tensor can be this moment: a matrix of products is symmetric, and squares are not negative."""
    if part == "output" and form.startswith("sketch"):
        return True
    if part not in ("second", "output"):
        return not bool((moment < 0).any())
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    skew = float((moment - moment.mT).abs().max())  # of float32 products: rounding
    return not bool((diagonal < 0).any()) and skew <= 1e-3 * float(diagonal.max())
