"""The built-in model: its tasks, its text, its images, and the checkpoint itself."""

from importlib.resources import files
from pathlib import Path

from spectrim.files import user_path


def resolve(model: str | Path) -> str:
    """A model name for the loaders: the packaged directory for "demo"; of anything else a ``~`` is read as home."""
    if str(model) == "demo":
        return str(files(__package__).joinpath("dense"))
    return str(user_path(model)) if str(model).startswith("~") else str(model)
