"""Evaluates model directories one after the other on the same text and the same questions."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers.utils.hub import cached_file

from spectrim.calibrate.data import Data
from spectrim.checkpoint import load, load_processor, read_provenance
from spectrim.checkpoint.config import METHOD
from spectrim.checkpoint.model_files import PROVENANCE
from spectrim.checkpoint.plain import METHOD as PLAIN
from spectrim.checkpoint.size import file_bytes, saved_tensors
from spectrim.checkpoint.sources import failure, read_config, split_source
from spectrim.checks import check_device
from spectrim.demo.tasks import Question
from spectrim.disk.scratch import scratch
from spectrim.errors import CheckpointError, SampleError, SpectrimError
from spectrim.evaluate.answering import Answer, prompted, takes_images, vqa
from spectrim.evaluate.divergence import Divergence, Predictions, samples_of
from spectrim.evaluate.examples import chosen as examples
from spectrim.evaluate.footprint import PeakMemory, stored_bytes
from spectrim.evaluate.language import Perplexity, Progress, perplexity, read_text
from spectrim.evaluate.questions import blind_questions, load_questions
from spectrim.evaluate.results import (
    DirectoryResult,
    EvaluationReport,
    Source,
    VqaScore,
    differences,
    score,
    versions,
)
from spectrim.files import read_object
from spectrim.samples import load_text, media_tokens
from spectrim.settings import EVALUATION, EvaluationOptions

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
StageProgress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class _Work:
    """What every directory is evaluated on."""

    text: str | None
    questions: Sequence[Question]
    swapped: Sequence[Question]  # the same with images swapped, for the model that gives the blind floor
    settings: EvaluationOptions
    device: str
    dtype: torch.dtype | None
    trusted: bool
    progress: StageProgress | None
    compared: Data | None = None  # what the dense model's predictions are compared on,
    predictions: Predictions | None = None  # which are kept here
    dense: Path | None = None


def evaluate(
    directories: Sequence[str | Path],
    *,
    tasks: Sequence[str] = EVALUATION.tasks,
    text: str = EVALUATION.text,
    questions: str = EVALUATION.questions,
    samples: int = EVALUATION.samples,
    seed: int = EVALUATION.seed,
    seqlen: int = EVALUATION.seqlen,
    stride: int | None = EVALUATION.stride,
    max_tokens: int | None = EVALUATION.max_tokens,
    max_new_tokens: int = EVALUATION.max_new_tokens,
    kl_tokens: int = EVALUATION.kl_tokens,
    prompts: str | Sequence[str | tuple[str, float]] | None = EVALUATION.prompts,
    batch_size: int | None = EVALUATION.batch_size,
    blind: bool = EVALUATION.blind,
    memory: str | None = EVALUATION.memory,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    progress: StageProgress | None = None,
) -> EvaluationReport:
    """Perplexity and visual question answering of each model, and paired differences to the dense one.

    A model is a directory, a hub id or a GGUF file, as for `load`. The reference is the first that is not compressed.
    :class:`EvaluationOptions` says what the settings mean. `device` and `dtype` go to the loader (None: CUDA if there
    is one, else CPU; the stored dtype); a batch size of None leaves the defaults of :func:`perplexity` and :func:`vqa`.
    `blind` adds the blind floor, one more pass over the questions. `trust_remote_code` runs code that a model brings.
    Only one model is in memory at a time, and every input is checked before the first loads. Conversations in a text
    source are rendered by the first model's chat template.

    Raises:
        CheckpointError: for a directory that does not exist or holds no safetensors model.
        SampleError: for settings that cannot be, samples that are missing or malformed or do not fit a model, for
            `vqa` on a text-only model, and for `kl` without a dense model and another.
        ModelError: for perplexity of what is no causal language model.
        NumericalError: for logits that are not finite.
    """
    chosen = EvaluationOptions.checked(
        tasks=tuple(tasks),
        text=text,
        questions=questions,
        samples=samples,
        seed=seed,
        seqlen=seqlen,
        stride=stride,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        kl_tokens=kl_tokens,
        prompts=prompts,
        batch_size=batch_size,
        blind=blind,
        memory=memory,
    )
    found = check_evaluation(directories, chosen, device=device, trusted=trust_remote_code)
    paths, reference = found.paths, found.reference
    measured: dict[Path, DirectoryResult] = {}
    floor = None
    with ExitStack() as stack:
        work = _Work(
            text=found.text if "perplexity" in tasks else None,
            questions=found.questions if "vqa" in tasks else (),
            swapped=found.swapped,
            settings=chosen,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype,
            trusted=trust_remote_code,
            progress=progress,
            compared=found.compared,
            predictions=None if found.compared is None else Predictions(stack.enter_context(scratch())),
            dense=reference,
        )
        # The dense model first where the others are compared with its predictions.
        for path in sorted(paths, key=lambda path: found.compared is not None and path != reference):
            measured[path], blind_scores = _evaluate_one(path, work, floor=path == (reference or paths[0]))
            floor = floor or blind_scores
    results = [measured[path] for path in paths]
    if reference is not None and work.questions:
        dense = measured[reference].answers
        results = [
            result if path == reference else replace(result, differences=differences(result.answers, dense))
            for path, result in zip(paths, results, strict=True)
        ]
    return EvaluationReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions("torch", "transformers"),
        settings=chosen.scored,
        text=None if found.text is None else Source(chosen.text, sha256(found.text.encode()).hexdigest()),
        questions=Source(chosen.questions, _fingerprint(found.questions)) if found.questions else None,
        reference=None if reference is None else str(reference),
        blind=floor,
        results=tuple(results),
        examples=examples(
            work.questions,
            [result.answers for result in results],
            None if reference is None else paths.index(reference),
        ),
    )


@dataclass(frozen=True)
class Checked:
    """The inputs of an evaluation, once nothing is wrong with them; `text` and `compared` are None where unused."""

    paths: list[Path]
    reference: Path | None
    questions: Sequence[Question]
    swapped: Sequence[Question]
    text: str | None
    compared: Data | None


def check_evaluation(
    directories: Sequence[str | Path], chosen: EvaluationOptions, *, device: str | None, trusted: bool
) -> Checked:
    """What of :func:`evaluate` can be known before any model is loaded. Raises as it does."""
    chosen.check_together()
    check_device(device)
    paths = [Path(directory) for directory in directories]
    check_directories(paths)
    for path in paths:
        if path.is_dir():
            stored_bytes(path), _stated(path, "retention"), _stated(path, "predicted_loss")  # each names what is wrong
    reference = next((path for path in paths if not is_compressed(path)), None)
    if "kl" in chosen.tasks and (reference is None or len(paths) < 2):
        raise SampleError("the task kl compares models with a dense one; name the dense model, and another")
    processors, asked, read = readable(paths, chosen, trusted=trusted)
    compared = None
    if "kl" in chosen.tasks and read is not None:
        compared = samples_of(
            processors[paths.index(reference)] if reference else None,
            text=read,
            questions=asked,
            prompts=chosen.prompts,
            seqlen=chosen.seqlen,
            tokens=chosen.kl_tokens,
            seed=chosen.seed,
        )
    swapped = blind_questions(asked) if chosen.blind and "vqa" in chosen.tasks else ()
    return Checked(paths, reference, asked, swapped, read, compared)


def readable(
    paths: Sequence[Path], chosen: EvaluationOptions, *, trusted: bool
) -> tuple[list[Any], Sequence[Question], str | None]:
    """The processors of models, and the questions and the text of an evaluation, where each model can read them.

    Raises SampleError for samples that are missing or malformed, or do not fit a model; no model is loaded.
    """
    tasks = chosen.tasks
    processors = [load_processor(path, trust_remote_code=trusted) for path in paths]
    sees = all(takes_images(processor) for processor in processors)
    if chosen.prompts is not None and not sees:
        raise SampleError("--prompts has no effect on models that read text alone; leave it out")
    shown = "vqa" in tasks or ("kl" in tasks and sees and chosen.prompts is None)
    asked = load_questions(chosen.questions, chosen.samples, chosen.seed) if shown else ()
    read = _text(processors, chosen) if {"perplexity", "kl"} & set(tasks) else None
    for path, processor in zip(paths, processors, strict=True):
        _check_samples(path, processor, chosen, read, asked, trusted)
    return processors, asked, read


def is_compressed(directory: Path) -> bool:
    """Whether a model's config.json names one of the formats that spectrim writes as its quantization method."""
    home = _home(directory)
    if home is None:
        return False
    try:
        quantization = read_object(home / "config.json").get("quantization_config")
    except ValueError as error:
        raise CheckpointError(f"{directory} is no model directory: {error}; give a directory of a model") from error
    return isinstance(quantization, dict) and quantization.get("quant_method") in (METHOD, PLAIN)


