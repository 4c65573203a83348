"""Samples as keyword arguments of ``model.forward``."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import ProcessorMixin

from spectrim.errors import SampleError
from spectrim.samples.images import ImageSample

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
    for ids in windows.split(batch_size):
        yield Batch("text", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, len(ids))


def image_batches(samples: Iterable[ImageSample], processor: ProcessorMixin, batch_size: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` samples whose processed tensors agree in every shape.

    The order is a function of the samples alone. At most four batches' worth of samples wait for companions; beyond
    that the fullest group goes out as it is.

    Raises:
        SampleError: the processor cannot place an image into a prompt.
    """
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
    """SHA-256 of the content that is used: token ids, pixels, instructions and answers, in order.

    The first image sample goes in as the model will see it as well, for the processor's part: its tokenizer, prompt
    template, resizing and normalisation.
    """
    digest = hashlib.sha256()
    if windows is not None:
        digest.update(f"text {tuple(windows.shape)}".encode())
        digest.update(windows.contiguous().numpy().tobytes())
    for number, sample in enumerate(images):
        digest.update(repr((number, sample.image.size, sample.instruction, sample.answer)).encode())
        digest.update(sample.image.tobytes())
        if number == 0 and processor is not None:
            for name, value in sorted(_processed(sample, processor).items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def image_prompt(processor: ProcessorMixin, instruction: str) -> str:
    """The chat prompt of one image with an instruction, up to where the answer begins.

    A processor without chat template gets its image token, a line break and the instruction.

    Raises:
        SampleError: the processor has neither a chat template nor an image token.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return str(prompt)
    token = getattr(processor, "image_token", None)
    if not token:
        raise SampleError(
            f"the processor {type(processor).__name__} has neither a chat template nor an image token, so that images "
            "cannot be placed in a prompt; add a chat template to the model's directory"
        )
    return f"{token}\n{instruction}"


def _processed(sample: ImageSample, processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    prompt = image_prompt(processor, sample.instruction)
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    # A template that writes the beginning-of-sequence token must not get a second one from the tokenizer.
    options = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
    inputs = processor(text=[prompt], images=[sample.image], return_tensors="pt", **options)
    # Some processors (PaliGemma's) add labels, with which the model would compute a training loss.
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name != "labels"}


def _joined(group: Sequence[tuple[dict[str, torch.Tensor], str | None]]) -> Batch:
    inputs = {name: torch.cat([sample[name] for sample, _ in group]) for name in group[0][0]}
    return Batch("image", inputs, len(group), tuple(answer for _, answer in group))
