"""Model directories of any shape: one sentence that names the file and the remedy, never a traceback."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from compressed import config_of, edited, factored
from families import FAMILIES, TEXT
from helpers.samples import word_tokenizer
from spectrim.checkpoint import load, load_processor, save
from spectrim.errors import CheckpointError, ModelError, SampleError, SpectrimError, printable
from spectrim.evaluate.footprint import stored_bytes

LAYER = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "dense"
    FAMILIES["llama"]().save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "dense"
    FAMILIES["llama"]().save_pretrained(directory, max_shard_size="60KB")
    return directory


@pytest.fixture
def dense(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "dense"))


def refuses(reader: Callable[..., Any], directory: str | Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        reader(directory)
    said = str(caught.value)
    assert said.isprintable()
    assert ";" in said or ":" in said  # a remedy


DEEP = "[" * 100_000


@pytest.mark.parametrize("reader", [load, load_processor])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        (DEEP, "nested too deeply"),
        ('{"model_type": "llama", "model_type": "llama"}', "gives the key 'model_type' twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ("[]", "is not a JSON object"),
        ("3", "is not a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": ["llama"]}', "names no model_type"),
        ('{"model_type": "of-tomorrow"}', "'of-tomorrow', which transformers .* does not know; upgrade"),
        ('{"model_type": "a\\n\\u001b[31m"}', r"which transformers"),
        ('{"model_type": "llama", "auto_map": "x"}', "auto_map that is no JSON object"),
        ('{"model_type": "llama", "dtype": "int8"}', "gives the dtype 'int8'; correct it to one of"),
        ('{"model_type": "llama", "torch_dtype": "float13"}', "gives the torch_dtype 'float13'"),
        ('{"model_type": "llava", "text_config": {"dtype": 3}}', "gives the dtype 3"),
    ],
)
def test_configs_that_cannot_be_read(dense: Path, text: str, said: str, reader: Callable[..., Any]) -> None:
    (dense / "config.json").write_text(text)
    refuses(reader, dense, rf"config\.json.*{said}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "abc"}, "hidden_size.*expected int.*copy config.json again"),
        ({"num_attention_heads": 0}, "cannot load the config"),
        ({"rope_parameters": "x"}, "rope_parameters"),
        ({"quantization_config": "fp8"}, "copy config.json again"),
        ({"hidden_size": -4}, "cannot load the model"),
        ({"hidden_act": "of-tomorrow"}, "cannot load the model"),
        ({"hidden_size": 128}, r"hold lm_head\.weight in the shape \[128, 64\] and config\.json wants \[128, 128\]"),
        ({"vocab_size": 10**14}, r"hold lm_head\.weight in the shape \[128, 64\] .* wants \[100000000000000, 64\]"),
        ({"num_hidden_layers": 3}, r"lack model\.layers\.2\."),
    ],
)
def test_configs_that_do_not_fit(dense: Path, change: dict[str, Any], said: str) -> None:
    (dense / "config.json").write_text(json.dumps(config_of(dense) | change))
    refuses(load, dense, said)


def test_a_directory_without_a_config(dense: Path) -> None:
    (dense / "config.json").rename(dense / "adapter_config.json")
    refuses(load, dense, "is no model directory but an adapter; merge it")
    (dense / "adapter_config.json").unlink()
    for reader in (load, load_processor):
        refuses(reader, dense, r"has no config\.json; name one, or a hub id")


def test_an_adapter_beside_the_weights(dense: Path) -> None:
    (dense / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    refuses(load, dense, r"move its adapter_config\.json elsewhere")


def shards_of(index: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {**index, "weight_map": {**index["weight_map"], **change}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: {}, "no weight_map"),
        (lambda index: [], "is not a JSON object"),
        (lambda index: {**index, "weight_map": []}, "no weight_map"),
        (lambda index: {**index, "weight_map": {}}, "no weight_map"),
        (lambda index: shards_of(index, x=3), "no weight_map"),
        (lambda index: {"weight_map": index["weight_map"]}, "no metadata"),
        (lambda index: shards_of(index, x="none.safetensors"), r"lacks none\.safetensors"),
        (lambda index: shards_of(index, x="../dense/model.safetensors"), "outside its directory"),
        (lambda index: shards_of(index, x="/etc/passwd"), "outside its directory"),
        (lambda index: shards_of(index, x="a\n\x1b[31m.safetensors"), "outside its directory"),
        (lambda index: DEEP, "nested too deeply"),
        (lambda index: "{", "is not JSON"),
    ],
)
def test_indexes_that_cannot_be_followed(
    sharded: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    directory = Path(shutil.copytree(sharded, tmp_path / "dense"))
    found = change(json.loads((directory / INDEX).read_text()))
    (directory / INDEX).write_text(found if isinstance(found, str) else json.dumps(found))
    refuses(load, directory, said)
    with pytest.raises(CheckpointError, match=said):
        stored_bytes(directory)


def test_bytes_are_those_of_the_files_that_are_read(sharded: Path, saved: Path, tmp_path: Path) -> None:
    assert stored_bytes(sharded) == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    both = Path(shutil.copytree(sharded, tmp_path / "both"))
    shutil.copyfile(saved / "model.safetensors", both / "model.safetensors")  # which transformers prefers
    assert stored_bytes(both) == (both / "model.safetensors").stat().st_size


@pytest.mark.parametrize("size", [0, 4, 100, -100])
def test_truncated_weights(dense: Path, size: int) -> None:
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuses(load, dense, r"model\.safetensors is truncated or not a safetensors file .*; copy it again")


def test_truncated_shards_are_named(sharded: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(sharded, tmp_path / "dense"))
    file = sorted(directory.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-1])
    refuses(load, directory, f"{file.name} is truncated")


def test_weights_of_other_shapes_are_named(dense: Path) -> None:
    with edited(dense) as tensors:
        tensors[LAYER] = tensors[LAYER][:3].clone()
    refuses(load, dense, rf"hold {LAYER} in the shape \[3, 64\] and config\.json wants \[64, 64\]")
    assert load(dense, ignore_mismatched_sizes=True)


def test_no_weights_at_all(dense: Path) -> None:
    (dense / "model.safetensors").unlink()
    refuses(load, dense, r"lacks its weights, model\.safetensors; save the model as safetensors")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_pickles_are_read_as_tensors_and_never_run(dense: Path, tmp_path: Path) -> None:
    with edited(dense) as tensors:
        pass
    (dense / "model.safetensors").unlink()
    file = dense / "pytorch_model.bin"
    torch.save(tensors, file)
    assert torch.equal(load(dense).get_parameter(LAYER), tensors[LAYER])
    torch.save({**tensors, "x": Evil(tmp_path / "ran")}, file)
    refuses(load, dense, r"pytorch_model\.bin is no file of tensors, or a pickle that runs code, which is refused")
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"junk", b"PK\3\4junk"):
        file.write_bytes(content)
        refuses(load, dense, r"pytorch_model\.bin is")
    torch.save([1, 2], file)
    refuses(load, dense, r"pytorch_model\.bin is")


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=4)),
        lambda: hf.BertModel(hf.BertConfig(**SMALL, vocab_size=50)),
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=50)),
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**SMALL, "vocab_size": 50}, vision_config={**SMALL, "image_size": 16, "patch_size": 4}
            )
        ),
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, decoder_start_token_id=1,
            )
        ),
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT)),
        lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT)),
    ],
)  # fmt: skip
def test_other_kinds_of_models_are_no_language_models(tmp_path: Path, make: Callable[[], Any]) -> None:
    make().save_pretrained(tmp_path)
    refuses(load, tmp_path, "is no language model or image-text model; name one")


@pytest.mark.parametrize("family", ["qwen2", "opt", "llama", "gemma3"])
def test_a_tokenizer_that_is_missing_is_an_error(tmp_path: Path, family: str) -> None:
    """Some classes come up with an empty vocabulary where there are no files."""
    FAMILIES[family]().save_pretrained(tmp_path)
    refuses(load_processor, tmp_path, r"add the tokenizer\.json of its base model")


@pytest.mark.parametrize("text", ["{", DEEP, "{}", "[]", '{"version": "1.0", "model": {"type": "Of tomorrow"}}'])
def test_a_tokenizer_that_is_broken_is_named(dense: Path, text: str) -> None:
    (dense / "tokenizer.json").write_text(text)
    refuses(load_processor, dense, r"tokenizer\.json.* again")


@pytest.mark.parametrize("text", ["{", DEEP, "[]", '{"a": 1, "a": 2}', '{"x": "\\ud800"}'])
@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("generation_config.json", load),
        ("tokenizer_config.json", load_processor),
        ("preprocessor_config.json", load_processor),
        ("processor_config.json", load_processor),
        ("chat_template.json", load_processor),
    ],
)
def test_files_that_transformers_may_do_without_are_named(
    dense: Path, name: str, reader: Callable[..., Any], text: str
) -> None:
    (dense / name).write_text(text)
    refuses(reader, dense, rf"{name} .*; copy it again")


@pytest.mark.parametrize("source", ["", "a\0b", "a\nb", "no/such-model", "./none", "../none", "~none", "\x1b[31m"])
def test_names_of_nothing(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for reader in (load, load_processor):
        refuses(reader, source, "name|hub id")


def test_a_file_is_no_model_directory(dense: Path) -> None:
    refuses(load, dense / "config.json", "is a file; name a model directory")


def test_damaged_checkpoints_are_checkpoint_errors(tmp_path: Path) -> None:
    small = save(factored("llama"), tmp_path / "small", max_shard_size="60KB")
    (small / sorted(small.glob("*.safetensors"))[0].name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        load(small)


# ---- messages ----


def test_messages_are_one_line_that_does_nothing() -> None:
    text = "a\nb\r\x1b[31mred\x00\u202eturned\ud800\u2028é漢 ok"
    assert printable(text).isprintable()
    assert printable(text) == r"a\nb\r\x1b[31mred\x00\u202eturned\ud800\u2028é漢 ok"
    assert str(SampleError(text)) == printable(text)
    assert str(SpectrimError()) == ""


def test_names_in_messages_are_escaped(tmp_path: Path) -> None:
    odd = tmp_path / "a\n\x1b[31m"
    odd.mkdir()
    refuses(load, odd, r"a\\n\\x1b\[31m is no model directory")


@pytest.mark.parametrize(
    "number", ["9'; rm -rf ~; '", "$(id)", "1.0 && id", "x" * 300, ["1"], {"a": 1}, 3, "", None, "\n1.0.0;"]
)
def test_a_version_in_a_shell_line_is_a_version(tmp_path: Path, number: Any) -> None:
    small = save(factored("llama"), tmp_path / "small")
    config = config_of(small)
    config["quantization_config"] |= {"version": 2, "spectrim_version": number}
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"pip install --upgrade spectrim$"):
        load(small)