def _home(path: Path) -> Path | None:
    """Where a model's files are: its directory, or the snapshot of a hub id, from the cache; None for a GGUF file.

    Raises ModelError for a hub id of which neither the hub nor the cache has a config.
    """
    if split_source(path)[1] is not None:
        return None
    if path.is_dir() or not _HUB_ID.fullmatch(str(path)):
        return path
    try:
        return Path(str(cached_file(str(path), "config.json"))).parent
    except OSError as error:
        raise failure("config", path, error) from error


def _file_bytes(path: Path, model: Any) -> int:
    """Bytes of a model's safetensors files; of a GGUF file, of those that its unpacked weights would take."""
    home = _home(path)
    return file_bytes(saved_tensors(model).values()) if home is None else stored_bytes(home)


def check_directories(paths: Sequence[Path]) -> None:
    """CheckpointError where no directory is named, one is named twice, or one holds no model."""
    if not paths:
        raise CheckpointError("no directory is named; give at least one model directory")
    if len(set(paths)) < len(paths):
        raise CheckpointError("a directory is named twice; give each model once")
    for path in paths:
        is_compressed(path)  # names what it cannot read


def _text(processors: Sequence[Any], settings: EvaluationOptions) -> str:
    """The text for perplexity, without any token that stands for an image in one of the models."""
    refused = {token for processor in processors for token in media_tokens(processor)}
    return load_text(settings.text, split="heldout", processor=processors[0], refused=sorted(refused))


