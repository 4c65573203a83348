"""One short training of the whole compressed model towards the dense one's predictions."""

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import chain
from math import ceil, cos, isfinite, log, pi
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.calibrate import Statistics
from spectrim.calibrate.data import reload_data
from spectrim.calibrate.passes import prepared
from spectrim.disk.lock import writing
from spectrim.disk.sealed import open_sealed, write_sealed
from spectrim.errors import NumericalError
from spectrim.files import parse_json
from spectrim.plan import maker
from spectrim.plan.key import COMPENSATED, made_key
from spectrim.plan.plan import Plan
from spectrim.recipe import Recipe
from spectrim.tune.divergence import divergence, gradients, rough_products
from spectrim.tune.numbers import Number, numbers, packed_layers
from spectrim.tune.samples import Sample, divided, gathered, together, tokens
from spectrim.tune.scales import trained_scales

_log = logging.getLogger(__name__)

VERSION = 5  # of what the tensors mean; a change makes earlier files unused
STEP = 512  # tokens of the larger modality behind one step of Adam; 2048 leave more at equal passes
WARM = 20  # the rate rises over one step in so many, and falls to zero by half a cosine over all of them
LESS = 1 / 3  # of the rate, after steps that were taken back
PARTS = 4  # of an epoch, which are measured: the mean of the states in each
FLOOR = 1e-3  # nats that are added to divergences before they are compared by their ratio

Nats = Mapping[str, float]
"""Mean divergence from the dense model by modality, nats per predicted token."""


@dataclass(frozen=True)
class Tuned:
    """What came of it, on the samples that were left out: nats before and after, and the step that was kept."""

    before: Nats
    after: Nats
    step: int
    steps: int


