"""Parts of a compressed model, parents of one, and the state_dict that save_pretrained is given."""

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from compressed import MAIN, config_of, factored, logits, low_rank, packed
from families import FAMILIES, TEXT, text_inputs
from helpers.forks import fork
from spectrim.checkpoint import attach, load, save
from spectrim.checkpoint.names import compressed_layers, tensor_names
from spectrim.checkpoint.quantizer import GUARD, WHOLE, SpectrimConfig
from spectrim.errors import CheckpointError

FORMS = ("whole", "headwise", "pivoted", "packed")
forms = pytest.mark.parametrize("form", FORMS)
LAYER = "model.layers.0.self_attn.q_proj"


def compressed(family: str, form: str) -> PreTrainedModel:
    return packed(family) if form == "packed" else factored(family, form=form)


def parts_of(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    return {name: part for name, part in found.items() if name and compressed_layers(part)}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def texts(config: Any) -> str:
    return config.to_json_string(use_diff=False)


@pytest.mark.parametrize(
    ("family", "form"),
    [*itertools.product((*MAIN, "mllama", "gemma3", "opt"), ("mixed", "packed"))],
)
def test_every_part_saves_with_its_own_share(family: str, form: str, tmp_path: Path) -> None:
    model = load(save(compressed(family, form), tmp_path / "full"))
    model.save_pretrained(tmp_path / "before")
    before, whole = texts(model.config), logits(model)
    parts = parts_of(model)
    assert len(parts) >= (1 if family == "llama" else 2)
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
        again = type(part).from_pretrained(tmp_path / name)
        assert_same(again, part)
        ranks = config_of(tmp_path / name)["quantization_config"]["ranks"]
        assert len(ranks) == len(low_rank(part))
        again.dequantize()
        assert not compressed_layers(again)
        assert not any(guard in again.config.to_json_string() for guard in (GUARD, WHOLE))
    assert texts(model.config) == before  # nothing stays behind, in the parts' configs or in that of the whole
    assert torch.equal(logits(model), whole)
    model.save_pretrained(tmp_path / "again")
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "before" / n).read_bytes() for n in names)


@forms
def test_parts_of_a_model_that_was_never_attached(form: str, tmp_path: Path) -> None:
    model = compressed("qwen2_5_vl", form)
    model.model.language_model.save_pretrained(tmp_path)
    assert "quantization_config" not in vars(model.config.text_config)
    again = hf.AutoModel.from_pretrained(tmp_path)
    inputs = text_inputs(model)
    assert torch.equal(again(**inputs).last_hidden_state, model.model.language_model(**inputs).last_hidden_state)


FRESH = """
import sys, torch
from transformers import AutoModel
if sys.argv[3] == "with":
    import spectrim
try:
    model = AutoModel.from_pretrained(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
else:
    saved = torch.load(sys.argv[2])
    print(all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items()))
"""


@pytest.mark.parametrize("form", ["headwise", "packed"])
def test_a_part_in_a_fresh_process(form: str, tmp_path: Path) -> None:
    part = compressed("llava", form).model.language_model
    part.save_pretrained(tmp_path / "a")
    torch.save(part.state_dict(), tmp_path / "tensors.pt")
    outcomes = {}
    for how in ("with", "without"):
        done = fork("-c", FRESH, tmp_path / "a", tmp_path / "tensors.pt", how)
        assert done.returncode == 0, done.stderr
        outcomes[how] = done.stdout.splitlines()[-1]
    assert outcomes["with"] == "True"
    assert "`import spectrim` before from_pretrained" in outcomes["without"]


@pytest.mark.parametrize("family", [*MAIN, "mllama", "gemma3"])
@pytest.mark.parametrize("form", ["whole", "packed"])
def test_classes_of_parts_and_the_directory_of_the_whole(family: str, form: str, tmp_path: Path) -> None:
    """Exact or refused."""
    model = compressed(family, form)
    model.save_pretrained(tmp_path)
    base = hf.AutoModel.from_pretrained(tmp_path)
    assert_same(base, model.model)
    if family == "llama":
        return
    parts = [part for part in parts_of(model).values() if type(part.config) is not type(model.config)]
    assert len(parts) == 2
    for part in parts:
        with pytest.raises(ValueError, match="load the whole by its own class"):
            type(part).from_pretrained(tmp_path)


