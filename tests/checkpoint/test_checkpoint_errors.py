import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from compressed import config_of, edited, factored, logits
from families import FAMILIES
from helpers.forks import fork
from spectrim.checkpoint import (
    SpectrimConfig,
    load,
    runtime_names,
    save,
)
from spectrim.errors import CheckpointError, ModelError

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved compressed language model; tests that change it work on a copy."""
    return save(factored("llama"), tmp_path_factory.mktemp("llama") / "small", provenance={"recipe": "svd"})


@pytest.fixture(scope="module")
def headwise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with ranks by head: four for LAYER."""
    return save(factored("llama", form="headwise"), tmp_path_factory.mktemp("headwise") / "small")


@pytest.fixture
def llama_copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.fixture
def headwise_copy(headwise: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(headwise, tmp_path / "headwise"))


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = config_of(directory)
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("reader", [load, hf.AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("weight", "says to be factored"),
        ("bias", "of which its config says nothing"),
        ("pivots", "of which its config says nothing"),
        ("R.weight", "of which its config says nothing"),
        ("A.0.weight", "of which its config says nothing"),
    ],
)
def test_more_tensors_of_a_layer_than_its_config_knows_are_an_error(
    llama_copy: Path, tensor: str, message: str, reader: Callable[[Path], Any]
) -> None:
    with edited(llama_copy) as tensors:
        tensors[f"{LAYER}.{tensor}"] = torch.ones(64, dtype=torch.int32 if tensor == "pivots" else torch.float32)
    with pytest.raises(CheckpointError, match=rf"copy holds .*{LAYER}.*{message}"):
        reader(llama_copy)


