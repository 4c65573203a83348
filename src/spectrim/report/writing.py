"""The entry point: from results on disk to one page."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from spectrim.checks import check_directory
from spectrim.errors import ReportError, UsageError
from spectrim.files import user_path, write_whole
from spectrim.report.reading import Material, Progress, read, read_files


def report(
    results: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one HTML page that shows results; it needs no network and no other file.

    Args:
        results: any of results.json of evaluate, pareto and bench, directories of checkpoints, inspection.json, and
            statistics directories, whose mismatch is analysed now. Checkpoints that results name are shown with them
            where they are still there.
        out: the file; one that was a page of this function is replaced.
        model: the dense model of the statistics, if no results name it.
        progress: is called with the stage, how much of it is done, and how much there is.

    Returns:
        The path of the page.

    Raises:
        ReportError: the packages that draw are not installed, or something is named that no page shows.
        UsageError: the page cannot be written there.
        SpectrimError: a file is damaged; names it.
    """
    check_packages()
    path = user_path(out)
    check_page(path)
    paths = [results] if isinstance(results, str | Path) else results
    write_page(read(paths, model=model, progress=progress), path)
    return path


def check_report(results: Sequence[str | Path], out: str | Path, *, model: str | Path | None = None) -> None:
    """What of :func:`report` can be known before a model is loaded or a page is drawn. Raises as it does."""
    check_packages()
    check_page(user_path(out))
    read_files(results, model=model)


def write_page(material: Material, path: Path) -> None:
    """Draw what was read, and write it whole. Raises OSError."""
    from spectrim.report.page import page  # its packages are optional

    write_whole(path, page(material).encode())


def check_page(path: Path, flag: str = "-o") -> None:
    """UsageError unless a page can be written at `path`: nothing is replaced but a page of ours or an empty file."""
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a directory; name a file in it, such as {path / 'report.html'}")
    if path.exists() and not _is_page(path):
        raise UsageError(f"{flag} {path} exists and is no page of spectrim report; name another file")
    check_directory(path.parent, flag)


def _is_page(path: Path) -> bool:
    if not path.is_file():  # a device, such as /dev/null
        return False
    try:
        with path.open("rb") as file:
            beginning = file.read(200)
    except OSError:
        return False
    return not beginning or b'content="spectrim report"' in beginning


def check_packages() -> None:
    """ReportError where the packages that draw the page are not installed."""
    if missing := [name for name in ("altair", "vl_convert") if find_spec(name) is None]:
        raise ReportError(f'the page needs {" and ".join(missing)}; run pip install "spectrim[report]"')
