"""Evaluates model directories one after the other on the same text and the same questions."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from spectrim.checkpoint import load, load_processor, read_provenance
from spectrim.checkpoint.quantizer import METHOD
from spectrim.checkpoint.read import PROVENANCE
from spectrim.checks import check_device
from spectrim.errors import CheckpointError, SampleError
from spectrim.evaluate.answering import Answer, takes_images, vqa
from spectrim.evaluate.footprint import PeakMemory, stored_bytes
from spectrim.evaluate.language import Perplexity, Progress, perplexity
from spectrim.evaluate.questions import Question, blind_questions, load_questions
from spectrim.evaluate.results import (
    DirectoryResult,
    EvaluationReport,
    Settings,
    Source,
    VqaScore,
    differences,
    score,
    versions,
)
from spectrim.samples import load_text
from spectrim.settings import EVALUATION, EvaluationOptions

StageProgress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class _Work:
    """What every directory is evaluated on."""

    text: str | None
    questions: Sequence[Question]
    swapped: Sequence[Question]  # the same with images swapped, for the model that gives the blind floor
    settings: Settings
    batch_size: int | None
    device: str
    dtype: torch.dtype | None
    progress: StageProgress | None


def evaluate(
    directories: Sequence[str | Path],
    *,
    tasks: Sequence[str] = EVALUATION.tasks,
    text: str = EVALUATION.text,
    vqa_source: str = EVALUATION.vqa_source,
    samples: int = EVALUATION.samples,
    seed: int = EVALUATION.seed,
    seqlen: int = EVALUATION.seqlen,
    stride: int | None = EVALUATION.stride,
    max_tokens: int | None = EVALUATION.max_tokens,
    max_new_tokens: int = EVALUATION.max_new_tokens,
    batch_size: int | None = EVALUATION.batch_size,
    blind: bool = EVALUATION.blind,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    progress: StageProgress | None = None,
) -> EvaluationReport:
    """Perplexity and visual question answering of each directory, and paired differences to the dense one.

    The reference is the first directory without a spectrim quantization config. `samples` questions of each task are
    asked. `device` and `dtype` go to the loader (None: CUDA if there is one, else CPU; the stored dtype);
    `batch_size=None` leaves the defaults of :func:`perplexity` and :func:`vqa`. `blind` adds the blind floor, one more
    pass over the questions. Only one model is in memory at a time, and every input is checked before the first loads.

    Raises:
        CheckpointError: for a directory that does not exist or holds no safetensors model.
        SampleError: for an unknown task, samples that are missing or malformed, and for `vqa` on a text-only model.
        NumericalError: for logits that are not finite.
    """
    EvaluationOptions.checked(
        tasks=tuple(tasks),
        text=text,
        vqa_source=vqa_source,
        samples=samples,
        seed=seed,
        seqlen=seqlen,
        stride=stride,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        blind=blind,
    ).check_together()
    check_device(device)
    paths = [Path(directory) for directory in directories]
    _check(paths, tasks)
    settings = Settings(
        tasks=tuple(tasks),
        samples=samples,
        seed=seed,
        seqlen=seqlen,
        stride=seqlen if stride is None else stride,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
    )
    questions = load_questions(vqa_source, samples, seed) if "vqa" in tasks else ()
    work = _Work(
        text=load_text(text, split="heldout") if "perplexity" in tasks else None,
        questions=questions,
        swapped=blind_questions(questions) if blind else (),
        settings=settings,
        batch_size=batch_size,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=dtype,
        progress=progress,
    )
    reference = next((path for path in paths if not is_compressed(path)), None)
    results, floor = [], None
    for path in paths:
        result, below = _evaluate_one(path, work, floor=path == (reference or paths[0]))
        results.append(result)
        floor = floor or below
    if reference is not None and questions:
        dense = results[paths.index(reference)].answers
        results = [
            result if path == reference else replace(result, differences=differences(result.answers, dense))
            for path, result in zip(paths, results, strict=True)
        ]
    return EvaluationReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions("torch", "transformers"),
        settings=settings,
        text=None if work.text is None else Source(text, sha256(work.text.encode()).hexdigest()),
        questions=Source(vqa_source, _fingerprint(questions)) if questions else None,
        reference=None if reference is None else str(reference),
        blind=floor,
        results=tuple(results),
    )


def is_compressed(directory: Path) -> bool:
    """Whether the directory's config.json names spectrim as its quantization method."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return (config.get("quantization_config") or {}).get("quant_method") == METHOD
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} is no model directory, its config.json cannot be read ({error}); give a directory of a model."
        ) from error


def _check(paths: Sequence[Path], tasks: Sequence[str]) -> None:
    if not paths:
        raise CheckpointError("No directory is named; give at least one model directory.")
    if len(set(paths)) < len(paths):
        raise CheckpointError("A directory is named twice; give each model once.")
    for path in paths:
        is_compressed(path), stored_bytes(path)  # each names what it cannot read
        _stated(path, "retention"), _stated(path, "predicted_loss")
        if "vqa" in tasks and not takes_images(load_processor(path)):
            raise SampleError(
                f"{path} holds a text-only model, which cannot do the task vqa; use tasks=['perplexity']."
            )


def _evaluate_one(path: Path, work: _Work, *, floor: bool) -> tuple[DirectoryResult, VqaScore | None]:
    """The result of one directory, and the blind floor if asked for."""
    settings = work.settings
    batch: dict[str, Any] = {} if work.batch_size is None else {"batch_size": work.batch_size}

    def stage(what: str) -> Progress | None:
        report = work.progress
        return None if report is None else lambda done, total: report(f"{path.name}: {what}", done, total)

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

    def look(what: str, questions: Sequence[Question]) -> tuple[list[Answer], VqaScore | None]:
        start = perf_counter()
        if not questions:
            return [], None
        answers = vqa(
            model, processor, questions, max_new_tokens=settings.max_new_tokens, progress=stage(what), **batch
        )
        return answers, score(answers, perf_counter() - start)

    with PeakMemory() as meter:
        model, processor = load(path, device_map=work.device, dtype=work.dtype), load_processor(path)
        language = None if work.text is None else read(work.text)
        answers, sight = look("vqa", work.questions)
        _, below = look("vqa with swapped images", work.swapped if floor else ())
    return DirectoryResult(
        directory=str(path),
        compressed=is_compressed(path),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        bytes=stored_bytes(path),
        memory=meter.memory,
        retention=_stated(path, "retention"),
        predicted_loss=_stated(path, "predicted_loss"),
        perplexity=language,
        tokens_per_second=None if language is None else language.tokens / language.seconds,
        vqa=sight,
        answers=tuple(answers),
    ), below


def _stated(path: Path, key: str) -> dict[str, float] | None:
    """The table of numbers that the checkpoint's provenance has under `key`, None for a model without provenance."""
    if not (path / PROVENANCE).is_file():
        return None
    stated = read_provenance(path).get(key)
    if stated is not None and not (
        isinstance(stated, dict) and all(isinstance(value, int | float) for value in stated.values())
    ):
        raise CheckpointError(f'"{key}" in {path / PROVENANCE} is not a table of numbers; compress the model again.')
    return stated


def _fingerprint(questions: Sequence[Question]) -> str:
    digest = sha256()
    for q in questions:
        digest.update(json.dumps([q.task, q.question, q.answer, q.image.size]).encode() + q.image.tobytes())
    return digest.hexdigest()
