"""Calibration: samples through the model, moments into the statistics directory."""

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from spectrim.anatomy import Anatomy, anatomy
from spectrim.calibrate.data import SAMPLE_SETTINGS, Data, load_data
from spectrim.calibrate.distributed import reduce_sums, share
from spectrim.calibrate.experts import described, tokens_by_expert
from spectrim.calibrate.fingerprint import model_print
from spectrim.calibrate.forms import choose_forms
from spectrim.calibrate.gradients import run_gradients
from spectrim.calibrate.groups import Sizes, shares, total
from spectrim.calibrate.labels import Known, labelled_samples, together
from spectrim.calibrate.manifest import COST_FILE, MANIFEST, CalibrationUnit, DataPrint, Gathered, Manifest
from spectrim.calibrate.memory import Fit, fitted
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.passes import prepared, run_batch
from spectrim.calibrate.positions import image_token
from spectrim.calibrate.probe import foresee, forget_peak, peak_memory, written_bytes
from spectrim.calibrate.relay import Relay
from spectrim.calibrate.route import Route
from spectrim.calibrate.size import handed_bytes, statistics_bytes
from spectrim.calibrate.snapshot import SnapshotStore, check_home, check_space
from spectrim.calibrate.statistics import Statistics
from spectrim.dense import check_dense
from spectrim.disk.lock import LOCK, writing
from spectrim.errors import SampleError, StatisticsError
from spectrim.estimate import Cost, compared
from spectrim.experts import all_tokens
from spectrim.files import user_path, write_whole
from spectrim.samples import Modality
from spectrim.samples.sources import local_path, split_columns
from spectrim.settings import CALIBRATION, CalibrationOptions, split_weight
from spectrim.versions import release

_log = logging.getLogger(__name__)

_SNAPSHOT_SHARE = 0.1  # of the time at most goes into snapshots


