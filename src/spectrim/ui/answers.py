"""Answers of several models to one question, token by token and in turn, with what each costs; without a browser."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from queue import Queue
from threading import Semaphore, Thread
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from spectrim.bench.engines import held_bytes
from spectrim.checkpoint import load, load_processor
from spectrim.errors import SampleError, SpectrimError, UsageError
from spectrim.evaluate.answering import takes_images
from spectrim.evaluate.footprint import stored_bytes
from spectrim.samples import media_tokens, question
from spectrim.samples.batches import chat_prompt, model_tensors
from spectrim.samples.beginning import with_beginning
from spectrim.samples.chat import render
from spectrim.samples.tokens import check_tokens, refuse_media


@dataclass(frozen=True)
class Answer:
    """What a model has said so far: ids of tokens, and when each came, in seconds of its own work."""

    tokens: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    done: bool = False
    failed: str | None = None  # a sentence, where the model could not answer

    @property
    def first_seconds(self) -> float | None:
        """Time to the first token; None before it."""
        return self.times[0] if self.times else None

    @property
    def per_second(self) -> float | None:
        """Tokens per second after the first; None before the second."""
        return (len(self.times) - 1) / max(self.times[-1] - self.times[0], 1e-9) if len(self.times) > 1 else None


class StoppedError(Exception):
    """Raised in a generation that nobody waits for any more."""


@dataclass
class _Relay(BaseStreamer):
    """Hands over the tokens of a generation one by one; it goes on when the next is asked for."""

    given: "Queue[int | BaseException | None]" = field(default_factory=Queue)
    asked: Semaphore = field(default_factory=lambda: Semaphore(0))
    prompt: bool = True
    stopped: bool = False

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate``: first with the prompt, then with each token."""
        if self.prompt:
            self.prompt = False
            return
        for token in value.flatten().tolist():
            self.given.put(int(token))
            self.asked.acquire()
            if self.stopped:
                raise StoppedError

    def end(self) -> None:
        """Called by ``generate`` at its end."""


class Speaker:
    """A model that answers, with its processor.

    Args:
        source: a model directory, a hub id or a .gguf file.
        name: as it is shown.
        model: from ``load``.
        processor: from ``load_processor``.
    """

    def __init__(self, source: str, name: str, model: Any, processor: Any) -> None:
        self.name, self.model, self.processor = name, model, processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.sees = takes_images(processor)
        self.weights = held_bytes(model)  # bytes in memory
        self.stored = _stored(source)  # bytes on disk; None for a hub id

    def prepare(self, text: str, image: Image.Image | None) -> dict[str, Any]:
        """Arguments of ``generate`` for a question, with an image or without.

        Raises:
            SampleError: there is no question, or the model cannot be asked it.
        """
        if not text.strip():
            raise SampleError("there is no question; write one")
        if image is not None and not self.sees:
            raise SampleError(f"{self.name} reads text alone; ask without an image")
        where = "the question"
        refuse_media(text, media_tokens(self.processor, self.model.config), where)
        turns = question(text) if image is not None else ({"role": "user", "content": text},)
        if image is not None:
            prompt = chat_prompt(self.processor, turns, where)
            inputs: Any = model_tensors(self.processor, [prompt], [[image.convert("RGB")]], [where])
        else:
            template = next((p for p in (self.processor, self.tokenizer) if getattr(p, "chat_template", None)), None)
            prompt = text if template is None else render(template, turns, where, answer_next=True)
            written = with_beginning(self.tokenizer, [prompt])
            inputs = self.tokenizer(
                written or [prompt], add_special_tokens=written is None, return_tensors="pt", verbose=False
            )
        check_tokens(inputs["input_ids"], self.model.config)
        return dict(
            inputs.to(self.model.device, dtype=self.model.dtype) if image is not None else _on(self.model, inputs)
        )

    def speak(self, text: str, image: Image.Image | None, max_new_tokens: int) -> Iterator[Answer]:
        """The answer after each token, greedily, and at its end; the model works only while the next is asked for.

        What it cannot do is in the last one, as ``failed``.
        """
        answer, relay = Answer(), _Relay()

        def work() -> None:
            try:
                greedy = GenerationConfig(
                    max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50,
                    repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=self.tokenizer.pad_token_id or 0,
                )  # fmt: skip
                self.model.generate(**self.prepare(text, image), generation_config=greedy, streamer=relay)
                relay.given.put(None)
            except BaseException as error:  # handed to whoever waits
                relay.given.put(error)

        worker = Thread(target=work, daemon=True)
        spent, started = 0.0, time.perf_counter()
        worker.start()
        try:
            while True:
                got = relay.given.get()
                spent += time.perf_counter() - started
                if isinstance(got, int):
                    answer = replace(answer, tokens=(*answer.tokens, got), times=(*answer.times, spent))
                    yield answer
                    started = time.perf_counter()
                    relay.asked.release()
                    continue
                if isinstance(got, BaseException) and not isinstance(got, SpectrimError | MemoryError | RuntimeError):
                    raise got
                yield replace(answer, done=True, failed=None if got is None else str(got) or type(got).__name__)
                return
        finally:
            relay.stopped = True
            relay.asked.release()
            worker.join()

    def read(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _on(model: Any, inputs: Any) -> dict[str, Any]:
    return {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask") if key in inputs}


def _stored(source: str) -> int | None:
    path = Path(source)
    if path.is_file():
        return path.stat().st_size
    with suppress(SpectrimError):
        return stored_bytes(path) if path.is_dir() else None
    return None


def open_speakers(
    sources: Sequence[str], names: Sequence[str], *, trust_remote_code: bool, **how: Any
) -> list[Speaker]:
    """Load models; their processors first, which may fail at once.

    `how` are arguments of ``load``. Raises UsageError where a model comes twice, and SpectrimError where one cannot be
    opened.
    """
    if len(set(sources)) < len(sources):
        raise UsageError("a model is named twice; name each once")
    processors = [load_processor(source, trust_remote_code=trust_remote_code) for source in sources]
    return [
        Speaker(source, name, load(source, trust_remote_code=trust_remote_code, **how), processor)
        for source, name, processor in zip(sources, names, processors, strict=True)
    ]


def in_turn(
    speakers: Sequence[Speaker], text: str, image: Image.Image | None, max_new_tokens: int
) -> Iterator[list[Answer]]:
    """The answers of all so far, after each round in which every model that is not done gives one token.

    One model works at a time, so that the times of one do not hold the work of another.
    """
    streams = [speaker.speak(text, image, max_new_tokens) for speaker in speakers]
    answers = [Answer() for _ in speakers]
    try:
        while not all(answer.done for answer in answers):
            answers = [answer if answer.done else next(stream) for answer, stream in zip(answers, streams, strict=True)]
            yield list(answers)
    finally:
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]


def parting(first: Answer, other: Answer) -> int | None:
    """Place of the first token in which two answers differ so far; None where there is none."""
    for place, (a, b) in enumerate(zip(first.tokens, other.tokens, strict=False)):
        if a != b:
            return place
    shorter = min((first, other), key=lambda answer: len(answer.tokens))
    return len(shorter.tokens) if shorter.done and len(first.tokens) != len(other.tokens) else None


@cache
def comparable(first: Speaker, other: Speaker) -> bool:
    """Whether tokens of two models mean the same."""
    return bool(first.tokenizer.get_vocab() == other.tokenizer.get_vocab())