def test_new_parents_of_a_part(tmp_path: Path) -> None:
    """A compressed language model in a dense image-text model, and a base model in a model with a head."""
    vlm, part = FAMILIES["llava"](), factored("llava").model.language_model
    vlm.model.language_model = part
    vlm.save_pretrained(tmp_path / "a")
    ranks = config_of(tmp_path / "a")["quantization_config"]["ranks"]
    assert all(name.startswith("language_model.model.layers.") for name in ranks)
    assert_same(load(tmp_path / "a"), vlm)
    small = load(save(factored("llama"), tmp_path / "small"))
    other = FAMILIES["llama"]()
    other.model = small.model
    other.save_pretrained(tmp_path / "b")
    assert_same(load(tmp_path / "b"), other)


def test_a_dense_part_and_a_dense_model_are_saved_as_ever(tmp_path: Path) -> None:
    model = load(save(factored("llava"), tmp_path / "a"))
    config = model.config.text_config
    assert WHOLE in config.fusion_config
    dense = hf.LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path / "dense")
    assert not {"fusion_config", "quantization_config"} & config_of(tmp_path / "dense").keys()
    assert_same(hf.LlamaForCausalLM.from_pretrained(tmp_path / "dense"), dense)
    model.dequantize().save_pretrained(tmp_path / "whole")
    assert "fusion_config" not in (tmp_path / "whole" / "config.json").read_text()
    assert_same(load(tmp_path / "whole"), model)


def test_other_fusions_stay(tmp_path: Path) -> None:
    model = attach(factored("qwen2_5_vl"))
    model.config.fusion_config = {"patch_embeddings": False}
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["fusion_config"] == {"patch_embeddings": False, GUARD: False}
    assert model.config.fusion_config == {"patch_embeddings": False}


