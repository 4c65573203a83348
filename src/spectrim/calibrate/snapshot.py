"""Snapshots: running sums to disk and back, so that a killed run loses a few minutes and no file.

A snapshot writes block files under names that carry its generation, then the manifest that names them, then deletes the
files of other generations. Whatever the moment of a kill, the manifest names whole files of one and the same state.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.manifest import MANIFEST, Gathered, Manifest, TensorFile
from spectrim.calibrate.moments import MomentSum, OutputSum, Sums
from spectrim.calibrate.tensors import check_files, file_digest, read_gram, read_tensor, written
from spectrim.disk.lock import LOCK
from spectrim.errors import StatisticsError
from spectrim.estimate import amount
from spectrim.files import PART, replacing, write_whole
from spectrim.maths.sums import Gram

_MOMENTS = re.compile(r".+\.g\d{6}\.safetensors")
_OURS = re.compile(rf"{_MOMENTS.pattern}|\..+{re.escape(PART)}|{re.escape(LOCK)}")


class SnapshotStore:
    """The statistics directory of a running calibration.

    Args:
        directory: made if missing.
        fresh: the manifest of a run that has gathered nothing yet.

    Raises:
        StatisticsError: the directory holds something else, or statistics that do not fit ``fresh``.
    """

    def __init__(self, directory: Path, fresh: Manifest) -> None:
        self._directory = directory
        if (directory / MANIFEST).exists():
            manifest = Manifest.read(directory)
            manifest.check_fits(fresh, directory)
            update = {"version": fresh.version, "versions": fresh.versions, "data": fresh.data}
            self.manifest = manifest.model_copy(update=update)
            return
        check_home(directory)
        self.manifest = fresh

    def check(self) -> None:
        """Before going on from the last snapshot: raises StatisticsError where a file of it has changed."""
        check_files(self._directory, self.manifest)

    def restore(self, unit: str, home: torch.device) -> Sums:
        """The sums of one unit in the last snapshot, bit for bit; zero sums when there is none."""
        return self._sums(self.manifest.gathered[unit], home)

    def save(self, sums: dict[str, Sums], *, finished: bool, complete: bool) -> None:
        """Write a snapshot; units that are not given, or have not grown since the last one, keep their files.

        Args:
            sums: by unit.
            finished: these units have all of their samples: their moments are packed.
            complete: all units are finished.

        Raises:
            StatisticsError: the directory cannot be written.
        """
        try:
            self._save(sums, finished, complete)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            with suppress(OSError):
                self._clean()  # makes room, too
            raise StatisticsError(
                f"{self._directory} cannot be written ({error}); make room or choose another output directory"
            ) from error

    def _save(self, sums: dict[str, Sums], finished: bool, complete: bool) -> None:
        generation = self.manifest.generation + 1
        written = {unit: self._write(unit, state, generation, finished) for unit, state in sums.items()}
        gathered = self.manifest.gathered | written
        update = {"generation": generation, "complete": complete, "gathered": gathered}
        manifest = self.manifest.model_copy(update=update)
        write_whole(self._directory / MANIFEST, manifest.json())
        self.manifest = manifest
        self._clean()

    def _clean(self) -> None:
        """Remove the files of other generations than the one that the manifest names."""
        named = {file.name for part in self.manifest.gathered.values() for file in part.files.values()}
        for path in self._directory.iterdir():
            if _MOMENTS.fullmatch(path.name) and path.name not in named:
                path.unlink()

    def _sums(self, gathered: Gathered, home: torch.device) -> Sums:
        def read(linear: str, part: str) -> torch.Tensor:
            block = self.manifest.blocks[linear]
            return read_tensor(self._directory, gathered, block, f"{linear}.{part}").to(home)

        def gram(linear: str, part: str) -> Gram:
            block, name = self.manifest.blocks[linear], f"{linear}.{part}"
            return read_gram(self._directory, gathered, block, name).to(home)

        sums = Sums(home, gathered.batches, gathered.samples, dict(gathered.owners), labels=gathered.labels)
        for owner, count in gathered.counts.items():
            sums.moments[owner] = MomentSum(gram(owner, "second"), read(owner, "abs_sum"), count)
        sums.fisher = {linear: read(linear, "fisher_cols") for linear in gathered.fisher}
        for linear, count in gathered.outputs.items():
            form = CurvatureForm.read(self.manifest.forms[linear])
            get = gram if form.kind == "full" else read
            held = {part: get(linear, part) for part in form.parts}
            sums.outputs[linear] = OutputSum(form, held, read(linear, "traces"), count)
        return sums

    def _write(self, unit: str, sums: Sums, generation: int, finished: bool) -> Gathered:
        if (before := self.manifest.gathered[unit]).batches == sums.batches:
            return before

        def held(linear: str, part: str, value: torch.Tensor | Gram) -> dict[str, torch.Tensor]:
            if not isinstance(value, Gram):
                return {f"{linear}.{part}": value}
            products = torch.promote_types(self.manifest.model.dtype(f"{linear}.weight"), torch.float32)
            return written(f"{linear}.{part}", value, products if finished else torch.float64)

        blocks = self.manifest.blocks
        moments = {owner: moment for owner, moment in sums.moments.items() if moment.count}  # others were never reached
        outputs = {linear: output for linear, output in sums.outputs.items() if output.count}
        files = {}
        for block in sorted({blocks[linear] for linear in (*moments, *sums.fisher, *outputs)}):
            tensors: dict[str, torch.Tensor] = {}
            for owner, moment in moments.items():
                if blocks[owner] == block:
                    tensors |= held(owner, "second", moment.gram) | {f"{owner}.abs_sum": moment.abs_sum}
            tensors |= {f"{name}.fisher_cols": value for name, value in sums.fisher.items() if blocks[name] == block}
            for name, output in outputs.items():
                if blocks[name] == block:
                    for kind, value in (*output.held.items(), ("traces", output.traces)):
                        tensors |= held(name, kind, value)
            path = self._directory / f"{unit}.{block}.g{generation:06d}.safetensors"
            with replacing(path) as part:
                save_file(tensors, part)
                files[block] = TensorFile(name=path.name, size=part.stat().st_size, sha256=file_digest(part))
        return Gathered(
            batches=sums.batches,
            samples=sums.samples,
            labels=sums.labels,
            owners={linear: owner for linear, owner in sums.owners.items() if owner in moments},
            counts={owner: moment.count for owner, moment in moments.items()},
            fisher=tuple(sums.fisher),
            outputs={name: output.count for name, output in outputs.items()},
            files=files,
        )


def check_home(directory: Path) -> None:
    """StatisticsError where statistics cannot be written: the path is a file, or a directory with other files."""
    if directory.is_file():
        raise StatisticsError(f"{directory} is a file; choose another output directory")
    if not directory.exists() or (directory / MANIFEST).exists():
        return
    if (foreign := next(_foreign(directory), None)) is not None:
        raise StatisticsError(f"{directory} holds other files ({foreign.name}); choose another output directory")


def check_space(directory: Path, nbytes: int) -> None:
    """StatisticsError where the disk has no room for statistics of so many bytes, less those that are there."""
    home = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    there = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    if (free := shutil.disk_usage(home).free) < nbytes - there:
        raise StatisticsError(
            f"{directory} will take {amount(nbytes)} and its disk has {amount(free)} left; choose another disk, or "
            "keep output moments in smaller forms, such as --curvature-form gate=sketch:256"
        )


def _foreign(directory: Path) -> Iterator[Path]:
    """Entries of a directory that no calibration writes; one that was killed early leaves no manifest."""
    return (path for path in sorted(directory.iterdir()) if not _OURS.fullmatch(path.name))
