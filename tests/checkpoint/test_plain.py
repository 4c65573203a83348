"""Plain compressed-tensors: whoever has no spectrim loads what spectrim made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compressed import cut_linears, pack_nearest
from families import FAMILIES, example_inputs
from helpers.command import run
from helpers.forks import fork
from helpers.samples import word_tokenizer
from spectrim import load
from spectrim.anatomy import anatomy
from spectrim.checkpoint import read_provenance, save
from spectrim.checkpoint.plain import one_grid
from spectrim.errors import CheckpointError, RecipeError
from spectrim.evaluate.running import is_compressed
from spectrim.experts import fuse
from spectrim.maths.rounding import Grid
from spectrim.pipeline import compress
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.storage import stored_layers

PLAIN = "compressed-tensors"
WITHOUT_SPECTRIM = """
import sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spectrim":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
for where in sys.argv[1:]:
    inputs = torch.load(f"{where}/inputs.pt")
    auto = AutoModelForImageTextToText if "pixel_values" in inputs else AutoModelForCausalLM
    model, report = auto.from_pretrained(where, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    torch.save(model(**inputs).logits, f"{where}/logits.pt")
assert "spectrim" not in sys.modules
"""


def on_grid(family: str, grid: Grid, dtype: torch.dtype = torch.float32, kept: int = 0) -> hf.PreTrainedModel:
    """All linears on one grid, but for the first few."""
    model = FAMILIES[family]().to(dtype)
    pack_nearest(model, {linear.name: grid for linear in anatomy(model).linears[kept:]})
    return model


CASES: dict[str, tuple[str, Grid, torch.dtype]] = {
    f"{family}-{bits}-{group}-{symmetric}": (family, Grid(bits, group, symmetric), dtype)
    for family, bits, group, symmetric, dtype in [
        ("llama", 4, 32, True, torch.bfloat16), ("llama", 4, None, True, torch.float32),
        ("llama", 8, None, True, torch.float16), ("llama", 2, 32, True, torch.float32),
        ("llava", 8, None, True, torch.float32), ("qwen2_5_vl", 4, None, True, torch.float32),
        ("mixtral", 4, 32, True, torch.bfloat16), ("qwen3_moe", 8, None, True, torch.float32),
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor, torch.Tensor]]:
    """Directory, logits without spectrim, and those of the checkpoint in spectrim's own format, of each case."""
    home, wanted = tmp_path_factory.mktemp("plain"), {}
    for name, (family, grid, dtype) in CASES.items():
        model = on_grid(family, grid, dtype, kept=2)
        inputs = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in example_inputs(model).items()
        }
        for form in ("spectrim", PLAIN):
            save(model, home / form / name, format=form)
        torch.save(inputs, home / PLAIN / name / "inputs.pt")
        with torch.no_grad():
            wanted[name] = load(home / "spectrim" / name, runtime="reference")(**inputs).logits
    done = fork("-c", WITHOUT_SPECTRIM, *(home / PLAIN / name for name in CASES))
    assert done.returncode == 0, done.stderr
    return {
        name: (home / PLAIN / name, torch.load(home / PLAIN / name / "logits.pt"), each)
        for name, each in wanted.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_whoever_has_no_spectrim_gets_the_same_logits(name, loaded):
    _, got, wanted = loaded[name]
    assert got.dtype == wanted.dtype
    assert (got.float() - wanted.float()).norm() <= torch.finfo(got.dtype).eps * wanted.float().norm()


def test_what_the_files_say(loaded):
    directory, _, _ = loaded["llama-4-32-True"]
    config = json.loads((directory / "config.json").read_text())
    assert "fusion_config" not in config
    said = config["quantization_config"]
    assert (said["quant_method"], said["format"]) == (PLAIN, "pack-quantized")
    assert said["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert said["ignore"] == ["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]
    card = (directory / "README.md").read_text()
    assert "import spectrim" not in card
    assert "compressed-tensors" in card
    assert is_compressed(directory)
    assert "spectrim_version" in read_provenance(directory)


def test_the_model_in_memory_stays_what_it_was(tmp_path):
    model = on_grid("llama", Grid(4, 32))
    inputs = example_inputs(model)
    before = model(**inputs).logits
    save(model, tmp_path / "plain", format=PLAIN)
    save(model, tmp_path / "own")
    assert torch.equal(load(tmp_path / "own", runtime="reference")(**inputs).logits, before)
    again = load(tmp_path / "plain")
    assert not stored_layers(again)
    torch.testing.assert_close(again(**inputs).logits, before)


def grid(bits: int, group: int | None = 32, symmetric: bool = True) -> dict[str, Any]:
    return {"bits": bits, "group": group, "symmetric": symmetric}


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"a": ("low-rank", {"rank": 3})}, "'a' has the form 'low-rank'"),
        ({"a": ("integers", grid(4)), "b": ("integer-factors", {})}, "'b' has the form 'integer-factors'"),
        ({"a": ("integers", grid(4)), "b": ("integers", grid(4, None))}, "'a' has 4 bits in groups of 32, 'b' 4 bits"),
        ({"a": ("integers", grid(4)), "b": ("integers", grid(4, symmetric=False))}, "groups of 32, asymmetric; set"),
        ({"a": ("integers", grid(3))}, "pack 3 bits in different ways; set quantize.bits to 2, 4, 8"),
        ({"a": ("integers", grid(4, symmetric=False))}, "cannot load compressed-tensors' zero points; set"),
        ({}, "there are no integers"),
    ],
)  # fmt: skip
def test_what_the_format_has_no_place_for(layers, said):
    with pytest.raises(CheckpointError, match=said):
        one_grid(layers)


