"""What works with which family of models: one table, measured on few-layer random models of the real classes.

    python benchmarks/families.py [--families llava,phi3] [--out X.json]

The models, and random inputs for them, are those of the tests (tests/families.py); no processor and no download is
involved. Each model is written to disk in bfloat16 and opened as a user would. Errors stand below the table.

- anatomy: linears in tower / connector / backbone, as `spectrim anatomy` finds them.
- gradients: "yes" where `spectrim.calibrate` gathers moments of inputs and of output gradients from eight random texts
  and, where the model takes images, eight random images in text, with answers that the model draws. Where that fails,
  moments of inputs are gathered alone.
- svd 60 %, pivoted 60 %, integers 30 %, spectrim 60 %: the recipes `svd`, `svd` with `storage.pivoted`,
  `curvature+gptq` and `spectrim` (compensation); without gradients `jw-svd+gptq`, and `jw-svd` with pivots and
  compensation. "yes": the Auto class of transformers opens the checkpoint with all that the plan compresses and nothing
  missing or left over, and its logits are those of the model in memory, to the last bit. The number is that of factored
  (pivoted, integer, factored) linears.
- generates: "yes" where greedy tokens of all four opened checkpoints are those of the models in memory.
- LoRA: "yes" where one step of adapters on the factors of the opened `svd` checkpoint lowers the loss of the batch.
- bytes: tensors of the linears in the safetensors files against plan.json, in per cent; of svd / pivoted / integers.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import spectrim
from families import FAMILIES, FURTHER, example_inputs
from random_samples import Samples
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.checkpoint.names import compressed_layers
from spectrim.cli import app
from spectrim.linear import PLACES
from spectrim.pipeline import compression
from spectrim.plan.plan import Plan, PlanRow
from spectrim.storage.runtime import set_runtime

BUILDERS = FAMILIES | FURTHER
# Recipe, retention and changes, by column.
COLUMNS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "svd 60 %": ("svd", 0.6, {}),
    "pivoted 60 %": ("svd", 0.6, {"storage.pivoted": True}),
    "integers 30 %": ("curvature+gptq", 0.3, {}),
    "spectrim 60 %": ("spectrim", 0.6, {}),
}
TABLE = ("family", "anatomy", "gradients", *COLUMNS, "generates", "LoRA", "bytes, %")
# What its linears are.
KINDS: dict[str, Callable[[PlanRow], bool]] = {
    "svd 60 %": lambda row: row.rank is not None,
    "pivoted 60 %": lambda row: row.spec.get("pivoted", False),
    "integers 30 %": lambda row: row.form in ("integers", "integer-factors", "integers+factors"),
    "spectrim 60 %": lambda row: row.rank is not None,
}
# In place of these where gradients cannot be gathered.
WITHOUT_GRADIENTS = {
    "integers 30 %": ("jw-svd+gptq", 0.3, {}),
    "spectrim 60 %": ("jw-svd", 0.6, {"storage.pivoted": True, "compensate.kind": "anchored"}),
}
TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


class Failed(str):
    """The error of a measurement."""


def attempt(what: Callable[[], str]) -> str:
    """What a measurement says, or how it fails: a failure is a result here, and the other columns go on."""
    try:
        return what()
    except Exception as error:
        return Failed(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def opened(directory: Path) -> Any:
    """The model in a directory, in the way of transformers; all its tensors come from the files."""
    sees = "vision_config" in json.loads((directory / "config.json").read_text())
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(directory, output_loading_info=True)
    if any(report.values()):
        raise RuntimeError(f"loaded with {report}")
    return model


def inputs_for(model: Any) -> dict[str, torch.Tensor]:
    found = example_inputs(model)
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in found.items()}


@torch.no_grad()
def behaviour(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and greedy tokens."""
    inputs = inputs_for(model)
    return model(**inputs).logits, model.generate(**inputs, **TOKENS)


