"""Versions of installed packages, for the records of what was made with them."""

from importlib.metadata import PackageNotFoundError, version


def release(package: str = "spectrim") -> str | None:
    """Version of an installed package; None where it is not installed, as spectrim may be in a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
