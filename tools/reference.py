"""Writes docs/reference/: one page per verb of the command line, made from the code.

    python tools/reference.py

A page has the usage, the arguments, the options with type, default and help, what a verb writes, and its exit codes.
Nothing in it depends on the terminal. `tests/cli/test_reference.py` fails where a page is not current.
"""

import inspect
from dataclasses import dataclass
from enum import StrEnum
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from spectrim.cli import app
from spectrim.settings import EFFORTS

FOLDER = Path(__file__).parents[1] / "docs" / "reference"

WRITES = {
    "anatomy": "Nothing, but for the file that `--json` names.",
    "bench": "Nothing, but for the file that `--json` names.",
    "calibrate": "The statistics directory `--out`: moments as safetensors, `manifest.json`, and `cost.json` with what "
    "was estimated and what it took. A run that was stopped goes on from there.",
    "chat": "Nothing.",
    "compress": "A checkpoint in `--out`, or one for each limit in it: weights, config, tokenizer and processor, "
    "`plan.json`, the record `spectrim.json` (recipe, data, predicted loss, estimated and actual cost) and the model "
    "card. Without `--stats`, statistics in `OUT.stats`. Spectra, options and compensated blocks beside the "
    "statistics, from which further runs start.",
    "demo": "Statistics, checkpoints, `results.json` and, with the extra `report`, `report.html` in `--out`.",
    "evaluate": "The file that `--json` names, and with `--card` the model card of each compressed checkpoint.",
    "inspect": "`inspection.json` and plots in `--out`.",
    "pareto": "Checkpoints, one for each recipe and size, and `results.json` in `--out`.",
    "plan": "Spectra and options beside the statistics, with `--measure` also what was measured and compensated, and "
    "the file that `--json` names.",
    "push": "A model repository on the Hugging Face hub.",
    "recipes": "Nothing, but for the file that `--json` names.",
    "report": "The page, one HTML file.",
}
EXIT_CODES = """| code | meaning |
|---|---|
| 0 | done, or a dry run without a mistake |
| 2 | a mistake in the command, the files or the machine: one sentence on standard error says which, and the remedy |
| 130, 143 | stopped by Ctrl-C or SIGTERM; a sentence says how to go on |
"""


_WORDS = {str: "text", int: "integer", float: "number", Path: "path"}


@dataclass(frozen=True)
class Parameter:
    """An argument or option: flags (none of an argument), type and default in words, and help."""

    name: str
    flags: tuple[str, ...]
    kind: str
    default: str
    required: bool
    several: bool
    help: str


def verbs() -> dict[str, tuple[str, list[Parameter]]]:
    """Docstring and parameters of each verb, by name."""
    made = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {}
    for registered in sorted(app.registered_commands, key=lambda one: str(one.name)):
        name, function = str(registered.name), registered.callback
        assert function is not None
        known, flags = signature(function).parameters, {p.name: p for p in made[name].params}
        parameters = [
            _parameter(p.name, p.annotation, p.default, flags[p.name])
            for p in known.values()
            if get_origin(p.annotation) is Annotated
        ]
        found[name] = inspect.cleandoc(function.__doc__ or ""), parameters
    return found


def _parameter(name: str, annotation: Any, default: Any, parsed: Any) -> Parameter:
    kind, info = get_args(annotation)
    option = isinstance(info, OptionInfo)
    flags = (*parsed.opts, *parsed.secondary_opts) if option else ()
    plain = [part for part in get_args(kind) if part is not type(None)] if type(None) in get_args(kind) else [kind]
    several = any(get_origin(part) is list for part in plain)
    plain = [get_args(part)[0] if get_origin(part) is list else part for part in plain]
    words = [
        " or ".join(f"`{choice.value}`" for choice in part)
        if isinstance(part, type) and issubclass(part, StrEnum)
        else "flag" if part is bool
        else _WORDS[part]
        for part in plain
    ]  # fmt: skip
    required = default is Signature.empty
    value = str(default).lower() if isinstance(default, bool) else str(default)
    shown = "required" if required else "–" if default in (None, "") else f"`{value}`"
    kinds = " or ".join(words) + (", repeatable" if several and option else "")
    return Parameter(name, flags, kinds, shown, required, several, _cell(info.help))


def page(name: str, text: str, parameters: list[Parameter]) -> str:
    """The page of one verb, as Markdown."""
    arguments = [p for p in parameters if not p.flags]
    options = [p for p in parameters if p.flags]
    words = [f"{p.name.upper()}{'...' if p.several else ''}" for p in arguments]
    must = [f"{max(p.flags, key=len)} {p.kind.upper()}" for p in options if p.required]
    first, *rest = (" ".join(part.split()) for part in text.split("\n\n"))
    lines = [
        f"# spectrim {name}",
        "",
        first,
        "",
        "```",
        " ".join(["spectrim", name, *words, *must, "[OPTIONS]"]),
        "```",
    ]
    lines += ["", *(line for part in rest for line in (part, ""))]
    if arguments:
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| `{word}` | {p.help} |" for word, p in zip(words, arguments, strict=True)] + [""]
    lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
    for p in options:
        lines.append(f"| {', '.join(f'`{flag}`' for flag in p.flags)} | {p.kind} | {p.default} | {p.help} |")
    if any(p.name == "effort" for p in options):
        lines += ["", "## Effort", "", *_efforts()]
    lines += ["", "## What it writes", "", WRITES[name], "", "## Exit codes", "", EXIT_CODES]
    return "\n".join(lines)


def index() -> str:
    """The list of all pages."""
    lines = ["# Reference", "", "Made from the code by `python tools/reference.py`.", "", "| verb | what it does |"]
    lines += ["|---|---|"]
    for name, (text, _) in verbs().items():
        lines.append(f"| [{name}]({name}.md) | {_cell(text.split(chr(10) * 2)[0])} |")
    return "\n".join(lines) + "\n"


def _efforts() -> list[str]:
    rows = ["| effort | samples of each modality | changes of a recipe that compensates |", "|---|---|---|"]
    for name, effort in EFFORTS.items():
        changes = ", ".join(f"`{key}={value}`" for key, value in effort.compensation.items())
        rows.append(f"| `{name}` | {effort.samples} | {changes or 'none'} |")
    rows += [
        "",
        "`--samples` wins over it, and so does `--set` of anything in `compensate`, which then is left as it is.",
    ]
    return rows


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def pages() -> dict[str, str]:
    """Name of the file → its content."""
    return {"README.md": index()} | {f"{name}.md": page(name, *about) for name, about in verbs().items()}


def main() -> None:
    """Write all pages, and remove those of verbs that are gone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, content in wanted.items():
        (FOLDER / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
