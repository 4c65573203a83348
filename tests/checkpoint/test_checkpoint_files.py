import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from compressed import config_of, edited, factored, logits, low_rank
from families import FAMILIES
from helpers.exchanged import replace_linears
from spectrim.checkpoint import (
    attach,
    load,
    load_processor,
    read_provenance,
    save,
)
from spectrim.errors import CheckpointError, ModelError
from spectrim.evaluate import evaluate


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved compressed language model; tests that change it work on a copy."""
    return save(factored("llama"), tmp_path_factory.mktemp("llama") / "small", provenance={"recipe": "svd"})


@pytest.fixture
def llama_copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_layers_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    tied = FAMILIES["qwen2"]()
    replace_linears(tied, {"lm_head": 3})
    with pytest.raises(CheckpointError, match="lm_head shares its weight"):
        save(tied, tmp_path / "a")
    quantized = factored("llama")
    quantized.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="already quantized"):
        save(quantized, tmp_path / "a")
    with pytest.raises(ModelError, match="no factored layer"):
        attach(FAMILIES["llama"]())
    assert not list(tmp_path.iterdir())


def test_provenance_and_files(tmp_path: Path) -> None:
    record = {"recipe": {"name": "svd"}, "predicted_loss": 0.25}
    directory = save(FAMILIES["llama"](), tmp_path / "deep" / "a", provenance=record, files={"plan.json": "{}\n"})
    assert (directory / "plan.json").read_text() == "{}\n"
    stored = read_provenance(directory)
    assert {key: stored[key] for key in record} == record
    assert not low_rank(load(directory))  # a dense model is saved as one
    assert "quantization_config" not in config_of(directory)
    modes = {path.stat().st_mode for path in directory.iterdir()}
    assert len(modes) == 1  # whoever can read the config can read the weights


@pytest.mark.parametrize("name", ["config.json", "spectrim.json", "model.safetensors", "../plan.json", "a/b", "", ".x"])
def test_files_with_names_of_the_model_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be added"):
        save(FAMILIES["llama"](), tmp_path / "a", files={name: ""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), torch.ones(1), {1, 2}])
def test_provenance_that_is_not_json_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        save(FAMILIES["llama"](), tmp_path / "a", provenance={"x": value})


def test_a_full_disk_leaves_the_target_as_it_was(llama_copy: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama_copy.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes a file may have; the weights need more
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*copy"):
            save(FAMILIES["llama"](), llama_copy, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in llama_copy.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("failing", ["target", "temporary"])
def test_a_failed_exchange_restores_the_target(
    llama_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = {path.name: path.read_bytes() for path in llama_copy.iterdir()}
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if (self == llama_copy) == (failing == "target") and self.suffix != ".old":
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(FAMILIES["llama"](), llama_copy, overwrite=True)
    assert {path.name: path.read_bytes() for path in llama_copy.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()

    def interrupted(directory: Path, **kwargs: Any) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_everything_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))[1]
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("replace"), replace(self, to))[1])
    directory = save(FAMILIES["llama"](), tmp_path / "a")
    synced = {Path(event).name for event in events[: events.index("replace")]}
    assert synced > {path.name for path in directory.iterdir()}  # and the directory itself
    assert events[events.index("replace") + 1 :] == [str(tmp_path)]


# ---- processors ----


def processor() -> hf.LlavaProcessor:
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", "<image>", "what"])}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = "{% for message in messages %}<image> {{ message['content'][1]['text'] }}{% endfor %}"
    return hf.LlavaProcessor(
        image_processor, tokenizer, patch_size=4, vision_feature_select_strategy="full", chat_template=template
    )


QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]


def test_a_processor_object_travels(tmp_path: Path) -> None:
    directory = save(factored("llava"), tmp_path / "a", processor=processor())
    again = load_processor(directory)
    assert type(again) is hf.LlavaProcessor
    assert again.apply_chat_template(QUESTION) == processor().apply_chat_template(QUESTION) == "<image> what"
    assert again.tokenizer("what <image>").input_ids == [3, 2]


def test_processor_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = save(FAMILIES["llava"](), tmp_path / "dense", processor=processor(), files={"plan.json": "{}"})
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("card of the dense model")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    small = save(factored("llava"), tmp_path / "small", processor=source)
    copied = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja", "LICENSE")
    for name in (*copied, "additional_chat_templates/tool.jinja"):
        assert (small / name).read_bytes() == (source / name).read_bytes()
    assert not {"pytorch_model.bin", "plan.json"} & {path.name for path in small.iterdir()}
    assert "card of the dense model" not in (small / "README.md").read_text()
    assert config_of(small)["quantization_config"]["quant_method"] == "spectrim"
    shutil.rmtree(small / "additional_chat_templates")  # transformers leaves its files open, which is a warning
    assert load_processor(small).apply_chat_template(QUESTION) == "<image> what"
    with pytest.raises(CheckpointError, match="file of the processor"):
        save(factored("llava"), tmp_path / "other", processor=source, files={"tokenizer.json": "{}"})


def test_a_language_model_has_a_tokenizer(tmp_path: Path) -> None:
    directory = save(factored("llama"), tmp_path / "a", processor=processor().tokenizer)
    assert load_processor(directory)("what").input_ids == [3]


def test_a_missing_processor_is_an_error(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_processor(llama)
    directory = save(factored("llava"), tmp_path / "a", processor=processor().tokenizer)
    with pytest.raises(ModelError, match=r"processor"):
        load_processor(directory)


# ---- other sources ----


def test_dense_directories_load_and_lacking_weights_are_an_error(tmp_path: Path) -> None:
    model = FAMILIES["llava"]()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    with edited(tmp_path) as tensors:
        del tensors["multi_modal_projector.linear_1.weight"]
    with pytest.raises(ModelError, match=r"multi_modal_projector\.linear_1\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "no/such-model-anywhere"])
def test_a_source_that_does_not_exist_is_an_error(name: str) -> None:
    for reader in (load, load_processor):
        with pytest.raises(ModelError, match=name) as caught:
            reader(name, local_files_only=True)
        assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model directory"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_provenance(tmp_path)
    for content, message in (("[]", "not a JSON object"), ("{}", "not a record")):
        (tmp_path / "spectrim.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_provenance(tmp_path)


def test_a_hub_id_is_a_source_like_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the local cache stands for the hub; nothing is fetched."""
    repository = tmp_path / "models--somebody--llava"
    dense = save(FAMILIES["llava"](), repository / "snapshots" / ("0" * 40), processor=processor())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(logits(load("somebody/llava", local_files_only=True)), logits(load(dense)))
    small = save(factored("llava"), tmp_path / "small", processor="somebody/llava")
    assert (small / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert load_processor(small).apply_chat_template(QUESTION) == "<image> what"
    (tmp_path / "words.txt").write_text("w7 w8 w9 w10 " * 40)
    how = {"tasks": ["perplexity"], "text": str(tmp_path / "words.txt"), "seqlen": 16}
    named, compressed = evaluate(["somebody/llava", small], **how).results
    assert (named.directory, named.compressed, compressed.compressed) == ("somebody/llava", False, True)
    assert named.bytes == (dense / "model.safetensors").stat().st_size
    with pytest.raises(ModelError, match="somebody/nobody"):
        evaluate(["somebody/nobody", small], **how)
