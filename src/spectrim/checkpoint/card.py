"""The model card of a checkpoint: the README.md that a hub shows and that a person opens first."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from spectrim.checkpoint.config import SpectrimConfig
from spectrim.checkpoint.model_files import CARD, PROVENANCE
from spectrim.checkpoint.names import shortened
from spectrim.checkpoint.sources import sees, split_source
from spectrim.errors import CheckpointError, printable
from spectrim.files import write_whole
from spectrim.versions import release

_BEGIN, _END = "<!-- results by spectrim evaluate -->", "<!-- end of results -->"
# What is taken from the card of a base model, which anybody may have written, and how it must look.
_TERM = re.compile(r"[\w.+-]{1,96}")
_TERMS = {
    "license": _TERM,
    "license_name": _TERM,
    "license_link": re.compile(r"(https://[\w.-]+/)?(?![/.])[\w./%+-]{1,256}"),
    "language": re.compile(r"[\w-]{1,32}"),
}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # of a repository on the hub
_SUFFIX = ", compressed by spectrim"
_TITLE = re.compile(r"^# +(.+?) *$", re.MULTILINE)
_SNAPSHOT = re.compile(r"models--(.+)--(.+)/snapshots/[^/]+")
_MARKUP = re.compile(r"[\\`*\[\]<>#|&@]|(?<=\w)(?=://)|(?<=www)(?=\.)", re.IGNORECASE)  # bare addresses would be links
_ESCAPED = re.compile(r"\\([\\`*\[\]<>#|&@:.])")


def model_card(model: PreTrainedModel, record: Mapping[str, Any], *, standard: bool = False) -> str:
    """The text of README.md: front matter as the Hugging Face hub reads it, then what the checkpoint is.

    `record` is the provenance; the card leaves out what it lacks. A `standard` checkpoint is one that loads without
    spectrim (see ``checkpoint.plain``). The base model and its licence are
    found by ``model.name_or_path``: a hub id, a snapshot in the hub's cache, or a directory with a card of its own.
    """
    name, base, terms = _base(model.name_or_path)
    name = name or type(model).__name__
    quantization = getattr(model.config, "quantization_config", None)
    factored = quantization if isinstance(quantization, SpectrimConfig) else None
    vision = sees(model.config)
    matter = {
        **terms,
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": ["spectrim", *(["compressed-tensors" if standard else "low-rank", "compressed"] if factored else [])],
    }
    parts = [f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"]
    if factored:
        parts += [f"# {plain(name)}{_SUFFIX}", _summary(base or name, factored, record)]
    else:
        parts += [f"# {plain(name)}", f"Written by spectrim{_release()}; all its linear layers are dense."]
    own_code = bool(getattr(model.config, "auto_map", None)) and type(model)._auto_class is not None
    parts += [
        *_kept(record),
        *_predicted(record),
        *_recipe(record),
        _use(vision, factored is not None, standard, own_code),
    ]
    if not terms.get("license"):
        parts.append("## Licence\n\nThe card of the base model names no licence; ask where the model came from.")
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """Text that others wrote, as one line of Markdown that shows it and does nothing else."""
    return _MARKUP.sub(r"\\\g<0>", printable(" ".join(str(text).split())))


def code(text: object) -> str:
    """A name as inline code; backticks would end it and cannot be escaped, so they are left out."""
    return f"`{printable(' '.join(str(text).split())).replace('`', '')}`"


def add_results(directory: str | Path, results: str) -> Path:
    """Put a Markdown text of measured results into a checkpoint's card, in place of earlier ones; returns its path.

    Only what stands between the two marks of this function is replaced. Raises CheckpointError for a directory without
    a card.
    """
    path = Path(directory) / CARD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); name a checkpoint that spectrim wrote") from error
    before, begun, following = text.partition(_BEGIN)
    _, ended, after = following.partition(_END)
    if begun and not ended:
        raise CheckpointError(f"{path} has the mark {_BEGIN!r} and not {_END!r} after it; remove the first or add both")
    section = f"{_BEGIN}\n## Measured\n\n{results.strip()}\n{_END}"
    text = f"{before}{section}{after}" if begun else f"{before.rstrip()}\n\n{section}\n"
    write_whole(path, text.encode())
    return path


def _base(source: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """Name of the base model, its hub id if it has one, and the entries about licence and language of its card.

    The card is somebody else's: nothing here depends on it, and what is not of the expected form is left out.
    """
    if not source:
        return "", None, {}
    place, gguf = split_source(source)
    directory = Path(place)
    if gguf is not None and directory.is_dir():  # a file among others, whose README.md may be of anything
        return Path(gguf).stem, None, {}
    if directory.is_dir():
        snapshot = _SNAPSHOT.search(directory.resolve().as_posix())
        base = "/".join(snapshot.groups()) if snapshot else None
        card = directory / CARD if (directory / CARD).is_file() else None
    elif not _ID.fullmatch(place):  # a directory that is no more, or a name that somebody gave
        base = card = None
    else:
        base = place
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        cached = cached_file(place, CARD, **quiet)  # a model without a card, or no network: the card says less
        card = None if cached is None else Path(cached)
    try:
        matter = (card and metadata_load(card)) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        matter = {}
    if (directory / PROVENANCE).is_file():  # of a checkpoint that is written again, the base stays the base
        base = matter.get("base_model")
    base = base if isinstance(base, str) and _ID.fullmatch(base) else None
    if base:
        name = base.rpartition("/")[2]
    else:
        title = _TITLE.search(card.read_text(encoding="utf-8", errors="replace")) if card else None
        name = _ESCAPED.sub(r"\1", title[1]).removesuffix(_SUFFIX) if title else directory.resolve().name
    return (
        printable(name)[:96],
        base,
        {key: matter[key] for key, form in _TERMS.items() if _fits(matter.get(key), form)},
    )


def _fits(value: Any, form: re.Pattern[str]) -> bool:
    """Whether an entry is a text of that form, or a list of such texts."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, str) and form.fullmatch(item) for item in values)


