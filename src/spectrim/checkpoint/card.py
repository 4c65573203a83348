"""The model card of a checkpoint: the README.md that a hub shows and that a person opens first."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from spectrim.checkpoint.quantizer import SpectrimConfig, release
from spectrim.checkpoint.read import PROVENANCE, sees
from spectrim.errors import CheckpointError
from spectrim.files import write_whole

CARD = "README.md"
_BEGIN, _END = "<!-- results by spectrim evaluate -->", "<!-- end of results -->"
_TERMS = ("license", "license_name", "license_link", "language")
_SUFFIX = ", compressed by spectrim"
_TITLE = re.compile(r"^# +(.+?) *$", re.MULTILINE)
_SNAPSHOT = re.compile(r"models--(.+)--(.+)/snapshots/[^/]+")


def model_card(model: PreTrainedModel, record: Mapping[str, Any]) -> str:
    """The text of README.md: front matter as the Hugging Face hub reads it, then what the checkpoint is.

    `record` is the provenance; of what it does not hold, the card says nothing. The base model and its licence are
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
        "tags": ["spectrim", "low-rank", "compressed"] if factored else ["spectrim"],
    }
    parts = [f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"]
    if factored:
        parts += [f"# {name}{_SUFFIX}", _summary(base or name, factored, record)]
    else:
        parts += [f"# {name}", f"Written by spectrim{_release()}; all its linear layers are dense."]
    parts += [*_kept(record), *_predicted(record), *_recipe(record), _use(vision, factored is not None)]
    if not terms.get("license"):
        parts.append("## Licence\n\nThe card of the base model names no licence; ask where the model came from.")
    return "\n\n".join(parts) + "\n"


def add_results(directory: str | Path, results: str) -> Path:
    """Put a Markdown text of measured results into a checkpoint's card, in place of those of before; returns its path.

    Only what stands between the two marks of this function is replaced. Raises CheckpointError for a directory without
    a card.
    """
    path = Path(directory) / CARD
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); name a checkpoint that spectrim wrote") from error
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if begun and not ended:
        raise CheckpointError(f"{path} has the mark {_BEGIN!r} and not {_END!r} after it; remove the first or add both")
    section = f"{_BEGIN}\n## Measured\n\n{results.strip()}\n{_END}"
    text = f"{before}{section}{after}" if begun else f"{before.rstrip()}\n\n{section}\n"
    write_whole(path, text.encode())
    return path


def _base(source: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """Name of the base model, its hub id if it has one, and the entries about licence and language of its card."""
    if not source:
        return "", None, {}
    directory = Path(source)
    if directory.is_dir():
        snapshot = _SNAPSHOT.search(directory.resolve().as_posix())
        base = "/".join(snapshot.groups()) if snapshot else None
        card = directory / CARD if (directory / CARD).is_file() else None
    else:
        base = source
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = cached_file(source, CARD, **quiet)  # a model without a card, or no network: the card says less
        card = None if found is None else Path(found)
    try:
        matter = (card and metadata_load(card)) or {}
    except (ValueError, yaml.YAMLError):  # somebody else's card, which nothing here depends on
        matter = {}
    if (directory / PROVENANCE).is_file():  # of a checkpoint that is written again, the base stays the base
        base = matter.get("base_model")
    title = _TITLE.search(card.read_text(encoding="utf-8", errors="replace")) if card and not base else None
    name = base.rpartition("/")[2] if base else title[1].removesuffix(_SUFFIX) if title else directory.name
    return name, base, {key: matter[key] for key in _TERMS if key in matter}


def _release() -> str:
    return f" {number}" if (number := release()) else ""


def _summary(base: str, config: SpectrimConfig, record: Mapping[str, Any]) -> str:
    recipe = record.get("recipe")
    method = f" by the recipe `{recipe['name']}`" if isinstance(recipe, dict) and "name" in recipe else ""
    link = f"[{base}](https://huggingface.co/{base})" if "/" in base else f"*{base}*"
    return (
        f"{link} with {len(config.ranks)} of its linear layers replaced by products of thin matrices{method}. Made by "
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
    if kept := [f"| {what} | {rows[key]:.2%} |" for key, what in words.items() if key in rows]:
        texts.append("\n".join(["## What was kept", "", "| of the dense model's | kept |", "|---|---|", *kept]))
    places = record.get("places")
    if isinstance(places, dict):
        counts = ("linears", "dense", "factored", "pivoted", "by_head")
        lines = [
            f"| {place} | {' | '.join(str(row[key]) for key in counts)} | "
            f"{' / '.join(map(str, row['ranks'])) or '–'} | {row['bytes'] / row['dense_bytes']:.1%} |"
            for place, row in places.items()
        ]
        head = "| place | linears | dense | factored | by pivots | by head | ranks: least / median / most | bytes |"
        texts.append("\n".join([head, "|---|---|---|---|---|---|---|---|", *lines]))
    return texts


def _predicted(record: Mapping[str, Any]) -> list[str]:
    """The predicted loss; of a checkpoint that was fine-tuned since, how that was done instead."""
    if tuned := record.get("fine_tuned"):
        listed = ", ".join(f"{key} {value}" for key, value in tuned.items()) if isinstance(tuned, dict) else str(tuned)
        return [f"## Fine-tuning\n\nThe factors were trained after compression: {listed}."]
    losses = _numbers(record.get("predicted_loss"))
    if not losses:
        return []
    listed = ", ".join(f"{modality} {loss:.4f}" for modality, loss in losses.items())
    return [f"## Predicted loss\n\nAbove the dense model, in nats per token, before any measurement: {listed}."]


def _recipe(record: Mapping[str, Any]) -> list[str]:
    recipe, data = record.get("recipe"), record.get("data")
    if not isinstance(recipe, dict):
        return []
    text = f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"
    samples = {key: str(data[key]) for key in ("text", "images") if data.get(key)} if isinstance(data, dict) else {}
    if samples:  # a local path is nobody else's business
        names = {key: Path(name).name if Path(name).exists() else name for key, name in samples.items()}
        text += f"\n\nCalibrated on {', '.join(f'{kind} from `{name}`' for kind, name in names.items())}."
    return [text]


def _use(vision: bool, factored: bool) -> str:
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    reader = "AutoProcessor" if vision else "AutoTokenizer"
    first = "import spectrim  # makes the format known to transformers\n" if factored else ""
    text = (
        f"## Use\n\n```python\n{first}from transformers import {auto}, {reader}\n\n"
        f'model = {auto}.from_pretrained("THIS_DIRECTORY_OR_ID")\n'
        f'{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("THIS_DIRECTORY_OR_ID")\n```'
    )
    if factored:
        text += (
            "\n\nGeneration, fine-tuning and saving work as with any other model; `model.dequantize()` merges the "
            "factors into\nplain linears. Where spectrim is installed, vLLM serves it: "
            "`vllm serve THIS_DIRECTORY_OR_ID`\n(docs/serving.md of spectrim)."
        )
    return text


def _numbers(value: Any) -> dict[str, float]:
    """The entries of a table that are numbers; a record may hold other things under the same name."""
    return {key: x for key, x in value.items() if isinstance(x, int | float)} if isinstance(value, dict) else {}