@pytest.mark.parametrize("reader", [load, hf.AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_factors_that_are_no_numbers_are_an_error(
    llama_copy: Path, value: float | None, reader: Callable[[Path], Any]
) -> None:
    with edited(llama_copy) as tensors:
        factor = tensors[f"{LAYER}.A.weight"]
        if value is None:
            tensors[f"{LAYER}.A.weight"] = factor.int()
        else:
            factor[3, 2] = value
    message = "another shape or kind" if value is None else rf"holds NaN or infinity in {LAYER}\.A\.weight"
    with pytest.raises(CheckpointError, match=message):
        reader(llama_copy)


@pytest.mark.parametrize("reader", [load, hf.AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("tensor", [f"{LAYER}.A.weight", f"{LAYER}.B.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_an_error(llama_copy: Path, tensor: str, reader: Callable[[Path], Any]) -> None:
    with edited(llama_copy) as tensors:
        del tensors[tensor]
    with pytest.raises(CheckpointError, match=tensor):
        reader(llama_copy)


@pytest.mark.parametrize("tensor", [f"{LAYER}.A.0.weight", f"{LAYER}.A.3.weight", f"{LAYER}.B.weight"])
def test_a_missing_head_is_an_error(headwise_copy: Path, tensor: str) -> None:
    with edited(headwise_copy) as tensors:
        del tensors[tensor]
    with pytest.raises(CheckpointError, match=tensor):
        load(headwise_copy)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ([8, 7, 6, 5], rf"{LAYER}\.A\.0\.weight"),  # as many numbers in all
        ([5, 6, 7, 9], rf"{LAYER}\.A\.3\.weight, {LAYER}\.B\.weight"),
        ([5, 21], rf"{LAYER}\.A\.0\.weight"),
        (26, rf"{LAYER}\.A\.weight"),
        ([5, 6, 15], rf"quantization_config does not fit the model: '{LAYER}': 64 outputs are not 3 equal heads"),
    ],
)
def test_heads_of_other_ranks_are_an_error(headwise_copy: Path, rank: Any, message: str) -> None:
    assert config_of(headwise_copy)["quantization_config"]["ranks"][LAYER] == [5, 6, 7, 8]
    edit_config(headwise_copy, lambda config: config["ranks"].update({LAYER: rank}))
    with pytest.raises(CheckpointError, match=message):
        load(headwise_copy)


def test_ranks_by_head_for_a_layer_that_was_factored_as_a_whole_are_an_error(llama_copy: Path) -> None:
    rank = config_of(llama_copy)["quantization_config"]["ranks"][LAYER]
    edit_config(llama_copy, lambda config: config["ranks"].update({LAYER: [5, 5, 5, rank - 15]}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.A\.0\.weight"):
        load(llama_copy)


@pytest.fixture
def pivoted_copy(tmp_path: Path) -> Path:
    return save(factored("llama", form="pivoted"), tmp_path / "pivoted")


def test_missing_pivots_are_an_error(pivoted_copy: Path) -> None:
    with edited(pivoted_copy) as tensors:
        del tensors[f"{LAYER}.pivots"]
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.pivots"):
        load(pivoted_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pivots: pivots[:-1], rf"{LAYER}\.pivots, or holds them in another shape"),
        (lambda pivots: pivots + 64, rf"{LAYER}\.pivots: pivots are rows 0 to 63"),
        (lambda pivots: pivots - 64, rf"{LAYER}\.pivots: pivots are rows 0 to 63"),
        (lambda pivots: pivots // 2 * 2, rf"{LAYER}\.pivots: pivots repeat a row"),
    ],
)
def test_damaged_pivots_are_an_error(pivoted_copy: Path, change: Callable[[Any], Any], message: str) -> None:
    with edited(pivoted_copy) as tensors:
        tensors[f"{LAYER}.pivots"] = change(tensors[f"{LAYER}.pivots"]).contiguous()
    with pytest.raises(CheckpointError, match=message):
        load(pivoted_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.remove(LAYER), rf"{LAYER}\.A\.weight"),
        (lambda names: names.append("model.norm"), r"names model\.norm as pivoted, without one rank"),
        (lambda names: names.append(3), "no list of names"),
    ],
)
def test_a_wrong_list_of_pivoted_linears_is_an_error(
    pivoted_copy: Path, change: Callable[[list[Any]], object], message: str
) -> None:
    edit_config(pivoted_copy, lambda config: change(config["pivoted"]))
    with pytest.raises(CheckpointError, match=message):
        load(pivoted_copy)


def test_pivots_of_ranks_by_head_are_an_error(headwise_copy: Path) -> None:
    edit_config(headwise_copy, lambda config: config.update(pivoted=[LAYER]))
    with pytest.raises(CheckpointError, match=f"names {LAYER} as pivoted, without one rank"):
        load(headwise_copy)


def test_a_list_of_pivoted_linears_beside_plain_factors_is_an_error(llama_copy: Path) -> None:
    edit_config(llama_copy, lambda config: config.update(pivoted=[LAYER]))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.A\.weight, {LAYER}\.pivots"):
        load(llama_copy)


def test_a_missing_bias_is_an_error(tmp_path: Path) -> None:
    directory = save(factored("opt"), tmp_path / "a")
    with edited(directory) as tensors:
        del tensors["model.decoder.layers.1.fc1.bias"]
    with pytest.raises(CheckpointError, match=r"model\.decoder\.layers\.1\.fc1\.bias"):
        load(directory)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_factor_of_another_rank_is_an_error(llama_copy: Path, ignore: bool) -> None:
    edit_config(llama_copy, lambda config: config["ranks"].update({LAYER: 5}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.A\.weight, {LAYER}\.B\.weight"):
        load(llama_copy, ignore_mismatched_sizes=ignore)


def test_a_factored_layer_without_a_rank_is_an_error(llama_copy: Path) -> None:
    edit_config(llama_copy, lambda config: config["ranks"].pop(LAYER))
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight"):
        load(llama_copy)


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        ("model.norm.weight", (63,)),
        ("model.embed_tokens.weight", (128, 63)),
        ("lm_head.weight", (127, 64)),
        (f"{LAYER}.A.weight", (63, 21)),
        (f"{LAYER}.B.weight", (21, 65)),
        (f"{LAYER}.B.weight", (21 * 64,)),
    ],
)
def test_a_tensor_of_another_shape_is_an_error(llama_copy: Path, tensor: str, size: tuple[int, ...]) -> None:
    with edited(llama_copy) as tensors:
        assert tensor in tensors
        tensors[tensor] = torch.ones(size)
    with pytest.raises(CheckpointError, match=tensor):
        load(llama_copy)


def test_every_message_names_the_directory(llama_copy: Path) -> None:
    edit_config(llama_copy, lambda c: c["ranks"].update({LAYER: -1}))
    with pytest.raises(CheckpointError, match=rf"^{llama_copy}: quantization_config gives '{LAYER}' the rank -1"):
        load(llama_copy)


def test_messages_name_the_directory(llama_copy: Path) -> None:
    with edited(llama_copy) as tensors:
        del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=f"{llama_copy} lacks model.norm.weight"):
        load(llama_copy)


def test_a_truncated_file_is_an_error(llama_copy: Path) -> None:
    file = llama_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(llama_copy)


def test_a_state_dict_without_the_factors_is_an_error(llama: Path) -> None:
    config = hf.AutoConfig.from_pretrained(llama)
    tensors = load_file(llama / "model.safetensors")
    model = hf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    assert torch.equal(logits(model), logits(load(llama)))
    del tensors[f"{LAYER}.B.weight"]
    with pytest.raises(CheckpointError, match=f"{LAYER}.B.weight"):
        hf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2, "spectrim_version": "7.1.0"}, r"version 2 .* pip install 'spectrim>=7\.1\.0'"),
        ({"version": 2, "spectrim_version": None}, "pip install --upgrade spectrim"),
        ({"pivots": {}}, "unknown entries: pivots"),
        ({"ranks": {}}, "no ranks"),
        ({"ranks": {LAYER: 0}}, "the rank 0"),
        ({"ranks": {LAYER: 2.5}}, r"the rank 2\.5"),
        ({"ranks": {LAYER: []}}, r"the rank \[\]"),
        ({"ranks": {LAYER: [3, 3, 0, 3]}}, r"the rank \[3, 3, 0, 3\]"),
        ({"ranks": {LAYER: [3, "3"]}}, r"the rank \[3, '3'\]"),
        ({"ranks": {LAYER: "33"}}, "the rank '33'"),
        ({"ranks": {LAYER: 10**9}}, rf"'{LAYER}': the rank 1000000000 is too large: it can have 64 at most"),
        ({"ranks": {LAYER: 65}}, rf"'{LAYER}': the rank 65 is too large: it can have 64 at most"),
        (
            {"ranks": {LAYER: [10**9] * 4}},
            rf"'{LAYER}': the rank 1000000000 is too large: a head of it can have 16 at most",
        ),
        ({"ranks": {LAYER: [1] * 10**6}}, rf"'{LAYER}': 64 outputs are not 1000000 equal heads"),
        ({"ranks": {LAYER: -3}}, "the rank -3"),
        ({"ranks": {LAYER: True}}, "the rank True"),
        ({"ranks": {LAYER: [True, 3]}}, r"the rank \[True, 3\]"),
        ({"ranks": {LAYER: None}}, "the rank None"),
        ({"ranks": {LAYER: [[3]]}}, r"the rank \[\[3\]\]"),
        ({"ranks": {"model.norm": 3}}, r"model\.norm\.B"),
        ({"pivoted": [LAYER, LAYER]}, f"names {LAYER} as pivoted twice"),
        ({"ranks": [LAYER]}, "no ranks"),
        ({"ranks": {"model.layers.9.self_attn.q_proj": 3}}, r"model\.layers\.9\.self_attn\.q_proj\.B"),
    ],
)
def test_a_config_that_cannot_be_obeyed_is_an_error(llama_copy: Path, change: dict[str, Any], message: str) -> None:
    edit_config(llama_copy, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        load(llama_copy)


def test_a_name_that_maps_to_nothing_is_an_error() -> None:
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.9\.mlp\.up_proj' maps to no linear of LlamaForCausalLM"
    ):
        runtime_names(FAMILIES["llama"](), ["model.layers.9.mlp.up_proj"])