def test_save_refuses_before_it_writes(tmp_path):
    model = FAMILIES["llama"]()
    name = anatomy(model).linears[0].name
    cut_linears(model, {name: 5}, ())
    with pytest.raises(CheckpointError, match=f"'{name}' has the form 'low-rank'"):
        save(model, tmp_path / "out", format=PLAIN)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="there are no integers"):
        save(FAMILIES["llama"](), tmp_path / "out", format=PLAIN)


@pytest.mark.parametrize(("bits", "symmetric"), [(None, True), (3, True), ("auto", True), (4, False)])
def test_recipes_that_cannot_be_plain(bits, symmetric):
    with pytest.raises(RecipeError, match=r"one symmetric grid of 2, 4, 8 bits; set quantize\.bits to one of these"):
        Recipe.read("svd", {"quantize.format": PLAIN, "quantize.bits": bits, "quantize.symmetric": symmetric})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(FAMILIES["llama"](), tmp_path_factory.mktemp("dense") / "model", processor=word_tokenizer())


def refused(capsys, *arguments: str | Path) -> str:
    code, _, said = run(capsys, "compress", *arguments, "--recipe", "svd", "--set", f"quantize.format={PLAIN}")
    assert code == 2
    return said


def test_the_command_refuses_in_one_sentence(dense, tmp_path, capsys):
    out = tmp_path / "out"
    four = "--set", "quantize.bits=4"
    said = refused(capsys, dense, "-o", out, "--retain", "0.5", *four, "--set", "quantize.group=64")
    assert "down_proj" in said  # whose 96 inputs 64 does not divide
    assert "set quantize.group to a size that divides the inputs of all, or to null" in said
    assert "set quantize.bits to one of these" in refused(capsys, dense, "-o", out, "--retain", "0.5")
    few = refused(capsys, dense, "-o", out, "--retain", "0.1", *four, "--set", "quantize.group=32")
    assert "smallest options" in few
    plan = tmp_path / "plan.json"
    compress(dense, tmp_path / "factors", recipe="svd", retain=0.5)
    plan.write_bytes((tmp_path / "factors" / "plan.json").read_bytes())
    said = refused(capsys, dense, "-o", out, "--plan", plan, *four, "--set", "quantize.group=32")
    assert "has the form 'low-rank'" in said
    assert not out.exists()


@pytest.mark.parametrize("roles", ["all", "feed-forward"])
def test_a_compression_from_end_to_end(roles, dense, tmp_path):
    changes = {"quantize.bits": 4, "quantize.group": 32, "quantize.format": PLAIN, "quantize.roles": roles}
    made: Any = compress(dense, tmp_path / "plain", recipe="svd", retain=0.99, changes=changes)
    forms = {row.form for row in Plan.read(tmp_path / "plain" / "plan.json").linears.values()}
    assert forms == ({"integers"} if roles == "all" else {"dense", "integers"})
    inputs = example_inputs(made)
    torch.testing.assert_close(load(tmp_path / "plain")(**inputs).logits, made(**inputs).logits)


@pytest.mark.parametrize("which", ["one expert", "one role", "all", "fused"])
def test_dense_experts_are_refused(which, tmp_path):
    """transformers 5.24 would give them random numbers, or fail."""
    model = FAMILIES["mixtral"]()
    linears = anatomy(model).linears
    left = {
        "one expert": [x.name for x in linears if x.expert == 2],
        "one role": [x.name for x in linears if x.name.endswith(".w2")],
    }.get(which, [x.name for x in linears if x.expert is not None])
    pack_nearest(model, {x.name: Grid(4, 32) for x in linears if x.name not in left})
    if which == "fused":
        fuse(model)
    with pytest.raises(CheckpointError, match=r"experts.* would stay dense; compress every expert"):
        save(model, tmp_path / "a", format=PLAIN)
    assert not (tmp_path / "a").exists()


def test_a_recipe_that_keeps_experts_is_refused_before_samples_run(tmp_path):
    changes = {"quantize.bits": 4, "quantize.group": 32, "quantize.format": PLAIN}
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.experts\.0\.w1' would stay dense"):
        compress(
            FAMILIES["mixtral"](), tmp_path / "a", recipe="svd", retain=0.3, changes=changes, keep=["*.experts.*"],
            processor=word_tokenizer(),
        )  # fmt: skip
