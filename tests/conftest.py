"""Fixtures that several files of tests use; plain helpers are in ``helpers``."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # what takes seconds to import is left to the processes that run tests
    from spectrim.anatomy import Anatomy
    from spectrim.calibrate import Statistics

if gc.isenabled():  # until tests run: imports leave nothing to collect
    gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """In a process that runs tests; one that hands them out gives each its share of the files in a row.

    So fixtures of a file are made once.
    """
    if config.getoption("tx", None):
        if config.option.dist == "load":
            config.option.dist = "worksteal"
        return
    import torch
    from hypothesis import settings

    settings.register_profile("suite", deadline=None)  # on a busy machine any example may take long
    settings.load_profile("suite")
    if not torch.cuda.is_available():  # before triton is imported: its kernels run in its interpreter
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and for the processes that it starts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """The collector leaves alone what was imported, which costs a tenth of the time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of text, for reading only."""
    from helpers.samples import WORDS

    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(WORDS)
    return str(path)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Six images; their instructions have three lengths."""
    from helpers.samples import image_folder, write_jsonl

    image_folder(tmp_path / "pictures", 6)
    rows = [{"image": f"pictures/{i:03}.png", "instruction": " ".join(["w7"] * (1 + i % 3))} for i in range(6)]
    return write_jsonl(tmp_path / "pictures.jsonl", rows)


@pytest.fixture(scope="session")
def parts() -> "Anatomy":
    """Of the few-layer Llama."""
    import families
    from spectrim.anatomy import anatomy

    return anatomy(families.FAMILIES["llama"]())


@pytest.fixture(scope="module")
def calibrated(words: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, "Statistics"]]:
    """A model that sees and one that does not, with their statistics; a file may have others under this name."""
    from helpers.streams import prepare

    return {family: prepare(family, words, tmp_path_factory.mktemp(family) / "s") for family in ("llama", "llava")}
