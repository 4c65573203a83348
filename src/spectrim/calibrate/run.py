"""Calibration: samples through the model, moments into the statistics directory."""

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from spectrim.anatomy import Anatomy, anatomy
from spectrim.calibrate.data import Data, load_data
from spectrim.calibrate.distributed import reduce_sums, share
from spectrim.calibrate.fingerprint import model_print
from spectrim.calibrate.manifest import DataPrint, Gathered, Manifest, Settings
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.passes import prepared, run_batch
from spectrim.calibrate.positions import image_token
from spectrim.calibrate.snapshot import Store
from spectrim.calibrate.statistics import Statistics
from spectrim.errors import SampleError

_SNAPSHOT_SHARE = 0.1  # of the time at most goes into snapshots


def calibrate(
    model: PreTrainedModel,
    out: Path | str,
    *,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    text: str | None = "builtin",
    images: str | None = "builtin",
    samples: int = 128,
    seqlen: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    instruction: str = "Describe this image.",
    image_tokens_only: bool = False,
    gradients: bool = False,
    checkpoint_seconds: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Gather the moments of every compressible linear from text and from images with an instruction.

    Text and image moments are kept apart. Memory is that of the moments and of one batch. A run that was killed
    continues after its last snapshot and ends with the same bits; a finished one is opened. Under torch.distributed
    every process calls this with the same arguments, takes its share of the batches, and gets the sums of all;
    such a run writes at its end only.

    Args:
        model: on any device, in any floating dtype; left as it was.
        out: the statistics directory.
        processor: the model's processor; for a language model its tokenizer.
        text: text source (see ``load_text``); None for none.
        images: image source (see ``load_images``); None for none. Models without a vision tower take no images, and
            "builtin" means none there.
        samples: of each modality.
        seqlen: tokens of a text sample.
        batch_size: samples that run together at most; with ``gradients``, text samples run one at a time.
        seed: of the choice of samples.
        instruction: of image samples that carry none.
        image_tokens_only: the backbone counts only the positions of image tokens in image samples.
        gradients: gather the gradient statistic of text samples too (see ``GradMoment``).
        checkpoint_seconds: time between snapshots; they are rarer where they would take over a tenth of the time.
        progress: called with samples done and samples in all.

    Raises:
        SampleError: samples are missing, malformed or too few, or do not fit the model.
        ModelError: nothing can be compressed, or the model lacks what an option needs.
        StatisticsError: ``out`` holds something else, or statistics of another model, data or settings.
        NumericalError: NaN or infinity; names the linear and the batch.
    """
    out, parts = Path(out), anatomy(model)
    settings = Settings(
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        seed=seed,
        instruction=instruction,
        image_tokens_only=image_tokens_only,
        gradients=gradients,
    )
    _check(settings, text)
    data = load_data(
        model,
        processor,
        text=text,
        images=images,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        instruction=instruction,
        sees=parts.tower is not None,
    )
    if image_tokens_only:
        if not data.images:
            raise SampleError("image_tokens_only needs image samples; give an image source or leave it out")
        image_token(model)
    source = DataPrint(text=text, images=images if data.images else None, fingerprint=data.fingerprint())
    store = Store(out, _manifest(model, parts, data, source, settings))
    if not store.manifest.complete:
        _gather(model, parts, data, store, checkpoint_seconds, progress or (lambda done, total: None))
    return Statistics.open(out)


def _gather(
    model: PreTrainedModel,
    parts: Anatomy,
    data: Data,
    store: Store,
    checkpoint_seconds: float,
    progress: Callable[[int, int], None],
) -> None:
    rank, processes = share()
    settings = store.manifest.settings
    modules = {linear: model.get_submodule(linear.name) for linear in parts.linears}
    home = _home(model.device, parts, len(data.samples))
    # Snapshots hold the sums of one process, so that only one alone can continue from them.
    sums = store.restore(home) if processes == 1 else {modality: Sums(home) for modality in data.samples}
    total = sum(data.samples.values())
    progress(sum(state.samples for state in sums.values()), total)
    if processes > 1:
        distributed.barrier()  # all have looked at the directory before one writes to it
    if rank == 0:
        store.save(sums, complete=False)  # claims the directory before the first files of moments
    due = time.monotonic() + checkpoint_seconds
    with prepared(model):
        for modality, state in sums.items():
            gradients = settings.gradients and modality == "text"
            resumed = state.batches
            for number, batch in enumerate(data.batches(modality, 1 if gradients else settings.batch_size)):
                if number < resumed or number % processes != rank:
                    continue
                only = settings.image_tokens_only and modality == "image"
                run_batch(model, modules, batch, state, image_tokens_only=only, gradients=gradients)
                progress(sum(state.samples for state in sums.values()), total)
                if processes == 1 and (started := time.monotonic()) >= due:
                    store.save(sums, complete=False)
                    took = time.monotonic() - started
                    due = time.monotonic() + max(checkpoint_seconds, took / _SNAPSHOT_SHARE)
    if processes > 1:
        for state in sums.values():
            reduce_sums(state, {linear.name: linear.in_features for linear in parts.linears})
    if rank == 0:
        store.save(sums, complete=True)
    if processes > 1:
        distributed.barrier()


def _check(settings: Settings, text: str | None) -> None:
    for name in ("samples", "seqlen", "batch_size"):
        if (value := getattr(settings, name)) < 1:
            raise SampleError(f"{name} must be at least 1, not {value}")
    if settings.gradients and (text is None or settings.seqlen < 2):
        raise SampleError("gradients need text in windows of at least 2 tokens; give a text source or leave them out")


def _manifest(model: PreTrainedModel, parts: Anatomy, data: Data, source: DataPrint, settings: Settings) -> Manifest:
    """The manifest of a calibration that has gathered nothing yet."""
    nothing = Gathered(batches=0, samples=0, owners={}, counts={}, fisher=(), files={})
    packages = {name: _version(name) for name in ("spectrim", "torch", "transformers")}
    return Manifest(
        model=model_print(model),
        data=source,
        settings=settings,
        versions={"python": platform.python_version(), **packages},
        blocks={linear.name: linear.block or "other" for linear in parts.linears},
        gathered=dict.fromkeys(data.samples, nothing),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def _home(device: torch.device, parts: Anatomy, modalities: int) -> torch.device:
    """Where the sums are kept: on a CUDA device where they take at most half of its free memory, else on the host."""
    if device.type != "cuda":
        return torch.device("cpu")
    need = modalities * sum(torch.float64.itemsize * linear.in_features**2 for linear in parts.linears)
    return device if need <= torch.cuda.mem_get_info(device)[0] / 2 else torch.device("cpu")
