"""Visual question answering: batched greedy generation and exact match."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from spectrim.demo.tasks import Question
from spectrim.errors import ModelError, NumericalError, SampleError
from spectrim.evaluate.language import Progress, inference
from spectrim.evaluate.questions import blind_questions
from spectrim.samples import check_tokens, media_tokens
from spectrim.samples.batches import image_prompt, model_tensors
from spectrim.samples.sources import check_positive
from spectrim.samples.tokens import refuse_media


@dataclass(frozen=True)
class Answer:
    """What a model said (`given`) to a question whose right answer is `expected`."""

    task: str
    question: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        """Exact match after :func:`normalise`."""
        return normalise(self.given) == normalise(self.expected)


def normalise(text: str) -> str:
    """The text without surrounding white space and one final period, in lower case."""
    return text.strip().removesuffix(".").rstrip().casefold()


def vqa(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    blind: bool = False,
    progress: Progress | None = None,
) -> list[Answer]:
    """Answers in the order of `questions`, from batched greedy generation.

    The prompt is that of :func:`spectrim.samples.batches.image_prompt`, the same as in calibration. Prompts of similar
    length share a batch and the shorter ones are padded on the left under the attention mask, so the batch size changes
    logits by rounding only. The checkpoint's generation config supplies the end tokens; its sampling and repetition
    settings do not apply. `blind=True` asks each question about the image of another question of its task
    (:func:`spectrim.evaluate.questions.blind_questions`).

    Raises:
        SampleError: when there is no question, `processor` takes no images, or a question cannot be asked; names it.
        ModelError: when the model cannot generate.
        NumericalError: when logits are NaN or infinite; names the question and the generated token.
    """
    if not questions:
        raise SampleError("there is no question to answer; give at least one")
    if not takes_images(processor):
        raise SampleError(f"{type(processor).__name__} takes no images, so it cannot answer questions about them")
    if not model.can_generate():
        raise ModelError(f"{type(model).__name__} cannot generate answers; choose a model with a language head")
    check_positive(batch_size=batch_size, max_new_tokens=max_new_tokens)
    asked: Sequence[Question] = blind_questions(questions) if blind else questions
    prompts = prompted(processor, model.config, asked)
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with inference(model), _finite_logits(model, [asked[i].question for i in batch]):
            texts = _generate(model, processor, [prompts[i] for i in batch], [asked[i] for i in batch], max_new_tokens)
        answers.update(zip(batch, texts, strict=True))
        if progress is not None:
            progress(len(answers), len(asked))
    return [Answer(q.task, q.question, q.answer, answers[i]) for i, q in enumerate(questions)]


def prompted(processor: ProcessorMixin, config: PreTrainedConfig, questions: Sequence[Question]) -> list[str]:
    """The prompts of questions for a model of this config.

    Raises:
        SampleError: a question cannot be asked; names it.
    """
    prompts, media = [], media_tokens(processor, config)
    for q in questions:
        refuse_media(q.question, media, f"the question {q.question[:60]!r}")
        prompts.append(image_prompt(processor, q.question))
        tokenizer: Any = processor.tokenizer
        ids = tokenizer(prompts[-1], add_special_tokens=False, verbose=False)["input_ids"]
        check_tokens(torch.tensor(ids), config)
    return prompts


def takes_images(processor: Any) -> bool:
    """Whether this is a processor with an image side rather than a tokenizer."""
    return getattr(processor, "image_processor", None) is not None


def _generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: list[str],
    questions: list[Question],
    max_new_tokens: int,
) -> list[str]:
    tokenizer = processor.tokenizer
    with _padding_token(tokenizer):
        inputs = model_tensors(
            processor,
            prompts,
            [[q.image] for q in questions],
            [f"the question {q.question[:60]!r} of task '{q.task}'" for q in questions],
            padding=True,
            padding_side="left",
        ).to(model.device, dtype=model.dtype)
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=tokenizer.pad_token_id,
        )
        generate: Any = model.generate  # typed as a submodule, since not every PreTrainedModel generates
        output = generate(**inputs, generation_config=greedy)
    new = output[:, inputs["input_ids"].shape[1] :]  # [batch, ≤ max_new_tokens]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


@contextmanager
def _padding_token(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Use EOS as padding token where the tokenizer has none; masked positions do not count, whatever they hold."""
    if tokenizer.pad_token is not None:
        yield
        return
    if tokenizer.eos_token is None:
        raise SampleError("the tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
    tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.pad_token = None


@contextmanager
def _finite_logits(model: PreTrainedModel, questions: list[str]) -> Iterator[None]:
    """Checks the logits of every forward pass that generation makes, before any processor may mask some with -inf."""
    step = 0

    def check(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal step
        finite = torch.isfinite(output.logits).flatten(1).all(dim=1)  # [batch]
        if not finite.all():
            question = questions[int(finite.logical_not().nonzero()[0, 0])]
            raise NumericalError(
                f"the logits for the question '{question}' are not finite at generated token {step}; check the model's "
                "weights or use a wider dtype"
            )
        step += 1

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
