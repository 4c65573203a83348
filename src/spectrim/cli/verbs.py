"""What all verbs share: the application, options made from a record of settings, and Ctrl-C."""

import signal
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import reduce, wraps
from inspect import Parameter, signature
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from spectrim.cli.console import is_standard, speaking
from spectrim.errors import UsageError
from spectrim.files import parse_yaml, user_path
from spectrim.settings import OptionRecord, RunOptions

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A model directory, a hub id, a .gguf file, or 'demo'.")]
Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cpu or cuda:0.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the files' own if not given.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings; only if you have read it.")
]
Json = Annotated[
    Path | None, typer.Option(help="Write the results here too; '-' is standard output, with nothing else on it.")
]
Dry = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be read, gathered and written, and do nothing of it.")
]
_DTYPES = ("float32", "bfloat16", "float16")


def verb(
    name: str, *, after_stop: str, record: type[OptionRecord] | None = None, runs: bool = True
) -> Callable[[Callable[..., None]], Any]:
    """Make a function a command.

    With a `record` of settings, the command has an option for each field, with its default and help, and the function
    gets all of them as `options`, and as `given` the values of those that the command line names. `after_stop` ends the
    sentence that Ctrl-C leaves: how to go on. What `runs` a while has the options of :class:`RunOptions`.
    """
    records: list[type[OptionRecord]] = [] if record is None else [record]
    records += [RunOptions] if runs else []

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def run(ctx: typer.Context, **values: Any) -> None:
            said = {field: values.pop(field) for field in RunOptions.model_fields} if runs else {}
            said = {field: user_path(value) if isinstance(value, Path) else value for field, value in said.items()}
            with speaking(RunOptions.checked(**said), json_out=is_standard(values.get("json"))):
                if record is not None:
                    read = {field: _value(record, field, values.pop(field)) for field in record.model_fields}
                    values["options"] = record.checked(**read)
                    values["given"] = {field: read[field] for field in read if is_given(ctx, field)}
                values = {key: user_path(value) if isinstance(value, Path) else value for key, value in values.items()}
                if "ctx" in signature(function).parameters:
                    values["ctx"] = ctx
                try:
                    function(**values)
                except KeyboardInterrupt as stop:
                    code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
                    print(f"spectrim: stopped; {after_stop}", file=sys.stderr)
                    raise SystemExit(code) from stop

        own = [p for name, p in signature(function).parameters.items() if name not in ("ctx", "options", "given")]
        options = [option for one in records for option in _options(one)]
        ctx = Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [ctx, *(p.replace(kind=Parameter.KEYWORD_ONLY) for p in own), *options]
        run.__signature__ = signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name)(run)
        return run

    return decorate


def check_results(path: Path | None) -> None:
    """UsageError unless results can be written where ``--json`` says."""
    from spectrim.checks import check_file

    if path is not None and not is_standard(path):
        check_file(path, "--json")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse(context: typer.Context, names: Sequence[str], where: str) -> None:
    """UsageError where one of these options is given, which have no effect there."""
    for name in names:
        if is_given(context, name):
            flags = next(p.opts for p in context.command.params if p.name == name)
            raise UsageError(f"{flags[0]} has no effect {where}; leave it out")


def _options(record: type[OptionRecord]) -> list[Parameter]:
    """One option per field; those of the record's own class come before those that it inherits."""
    fields = record.model_fields
    own = [name for name in record.__annotations__ if name in fields]
    made = []
    for name in [*own, *(name for name in fields if name not in own)]:
        kind, default = _plain(name, fields[name].annotation, fields[name].default)
        flags = [record.flag(name)] if fields[name].json_schema_extra else []
        option = typer.Option(*flags, help=fields[name].description)
        made.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]))
    return made


def _plain(name: str, kind: Any, default: Any) -> tuple[Any, Any]:
    """A field's type and default in the types that options have."""
    if get_origin(kind) is Literal:
        return StrEnum(name, {value: value for value in get_args(kind)}), default  # type: ignore[misc]
    if get_origin(kind) is dict:
        return list[str] | None, None
    if get_origin(kind) is tuple:
        return str, ",".join(default)
    if _several(kind):
        return list[str] | None, None if default is None else [default]
    if isinstance(default, str):
        return str, default  # "none" stands for None
    if parts := get_args(kind):  # a limit on one part of a union is the record's to check
        plain = (get_args(part)[0] if get_origin(part) is Annotated else part for part in parts)
        kind = reduce(or_, plain)
    return kind, default


def _several(kind: Any) -> bool:
    """Whether a field is a source, or several."""
    return any(get_origin(part) is tuple for part in get_args(kind))


def _value(record: type[OptionRecord], name: str, value: Any) -> Any:
    """The value of an option in the type of its field."""
    kind = record.model_fields[name].annotation
    if get_origin(kind) is dict:
        return pairs(value or [], f"{record.flag(name)} gate=sketch:256")
    if get_origin(kind) is tuple:
        return tuple(value.split(","))
    if _several(kind):
        return None if not value or [*value] == ["none"] else value[0] if len(value) == 1 else tuple(value)
    if isinstance(value, StrEnum):
        return value.value
    return None if value == "none" and type(None) in get_args(kind) else value


def pairs(values: Sequence[str], example: str) -> dict[str, Any]:
    """``key=value`` pairs; values are read as YAML, so numbers are numbers. `example` begins with the option's name."""
    option = example.split()[0]
    entries: dict[str, Any] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {value} has no {'key' if equals else 'value'}; write it as {example}")
        if key in entries:
            raise UsageError(f"{option} gives {key} twice; give it once")
        try:
            entries[key] = parse_yaml(text)
        except ValueError as error:
            raise UsageError(f"{option} {value} has a value that {error}; quote it") from error
    return entries


def dtype_of(name: str | None) -> "torch.dtype | None":
    """The dtype that ``--dtype`` names."""
    if name is None:
        return None
    if name not in _DTYPES:
        raise UsageError(f"--dtype {name} is not one of {', '.join(_DTYPES)}; choose one of these")
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