@torch.inference_mode(False)  # whose tensors of samples could not be differentiated
def calibrate(
    model: PreTrainedModel,
    out: Path | str,
    *,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    text: str | Sequence[str | tuple[str, float]] | None = CALIBRATION.text,
    images: str | Sequence[str | tuple[str, float]] | None = CALIBRATION.images,
    samples: int = CALIBRATION.samples,
    seqlen: int = CALIBRATION.seqlen,
    batch_size: int = CALIBRATION.batch_size,
    seed: int = CALIBRATION.seed,
    instruction: str = CALIBRATION.instruction,
    image_tokens_only: bool = CALIBRATION.image_tokens_only,
    all_experts: bool = CALIBRATION.all_experts,
    gradients: bool = CALIBRATION.gradients,
    curvature: bool = CALIBRATION.curvature,
    labels: Literal["given", "sampled"] = CALIBRATION.labels,
    answer_tokens: int = CALIBRATION.answer_tokens,
    curvature_forms: Mapping[str, str] = CALIBRATION.curvature_forms,
    memory: str | None = CALIBRATION.memory,
    checkpoint_seconds: float = CALIBRATION.checkpoint_seconds,
    progress: Callable[[int, int], None] | None = None,
    estimate: bool = False,
) -> Statistics:
    """Gather the moments of every compressible linear from text and from images with an instruction.

    Text and image moments are kept apart. Blocks are gathered a group at a time, as many as fit into the memory. A run
    that was killed continues after its last snapshot and ends with the same bits, under another limit of memory as
    well; a finished one is opened. Under torch.distributed
    every process calls this with the same arguments, takes its share of the batches, and gets the sums of all;
    such a run writes at its end only.

    Args:
        model: on any device, in any floating dtype; left as it was.
        out: the statistics directory.
        processor: the model's processor; for a language model its tokenizer.
        text: text source (see ``load_text``), or several, such as ``["a.jsonl:0.7", "b.txt:0.3"]`` or
            ``[("a.jsonl", 0.7), ("b.txt", 0.3)]``, whose weights are shares of the samples; None for none.
        images: image source (see ``load_images``), or several; None for none. Models without a vision tower take no
            images, and "builtin" means none there.
        samples: of each modality.
        seqlen: tokens of a text sample.
        batch_size: samples that run together at most; in gradient passes neighbours of equal shapes.
        seed: of the choice of samples.
        instruction: of image samples that carry none.
        image_tokens_only: the backbone counts only the positions of image tokens in image samples.
        all_experts: every expert reads all tokens, so that its input moments are those of its layer; what comes out of
            the model stays routed, and so do gradients.
        gradients: gather the gradient statistic of text samples too (see ``GradMoment``).
        curvature: gather the moments of output gradients of all samples too (see ``OutputMoment``). Text is labelled at
            every token; an image sample at its answer, or at one that the model draws where it brings none.
        labels: "given": the samples' own tokens (empirical Fisher); "sampled": drawn from the model at the same
            positions (true Fisher).
        answer_tokens: of a drawn answer at most.
        curvature_forms: smaller form of output moments by role, such as ``{"gate": "sketch:256"}``; else they are full.
        memory: the most that the process may hold on the model's device, such as ``"20GiB"``; by default what it holds
            and most of what is free. What is left for moments decides how many blocks are gathered in one pass over the
            samples, and so the number of passes; the statistics are the same.
        checkpoint_seconds: time between snapshots; they are rarer where they would take over a tenth of the time.
        progress: called with samples done and samples in all.
        estimate: time a few batches first, and log what the run will take, and at its end what it took; both are kept
            in ``cost.json`` beside the statistics.

    Raises:
        SampleError: samples are missing, malformed or too few, or do not fit the model.
        ModelError: nothing can be compressed, or the model lacks what an option needs.
        RecipeError: ``curvature_forms`` names a role or a form that does not exist.
        UsageError: the memory holds a model and a batch, and not the moments of a linear besides.
        StatisticsError: ``out`` holds something else, or statistics of another model, data or settings.
        NumericalError: NaN or infinity; names the linear and the batch.
    """
    options = CalibrationOptions.checked(
        text=text,
        images=images,
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        seed=seed,
        instruction=instruction,
        image_tokens_only=image_tokens_only,
        all_experts=all_experts,
        gradients=gradients,
        curvature=curvature,
        labels=labels,
        answer_tokens=answer_tokens,
        curvature_forms=dict(curvature_forms),
        memory=memory,
        checkpoint_seconds=checkpoint_seconds,
    )
    options.check_together()
    check_dense(model)
    out, parts = user_path(out), anatomy(model)
    check_home(out)
    if share()[1] == 1 and (out / LOCK).exists() and not ((out / MANIFEST).exists() and Manifest.read(out).complete):
        with writing(out, alone=True):
            pass  # nobody else writes there: known before samples are loaded
    chosen = options.model_dump(include=SAMPLE_SETTINGS)
    sources: dict[str, Any] = {"text": options.text, "images": options.images}
    data = load_data(model, processor, sees=parts.tower is not None, **sources, **chosen)
    if image_tokens_only:
        if not data.images:
            raise SampleError("image_tokens_only needs image samples; give an image source or leave it out")
        image_token(model)
    shown = options.images if data.images else None
    source = DataPrint(text=_absolute(options.text), images=_absolute(shown), fingerprint=data.fingerprint())
    fresh, fit = _manifest(model, parts, data, source, options)
    run = _Run(model, parts, data, fit, out)
    if SnapshotStore(out, fresh).manifest.complete:
        _log.info("calibrate: complete already, in %s", out)
    else:
        waiting = handed_bytes(parts, fit.groups, fit.expected)
        check_space(out, waiting + statistics_bytes(parts, options.settings, source.modalities, fit.expected))
        with _sole_writer(out):
            store = SnapshotStore(out, fresh)  # as the last writer left it
            if not store.manifest.complete:
                store.check()
                store.manifest = store.manifest.regrouped(fresh, data.samples)
                cost = _cost(run, store, out) if estimate else None
                _gather(run, store, checkpoint_seconds, progress or (lambda done, total: None))
                if cost is not None:
                    _compare(cost, out)
    statistics = Statistics.open(out)
    if line := described(tokens_by_expert(statistics, parts.linears)):
        _log.info("calibrate: %s", line)
    return statistics


