"""The command line: one thin function per verb. What a verb needs is imported when it runs, so that help is instant."""

import logging
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from spectrim.cli import chatting, compressing, looking, measuring, sharing
from spectrim.cli.verbs import app
from spectrim.errors import SpectrimError, UsageError, first_line, printable
from spectrim.settings import REPLACED
from spectrim.versions import release

__all__ = ["app", "chatting", "compressing", "looking", "main", "measuring", "sharing"]


def _show_version(wanted: bool) -> None:
    if wanted:
        number = release()
        typer.echo(f"spectrim {number}" if number else "spectrim, from a source tree that is not installed")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Compress vision-language models, after training and without labels."""


def _check_replaced(arguments: list[str]) -> None:
    """UsageError for an option that another one has taken the place of."""
    named = {argument.partition("=")[0] for argument in arguments}
    for name, other in REPLACED.items():
        if (flag := f"--{name.replace('_', '-')}") in named:
            raise UsageError(f"{flag} is gone; --{other}, such as --{other} 20GiB, takes its place")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(number)


def main() -> None:
    """Entry point: the user's mistakes are one line on standard error and exit code 2."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_replaced(sys.argv)
        app()
    except SpectrimError as error:
        _fail(str(error), 2, error)
    except OSError as error:
        _fail(f"{error}; check the path and the free space", 2, error)
    except (MemoryError, RuntimeError) as error:
        said = first_line(error)
        if not isinstance(error, MemoryError) and "out of memory" not in said and "can't allocate memory" not in said:
            raise
        _fail(f"the memory is too small ({said}); lower --batch-size or --seqlen, or change --dtype", 2, error)
    except KeyboardInterrupt as stop:
        _fail("stopped", 130, stop)
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int, cause: BaseException) -> NoReturn:
    print(f"spectrim: {printable(message)}", file=sys.stderr)
    raise SystemExit(code) from cause
