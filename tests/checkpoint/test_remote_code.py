"""Models that bring Python code: it is never run, and nothing asks, unless the user allows it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import spectrim
from compressed import config_of, logits
from families import FAMILIES
from helpers.command import run
from helpers.samples import word_tokenizer
from spectrim.checkpoint import load, load_processor, read_provenance, save
from spectrim.errors import ModelError

CONFIG = """
from transformers import LlamaConfig

class TinyOwnConfig(LlamaConfig):
    model_type = "tiny_own"
"""
MODEL = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyOwnConfig

Path({mark!r}).touch()

class TinyOwnForCausalLM(LlamaForCausalLM):
    config_class = TinyOwnConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({mark!r}).touch()

class TinyOwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists once the model's code has run."""
    return tmp_path / "ran"


@pytest.fixture
def own(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory with config, model and tokenizer of its own, as hubs have them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # of an earlier directory of modules
    directory = tmp_path / "own"
    FAMILIES["llama"]().save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    config = config_of(directory) | {"model_type": "tiny_own", "architectures": ["TinyOwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_tiny.TinyOwnConfig", "AutoModelForCausalLM": "modeling_tiny.TinyOwnForCausalLM"
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text()) | {"tokenizer_class": "TinyOwnTokenizer"}
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "tokenization_tiny.TinyOwnTokenizer"]}
    path.write_text(json.dumps(tokenizer))
    (directory / "configuration_tiny.py").write_text(CONFIG)
    (directory / "modeling_tiny.py").write_text(MODEL.format(mark=str(mark)))
    (directory / "tokenization_tiny.py").write_text(TOKENIZER.format(mark=str(mark)))
    return directory


@pytest.mark.parametrize("reader", [load, load_processor])
def test_code_is_not_run_and_the_message_says_how(own: Path, mark: Path, reader: object) -> None:
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(ModelError, match=r"code of its own .*--trust-remote-code \(trust_remote_code=True\)"):
            reader(own, **options)
    assert not mark.exists()


@pytest.mark.parametrize(
    "verb",
    [
        "anatomy {own}",
        "calibrate {own} -o {out}",
        "compress {own} -o {out} --retain 0.6 --recipe svd",
        "evaluate {own} --tasks perplexity",
    ],
)
def test_no_verb_asks_or_runs_it(
    own: Path,
    mark: Path,
    tmp_path: Path,
    verb: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": (asked.append(question), "y")[1])
    code, _, err = run(capsys, *verb.format(own=own, out=tmp_path / "out").split())
    assert code == 2
    assert "--trust-remote-code" in err
    assert not asked
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_with_trust_a_model_loads_is_compressed_and_loads_again(own: Path, mark: Path, tmp_path: Path) -> None:
    model = load(own, trust_remote_code=True)
    assert type(model).__name__ == "TinyOwnForCausalLM"
    assert mark.exists()
    assert type(load_processor(own, trust_remote_code=True)).__name__ == "TinyOwnTokenizer"
    out = tmp_path / "small"
    small = spectrim.compress(str(own), out, recipe="svd", retain=0.6, trust_remote_code=True)
    code = {"configuration_tiny.py", "modeling_tiny.py", "tokenization_tiny.py"}  # as transformers saves such models
    assert {path.name for path in out.glob("*.py")} == code
    assert code <= set(read_provenance(out)["files"])
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    shutil.rmtree(own)
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load(out)
    again = load(out, trust_remote_code=True)
    assert torch.equal(logits(again), logits(small))
    assert load_processor(out, trust_remote_code=True)("w7").input_ids == [1, 7]
    report = spectrim.evaluate([out], tasks=["perplexity"], max_tokens=64, seqlen=16, trust_remote_code=True)
    assert report.results[0].compressed


def test_a_class_that_transformers_has_needs_no_code(own: Path, mark: Path, tmp_path: Path) -> None:
    """As of Phi-3, whose directories still name the code that came before."""
    config = config_of(own) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (own / "config.json").write_text(json.dumps(config))
    model = load(own)
    assert type(model).__module__.startswith("transformers.")
    assert not mark.exists()
    out = save(model, tmp_path / "small")
    assert not list(out.glob("*.py"))
    assert "auto_map" not in config_of(out)  # it would name files that are not there
    load(out, trust_remote_code=True)


@pytest.mark.parametrize("name", ["configuration_tiny.py", "modeling_tiny.py"])
def test_code_that_is_not_there_is_an_error(own: Path, name: str) -> None:
    (own / name).unlink()
    with pytest.raises(ModelError, match=name):
        load(own, trust_remote_code=True)
    (own / name).write_text("raise ValueError('broken')")
    with pytest.raises(ModelError, match="cannot load the"):
        load(own, trust_remote_code=True)


def test_the_option_of_the_command_line(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trust = "--trust-remote-code"
    code, _, err = run(capsys, "anatomy", own, trust)
    assert code == 0, err
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"w{3 + i * 7 % 110}" for i in range(600)))
    samples = ("--text", words, "--images", "none", "--samples", "4", "--seqlen", "16")
    code, _, err = run(capsys, "calibrate", own, "-o", tmp_path / "stats", *samples, trust)
    assert code == 0, err
    code, _, err = run(
        capsys, "compress", own, "-o", tmp_path / "out", "--retain", "0.6", "--stats", tmp_path / "stats", trust
    )
    assert code == 0, err
    assert (tmp_path / "out" / "tokenization_tiny.py").is_file()
    code, _, err = run(
        capsys, "evaluate", own, tmp_path / "out", "--tasks", "perplexity", "--text", words, "--seqlen", "16", trust
    )
    assert code == 0, err
    code, _, err = run(
        capsys, "inspect", own, "--stats", tmp_path / "stats", "-o", tmp_path / "report", "--no-plots", trust
    )
    assert "code of its own" not in err
