"""Start-up: help costs no import of torch, and the checkpoint format is known to transformers in every order."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

import spectrim
from helpers.command import run
from helpers.forks import fork
from spectrim import checkpoint

SECONDS = 2.0  # of processor time, which printing help may take; it takes about 0.4


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False
    )


VERBS = ("anatomy", "calibrate", "compress", "demo", "evaluate", "inspect", "pareto", "push", "recipes", "report")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_is_there_at_once(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fresh("-X", "importtime", "-m", "spectrim", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stdout.startswith("spectrim ") if arguments == ["--version"] else "Usage" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "numpy", "datasets"}


def test_every_verb_is_in_the_help_and_h_is_help(capsys):
    text = run(capsys, "--help")[1]
    assert all(f" {verb} " in text for verb in VERBS)
    for verb in ([], *([verb] for verb in VERBS)):
        assert run(capsys, *verb, "-h") == run(capsys, *verb, "--help")


KNOWN = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZATION_CONFIG_MAPPING["spectrim"].__name__ == "SpectrimConfig"
assert AUTO_QUANTIZER_MAPPING["spectrim"].__name__ == "SpectrimQuantizer"
import sys
assert not any(type(finder).__module__.startswith("spectrim") for finder in sys.meta_path)
"""
ORDERS = {
    "spectrim first": "import spectrim, transformers.modeling_utils",
    "spectrim first, by a class": "import spectrim\nfrom transformers import LlamaForCausalLM",
    "spectrim first, by an Auto class": "import spectrim\nfrom transformers import AutoModel\n"
    "from transformers import LlamaConfig\n"
    "c = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)\n"
    "AutoModel.from_config(c)",
    "transformers first": "import transformers, spectrim\nfrom transformers import LlamaForCausalLM",
    "models first": "from transformers import LlamaForCausalLM\nimport spectrim",
    "Auto classes first": "from transformers import AutoModel, AutoConfig\nimport spectrim\n"
    "from transformers import LlamaForCausalLM",
    "quantizers alone": "import spectrim, transformers.quantizers.auto",
    "quantizers first": "import transformers.quantizers.auto, spectrim",
    "quantizers by their package": "import spectrim\nfrom transformers.quantizers import AutoQuantizationConfig",
    **{
        f"by way of {name}": f"import spectrim, {name}, transformers.modeling_utils"
        for name in (
            "transformers.processing_utils",
            "transformers.pipelines",
            "transformers.trainer",
            "transformers.masking_utils",
            "transformers.generation",
            "compressed_tensors",
            "peft",
        )
    },
    "by way of AutoProcessor": "import spectrim\nfrom transformers import AutoProcessor, AutoModelForCausalLM\n"
    "import transformers.modeling_utils",
    "a part of spectrim": "import spectrim.errors\nfrom transformers import LlamaForCausalLM",
    **{
        f"a part of spectrim that needs transformers, {name}": f"{code}\nfrom transformers import LlamaForCausalLM"
        for name, code in {
            "its config": "from spectrim.checkpoint import SpectrimConfig",
            "its names": "from spectrim.checkpoint import *",
            "its experts": "import spectrim.experts",
            "what runs it": "from spectrim.storage.runtime import set_runtime",
        }.items()
    },
    "twice": "import importlib, spectrim\nimportlib.reload(spectrim)\nfrom transformers import LlamaForCausalLM",
    "after an import that failed": "import sys, spectrim\nsys.modules['spectrim.storage.layers'] = None\n"
    "try:\n    import transformers.modeling_utils\nexcept ImportError:\n    pass\nelse:\n    raise AssertionError\n"
    "del sys.modules['spectrim.storage.layers']\nimport transformers.modeling_utils",
}

HEAVY = (
    "torch._dynamo", "torch.distributed.checkpoint", "accelerate", "sklearn.metrics", "huggingface_hub.hf_api",
    "safetensors.torch", "tokenizers", "jinja2", "PIL.Image", "datasets", "pydantic",
    "torch.nn.attention.flex_attention", "torch.distributed._composable.fsdp",
)  # fmt: skip
FORKS = """
import contextlib, importlib, json, os, sys, traceback
for name in sys.argv[2:]:  # what transformers imports: once, before the forks
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not {"transformers", "spectrim"} & sys.modules.keys()
found, running = {}, {}
def collect():
    name, read = running.pop(os.wait()[0])
    with open(read) as end:
        found[name] = end.read()
for name, code in json.loads(sys.argv[1]).items():
    if len(running) == 2:
        collect()
    read, write = os.pipe()
    if (process := os.fork()) == 0:
        try:
            exec(code, {"__name__": "__main__"})
            said = "done"
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    running[process] = (name, read)
while running:
    collect()
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module", autouse=True)
def orders() -> Iterator[subprocess.Popen[str]]:
    """Every order in a fork of a process that knows neither transformers nor spectrim, while the first tests run."""
    code = json.dumps({name: order + KNOWN for name, order in ORDERS.items()})
    command = [sys.executable, "-c", FORKS, code, *HEAVY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def outcomes(orders: subprocess.Popen[str]) -> dict[str, str]:
    """What each order ends with."""
    out, err = orders.communicate()
    assert orders.returncode == 0, err
    return json.loads(out)


@pytest.mark.parametrize("order", ORDERS)
def test_the_format_is_registered_in_every_order(order, outcomes):
    assert outcomes[order] == "done"


def test_importing_it_imports_nothing_heavy_and_configs_need_no_models():
    code = (
        "import sys, spectrim\nassert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "from transformers import AutoConfig\nassert 'transformers.modeling_utils' not in sys.modules"
    )
    done = fresh("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_are_there_whatever_was_imported_first():
    code = (
        "import spectrim.evaluate.running, spectrim.calibrate.run, spectrim.anatomy\nimport spectrim\n"
        "assert all(callable(getattr(spectrim, name)) for name in spectrim.__all__)\n"
        "from spectrim import anatomy, calibrate, evaluate, Plan\n"
        "assert all(callable(one) for one in (anatomy, calibrate, evaluate))\n"
        "assert anatomy.__module__ == 'spectrim.anatomy'"
    )
    done = fork("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_are_listed():
    for package in (spectrim, checkpoint):
        assert set(package.__all__) == package._HOMES.keys()
        assert set(package.__all__) <= set(dir(package))
        assert all(callable(getattr(package, name)) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        spectrim.compres  # noqa: B018
