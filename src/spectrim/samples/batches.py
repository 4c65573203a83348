"""Samples as keyword arguments of ``model.forward``."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from spectrim.errors import SampleError, first_line
from spectrim.samples.beginning import with_beginning
from spectrim.samples.chat import Message, as_parts, question, render
from spectrim.samples.images import ImageSample
from spectrim.samples.sources import check_positive

Modality = Literal["text", "image"]

# Batches' worth of samples that wait for others of their shapes, so that memory stays bounded.
_WAITING_BATCHES = 4


@dataclass(frozen=True)
class Batch:
    """Samples of identical shapes: a batch never holds padding."""

    modality: Modality
    inputs: dict[str, torch.Tensor]  # keyword arguments of model.forward, on the CPU
    samples: int
    answers: tuple[str | None, ...] = ()  # of image samples; None where one brings none


def text_batches(windows: torch.Tensor, batch_size: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` windows, int64 ``[samples, seqlen]``, in their order."""
    check_positive(batch_size=batch_size)
    for ids in windows.split(batch_size):
        yield Batch("text", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, len(ids))


def image_batches(samples: Iterable[ImageSample], processor: ProcessorMixin, batch_size: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` samples whose processed tensors agree in every shape.

    The order is a function of the samples alone. At most four batches' worth of samples wait for companions; beyond
    that the fullest group goes out as it is.

    Raises:
        SampleError: the processor cannot place the images of a sample into a prompt, or refuses the sample.
    """
    check_positive(batch_size=batch_size)
    groups: dict[tuple[tuple[Any, ...], ...], list[tuple[dict[str, torch.Tensor], str | None]]] = {}
    waiting = 0
    for sample in samples:
        inputs = _processed(sample, processor)
        key = tuple((name, *value.shape) for name, value in sorted(inputs.items()))
        groups.setdefault(key, []).append((inputs, sample.answer))
        waiting += 1
        if len(groups[key]) < batch_size:
            if waiting < _WAITING_BATCHES * batch_size:
                continue
            key = max(groups.items(), key=lambda group: len(group[1]))[0]  # the oldest of equals
        batch = _joined(groups.pop(key))
        waiting -= batch.samples
        yield batch
    for group in groups.values():
        yield _joined(group)


def data_fingerprint(
    windows: torch.Tensor | None, images: Iterable[ImageSample], processor: ProcessorMixin | None
) -> str:
    """SHA-256 of the content that is used: token ids, pixels, conversations and answers, in order.

    The first image sample goes in as the model will see it as well, for the processor's part: its tokenizer, prompt
    template, resizing and normalization.
    """
    digest = hashlib.sha256()
    if windows is not None:
        digest.update(f"text {tuple(windows.shape)}".encode())
        digest.update(windows.contiguous().numpy().tobytes())
    for number, sample in enumerate(images):
        sizes = [image.size for image in sample.images]
        digest.update(repr((number, sizes, sample.turns, sample.answer)).encode())
        for image in sample.images:
            digest.update(image.tobytes())
        if number == 0 and processor is not None:
            for name, value in sorted(_processed(sample, processor).items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def image_prompt(processor: ProcessorMixin, instruction: str) -> str:
    """The chat prompt of one image with an instruction, up to where the answer begins; see :func:`chat_prompt`."""
    return chat_prompt(processor, question(instruction), f"the question {instruction[:60]!r}")


def chat_prompt(processor: ProcessorMixin, turns: Sequence[Message], where: str) -> str:
    """A conversation by the processor's chat template, up to where the answer begins.

    A processor without chat template gets its image token for each image, and the text, in lines.

    Raises:
        SampleError: there is neither a chat template nor an image token, or the conversation does not fit them.
    """
    shown = sum(part["type"] == "image" for turn in turns for part in turn["content"] if isinstance(part, dict))
    token = getattr(processor, "image_token", None)
    if getattr(processor, "chat_template", None):
        prompt = render(processor, turns, where, answer_next=True)
        marks = (prompt.count(mark) for mark in (token, getattr(processor, "boi_token", None)) if mark)
        if (written := max(marks, default=shown)) not in (0, shown):  # 0: the template writes something else
            raise SampleError(
                f"{where} has {shown} images, of which the chat template of {type(processor).__name__} writes "
                f"{written}; give samples of one image"
            )
        return prompt
    if not token:
        raise SampleError(
            f"the processor {type(processor).__name__} has neither a chat template nor an image token, so that images "
            "cannot be placed in a prompt; add a chat template to the model's directory"
        )
    if len(turns) > 1:
        raise SampleError(
            f"{where} has several turns, for which the processor {type(processor).__name__} has no chat template; add "
            "one to the model's directory, or give samples of one question"
        )
    return "\n".join(token if part["type"] == "image" else part["text"] for part in as_parts(turns[0]["content"]))


def model_tensors(
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    where: Sequence[str],
    **options: Any,
) -> BatchFeature:
    """Prompts and the images of each, as a processor makes them inputs of a model.

    The beginning of a text (BOS) stands before every prompt exactly once, whether the template writes it or the
    tokenizer adds it; the prompts of a batch may differ in that.

    Raises:
        SampleError: the processor refuses a sample; the message has its name in ``where``.
    """
    tokenizer: Any = getattr(processor, "tokenizer", None)
    if tokenizer is not None and (written := with_beginning(tokenizer, prompts)) is not None:
        prompts, options["add_special_tokens"] = written, False
    call: Any = processor
    try:
        inputs: BatchFeature = call(text=list(prompts), images=list(map(list, images)), return_tensors="pt", **options)
    except Exception as error:  # of whatever kind a processor fails with
        for prompt, shown, name in zip(prompts, images, where, strict=True) if len(prompts) > 1 else ():
            model_tensors(processor, [prompt], [shown], [name], **options)  # says which one it is
        sizes = ", ".join(f"{image.width}×{image.height}" for image in images[0])
        raise SampleError(
            f"{where[0]} cannot be read by {type(processor).__name__} ({first_line(error)}; images of {sizes} pixels); "
            "correct or remove it"
        ) from error
    return inputs


def _processed(sample: ImageSample, processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    prompt = chat_prompt(processor, sample.turns, sample.where)
    inputs = model_tensors(processor, [prompt], [sample.images], [sample.where])
    # Some processors (PaliGemma's) add labels, with which the model would compute a training loss.
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name != "labels"}


def _joined(group: Sequence[tuple[dict[str, torch.Tensor], str | None]]) -> Batch:
    inputs = {name: torch.cat([sample[name] for sample, _ in group]) for name in group[0][0]}
    return Batch("image", inputs, len(group), tuple(answer for _, answer in group))
