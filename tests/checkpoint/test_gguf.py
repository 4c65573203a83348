"""GGUF files as models: loaded, compressed by the command line, and refused in one sentence."""

from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

import spectrim
from compressed import logits
from families import FAMILIES
from helpers.command import run
from spectrim.checkpoint import check_target, load, load_processor, read_provenance, save, sources
from spectrim.errors import CheckpointError, ModelError

PARTS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
PARTS |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
PARTS |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, family: str) -> Path:
    """A few-layer model in float32, and for a Llama a tokenizer of single characters."""
    model = FAMILIES[family]()
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens += [f"unused{i}" for i in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = WHOLE | {f"model.layers.{i}.{part}": f"blk.{i}.{short}" for i in range(2) for part, short in PARTS.items()}
    tied = config.tie_word_embeddings
    for name, short in names.items():
        for kind, tensor in () if tied and name == "lm_head" else model.get_submodule(name).named_parameters():
            writer.add_tensor(f"{short}.{kind}", tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama")


def test_gguf_files_load_as_dense_models(tmp_path: Path) -> None:
    """Those of Qwen2, which transformers does not reorder, to the bit."""
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2")
    for source in (path, f"{tmp_path}::tiny.gguf"):
        again = load(source, dtype=torch.float32)
        assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
        assert torch.equal(logits(again), logits(FAMILIES["qwen2"]()))


def test_weights_are_bfloat16_unless_asked_and_that_is_said(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(tiny).dtype == torch.bfloat16
    (record,) = caplog.records
    assert record.name.startswith("spectrim")
    assert "tiny.gguf" in record.getMessage()
    assert "bfloat16" in record.getMessage()
    caplog.clear()
    assert load(tiny, dtype=torch.float32).dtype == torch.float32
    assert load(tiny, dtype="float16").dtype == torch.float16
    assert not caplog.records


@pytest.mark.parametrize("form", ["{}", "{0.parent}::{0.name}"])
def test_the_command_line_compresses_them(
    tiny: Path, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("the quick brown fox jumps over the lazy dog " * 40)
    out = tmp_path / "out"
    code, _, err = run(
        capsys, "compress", form.format(tiny), "-o", out, "--retain", "0.4", "--recipe", "svd-llm",
        "--text", words, "--images", "none", "--samples", "4", "--seqlen", "16",
    )  # fmt: skip
    assert code == 0, err
    small, tokenizer = load(out), load_processor(out)
    assert small.dtype == torch.bfloat16
    assert tokenizer("fox").input_ids == load_processor(tiny)("fox").input_ids
    linears = sum(x.weight.numel() for x in FAMILIES["llama"]().model.layers.modules() if isinstance(x, nn.Linear))
    assert read_provenance(out)["bytes"]["linears_dense"] == 2 * linears  # and not 4
    card = (out / "README.md").read_text()
    assert "# tiny, compressed by spectrim" in card
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            assert str(tiny.parent) not in path.read_text()
    how = {"tasks": ["perplexity", "kl"], "text": str(words), "seqlen": 16}
    dense, compressed = spectrim.evaluate([form.format(tiny), out], **how).results
    assert dense.perplexity != compressed.perplexity
    assert (dense.compressed, compressed.compressed) == (False, True)
    written = save(load(tiny), tmp_path / "dense") / "model.safetensors"
    assert 0 <= dense.bytes - written.stat().st_size < 200 * 40  # its header is known to within some bytes a tensor


def test_a_gguf_file_is_not_replaced_by_what_is_made_of_it(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is a link|is a file|which this run reads"):
        save(load(tiny), tiny, overwrite=True)
    with pytest.raises(CheckpointError, match=r"holds .*tiny\.gguf"):
        check_target(tiny.parent, overwrite=True, protected=[tiny])
    assert tiny.is_file()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("reader", [load, load_processor])
def test_a_truncated_file_is_an_error(tiny: Path, tmp_path: Path, share: float, reader: object) -> None:
    whole = tiny.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError, match=r"cut\.gguf is truncated, no GGUF file"):
        reader(tmp_path / "cut.gguf")


@pytest.mark.parametrize("reader", [load, load_processor])
def test_files_that_are_none_or_not_there(tmp_path: Path, reader: object) -> None:
    (tmp_path / "text.gguf").write_text("no model " * 100)
    with pytest.raises(ModelError, match=r"text\.gguf is truncated, no GGUF file"):
        reader(tmp_path / "text.gguf")
    for source in (tmp_path / "none.gguf", f"{tmp_path}::none.gguf", "nowhere/none.gguf"):
        with pytest.raises(ModelError, match=r"none\.gguf does not exist; name a GGUF file"):
            reader(source)
    with pytest.raises(ModelError, match=r"somebody/model::none\.gguf.*check the name and the network"):
        reader("somebody/model::none.gguf", local_files_only=True)


def test_without_the_package_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"package gguf: pip install 'spectrim\[gguf\]'"):
        spectrim.load(tiny)


def test_a_directory_with_a_gguf_file_alone_says_how_to_name_it(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; name its GGUF file .*tiny\.gguf"):
        load(tiny.parent)


@pytest.mark.parametrize("name", ["UPPER.GGUF", "with space.gguf", "größe.Gguf"])
def test_other_spellings_of_the_name(tiny: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / name).symlink_to(tiny)
    assert torch.equal(logits(load(tmp_path / name)), logits(load(tiny)))
    assert name in caplog.records[0].getMessage()
    assert load_processor(tmp_path / name)("fox").input_ids == load_processor(tiny)("fox").input_ids
