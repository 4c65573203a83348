"""What of a model directory gets into a checkpoint and to the hub: what a model is made of, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from compressed import factored
from families import FAMILIES
from helpers.command import hub
from helpers.samples import llava_processor, word_tokenizer
from spectrim.calibrate import calibrate
from spectrim.checkpoint import load, load_processor, push, read_provenance, save
from spectrim.errors import CheckpointError
from spectrim.pipeline import compress

PRIVATE = (
    "secrets.env", ".env", "id_rsa", "train.log", "modeling_own.py", "adapter_config.json", "adapter_model.safetensors",
    "training_args.bin", "optimizer.pt", "notes.txt", "license.key", "LICENSE.py", "tokens.json", "wandb/run.json",
    ".cache/huggingface/token", "additional_chat_templates/tool.py", "additional_chat_templates/deep/tool.jinja",
    "old/tokenizer.json", "a\nb.tiktoken", "license_key.txt", "LICENSE-token", "notice_to_self.txt", "tokenizer.json~",
    "TOKENIZER.JSON", "events.out.tfevents.1",
)  # fmt: skip
WANTED = (
    "LICENSE", "LICENSE.txt", "Notice.md", "USE_POLICY.md", "LICENSE-APACHE-2.0", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "qwen.tiktoken", "additional_chat_templates/tool.jinja",
    "tiktoken.model", "SYSTEM_PROMPT.txt", "MODEL_LICENSE", "LICENSE-CODE", "COPYRIGHT.txt", "Acceptable_Use_Policy.md",
    "ThirdPartyNotices.txt", "terms_of_use.html",
)  # fmt: skip


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A dense model with its processor, and with what people keep beside one."""
    directory = save(FAMILIES["llava"](), tmp_path / "dense", processor=llava_processor())
    for name in (*PRIVATE, *WANTED):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if path.suffix == ".json" else name)
    return directory


def test_a_checkpoint_takes_what_a_model_is_made_of(source: Path, tmp_path: Path) -> None:
    own = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
    made = {"config.json", "generation_config.json", "model.safetensors", "README.md", "spectrim.json"}
    small = save(factored("llava"), tmp_path / "small", processor=source)
    assert names(small) == {*own, *made, *WANTED}
    assert set(read_provenance(small)["files"]) == names(small)
    for name in (*own, *WANTED):
        assert (small / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "LICENSE", "vocab.json"])