def _absolute(sources: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """Sources of samples with absolute paths: they may be loaded again from another working directory."""
    if isinstance(sources, tuple):
        names = [split_weight(source)[0] for source in sources]
        return tuple(f"{_absolute(name)}{source[len(name) :]}" for name, source in zip(names, sources, strict=True))
    path = None if sources in (None, "builtin") else local_path(str(sources))
    if path is None:
        return sources
    return f"{path.absolute()}{str(sources)[len(split_columns(str(sources))[0]) :]}"


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """The lock of the directory, which the first of the processes of torch.distributed holds for all of them."""
    rank, processes = share()
    with ExitStack() as stack:
        failed: list[Any] = [None]
        if rank == 0:
            try:
                stack.enter_context(writing(out, alone=True))
            except StatisticsError as error:
                failed = [error]
        if processes > 1:
            distributed.broadcast_object_list(failed)
        if failed[0] is not None:
            raise failed[0]
        yield


@dataclass(frozen=True)
class _Run:
    """What all units of a calibration run on, and what earlier ones found."""

    model: PreTrainedModel
    parts: Anatomy
    data: Data
    fit: Fit
    directory: Path
    known: Known = field(default_factory=Known)
    routes: dict[Modality, Route] = field(default_factory=dict)
    relays: dict[str, Relay] = field(default_factory=dict)  # by kind of unit

    def sizes(self, manifest: Manifest, unit: CalibrationUnit) -> tuple[int, int]:
        """Bytes of the sums of one unit in memory and on disk."""
        given = [self.parts.linear(x) for x in manifest.linears(unit)], unit, manifest.output_forms, manifest.settings
        expected = self.fit.expected[unit.modality]
        memory, disk = (total(shares(*given, Sizes(expected, on_disk=on_disk))) for on_disk in (False, True))
        return memory, disk

    def steps(
        self, manifest: Manifest, unit: CalibrationUnit, sums: Sums, after: CalibrationUnit | None = None
    ) -> Iterator[None]:
        """Run the batches of one unit that are this process's share and not in ``sums`` yet; yields after each.

        `after` is the next unit of the same kind.
        """
        settings, (rank, processes), resumed = manifest.settings, share(), sums.batches
        modules = {self.parts.linear(x): self.model.get_submodule(x) for x in manifest.linears(unit)}
        if not unit.gradients:
            only = settings.image_tokens_only and unit.modality == "image"
            route = self.routes.setdefault(unit.modality, Route(self.model, self.parts.linears))
            for number, batch in enumerate(self.data.batches(unit.modality, settings.batch_size)):
                if number >= resumed and number % processes == rank:
                    with all_tokens() if settings.all_experts else nullcontext():
                        run_batch(self.model, modules, batch, sums, image_tokens_only=only, route=route)
                    yield
            return
        blocks = self.parts.blocks() if self.fit.recomputes else ()
        if (relay := self.relays.get(unit.kind)) is not None:
            relay.start(modules, () if after is None else [self.parts.linear(x) for x in manifest.linears(after)])
        how: dict[str, Any] = {
            "fisher": settings.gradients and unit.modality == "text",
            "blocks": {name: self.model.get_submodule(name) for name in blocks},
            "relay": relay,
        }
        samples = labelled_samples(
            self.model,
            self.data,
            unit.modality,
            sampled=settings.labels == "sampled",
            answer_tokens=settings.answer_tokens,
            seed=settings.seed,
            numbers=range(sums.samples or rank, self.data.samples[unit.modality], processes),
            known=self.known,
        )
        apart = False
        for several in together(samples, settings.batch_size):
            apart = apart or not run_gradients(self.model, modules, several, sums, manifest.output_forms, **how)
            if not apart:
                yield
            for sample in several if apart else ():
                run_gradients(self.model, modules, [sample], sums, manifest.output_forms, **how)
                yield


def _ordered(units: Sequence[CalibrationUnit]) -> list[CalibrationUnit]:
    """Gradient passes of a kind from the last linears to the first, in place of the other way round."""
    found: list[CalibrationUnit] = []
    for _, several in groupby(units, key=lambda unit: unit.kind):
        same = [*several]
        found += same[::-1] if same[0].gradients else same
    return found


def _gather(run: _Run, store: SnapshotStore, checkpoint_seconds: float, progress: Callable[[int, int], None]) -> None:
    rank, processes = share()
    manifest, data, device = store.manifest, run.data, run.model.device
    linears = {linear.name: linear for linear in run.parts.linears}
    total = sum(data.samples[unit.modality] for unit in manifest.units)
    finished = {x.name for x in manifest.units if manifest.gathered[x.name].samples == data.samples[x.modality]}
    # Snapshots hold the sums of one process, so that only one alone can continue from them.
    kept = finished if processes > 1 else manifest.gathered.keys()
    done = sum(manifest.gathered[name].samples for name in kept)
    if done:
        _log.info("calibrate: resuming after sample %d of %d", done, total)
    progress(done, total)
    units = _ordered([unit for unit in manifest.units if unit.name not in finished])
    if any(len(groups) > 1 for groups in manifest.groups.values()):
        counts = (f"{len(groups)} passes over {kind}" for kind, groups in manifest.groups.items())
        _log.info("calibrate: %s", ", ".join(counts))
    if processes > 1:
        distributed.barrier()  # all have looked at the directory before one writes to it
    if rank == 0:
        store.save({}, finished=False, complete=not units)  # claims the directory before the first files of moments
    home = device if device.type == "cuda" else torch.device("cpu")
    due = time.monotonic() + checkpoint_seconds
    with prepared(run.model), ExitStack() as relays:
        for unit, after in zip(units, [*units[1:], None], strict=True):  # one at a time: memory is that of one's sums
            after = after if after is not None and after.kind == unit.kind else None
            if unit.gradients and unit.group is not None and unit.kind not in run.relays:
                run.relays[unit.kind] = Relay(run.model, run.parts.linears, run.directory)
                relays.callback(run.relays[unit.kind].close)
            sums = store.restore(unit.name, home) if processes == 1 else Sums(home)
            done -= sums.samples
            for _ in run.steps(manifest, unit, sums, after):
                progress(done + sums.samples, total)
                last = sums.samples == data.samples[unit.modality]  # after which the unit is written anyway
                if processes == 1 and not last and (started := time.monotonic()) >= due:
                    store.save({unit.name: sums}, finished=False, complete=False)
                    took = time.monotonic() - started
                    due = time.monotonic() + max(checkpoint_seconds, took / _SNAPSHOT_SHARE)
            if processes > 1:
                reduce_sums(sums, linears, manifest.output_forms)
            if rank == 0:
                store.save({unit.name: sums}, finished=True, complete=unit == units[-1])
            done += sums.samples
            del sums
            if after is None:
                relays.close()
    if processes > 1:
        distributed.barrier()


def _cost(run: _Run, store: SnapshotStore, out: Path) -> Cost:
    """What is left to gather will take, said; the clock runs from here."""
    device = run.model.device
    with prepared(run.model):
        steps, sizes = partial(run.steps, store.manifest), partial(run.sizes, store.manifest)
        found = foresee(store.manifest, run.data.samples, device, steps, sizes)
    _log.info("calibrate: will take about %s", found)
    forget_peak(device)  # of loading the model, and of the probe
    return Cost(found, time.monotonic, partial(peak_memory, device), partial(written_bytes, out))


def _compare(cost: Cost, out: Path) -> None:
    """Say and keep what the calibration took, beside what it was to take."""
    found = cost.so_far()
    _log.info("calibrate: took %s; estimated were %s", found, cost.estimate)
    write_whole(out / COST_FILE, json.dumps(compared(cost.estimate, found), indent=2).encode())


def _manifest(
    model: PreTrainedModel, parts: Anatomy, data: Data, source: DataPrint, options: CalibrationOptions
) -> tuple[Manifest, Fit]:
    """The manifest of a calibration that has gathered nothing yet, and how it fits the memory."""
    packages = {name: release(name) or "unknown" for name in ("spectrim", "torch", "transformers")}
    settings, model_is = options.settings, model_print(model)  # which brings the weights into memory
    forms = choose_forms(parts.linears, settings.curvature_forms) if settings.curvature else {}
    fit = fitted(model, parts, data, options, forms)
    fresh = Manifest(
        model=model_is,
        data=source,
        settings=settings,
        versions={"python": platform.python_version(), **packages},
        blocks={linear.name: linear.block or "other" for linear in parts.linears},
        forms={name: str(form) for name, form in forms.items()},
        heads={x.name: x.per_head for x in parts.linears if x.name in forms and x.per_head},
        groups=fit.groups,
        gathered={},
    )
    return fresh.model_copy(update={"gathered": {unit.name: Gathered() for unit in fresh.units}}), fit