def beside(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same tensors whose modules may be exchanged apart; those of one dimension are its own.

    So the dense model stays what it is while linears of the other one are exchanged and norms and biases are trained.
    """
    shared = {id(x): x for x in chain(model.parameters(), model.buffers()) if x.ndim != 1}
    return deepcopy(model, shared)


class Tuning:
    """Of a compressed model, with the dense one beside it (docs/methods.md, section 7)."""

    def __init__(
        self,
        dense: PreTrainedModel,
        small: PreTrainedModel,
        parts: Anatomy,
        recipe: Recipe,
        plan: Plan,
        statistics: Statistics,
        processor: Any,
    ) -> None:
        self._dense, self._small, self._part = dense, small, recipe.tune
        self._statistics, self._processor, self._sees = statistics, processor, parts.tower is not None
        self._key = made_key((VERSION, COMPENSATED, maker.VERSION), statistics, parts, recipe, plan.rows)
        self.path = statistics.path / "tuned" / f"{self._key}.safetensors"

    def run(self, progress: Callable[[int, int], None] | None = None) -> Tuned:
        """Train the compressed model in place, or take from disk what an earlier call has found.

        Raises:
            SampleError: the calibration samples cannot be loaded any more, or have no labels.
            StatisticsError: they are other samples now, or what is found cannot be written or read.
            ModelError: the model gives no predictions that samples could label.
            NumericalError: a divergence is not finite.
        """
        trained = list(numbers(self._small))
        if self.path.exists():
            file = open_sealed(self.path, of=self._key)
            for one in trained:
                one.tensor.data.copy_(file.tensor(one.name))
            found = Tuned(**parse_json(file.note))
            _log.info("tune: complete already")
        else:
            with writing(self._statistics.path, alone=False):
                found = self._train(trained, progress)
                state = {one.name: one.tensor.detach() for one in trained}
                write_sealed(self.path, state, of=self._key, note=json.dumps(asdict(found)))
        changes = (f"{name} {found.before[name]:.4f} → {found.after[name]:.4f}" for name in found.before)
        _log.info("tune: nats on left-out samples: %s (step %d of %d)", ", ".join(changes), found.step, found.steps)
        return found

    def _train(self, trained: Sequence[Number], progress: Callable[[int, int], None] | None) -> Tuned:
        settings = self._statistics.manifest.settings
        data = reload_data(self._dense, self._processor, self._statistics, sees=self._sees, samples=self._part.samples)
        samples = gathered(self._dense, data, answer_tokens=settings.answer_tokens, seed=settings.seed)
        seen, left_out = divided(samples)
        held = {modality: together(some) for modality, some in left_out.items()}
        per_epoch = max(min(len(some), ceil(tokens(some) / STEP)) for some in seen.values())
        steps = self._part.epochs * per_epoch
        part_of_epoch = max(1, per_epoch // PARTS)
        rate, optimizer = self._part.rate, torch.optim.Adam([one.master for one in trained], betas=(0.9, 0.95))
        batches = {m: _turns(some, ceil(len(some) / per_epoch), settings.seed) for m, some in seen.items() if some}
        with self._training(trained):
            before = best = self._nats(held)
            if not all(map(isfinite, before.values())):
                raise NumericalError("the predictions of the compressed model are not finite; set tune.epochs=0")
            kept, at, since = [one.tensor.detach().clone() for one in trained], 0, 0
            for step in range(1, steps + 1):
                for modality, turns in batches.items():
                    batch = next(turns)
                    share = 1 / (before[modality] + FLOOR) / sum(one.labels for one in batch)
                    for part in together(batch):
                        self._add(part, share, trained)
                optimizer.param_groups[0]["lr"] = rate * _share(step - 1, steps)
                optimizer.step()
                optimizer.zero_grad()
                since += 1
                for one in trained:
                    one.average(1 / min(since, part_of_epoch))
                    one.write()
                if step % part_of_epoch == 0 or step == steps:
                    for one in trained:
                        one.write_mean()
                    now = self._nats(held)
                    gains = all(map(isfinite, now.values())) and _score(now, best) < 0
                    if gains:
                        best, at = now, step
                    else:  # what gained nothing is taken back
                        rate, since = rate * LESS, 0
                        optimizer.state.clear()
                    for held_one, one in zip(kept, trained, strict=True):
                        if gains:
                            held_one.copy_(one.tensor)
                            one.write()
                        else:
                            one.restore(held_one)
                if progress is not None:
                    progress(step, steps)
            for held_one, one in zip(kept, trained, strict=True):
                one.restore(held_one)
        return Tuned(before, best, at, steps)

    @contextmanager
    def _training(self, trained: Sequence[Number]) -> Iterator[None]:
        """Gradients of what is trained and of nothing else; the start is restored where the block fails."""
        start = [one.tensor.detach().clone() for one in trained]
        with prepared(self._small), prepared(self._dense), trained_scales(packed_layers(self._small)):
            try:
                for one in trained:
                    one.tensor.requires_grad_(True)
                yield
            except BaseException:
                for one, before in zip(trained, start, strict=True):
                    one.tensor.data.copy_(before)
                raise
            finally:
                for one in trained:
                    one.tensor.requires_grad_(False)

    def _add(self, part: Sample, share: float, trained: Sequence[Number]) -> None:
        """Add the gradient of `share` times the sum of divergences of some samples; products may be of bfloat16."""
        wanted = [one.tensor for one in trained]
        with rough_products(), torch.enable_grad():
            for found in gradients(self._dense, self._small, part, wanted):
                for one, gradient in zip(trained, found, strict=True):
                    one.add(gradient, share)

    def _nats(self, held: Mapping[Any, Sequence[Sample]]) -> dict[str, float]:
        """Of samples that were left out."""
        found = {}
        for modality, parts in held.items():
            total = sum(divergence(self._dense, self._small, part) for part in parts)
            found[str(modality)] = total / sum(part.labels for part in parts)
        return found


def _turns(samples: Sequence[Sample], count: int, seed: int) -> Iterator[list[Sample]]:
    """`count` samples at a time without end; every sample comes up once before any comes up again."""
    order, waiting = random.Random(seed), list[Sample]()
    while True:
        while len(waiting) < count:
            waiting += order.sample(samples, len(samples))
        yield waiting[:count]
        del waiting[:count]


def _share(step: int, steps: int) -> float:
    """Share of the rate in a step: it rises at once and falls slowly."""
    return min(1.0, (step + 1) * WARM / steps) * (1 + cos(pi * step / steps)) / 2


def _score(nats: Nats, other: Nats) -> float:
    """Below zero where modalities are nearer to the dense model by the mean of their log ratios."""
    return sum(log((nats[name] + FLOOR) / (other[name] + FLOOR)) for name in nats)
