"""What a verb says: results on standard output, all else on standard error; bars on a terminal, lines in a log.

Whatever is said goes through the logger ``spectrim``, so that a log file has all of it.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from spectrim.errors import UsageError, printable
from spectrim.estimate import duration
from spectrim.settings import RunOptions

_RESULTS, _PROGRESS = "spectrim.results", "spectrim.progress"
_EVERY = 60.0  # seconds between two lines of one stage
_COUNTED = {  # by stage: what its numbers count
    "calibrate": "samples",
    "decompose": "linears",
    "options": "linears",
    "measure": "plans",
    "compensate": "blocks",
    "inspect": "linears",
}

Report = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class _Manner:
    """How the running verb speaks: without progress, and with standard output for JSON alone."""

    quiet: bool = False
    json_out: bool = False


_PLAIN = _Manner()
_MANNER: ContextVar[_Manner] = ContextVar("manner", default=_PLAIN)


class _Standard(logging.Handler):
    """Standard error, whichever it is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        shown = record.name == _RESULTS or (record.name == _PROGRESS and sys.stderr.isatty())  # elsewhere
        if not shown:
            print(self.format(record), file=sys.stderr, flush=True)


@contextmanager
def speaking(options: RunOptions, *, json_out: bool) -> Iterator[None]:
    """The handlers of a verb inside the block; what it raises is in the log file as well.

    Raises UsageError where options contradict each other or the log file cannot be written.
    """
    options.check_together()
    if _assists():
        options = options.model_copy(update={"quiet": True, "verbose": False, "log_file": None})
    logger, handlers = logging.getLogger("spectrim"), list[logging.Handler]()
    handlers.append(_Standard(logging.DEBUG if options.verbose else logging.ERROR if options.quiet else logging.INFO))
    if options.log_file is not None:
        try:
            handlers.append(logging.FileHandler(options.log_file, encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--log-file {options.log_file} cannot be written ({error}); name another file") from error
        handlers[-1].setLevel(logging.DEBUG)
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if options.quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which are imported later
    before, manner = logger.level, _MANNER.set(_Manner(options.quiet, json_out))
    logger.setLevel(min(handler.level for handler in handlers))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        logging.getLogger(_RESULTS).error("%s", printable(str(error)) or type(error).__name__)
        raise
    finally:
        _MANNER.reset(manner)
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def show(output: RenderableType) -> None:
    """Print a result: a table, or text, in which nothing is read as markup.

    A terminal gets at least 120 columns, which tables need. In a pipe nothing is folded. Where standard output is for
    JSON alone, a result is said like all else.
    """
    if _assists():
        return
    text = output if isinstance(output, str) else _rendered(output)
    if _MANNER.get().json_out:
        logging.getLogger("spectrim").info("%s", text)
        return
    logging.getLogger(_RESULTS).info("%s", text)
    console = Console(markup=False, highlight=False)
    if isinstance(output, str) or not console.is_terminal:
        typer.echo(text)
    else:
        Console(markup=False, highlight=False, width=max(console.width, 120)).print(output)


def _assists() -> bool:
    """Whether this is a process of torchrun's that leaves it to the first one to say what there is to say."""
    return os.environ.get("RANK", "0") != "0"


def _rendered(output: RenderableType) -> str:
    """As text with as many columns as it needs."""
    file = StringIO()
    Console(file=file, markup=False, highlight=False, width=10_000).print(output)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def write_results(path: Path | None, content: str) -> None:
    """Write JSON to a file, or to standard output where the path is ``-``; None is nowhere."""
    if path is None:
        return
    if is_standard(path):
        typer.echo(content.rstrip("\n"))
        return
    from spectrim.files import write_whole

    write_whole(path, content.encode())
    show(f"results: {path}")


def stamped(content: Mapping[str, Any]) -> str:
    """Indented JSON of a result, with the date and the versions that made it."""
    from spectrim.evaluate.results import versions

    made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions("torch", "transformers")}
    return json.dumps({**made, **content}, indent=2, ensure_ascii=False)


def is_standard(path: Path | None) -> bool:
    """Whether JSON goes to standard output."""
    return path is not None and str(path) == "-"


@contextmanager
def progress() -> Iterator[Report]:
    """On a terminal a bar with the time left for each stage; elsewhere, and in log files, lines (:class:`Pace`)."""
    pace = Pace(lambda line: logging.getLogger(_PROGRESS).info("%s", line))
    if _MANNER.get().quiet or not sys.stderr.isatty():
        yield pace
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        stages: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            pace(stage, done, total)
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total, visible=done < total)

        yield report


class Pace:
    """Says a line a minute of what is done and what is left, and one when a stage is done.

    Args:
        say: gets each line.
        clock: gives the time in seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._stage, self._first, self._done = "", 0, 0
        self._began = self._said = self._last = clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """So much of a stage is done. A stage begins with its first report, or with the last one of another."""
        now = self._clock()
        if stage != self._stage or done < self._done:
            self._stage, self._first = stage, 0 if done == 1 else done
            self._began = self._said = self._last if done == 1 else now
        elif done == self._done:
            return
        self._done, self._last = done, now
        counted = f" {_COUNTED[stage]}" if stage in _COUNTED else ""
        if done > self._first:
            if done >= total:
                self._say(f"{stage}: all {total}{counted} done after {duration(now - self._began)}")
            elif now - self._said >= _EVERY:
                left = (now - self._began) / (done - self._first) * (total - done)
                self._say(f"{stage}: {done} of {total}{counted}, about {duration(left)} left")
                self._said = now


def quiet() -> None:
    """Turn off the progress bars of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
