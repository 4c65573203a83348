"""The built-in model: its tasks, its text, its images, and the checkpoint itself."""

from importlib.resources import files
from pathlib import Path


def resolve(model: str | Path) -> str:
    """A model name for the loaders: the packaged directory for "demo", anything else as it is."""
    return str(files(__package__).joinpath("dense")) if str(model) == "demo" else str(model)
