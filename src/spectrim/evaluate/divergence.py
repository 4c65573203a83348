"""How far a model's predictions are from those of the dense model, token by token; no labels are needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from spectrim.calibrate.data import Data
from spectrim.calibrate.labels import Labelled, labelled_samples
from spectrim.calibrate.passes import prepared
from spectrim.demo.tasks import Question
from spectrim.errors import NumericalError, SampleError
from spectrim.evaluate.intervals import Z
from spectrim.evaluate.language import Progress
from spectrim.samples import ImageSample, Modality, load_images, question, text_windows

_SAMPLES = 512  # of a modality at most; the number of tokens ends it before


@dataclass(frozen=True)
class Divergence:
    """Of one modality: Kullback–Leibler divergence of a model from the dense one, in nats per predicted token.

    ``mean`` over `tokens` positions of `samples` samples, with its 95 % interval from the spread over samples (None of
    one sample); ``p99`` is the 99th percentile of positions. ``agreement`` is the share of positions at which both find
    the same token most likely, with its interval. For tokens that the dense model draws itself, the mean is the
    expected rise of the loss.
    """

    modality: Modality
    samples: int
    tokens: int
    mean: float
    low: float | None
    high: float | None
    p99: float
    agreement: float
    agreement_low: float | None
    agreement_high: float | None


class Predictions:
    """What the dense model predicts of samples: their inputs and its log-probabilities, in files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[tuple[Modality, Path]] = []

    def gather(self, model: PreTrainedModel, data: Data, *, tokens: int, seed: int, progress: Progress | None) -> None:
        """Run samples of each modality until `tokens` positions are predicted, or there are no more samples.

        Positions are all those of text, and those of the answer to an image: the sample's own or, where it has none,
        one that the model draws (at most 32 tokens). Raises NumericalError for logits that are not finite.
        """
        with prepared(model):
            for modality, count in data.samples.items():
                done = 0
                given: dict[str, Any] = {"sampled": False, "answer_tokens": 32, "seed": seed, "numbers": range(count)}
                for sample in labelled_samples(model, data, modality, **given):
                    found = _predicted(model, sample.inputs, sample.labelled)[: tokens - done]
                    self._keep(sample, found)
                    done += len(found)
                    if progress is not None:
                        progress(done, tokens)
                    if done == tokens:
                        break

    def _keep(self, sample: Labelled, found: torch.Tensor) -> None:
        path = self._folder / f"{len(self._files)}.safetensors"
        tensors = {f"inputs.{name}": value.cpu().contiguous() for name, value in sample.inputs.items()}
        save_file(tensors | {"labelled": sample.labelled.cpu(), "predicted": found.cpu()}, path)
        self._files.append((sample.modality, path))

    def compare(self, model: PreTrainedModel, progress: Progress | None = None) -> tuple[Divergence, ...]:
        """The divergence of another model with the same tokens, for each modality.

        Raises:
            SampleError: it has another vocabulary.
            NumericalError: its logits are not finite.
        """
        found: dict[Modality, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        with prepared(model):
            for number, (modality, path) in enumerate(self._files):
                held = load_file(path, device=str(model.device))
                inputs = {
                    name.removeprefix("inputs."): value.to(model.dtype) if value.is_floating_point() else value
                    for name, value in held.items()
                    if name.startswith("inputs.")
                }
                p = held["predicted"]
                q = _predicted(model, inputs, held["labelled"])[: len(p)]
                if q.shape != p.shape:
                    raise SampleError(
                        f"{type(model).__name__} knows {q.shape[1]} tokens and the dense model {p.shape[1]}, so that "
                        "their predictions cannot be compared; leave out the task kl"
                    )
                divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0).double().cpu()  # rounding may fall below zero
                same = (p.argmax(-1) == q.argmax(-1)).double().cpu()
                found.setdefault(modality, []).append((divergence, same))
                if progress is not None:
                    progress(number + 1, len(self._files))
        return tuple(_summary(modality, pairs) for modality, pairs in found.items())


def samples_of(
    processor: Any, *, text: str | None, questions: Sequence[Question], prompts: str | tuple[str, ...] | None,
    seqlen: int, tokens: int, seed: int,
) -> Data:  # fmt: skip
    """What models are compared on: windows of a text, and questions about images or, in their place, `prompts`.

    `prompts` are image samples as :func:`spectrim.calibrate` takes them. Raises SampleError as `load_images`.
    """
    windows = None
    if text is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        room = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) // seqlen
        samples = max(1, min(room, -(-tokens // max(1, seqlen - 1))))
        windows = text_windows(text, tokenizer, samples=samples, seqlen=seqlen, seed=seed)
    if prompts is not None:
        shown: Sequence[ImageSample] = load_images(prompts, samples=_SAMPLES, seed=seed, fewer=True)
    else:
        order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
        shown = [ImageSample((questions[i].image,), question(questions[i].question)) for i in order]
    return Data(windows, shown, processor if shown else None)


@torch.no_grad()
def _predicted(model: PreTrainedModel, inputs: dict[str, torch.Tensor], labelled: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 [positions, vocabulary] of the tokens after the labelled positions."""
    logits = model(**inputs, use_cache=False).logits[0, :-1][labelled.to(model.device)]
    if not torch.isfinite(logits).all():
        raise NumericalError(
            "logits that are compared with the dense model's are not finite; check the model's weights or use a wider "
            "dtype"
        )
    return logits.float().log_softmax(-1)


def _summary(modality: Modality, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Divergence:
    divergence, same = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    low, high = _interval([values for values, _ in pairs], inf)
    bounds = _interval([values for _, values in pairs], 1.0)
    return Divergence(
        modality,
        len(pairs),
        len(divergence),
        divergence.mean().item(),
        low,
        high,
        divergence.quantile(0.99).item(),
        same.mean().item(),
        *bounds,
    )


def _interval(parts: Sequence[torch.Tensor], most: float) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the mean over all values, whose samples are independent and their values are not."""
    if len(parts) < 2:
        return None, None
    sums, counts = torch.stack([part.sum() for part in parts]), torch.tensor([len(part) for part in parts])
    mean = sums.sum() / counts.sum()
    spread = ((sums - mean * counts) ** 2).sum() * len(parts) / (len(parts) - 1)  # of a ratio of sums
    half = Z * sqrt(spread.item()) / int(counts.sum())
    return max(0.0, mean.item() - half), min(most, mean.item() + half)
