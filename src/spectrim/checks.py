"""What can be known before a model is loaded: budgets, devices, sources of samples, and places to write to."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from spectrim.errors import BudgetError, UsageError
from spectrim.files import parse_json
from spectrim.samples import load_images, load_text
from spectrim.samples.sources import local_path, no_datasets
from spectrim.settings import counts

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # names of accelerate for several devices

_RESULTS = {"date", "versions"}  # keys of results of tasks and of suites


def check_retain(retain: float) -> float:
    """`retain` itself; BudgetError unless it lies in (0, 1]."""
    if not 0 < retain <= 1:
        raise BudgetError(f"a retention of {retain} is impossible; give a share between 0 and 1, such as 0.6")
    return retain


def check_device(name: str | None) -> None:
    """UsageError unless this machine has the device; None stands for any."""
    if name is None or name in _MAPS:
        return
    try:
        device = torch.device(name)
        module = torch.get_device_module(device)
    except RuntimeError as error:
        raise UsageError(f"there is no kind of device '{name}'; write cpu, cuda or cuda:0") from error
    count = module.device_count() if module.is_available() else 0
    if count <= (device.index or 0):
        has = f"{count} of the kind {device.type}" if count else f"none of the kind {device.type}"
        raise UsageError(f"device '{name}' is not there, this machine has {has}; choose another, such as cpu")


def check_sources(text: str | tuple[str, ...] | None, images: str | tuple[str, ...] | None) -> None:
    """Read local sources of samples; SampleError for one that is missing, of a wrong kind, empty or malformed.

    Data sets of the hub are not fetched, but the package that fetches them is asked for.
    """
    for name in counts(text, 1) if text is not None else ():
        if _reads_at_once(name):
            load_text(name, check=True)
    for name in counts(images, 1) if images is not None else ():
        if _reads_at_once(name):
            load_images(name, samples=1, seed=0)


def _reads_at_once(source: str) -> bool:
    """Whether a source is local; SampleError for one that is not local and cannot be fetched."""
    if source == "builtin":
        return False
    if local_path(source) is not None:
        return True
    if find_spec("datasets") is None:
        raise no_datasets(source)
    return False


def check_file(path: Path, flag: str) -> None:
    """UsageError unless results can be written at `path`; `flag` is the option that names it.

    What is there already is replaced where it is empty or holds results of an evaluation, and else left alone.
    """
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a directory; name a file in it")
    if path.exists() and not _holds_results(path):
        raise UsageError(f"{flag} {path} exists and holds no results of an evaluation; name another file")
    check_directory(path.parent, flag)


def _holds_results(path: Path) -> bool:
    if not path.is_file():  # a device, such as /dev/null
        return False
    try:
        content = parse_json(path.read_bytes() or b"{}")
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and (not content or content.keys() >= _RESULTS)


def check_directory(path: Path, flag: str) -> None:
    """UsageError unless `path` is a directory that can be written to, or can be made."""
    try:
        first = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        if not first.is_dir():
            raise UsageError(f"{flag} {path} cannot be, since {first} is a file; name a directory")
        with TemporaryDirectory(dir=first, prefix=".spectrim-"):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written ({error}); name another directory") from error


def check_once(values: Sequence[object], flag: str) -> None:
    """UsageError where a value is given twice."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UsageError(f"{flag} {value} is given twice; give each value once")
