"""Runs of calibration: what a killed one leaves, what is refused, what it leaves alone, several processes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

import families
from helpers.calibrated import assert_same_bits, named, tensors, tiny
from helpers.forks import run_ranks
from helpers.samples import WORDS, llava_processor, word_tokenizer
from spectrim import files
from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate, run
from spectrim.calibrate.fingerprint import model_print
from spectrim.calibrate.manifest import MANIFEST
from spectrim.errors import ModelError, NumericalError, SampleError, StatisticsError


@pytest.fixture
def snapshots_after_every_batch(monkeypatch):
    monkeypatch.setattr(run, "_SNAPSHOT_SHARE", float("inf"))


class StopError(Exception):
    pass


def stop_at(count):
    def progress(done, total):
        if done >= count:
            raise StopError

    return progress


@pytest.fixture(scope="module")
def wholes():
    """Statistics of runs that nothing stopped, by what they are of; made by the first test that needs them."""
    return {}


@pytest.mark.usefixtures("snapshots_after_every_batch")
@pytest.mark.parametrize("stop", [1, 4, 6, 7, 11, 14, 22])
@pytest.mark.parametrize(
    ("extra", "total"),
    [
        ({"curvature": False}, 12),
        ({"curvature": False, "gradients": True}, 18),
        ({"curvature": True, "answer_tokens": 3}, 24),
    ],
    ids=["plain", "gradients", "curvature"],
)
def test_a_killed_run_resumes_bit_for_bit(words, pictures, tmp_path, wholes, stop, extra, total):
    if stop > total:
        pytest.skip("the run has ended by then")
    model = tiny("llava", torch.float32)
    options = {"processor": llava_processor(), "text": words, "images": pictures, "samples": 6, "seqlen": 12}
    options |= {"batch_size": 2, "checkpoint_seconds": 0, **extra}
    if total not in wholes:
        wholes[total] = calibrate(model, tmp_path / "whole", **options)
    whole = wholes[total]
    with pytest.raises(StopError):
        calibrate(model, tmp_path / "killed", **options, progress=stop_at(stop))
    with pytest.raises(StatisticsError, match="was interrupted; run the same"):
        Statistics.open(tmp_path / "killed")
    seen = []
    resumed = calibrate(model, tmp_path / "killed", **options, progress=lambda done, total: seen.append((done, total)))
    assert_same_bits(whole.path, tmp_path / "killed")
    assert resumed.manifest.gathered["image"].counts == whole.manifest.gathered["image"].counts
    assert seen[-1] == (total, total)
    # The stop comes before the snapshot of its batch, so that the batch before it counts.
    before = {1: 0, 4: 2, 6: 4, 7: 6, 11: 10, 14: 12, 22: 21}
    assert seen[0] == (before[stop], total)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == named(tmp_path / "killed")


@pytest.mark.usefixtures("snapshots_after_every_batch")
@pytest.mark.parametrize("write", range(1, 47, 3))
def test_a_kill_between_two_writes_leaves_one_whole_state(words, pictures, tmp_path, monkeypatch, wholes, write):
    model = tiny("llava", torch.float32)
    options = {"processor": llava_processor(), "text": words, "images": pictures, "samples": 6, "seqlen": 12}
    options |= {"batch_size": 2, "checkpoint_seconds": 0, "curvature": False}
    if "writes" not in wholes:
        wholes["writes"] = calibrate(model, tmp_path / "whole", **options)
    sync, calls = files.sync, []

    def dying(path):  # called before and after each file takes its place
        calls.append(path)
        if len(calls) == write:
            (tmp_path / "killed" / ".text.model.g000009.safetensors.xyz.part").write_bytes(b"half of a fi")
            raise StopError
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", dying)
        with pytest.raises(StopError):
            calibrate(model, tmp_path / "killed", **options)
    calibrate(model, tmp_path / "killed", **options)
    assert_same_bits(wholes["writes"].path, tmp_path / "killed")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == named(tmp_path / "killed")


def llama_options(words: str) -> dict:
    return {"processor": word_tokenizer(), "text": words, "samples": 4, "seqlen": 8}


def test_same_seed_same_moments(words, tmp_path):
    model = tiny("llama", torch.float32)
    calibrate(model, tmp_path / "a", **llama_options(words))
    calibrate(model, tmp_path / "b", **llama_options(words))
    calibrate(model, tmp_path / "c", **llama_options(words), seed=1)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    first, other = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_finished_directory_is_opened_and_not_gathered_again(words, tmp_path, monkeypatch):
    model = tiny("llama")
    calibrate(model, tmp_path / "s", **llama_options(words))
    monkeypatch.setattr(run, "run_batch", None)
    statistics = calibrate(model, tmp_path / "s", **llama_options(words))
    assert statistics.manifest.complete


def test_what_does_not_fit_is_refused_by_name(words, tmp_path):
    model, options = tiny("llama"), llama_options(words)
    calibrate(model, tmp_path / "s", **options)
    with pytest.raises(StatisticsError, match=r"with seqlen 8 \(now 9\).*choose another output"):
        calibrate(model, tmp_path / "s", **{**options, "seqlen": 9})
    with pytest.raises(StatisticsError, match=r"with gradients False \(now True\)"):
        calibrate(model, tmp_path / "s", **options, gradients=True)
    (tmp_path / "others.txt").write_text("w5 " + WORDS)
    with pytest.raises(StatisticsError, match="of other samples"):
        calibrate(model, tmp_path / "s", **options | {"text": str(tmp_path / "others.txt")})
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5] += 1e-9
    with pytest.raises(StatisticsError, match=f"another model .parameter {name} is float64"):
        calibrate(model, tmp_path / "s", **options)
    with pytest.raises(StatisticsError, match=f"another model .parameter {name} is float64"):
        Statistics.open(tmp_path / "s").check_model(model)
    with pytest.raises(StatisticsError, match=r"is float64.* and float32"):
        Statistics.open(tmp_path / "s").check_model(tiny("llama").float())
    with pytest.raises(StatisticsError, match=r"parameter .* is in one of them only"):
        Statistics.open(tmp_path / "s").check_model(tiny("qwen3"))
    Statistics.open(tmp_path / "s").check_model(tiny("llama"))


def test_a_directory_that_holds_something_else_is_left_alone(words, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years of work")
    with pytest.raises(StatisticsError, match=r"holds other files \(thesis\.tex\)"):
        calibrate(tiny("llama"), tmp_path / "s", **llama_options(words))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["thesis.tex"]
    with pytest.raises(StatisticsError, match=r"words\.txt is a file"):
        calibrate(tiny("llama"), Path(words), **llama_options(words))


def damage_manifest(directory, **change):
    content = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(content | change))


def first_file(directory):
    return sorted(directory.glob("text.model.layers.0.*"))[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / MANIFEST).unlink(), "holds no manifest.json"),
        (lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:-40]), "cannot be read"),
        (lambda d: (d / MANIFEST).write_text("[]"), "was not written by spectrim"),
        (lambda d: damage_manifest(d, format="other"), "was not written by spectrim"),
        (lambda d: damage_manifest(d, version=9), "statistics format 9 and this spectrim reads 5; delete"),
        (lambda d: damage_manifest(d, extra=2), "is damaged at 'extra'"),
        (lambda d: damage_manifest(d, complete=False), r"manifest\.json has changed since it was written"),
        (lambda d: first_file(d).unlink(), "layers.0.*missing or truncated"),
        (lambda d: first_file(d).write_bytes(first_file(d).read_bytes()[:-8]), "layers.0.*missing or truncated"),
        (lambda d: first_file(d).write_bytes(b""), "layers.0.*missing or truncated"),
    ],
)
def test_damaged_directories_are_refused(words, tmp_path, damage, message):
    calibrate(tiny("llama"), tmp_path / "s", **llama_options(words))
    damage(tmp_path / "s")
    with pytest.raises(StatisticsError, match=message):
        Statistics.open(tmp_path / "s")


def test_unknown_linears_are_refused(words, tmp_path):
    statistics = calibrate(tiny("llama"), tmp_path / "s", **llama_options(words))
    with pytest.raises(StatisticsError, match=r"have no linear model\.layers\.9"):
        statistics.moment("model.layers.9", "text")
    with pytest.raises(StatisticsError, match=r"have no linear model\.layers\.9"):
        statistics.gradient("model.layers.9", "text")
    with pytest.raises(StatisticsError, match="holds no manifest"):
        Statistics.open(tmp_path / "nowhere")


@pytest.mark.parametrize("gradients", [False, True])
def test_nan_is_named_with_linear_and_batch(words, tmp_path, gradients):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(NumericalError, match=r"the input of model\.layers\.1\.self_attn\.q_proj at text batch 1;"):
        calibrate(model, tmp_path / "s", **llama_options(words), gradients=gradients)


def test_infinite_gradients_are_named(words, tmp_path):
    model = tiny("llama", torch.float32)
    with torch.no_grad():  # gradients of 1e25 and more, whose squares overflow
        model.lm_head.weight.mul_(1e25)
    with pytest.raises(
        NumericalError, match=r"the gradient of model\.layers\.1\.mlp\.down_proj at text sample 1 to 4 \(gradients\);"
    ):
        calibrate(model, tmp_path / "s", **llama_options(words), gradients=True)


@pytest.mark.parametrize("outcome", ["ends", "raises"])
def test_the_model_is_left_as_it_was(words, tmp_path, outcome):
    model = tiny("llama", torch.float32).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    training = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    torch.set_float32_matmul_precision("high")
    try:
        stop = stop_at(2 if outcome == "raises" else 99)
        with pytest.raises(StopError) if outcome == "raises" else torch.no_grad():
            calibrate(model, tmp_path / "s", **llama_options(words), gradients=True, progress=stop)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_surroundings_do_not_matter(words, tmp_path):
    model = tiny("llama", torch.float32)
    calibrate(model, tmp_path / "plain", **llama_options(words))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        calibrate(model, tmp_path / "odd", **llama_options(words))
    assert_same_bits(tmp_path / "plain", tmp_path / "odd")


def test_language_models_take_no_images(words, pictures, tmp_path):
    statistics = calibrate(tiny("llama"), tmp_path / "s", **llama_options(words), images="builtin")
    assert list(statistics.manifest.gathered) == ["text", "text-gradients"]
    assert statistics.manifest.data.images is None
    with pytest.raises(SampleError, match="takes no images"):
        calibrate(tiny("llama"), tmp_path / "t", **llama_options(words), images=pictures)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "needs samples"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seqlen": 257}, "exceed the model's 256 positions"),
        ({"samples": 100}, "room for 85 windows of 8"),
        ({"gradients": True, "seqlen": 1}, "windows of at least 2 tokens"),
        ({"image_tokens_only": True}, "needs image samples"),
        ({"processor": word_tokenizer(300)}, "the model knows 128"),
    ],
)
def test_bad_arguments_are_named(words, tmp_path, change, message):
    if "processor" in change:
        words = str(tmp_path / "words.txt")
        Path(words).write_text(" ".join(f"w{i}" for i in range(200, 300)))
    with pytest.raises(SampleError, match=message):
        calibrate(tiny("llama"), tmp_path / "s", **{**llama_options(words), **change})
    assert not (tmp_path / "s").exists()


def test_image_samples_need_a_processor(pictures, tmp_path):
    with pytest.raises(SampleError, match="the model's processor"):
        calibrate(tiny("llava"), tmp_path / "s", processor=word_tokenizer(), text=None, images=pictures, samples=6)


def test_built_in_samples(tmp_path):
    statistics = calibrate(
        tiny("llava", torch.float32), tmp_path / "s", processor=llava_processor(), samples=3, seqlen=16
    )
    assert statistics.manifest.data.text == statistics.manifest.data.images == "builtin"
    tower = statistics.moment(anatomy(tiny("llava")).in_place("tower")[0].name, "image")
    assert tower.count == 3 * 17


def test_fingerprint_survives_saving_and_sees_small_changes(tmp_path):
    model = tiny("llava", torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert model_print(loaded) == model_print(model)
    weight = loaded.model.language_model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, :2] = weight[0, :2].flip(0)  # the sum stays
    assert model_print(loaded) != model_print(model)
    config = LlamaConfig(**families.TEXT)
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    before = model_print(plain)
    plain.config.rms_norm_eps = 1e-3
    assert before.difference(model_print(plain)) == "their configs differ"
    with torch.device("meta"), pytest.raises(ModelError, match="not in memory"):
        model_print(LlamaForCausalLM(config))


def two_processes(words):
    options = {"processor": llava_processor(), "text": words, "images": "builtin", "samples": 5, "seqlen": 8}
    return options | {"batch_size": 2, "gradients": True, "curvature": True, "answer_tokens": 3}


def _rank(rank, store, out, words):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    calibrate(tiny("llava"), Path(out), **two_processes(words))
    torch.distributed.destroy_process_group()


def test_two_processes_add_up(words, tmp_path):
    run_ranks(_rank, str(tmp_path / "store"), str(tmp_path / "two"), words)
    options = {"processor": llava_processor(), "text": words, "images": "builtin", "samples": 5, "seqlen": 8}
    one = calibrate(
        tiny("llava"), tmp_path / "one", **options, batch_size=2, gradients=True, curvature=True, answer_tokens=3
    )
    two = Statistics.open(tmp_path / "two")
    for modality, gathered in one.manifest.gathered.items():
        other = two.manifest.gathered[modality]
        assert (gathered.samples, gathered.batches) == (other.samples, other.batches)
        assert (gathered.owners, gathered.counts) == (other.owners, other.counts)
    left, right = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert left.keys() == right.keys()
    assert len({name.rpartition(".")[2] for name in left} & {"rows", "half"}) == 2
    for name, tensor in left.items():
        other = right[name]
        if name.endswith(".rows"):  # in another order
            tensor, other = tensor.T @ tensor, other.T @ other
        torch.testing.assert_close(other, tensor, rtol=1e-10, atol=1e-12)