def test_links_that_lead_out_are_not_followed(source: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": 1}')
    (source / name).unlink()
    (source / name).symlink_to(secret)
    small = save(factored("llava"), tmp_path / "small", processor=source)
    assert name not in names(small)
    (source / name).unlink()
    (source / name).symlink_to("tokenizer.json")  # one that stays
    small = save(factored("llava"), tmp_path / "other", processor=source)
    assert (small / name).read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not (small / name).is_symlink()


def test_a_directory_of_templates_that_is_a_link_is_not_followed(source: Path, tmp_path: Path) -> None:
    shutil.move(source / "additional_chat_templates", tmp_path / "elsewhere")
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    small = save(factored("llava"), tmp_path / "small", processor=source)
    assert not (small / "additional_chat_templates").exists()


def test_links_of_the_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--somebody--llava"
    snapshot = home / "snapshots" / ("0" * 40)
    shutil.copytree(source, snapshot)
    (home / "blobs").mkdir()
    for number, name in enumerate(("tokenizer.json", "LICENSE", "config.json")):
        shutil.move(snapshot / name, home / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (snapshot / "vocab.json").unlink()
    (snapshot / "vocab.json").symlink_to(source / "vocab.json")  # out of the repository
    small = save(factored("llava"), tmp_path / "small", processor=snapshot)
    assert {"tokenizer.json", "LICENSE"} <= names(small)
    assert "vocab.json" not in names(small)


@pytest.mark.parametrize("processor", ["directory", "object"])
def test_no_path_of_this_machine_is_written(source: Path, tmp_path: Path, processor: str) -> None:
    """Neither the model's nor the samples', whoever wrote them where."""
    config = json.loads((source / "config.json").read_text())
    config |= {"_name_or_path": str(source), "mm_vision_tower": str(source / "config.json")}
    config["text_config"]["_name_or_path"] = "/home/somebody/llama"
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer |= {"name_or_path": str(source), "special_tokens_map_file": "/root/.cache/x/special_tokens_map.json"}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in {*PRIVATE, *WANTED} & names(source):  # those of the fixture are none that transformers can use
        (source / name).unlink()
    shutil.rmtree(source / "additional_chat_templates")
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{3 + i * 7 % 110}" for i in range(600)))
    model = load(source)
    small = compress(
        model, tmp_path / "small", recipe="svd-llm", retain=0.6, text=str(words), images=None, samples=4, seqlen=16,
        processor=source if processor == "directory" else load_processor(source),
    )  # fmt: skip
    assert small.name_or_path == str(source)
    written = [path for path in (tmp_path / "small").iterdir() if path.suffix != ".safetensors"]
    assert len(written) > 6
    for path in written:
        text = path.read_text()
        assert str(tmp_path) not in text, path.name
        assert "/home/somebody" not in text
        assert "/root/.cache" not in text
    assert read_provenance(tmp_path / "small")["data"]["text"] == "words.txt"
    assert load(tmp_path / "small").config.mm_vision_tower == "config.json"
    load_processor(tmp_path / "small")


def test_statistics_keep_the_whole_path_for_a_later_run(tmp_path: Path) -> None:
    """Compensation reads the samples again from where they are; the checkpoint does not say where."""
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{3 + i * 7 % 110}" for i in range(600)))
    tokenizer = word_tokenizer()
    calibrate(FAMILIES["llama"](), tmp_path / "stats", processor=tokenizer, text=str(words), samples=4, seqlen=16)
    compress(
        FAMILIES["llama"](), tmp_path / "small", recipe="svd-llm", retain=0.6, stats=tmp_path / "stats",
        processor=tokenizer, changes={"compensate.kind": "anchored"},
    )  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "small" / "spectrim.json").read_text()


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("/data/a/words.txt", "words.txt"),
        ("~/words.txt", "words.txt"),
        ("../words/", "words"),
        (r"C:\Users\me\words.txt", "words.txt"),
        ("Salesforce/wikitext:wikitext-2-raw-v1:train", "Salesforce/wikitext:wikitext-2-raw-v1:train"),
        ("builtin", "builtin"),
        (None, None),
    ],
)
def test_data_sources_are_recorded_by_their_last_part(tmp_path: Path, source: object, public: object) -> None:
    directory = save(FAMILIES["llama"](), tmp_path / "a", provenance={"data": {"text": source, "images": source}})
    assert read_provenance(directory)["data"] == {"text": public, "images": public}


@pytest.mark.parametrize("name", ["a\nb", "x\x1b[31m", "run.py", "adapter_config.json"])
def test_names_of_files_that_cannot_be_added(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be added") as caught:
        save(FAMILIES["llama"](), tmp_path / "a", files={name: ""})
    assert str(caught.value).isprintable()


def test_only_what_a_model_is_made_of_goes_to_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = save(factored("llava"), tmp_path / "small", processor=source, files={"plan[1].json": "{}"})
    uploaded = names(small)
    (small / "model-00001-of-00002.safetensors").touch()  # as after fine-tuning
    for name in PRIVATE:
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        (small / name).touch()
    (small / "vocab.txt").symlink_to(tmp_path / "dense" / "vocab.json")
    api = hub(monkeypatch)
    push(small, "me/small")
    folder = api.calls[-1][1]
    sent = set(filter_repo_objects(names(small), allow_patterns=folder["allow_patterns"]))
    assert sent == {*uploaded, "model-00001-of-00002.safetensors"}
    (record,) = caplog.records
    assert "not uploaded" in record.getMessage()
    for name in ("secrets.env", "id_rsa", "vocab.txt", r"a\nb.tiktoken"):
        assert name in record.getMessage()


def test_a_whole_checkpoint_goes_up_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = save(factored("llama"), tmp_path / "small", files={"plan.json": "{}"})
    api = hub(monkeypatch)
    push(small, "me/small")
    assert set(filter_repo_objects(names(small), allow_patterns=api.calls[-1][1]["allow_patterns"])) == names(small)
    assert not caplog.records