def _release() -> str:
    return f" {number}" if (number := release()) else ""


def _summary(base: str, config: SpectrimConfig, record: Mapping[str, Any]) -> str:
    recipe = record.get("recipe")
    method = f" by the recipe {code(recipe['name'])}" if isinstance(recipe, dict) and "name" in recipe else ""
    link = f"[{base}](https://huggingface.co/{base})" if "/" in base and _ID.fullmatch(base) else f"*{plain(base)}*"
    return (
        f"{link} with {len(config.layers())} of its linear layers stored as factors or integers{method}. Made by "
        f"spectrim{_release()} after training, without labels; `spectrim.json` has the whole record."
    )


def _kept(record: Mapping[str, Any]) -> list[str]:
    """Retention by bytes and parameters, and what became of the linears of each place."""
    rows, texts = _numbers(record.get("retention")), []
    words = {
        "bytes": "bytes of the compressible linears",
        "params": "their parameters",
        "checkpoint": "bytes of the whole checkpoint",
    }
    if kept := [f"| {label} | {rows[key]:.2%} |" for key, label in words.items() if key in rows]:
        texts.append("\n".join(["## What was kept", "", "| of the dense model's | kept |", "|---|---|", *kept]))
    places = record.get("places")
    if isinstance(places, dict):
        lines = [
            f"| {plain(place)} | {row['linears']} | "
            f"{plain(', '.join(f'{count} {kind}' for kind, count in row.get('forms', {}).items()) or '–')} | "
            f"{' / '.join(map(str, row['ranks'])) or '–'} | {row['bytes'] / row['dense_bytes']:.1%} |"
            for place, row in places.items()
        ]
        head = "| place | linears | stored as | ranks: least / median / most | bytes |"
        texts.append("\n".join([head, "|---|---|---|---|---|", *lines]))
    reasons = record.get("kept")
    if isinstance(reasons, dict) and reasons:
        listed = "; ".join(f"{count} {plain(reason)}" for reason, count in reasons.items())
        texts.append(f"Linears that had to stay dense: {listed}.")
    unreached = record.get("unreached")
    if isinstance(unreached, list) and unreached:
        names = shortened([code(name) for name in unreached])
        texts.append(f"{len(unreached)} linears are dense because no calibration sample reaches them: {names}.")
    return texts


def _predicted(record: Mapping[str, Any]) -> list[str]:
    """The predicted loss; for a checkpoint that was fine-tuned since, how it was fine-tuned."""
    if tuned := record.get("fine_tuned"):
        listed = ", ".join(f"{key} {value}" for key, value in tuned.items()) if isinstance(tuned, dict) else str(tuned)
        return [f"## Fine-tuning\n\nThe factors were trained after compression: {plain(listed)}."]
    losses = _numbers(record.get("predicted_loss"))
    if not losses:
        return []
    listed = ", ".join(f"{plain(modality)} {loss:.4f}" for modality, loss in losses.items())
    when = "measurement and any compensation" if _compensates(record) else "measurement"
    return [f"## Predicted loss\n\nAbove the dense model, in nats per token, before any {when}: {listed}."]


def _compensates(record: Mapping[str, Any]) -> bool:
    recipe = record.get("recipe")
    how = recipe.get("compensate") if isinstance(recipe, dict) else None
    return isinstance(how, dict) and how.get("kind", "none") != "none"


def _recipe(record: Mapping[str, Any]) -> list[str]:
    recipe, data = record.get("recipe"), record.get("data")
    if not isinstance(recipe, dict):
        return []
    written = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", written)), default=0))
    text = f"## Recipe\n\n{fence}yaml\n{written}{fence}"
    names = {key: data[key] for key in ("text", "images") if data.get(key)} if isinstance(data, dict) else {}
    each = {kind: named if isinstance(named, list) else [named] for kind, named in names.items()}
    if names:
        said = (f"{kind} from {' and '.join(map(code, sources))}" for kind, sources in each.items())
        text += f"\n\nCalibrated on {', '.join(said)}."
    return [text]


def _use(vision: bool, factored: bool, standard: bool, own_code: bool) -> str:
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    reader = "AutoProcessor" if vision else "AutoTokenizer"
    where = '"THIS_DIRECTORY_OR_ID"' + (", trust_remote_code=True" if own_code else "")
    first = "import spectrim  # makes the format known to transformers\n" if factored and not standard else ""
    text = (
        f"## Use\n\n```python\n{first}from transformers import {auto}, {reader}\n\n"
        f"model = {auto}.from_pretrained({where})\n"
        f"{reader.removeprefix('Auto').lower()} = {reader}.from_pretrained({where})\n```"
    )
    if standard:
        text += (
            "\n\nThe integers are in the format `pack-quantized` of compressed-tensors, which transformers needs "
            "(`pip install\ncompressed-tensors`). vLLM serves it as it is: `vllm serve THIS_DIRECTORY_OR_ID`."
        )
    elif factored:
        text += (
            "\n\nGeneration, fine-tuning and saving work as with any other model; `model.dequantize()` merges the "
            "factors into\nplain linears. Where spectrim is installed, vLLM serves it: "
            "`vllm serve THIS_DIRECTORY_OR_ID`\n(docs/serving.md of spectrim)."
        )
    return text


def _numbers(value: Any) -> dict[str, float]:
    """The entries of a table that are numbers; a record may hold other things under the same name."""
    return {key: x for key, x in value.items() if isinstance(x, int | float)} if isinstance(value, dict) else {}
