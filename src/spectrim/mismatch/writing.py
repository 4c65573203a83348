"""The analysis as files: JSON, and charts where their packages are installed."""

from importlib.util import find_spec
from pathlib import Path

from spectrim.errors import ReportError
from spectrim.files import user_path, write_whole
from spectrim.mismatch.analysis import Inspection


def write(inspection: Inspection, directory: str | Path, *, plots: bool = True) -> list[Path]:
    """Write ``inspection.json`` and the plots, each as PNG and as an HTML page that needs no network.

    Plots are ``effective_rank`` and, where images were seen, ``rho`` and ``error_curves``. All are drawn before the
    first file is written, and every file appears whole or not at all.

    Raises:
        ReportError: the plots' packages are not installed, or a file cannot be written.
    """
    directory = user_path(directory)
    files = {"inspection.json": inspection.to_json().encode()}
    if plots:
        check_plots()
        from spectrim.mismatch.plots import draw  # its packages are optional

        files |= draw(inspection)
    try:
        for name, content in files.items():
            write_whole(directory / name, content)
    except OSError as error:
        raise ReportError(f"{directory} cannot be written ({error}); free space or name another directory") from error
    return [directory / name for name in files]


def check_plots() -> None:
    """ReportError where the packages that draw plots are not installed."""
    if missing := [name for name in ("altair", "vl_convert") if find_spec(name) is None]:
        raise ReportError(
            f'plots need {" and ".join(missing)}; run pip install "spectrim[report]", or ask for no plots'
        )
