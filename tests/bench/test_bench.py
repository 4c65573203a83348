"""What a benchmark counts and compares; not how fast anything is."""

import json
import re

import pytest
from safetensors.torch import load_file

from compressed import factored, packed
from families import FAMILIES
from helpers.command import run
from helpers.evaluated import make_llava, make_processor
from spectrim.bench import bench, engines, measure
from spectrim.checkpoint import save
from spectrim.errors import ModelError, UsageError

QUICK = {"prompt": 4, "new": 3, "repeats": 2}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    dense = FAMILIES["llama"]().bfloat16()
    save(dense, home / "dense")
    save(packed("llama", FAMILIES["llama"]().bfloat16()), home / "small")
    return [home / "dense", home / "small"]


def tensor_bytes(directory) -> int:
    tensors = load_file(directory / "model.safetensors").values()
    return sum(tensor.nbytes for tensor in tensors)


def test_rows_are_complete_and_ratios_are_to_the_first(directories):
    found = bench(directories, names=["a", "b"], batches=[1, 2], **QUICK)
    assert [(row.model, row.batch) for row in found.rows] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    for number in (0, 2):
        dense, small = found.rows[number : number + 2]
        assert dense.prefill.ratio == dense.decode.ratio == 1
        assert small.prefill.ratio == pytest.approx(small.prefill.median / dense.prefill.median)
        assert small.file_bytes == (directories[1] / "model.safetensors").stat().st_size
        assert dense.weight_bytes == pytest.approx(tensor_bytes(directories[0]), rel=0.05)
    again = json.loads(found.json())
    assert again["rows"][1]["model"] == "b"
    assert "b | 2" in found.markdown()
    assert all(word in found.about for word in ("torch", "3 new tokens", "threads"))


def test_weights_in_memory_follow_the_runtime(directories):
    sizes = {
        runtime: bench(directories, runtime=runtime, **QUICK).rows[1].weight_bytes
        for runtime in ("reference", "memory", "speed")
    }
    assert sizes["reference"] <= 1.1 * tensor_bytes(directories[1])
    assert sizes["reference"] <= sizes["speed"]


def test_times_are_those_of_what_ran_in_turn(directories, monkeypatch):
    """A clock that only the models move: what is counted is exactly what they take, without the first turn."""
    now, ran = [0.0], []

    class Clocked:
        vocabulary = 100

        def __init__(self, directory, **options):
            self.slow = 2.0 if "small" in directory else 1.0

        def generate(self, prompts, new):
            ran.append((self.slow, len(prompts), new))
            now[0] += self.slow * (10 + new)

        def weights(self):
            return 7

    monkeypatch.setattr(engines, "Transformers", Clocked)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    dense, small = bench(directories, prompt=4, new=3, repeats=2).rows
    assert (dense.prefill.median, dense.decode.median, dense.tokens_per_second) == (11, 1, 3 / 13)
    assert (small.prefill.median, small.decode.ratio, small.prefill.spread) == (22, 2, 0)
    assert (small.weight_bytes, small.image) == (7, None)
    turn = [(1.0, 1, 1), (1.0, 1, 3), (2.0, 1, 1), (2.0, 1, 3)]
    assert ran[-12:] == 3 * turn


def test_exactly_so_many_tokens_are_generated(directories):
    one = engines.opener("transformers", device=None, dtype=None, runtime=None, length=9, batch=2)(str(directories[1]))
    counts = []
    generate = one._model.generate
    one._model.generate = lambda **given: counts.append(generate(**given).shape)
    one.generate([[5, 6, 7], [8, 9, 10]], 4)
    assert counts == [(2, 7)]


def test_a_model_that_sees_is_shown_an_image(tmp_path):
    save(make_llava(), tmp_path / "llava", processor=make_processor())
    (row,) = bench([tmp_path / "llava"], image=True, **QUICK).rows
    assert row.image is not None
    assert row.image.ratio == 1


def test_steps_in_a_context_run_with_and_without_latents(directories, tmp_path):
    save(factored("llama", form="headwise"), tmp_path / "heads")
    home = [directories[0], tmp_path / "heads"]
    found = bench(home, names=["dense", "heads"], batches=[2, 1], context=20, latent_cache=True, **QUICK)
    assert [row.model for row in found.rows] == ["dense", "heads", "heads, latents"] * 2
    dense, whole, latent = found.rows[:3]
    assert dense.step.ratio == 1
    assert latent.step.ratio == pytest.approx(latent.step.median / dense.step.median)
    assert dense.cache_bytes == 2 * 2 * 2 * 2 * 20 * 16 * 2  # k and v, layers, heads, sequences, tokens, width, bytes
    assert latent.cache_bytes < 0.7 * whole.cache_bytes
    assert found.rows[3].step is None
    assert "step in context" in found.markdown()
    assert "20 tokens of context" in found.about
    assert "step in context" not in bench(directories, **QUICK).markdown()


def test_steps_are_taken_back(directories):
    one = engines.opener("transformers", device=None, dtype=None, runtime=None, length=9, batch=2)(str(directories[0]))
    size = one.fill([[5, 6, 7, 8]] * 2)
    one.step(3)
    one.step(2)
    assert one._past.get_seq_length() == 4
    assert size == one.fill([[5, 6, 7, 8]] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "0"], "--context 0 is too small; give at least 1"),
        (["--latent-cache"], "--latent-cache has no effect on these models: .* recipe laser"),
        (["--new", "1"], "--new 1 is too small; give at least 2"),
        (["--prompt", "0"], "--prompt 0 is too small"),
        (["--repeats", "0"], "--repeats 0 is too small"),
        (["--batch", "1,x"], "--batch 1,x is no list of numbers"),
        (["--batch", "0"], "batches of at least 1"),
        (["--engine", "onnx"], "there is no engine 'onnx'; choose from transformers, vllm"),
        (["--engine", "vllm", "--runtime", "speed"], "--runtime has no effect in vLLM"),
        (["--runtime", "fast"], "no runtime 'fast'"),
        (["--image"], "--image has no effect on .*dense, which reads text alone"),
        (["--json", "/dev/null/all.json"], "/dev/null"),
    ],
)
def test_mistakes_are_one_sentence(directories, capsys, arguments, message):
    code, _, err = run(capsys, "bench", *directories, *arguments)
    assert code == 2
    assert err.startswith("spectrim: ")
    assert re.search(message, err)


def test_one_model_named_twice_is_refused(directories):
    with pytest.raises(UsageError, match="two models have one name"):
        bench([directories[0], directories[0]], **QUICK)


def test_vllm_that_is_not_installed_is_named(directories, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="vLLM is not installed"):
        bench(directories, engine="vllm", **QUICK)


def test_the_command_prints_a_table_and_writes_json(directories, capsys, tmp_path):
    out = tmp_path / "bench.json"
    code, table, _ = run(capsys, "bench", *directories, "--new", "2", "--prompt", "4", "--repeats", "1", "--json", out)
    assert code == 0
    assert "tokens/s" in table
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert run(capsys, "bench", directories[0], "--new", "2", "--prompt", "4", "--repeats", "1", "--json", out)[0] == 0