def test_copies_are_saved_as_themselves(tmp_path: Path) -> None:
    model = load(save(factored("llama"), tmp_path / "a"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule(LAYER).A.weight.zero_()
    twin.save_pretrained(tmp_path / "b")
    assert_same(load(tmp_path / "b"), twin)


# ---- the state_dict that is given ----


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@forms
@pytest.mark.parametrize("attached", [True, False])
def test_the_state_dict_that_is_given_is_written(family: str, form: str, attached: bool, tmp_path: Path) -> None:
    model = compressed(family, form)
    if attached:
        attach(model)
    given = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    kept = dict(given)
    model.save_pretrained(tmp_path, state_dict=given, max_shard_size="60KB")
    assert given.keys() == kept.keys()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = load(tmp_path).state_dict()
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    stored: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    assert sum(tensor.numel() == 0 for tensor in stored.values()) == len(compressed_layers(model))


@forms
def test_a_state_dict_fills_a_new_skeleton(form: str, tmp_path: Path) -> None:
    model = compressed("llama", form)
    skeleton = load(save(model, tmp_path / "a"))
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.zero_()
    skeleton.load_state_dict(model.state_dict())
    assert_same(skeleton, model)
    assert torch.equal(logits(skeleton), logits(model))


def test_not_the_main_process_writes_nothing(tmp_path: Path) -> None:
    attach(factored("llama")).save_pretrained(tmp_path / "a", is_main_process=False)
    assert not list((tmp_path / "a").iterdir())


def test_more_and_fewer_tensors(tmp_path: Path) -> None:
    model = attach(factored("llama"))
    given = model.state_dict()
    model.save_pretrained(tmp_path / "more", state_dict={**given, "extra": torch.ones(3)})
    assert "extra" in load_file(tmp_path / "more" / "model.safetensors")
    assert_same(load(tmp_path / "more"), model)
    part = {name: tensor for name, tensor in given.items() if not name.startswith(LAYER)}
    with pytest.raises(CheckpointError, match=rf"the state_dict lacks {LAYER}\.A\.weight, {LAYER}\.B\.weight"):
        model.save_pretrained(tmp_path / "fewer", state_dict=part)
    assert not (tmp_path / "fewer").exists()


@pytest.mark.parametrize(("tensor", "size"), [("weight", (64, 64)), ("A.weight", (64, 5)), ("B.weight", (5, 64))])
def test_tensors_of_another_form_are_refused_before_anything_is_written(
    tensor: str, size: tuple[int, int], tmp_path: Path
) -> None:
    model = attach(factored("llama"))
    with pytest.raises(CheckpointError, match=rf"holds {LAYER}\.{tensor} in another shape"):
        model.save_pretrained(tmp_path / "a", state_dict={**model.state_dict(), f"{LAYER}.{tensor}": torch.ones(size)})
    assert not (tmp_path / "a").exists()


def test_a_file_read_back_is_a_state_dict(tmp_path: Path) -> None:
    model = save(factored("llama"), tmp_path / "a")
    again = load(model)
    again.save_pretrained(tmp_path / "b", state_dict=load_file(model / "model.safetensors"))  # with its guards
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_accelerate_saves_what_it_gathers(tmp_path: Path) -> None:
    accelerator = __import__("accelerate").Accelerator(cpu=True)
    model = accelerator.prepare(load(save(factored("llama"), tmp_path / "a")))
    with torch.no_grad():
        model.get_submodule(LAYER).A.weight.mul_(2)
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "b",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert_same(load(tmp_path / "b"), model)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "mllama"])
@forms
def test_names_of_tensors_are_the_keys_of_the_state_dict(family: str, form: str) -> None:
    model = compressed(family, form)
    assert tensor_names(model) == model.state_dict().keys()


def test_modules_around_others_are_no_part_of_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = factored("llama")
    expected = model.state_dict()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.save_pretrained(tmp_path, state_dict=expected)
    assert_same(load(tmp_path), factored("llama"))


def test_a_model_quantized_otherwise_is_not_described(tmp_path: Path) -> None:
    model = factored("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="quantized in another way"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_config_of_an_attached_model_follows_it(tmp_path: Path) -> None:
    model = attach(factored("llama"))
    layer = model.get_submodule(LAYER)
    model.set_submodule(LAYER, layer.to_dense())
    model.save_pretrained(tmp_path)
    assert LAYER not in config_of(tmp_path)["quantization_config"]["ranks"]
    assert isinstance(model.config.quantization_config, SpectrimConfig)
    assert LAYER not in model.config.quantization_config.ranks
    assert_same(load(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == TEXT["vocab_size"]


SHARDED = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from spectrim.checkpoint import load
cpu = torch.device("cpu")
for number in (1, 2):
    model = load(sys.argv[1])
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if number == 1:
        for place, block in enumerate(model.model.layers):
            model.model.layers[place] = FullyShardedDataParallel(block, device_id=cpu)
        whole, kind = FullyShardedDataParallel(model, device_id=cpu), StateDictType.FULL_STATE_DICT
        with FullyShardedDataParallel.state_dict_type(whole, kind, FullStateDictConfig(offload_to_cpu=True)):
            gathered = whole.state_dict()
    else:
        for block in (*model.model.layers, model):
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(f"{sys.argv[2]}/{number}", state_dict=gathered)
    again = load(f"{sys.argv[2]}/{number}").state_dict()
    print(again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole", "packed"])
def test_sharded_models_save_what_is_gathered(form: str, tmp_path: Path) -> None:
    """FSDP in both its versions, in a process group of one."""
    save(compressed("llama", form), tmp_path / "a")
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, tmp_path / "a", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert [line for line in run.stdout.splitlines() if line in ("True", "False")] == ["True", "True"]