def tensor_bytes(directory: Path) -> int:
    """Of all tensors in the safetensors files, headers not counted."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


@contextmanager
def samples_of(model: Any) -> Iterator[None]:
    """Random samples where spectrim would load its own by a processor."""
    with (
        mock.patch("spectrim.calibrate.run.load_data", return_value=Samples(model)),
        mock.patch("spectrim.compensate.run.reload_data", return_value=Samples(model)),
        mock.patch("spectrim.calibrate.passes.load_data", return_value=Samples(model)),
    ):
        yield


def places(directory: Path) -> str:
    done = CliRunner().invoke(app, ["anatomy", str(directory)])
    if done.exit_code:
        raise done.exception or RuntimeError(done.output)
    parts = anatomy(spectrim.load(directory))
    return " / ".join(str(len(parts.in_place(place))) for place in PLACES)


class Family:
    """The measurements of one family; later ones use what earlier ones wrote."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.dense = folder, folder / "dense"
        BUILDERS[name]().to(torch.bfloat16).save_pretrained(folder / "built")
        opened(folder / "built").save_pretrained(self.dense)  # some classes keep some tensors in float32
        self.same_tokens: dict[str, bool] = {}
        self.bytes: dict[str, float] = {}

    def row(self) -> dict[str, str]:
        """The cells by column; where there is nothing to compress, only the first."""
        found = {"anatomy": attempt(lambda: places(self.dense))}
        if isinstance(found["anatomy"], Failed):
            return found
        found["gradients"] = attempt(lambda: self.gathered(curvature=True))
        how = COLUMNS
        if isinstance(found["gradients"], Failed):
            self.gathered(curvature=False)
            how = COLUMNS | WITHOUT_GRADIENTS
        for column, options in how.items():
            found[column] = attempt(lambda column=column, options=options: self.compressed(column, *options))
        wrong = [column for column in how if not self.same_tokens.get(column)]
        found["generates"] = Failed(f"other tokens, or none: {', '.join(wrong)}") if wrong else "yes"
        found["LoRA"] = attempt(self.trained)
        deviations = [self.bytes.get(column) for column in list(COLUMNS)[:3]]
        found["bytes, %"] = " / ".join("–" if x is None else f"{x:+.2f}" if x else "0" for x in deviations)
        return found

    def gathered(self, *, curvature: bool) -> str:
        """Statistics in their directory."""
        model = opened(self.dense)
        with samples_of(model):
            calibrate(
                model,
                self.folder / f"statistics-{curvature}",
                processor=object(),
                text="random",
                images="random",
                samples=8,
                seqlen=12,
                answer_tokens=4,
                curvature=curvature,
            )
        self.statistics = self.folder / f"statistics-{curvature}"
        return "yes"

    def compressed(self, column: str, recipe: str, retain: float, changes: dict[str, Any]) -> str:
        """Compress, save, open, compare."""
        model, out = opened(self.dense), self.folder / column.split()[0]
        stats = self.statistics if spectrim.Recipe.read(recipe, changes).needs_statistics else None
        # Compensation wants a processor, of which these samples have no use.
        options: dict[str, Any] = {"stats": stats, "processor": object(), "changes": changes}
        with samples_of(model), compression(model, recipe, **options) as prepared:
            plan = prepared.plan(retain)
            prepared.save(plan, out, overwrite=True)
            with prepared.applied(plan) as small:
                logits, tokens = behaviour(small)
        planned = Plan.model_validate_json((out / "plan.json").read_text())  # `Plan.read` would count the bytes anew
        if not (count := sum(KINDS[column](row) for row in planned.linears.values())):
            raise RuntimeError("the plan has no linear of this kind")
        # Dense and compressed files hold the same tensors but for the linears.
        measured = tensor_bytes(out) - tensor_bytes(self.dense) + planned.dense_bytes
        self.bytes[column] = 100 * (measured / planned.bytes - 1)
        again = opened(out)
        set_runtime(again, "reference")  # kernels round in other places than the model in memory
        if (found := set(compressed_layers(again))) != set(planned.changed):
            raise RuntimeError(f"compressed in one of plan and checkpoint: {sorted(found ^ set(planned.changed))}")
        again_logits, again_tokens = behaviour(again)
        self.same_tokens[column] = torch.equal(again_tokens, tokens)
        if not torch.equal(again_logits, logits):
            raise RuntimeError(f"logits differ by {float((again_logits - logits).abs().max()):.1e}")
        return f"yes, {count}" if recipe == COLUMNS[column][0] else f"yes, {count} (`{recipe}`)"

    def trained(self) -> str:
        """One step of adapters on the factors of the svd checkpoint."""
        model = opened(self.folder / "svd")
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=spectrim.lora_targets(model)))
        batch = inputs_for(model)
        batch["labels"] = batch["input_ids"].where(batch["input_ids"] < model.config.get_text_config().vocab_size, -100)
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        before = adapted(**batch).loss
        before.backward()
        optimizer.step()
        with torch.no_grad():
            after = adapted(**batch).loss
        if not after < before:
            raise RuntimeError(f"the loss goes from {float(before):.4f} to {float(after):.4f}")
        return "yes"


def line(row: dict[str, str]) -> str:
    """One line of the Markdown table."""
    cells = (row.get(column, "–") for column in TABLE)
    return f"| {' | '.join('fails' if isinstance(cell, Failed) else cell for cell in cells)} |"


def errors(rows: list[dict[str, str]]) -> str:
    """What fails, a list in Markdown."""
    return "".join(
        f"- {row['family']}, {column}: {cell}\n"
        for row in rows
        for column, cell in row.items()
        if isinstance(cell, Failed)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="comma-separated (default: all)")
    parser.add_argument("--out", type=Path, help="file of results, JSON")
    args = parser.parse_args()
    names = args.families.split(",") if args.families else list(BUILDERS)
    if unknown := sorted(set(names) - BUILDERS.keys()):
        parser.error(f"no family '{unknown[0]}'; choose from {', '.join(BUILDERS)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    started, rows = time.process_time(), []
    print(f"| {' | '.join(TABLE)} |\n{'|---' * len(TABLE)}|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"family": name, **Family(name, Path(folder)).row()})
        print(line(rows[-1]), flush=True)
    seconds, date = time.process_time() - started, datetime.now(UTC).isoformat(timespec="seconds")
    versions = {package: version(package) for package in ("torch", "transformers", "peft", "compressed-tensors")}
    versions["python"] = platform.python_version()
    listed = ", ".join(f"{package} {number}" for package, number in versions.items())
    print(f"\n{errors(rows)}\n{date}, {listed}; {seconds:.0f} s of processor time")
    if args.out is not None:
        report = {"date": date, "versions": versions, "seconds": seconds, "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