def _check_samples(
    path: Path,
    processor: Any,
    settings: EvaluationOptions,
    text: str | None,
    questions: Sequence[Question],
    trusted: bool,
) -> None:
    """Raise the error of samples that this model cannot read, before any model is loaded."""
    if "vqa" in settings.tasks and not takes_images(processor):
        raise SampleError(f"{path} holds a text-only model, which cannot do the task vqa; use tasks=['perplexity']")
    config = read_config(path, {"trust_remote_code": trusted})
    try:
        if text is not None:
            tokenizer = getattr(processor, "tokenizer", processor)
            windows = settings.model_dump(include={"seqlen", "stride", "max_tokens"})
            read_text(config, tokenizer, text, **windows)
        prompted(processor, config, questions)
    except SpectrimError as error:
        raise type(error)(f"{path}: {error}") from error


def _evaluate_one(path: Path, work: _Work, *, floor: bool) -> tuple[DirectoryResult, VqaScore | None]:
    """The result of one directory, and the blind floor if asked for."""
    settings = work.settings
    batch: dict[str, Any] = {} if settings.batch_size is None else {"batch_size": settings.batch_size}

    def stage(name: str) -> Progress | None:
        report = work.progress
        return None if report is None else lambda done, total: report(f"{path.name}: {name}", done, total)

    def read(text: str) -> Perplexity:
        tokenizer = getattr(processor, "tokenizer", processor)
        return perplexity(
            model,
            tokenizer,
            text,
            seqlen=settings.seqlen,
            stride=settings.stride,
            max_tokens=settings.max_tokens,
            progress=stage("perplexity"),
            **batch,
        )

    def look(name: str, questions: Sequence[Question]) -> tuple[list[Answer], VqaScore | None]:
        start = perf_counter()
        if not questions:
            return [], None
        answers = vqa(
            model, processor, questions, max_new_tokens=settings.max_new_tokens, progress=stage(name), **batch
        )
        return answers, score(answers, perf_counter() - start)

    with PeakMemory() as meter:
        where: dict[str, Any] = {"device_map": work.device, "memory": work.settings.memory}
        model = load(path, dtype=work.dtype, trust_remote_code=work.trusted, **where)
        processor = load_processor(path, trust_remote_code=work.trusted)
        language = None if work.text is None else read(work.text)
        answers, scores = look("vqa", work.questions)
        _, blind = look("vqa with swapped images", work.swapped if floor else ())
        divergence: tuple[Divergence, ...] = ()
        if work.predictions is not None and work.compared is not None:
            if path == work.dense:
                gathered: dict[str, int] = {"tokens": settings.kl_tokens, "seed": settings.seed}
                work.predictions.gather(model, work.compared, **gathered, progress=stage("kl"))
            else:
                divergence = work.predictions.compare(model, stage("kl"))
    return DirectoryResult(
        directory=str(path),
        compressed=is_compressed(path),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        bytes=_file_bytes(path, model),
        memory=meter.memory,
        retention=_stated(path, "retention"),
        predicted_loss=_stated(path, "predicted_loss"),
        perplexity=language,
        tokens_per_second=None if language is None else language.tokens / language.seconds,
        vqa=scores,
        divergence=divergence,
        answers=tuple(answers),
        image_price=_image_price(path),
    ), blind


def _record(path: Path) -> dict[str, Any]:
    """The checkpoint's provenance; empty for a model without."""
    return read_provenance(path) if (path / PROVENANCE).is_file() else {}


def _stated(path: Path, key: str) -> dict[str, float] | None:
    """The table of numbers that the checkpoint's provenance has under `key`, None for a model without provenance."""
    stated = _record(path).get(key)
    if stated is not None and not (
        isinstance(stated, dict) and all(isinstance(value, int | float) for value in stated.values())
    ):
        raise CheckpointError(f'"{key}" in {path / PROVENANCE} is not a table of numbers; compress the model again')
    return stated


def _image_price(path: Path) -> float:
    """What one nat of images counts in a prediction of both; 1 where the record names no price."""
    recipe = _record(path).get("recipe")
    metric = recipe.get("metric") if isinstance(recipe, dict) else None
    price = metric.get("image_price", 1.0) if isinstance(metric, dict) else 1.0
    return float(price) if isinstance(price, int | float) else 1.0


def _fingerprint(questions: Sequence[Question]) -> str:
    digest = sha256()
    for q in questions:
        digest.update(json.dumps([q.task, q.question, q.answer, q.image.size]).encode() + q.image.tobytes())
    return digest.hexdigest()
