"""Suites in other people's harnesses: lm-eval with the model in memory, lmms-eval with the checkpoint's directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spectrim.checkpoint import load, load_processor
from spectrim.checkpoint.sources import read_config
from spectrim.checks import check_device
from spectrim.errors import SampleError, first_line
from spectrim.evaluate.answering import takes_images
from spectrim.evaluate.results import versions
from spectrim.evaluate.running import check_directories
from spectrim.evaluate.suites import Suite, SuiteReport, read_scores
from spectrim.samples.sources import check_positive

PACKAGES = {"lm-eval": ("lm_eval", "eval"), "lmms-eval": ("lmms_eval", "lmms")}  # module and extra

# lmms-eval has one class per family; its name by the config's model_type. Its generic class loads no language head.
LMMS_MODELS = {
    "gemma3": "gemma3",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "mllama": "llama_vision",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
}


def run_suite(
    suite: Suite,
    directories: Sequence[str | Path],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> SuiteReport:
    """Score every model directory on a suite; one model is in memory at a time.

    `limit` asks that many samples of each task at most (the scores are then not those of the benchmark). `device` and
    `dtype` go to the loader; lmms-eval chooses its own dtype. `trust_remote_code` runs code that a model brings (in
    lmms-eval its classes decide).

    Raises:
        SampleError: the harness is not installed, lacks a task or a model class, or cannot get its data.
        CheckpointError: a directory is no model.
    """
    check_run(suite, directories, limit=limit, batch_size=batch_size, device=device)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = _Run(suite, limit, batch_size or 1, place, dtype, trust_remote_code)
    harness = _lm_eval if suite.harness == "lm-eval" else _lmms_eval
    scores = {}
    for directory in map(str, directories):
        try:
            results = harness(run, directory)
        except OSError as error:  # data sets that cannot be fetched
            raise SampleError(
                f"suite '{suite.name}' stopped ({first_line(error)}); its data sets come from the Hugging Face hub, so "
                "check the network"
            ) from error
        scores[directory] = read_scores(results, suite.tasks)
    return SuiteReport(
        suite=suite,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(suite.harness, "torch", "transformers"),
        limit=limit,
        scores=scores,
    )


def check_run(
    suite: Suite, directories: Sequence[str | Path], *, limit: int | None, batch_size: int | None, device: str | None
) -> None:
    """What of :func:`run_suite` can be known before any model loads. Raises as it does."""
    module, extra = PACKAGES[suite.harness]
    if find_spec(module) is None:
        raise SampleError(
            f"suite '{suite.name}' runs in {suite.harness}, which is not installed; pip install 'spectrim[{extra}]'"
        )
    check_device(device)
    check_positive(limit=limit, batch_size=batch_size)
    check_directories([Path(directory) for directory in directories])


@dataclass(frozen=True)
class _Run:
    """How every model directory is scored."""

    suite: Suite
    limit: int | None
    batch_size: int
    device: str
    dtype: torch.dtype | None
    trusted: bool

    def arguments(self, manager: Any) -> dict[str, Any]:
        """What both harnesses are called with. Raises SampleError for a task that `manager` does not know."""
        suite = self.suite
        if missing := [task for task in suite.tasks if task not in manager.all_tasks]:
            raise SampleError(
                f"{suite.harness} has no task '{missing[0]}'; correct suite '{suite.name}', or install a release that "
                "has it"
            )
        return {
            "tasks": list(suite.tasks),
            "num_fewshot": suite.num_fewshot,
            "limit": self.limit,
            "task_manager": manager,
            "log_samples": False,
        }


@cache
def task_manager(folder: str | None) -> Any:
    """What lm-eval knows of its tasks and of those in a folder; it reads thousands of files, so once for all models."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _lm_eval(run: _Run, directory: str) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM

    arguments = run.arguments(task_manager(run.suite.task_folder))
    processor = load_processor(directory, trust_remote_code=run.trusted)
    if run.suite.images and not takes_images(processor):
        raise SampleError(f"{directory} holds a text-only model; suite '{run.suite.name}' shows images")
    # Loaded here: the harness itself opens image-text models for image tasks only.
    model = load(directory, device_map=run.device, dtype=run.dtype, trust_remote_code=run.trusted)
    if run.suite.images:
        wrapped = HFMultimodalLM(pretrained=model, batch_size=run.batch_size)
    else:
        tokenizer = getattr(processor, "tokenizer", processor)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=run.batch_size)
    return simple_evaluate(model=wrapped, apply_chat_template=run.suite.images, **arguments)


def _lmms_eval(run: _Run, directory: str) -> Mapping[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    arguments = run.arguments(TaskManager(include_path=run.suite.task_folder))
    kind = read_config(directory, {"trust_remote_code": run.trusted}).model_type
    if kind not in LMMS_MODELS:
        raise SampleError(
            f"no class of lmms-eval is known to open {directory}, a {kind}; run lmms-eval itself by "
            "`python -m spectrim.harness lmms_eval`, with the class that fits"
        )
    return simple_evaluate(
        model=LMMS_MODELS[kind],
        model_args=f"pretrained={directory},device_map={run.device}",
        batch_size=run.batch_size,
        device=run.device,
        **arguments,
    )
