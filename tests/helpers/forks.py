"""Processes of their own that start at once: forks of one that has imported torch and transformers, and no spectrim."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["accelerate", "sklearn.metrics", "torch._dynamo", "torch.distributed.checkpoint", "compressed_tensors",
     "transformers.generation", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
     "transformers.models.auto.processing_auto", "transformers.models.clip.modeling_clip",
     "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava"]
)  # fmt: skip


def _python(
    arguments: list[str], folder: Path, environment: Mapping[str, str], out: Connection, err: Connection
) -> None:
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background of a shell ignore
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None  # which the environment may have moved
    import torch

    torch.set_num_threads(1)
    kind, what, *rest = arguments
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        exec(what, {"__name__": "__main__"})


class Fork:
    """``python -m MODULE …`` or ``python -c CODE …``, with one thread; what it prints as `subprocess.Popen` has it."""

    def __init__(
        self, *arguments: str | Path, folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        reader, out = FORKS.Pipe(duplex=False)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  read and closed by `done`
        err = Connection(os.dup(self._errors.fileno()))
        given = ([*map(str, arguments)], folder or Path.cwd(), environment or {})
        self.process = FORKS.Process(target=_python, args=(*given, out, err))
        self.process.start()
        out.close()
        err.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()))
        reader.close()

    def done(self) -> subprocess.CompletedProcess[str]:
        """What it came to, when it ends."""
        with self.stdout, self._errors:
            said = self.stdout.read()
            self.process.join()
            self._errors.seek(0)
            return subprocess.CompletedProcess((), self.process.exitcode, said, self._errors.read())


def fork(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, waited for."""
    return Fork(*arguments, **options).done()


def run_ranks(function: Callable[..., None], *arguments: object) -> None:
    """``function(rank, *arguments)`` in two processes side by side, to their ends; what one raises is raised."""
    import torch

    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")