def test_a_dense_checkpoint_is_not_factored_on_loading(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="pre-quantized"):
        load(tmp_path, quantization_config=SpectrimConfig({LAYER: 3}))


WITHOUT_SPECTRIM = """
import json, sys
import transformers
from transformers import AutoModel, AutoModelForCausalLM
small, resaved, headwise, dense = sys.argv[1:]
def attempt(auto, directory, **kwargs):
    try:
        auto.from_pretrained(directory, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"
print(json.dumps([
    attempt(AutoModelForCausalLM, small),
    attempt(AutoModel, small),
    attempt(AutoModelForCausalLM, resaved),
    attempt(AutoModelForCausalLM, headwise),
    attempt(AutoModelForCausalLM, small, fusion_config={}),
    attempt(AutoModelForCausalLM, headwise, fusion_config={}),
    attempt(AutoModelForCausalLM, dense),
    "spectrim" in sys.modules,
]))
"""


def test_without_spectrim_transformers_refuses_to_load(llama: Path, headwise: Path, tmp_path: Path) -> None:
    model = load(llama)
    model.save_pretrained(tmp_path / "resaved")
    model.dequantize().save_pretrained(tmp_path / "dense")
    run = fork("-c", WITHOUT_SPECTRIM, llama, tmp_path / "resaved", headwise, tmp_path / "dense")
    assert run.returncode == 0, run.stderr
    *guarded, unguarded, unguarded_headwise, dense, imported = json.loads(run.stdout.splitlines()[-1])
    assert len(guarded) == 4
    for outcome in guarded:
        assert outcome.startswith("ValueError")
        assert "`import spectrim` before from_pretrained" in outcome
    for outcome in (unguarded, unguarded_headwise):
        assert outcome.startswith("RuntimeError")  # the shapes of the dense weights do not fit
    assert dense == "loaded"
    assert not imported
