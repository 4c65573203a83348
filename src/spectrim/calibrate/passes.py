"""One batch through a model, and the state that the model is put into for it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.calibrate.data import load_data
from spectrim.calibrate.hooks import Watch
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.positions import positions
from spectrim.calibrate.route import Route
from spectrim.calibrate.statistics import Statistics
from spectrim.errors import SpectrimError
from spectrim.linear import Linear
from spectrim.samples import Batch
from spectrim.trace import few_tokens


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode with frozen parameters, and products in full float32; everything restored after."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    precision = torch.get_float32_matmul_precision()
    try:
        model.eval()
        model.requires_grad_(False)
        torch.set_float32_matmul_precision("highest")
        with torch.inference_mode(False), torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """The inputs of a batch on the model's device, images in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.inputs.items()
    }


def forward_options(model: PreTrainedModel) -> dict[str, int]:
    """Arguments of a forward pass of which only the linears matter."""
    options: dict[str, int] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # spares the product with the vocabulary
    return options


def run_batch(
    model: PreTrainedModel,
    modules: Mapping[Linear, nn.Module],
    batch: Batch,
    sums: Sums,
    *,
    image_tokens_only: bool = False,
    route: Route | None = None,
) -> None:
    """Run a batch through a :func:`prepared` model and add what its linears read to ``sums``.

    Args:
        model: on any device.
        modules: the linears to watch.
        batch: of any size.
        sums: of the batch's modality.
        image_tokens_only: the backbone counts only positions of image tokens.
        route: that of the batch's modality; the pass then ends behind the last of these linears.

    Raises:
        NumericalError: NaN or infinity; names the linear and the batch.
    """
    inputs = model_inputs(model, batch)
    counted = positions(model, inputs, image_tokens_only=image_tokens_only)
    way = nullcontext() if route is None else route.followed(modules)
    with torch.no_grad(), Watch(modules, sums, counted) as watch, way:
        model(**inputs, **forward_options(model))
    watch.finish(f"{batch.modality} batch {sums.batches + 1}")
    sums.batches += 1
    sums.samples += batch.samples


def short_samples(
    model: PreTrainedModel, processor: Any, statistics: Statistics | None, *, sees: bool
) -> list[dict[str, torch.Tensor]]:
    """Inputs of one short sample of each modality of the statistics; tokens alone where no samples are at hand."""
    if statistics is not None and processor is not None:
        source, settings = statistics.manifest.data, statistics.manifest.settings
        options: dict[str, Any] = {"text": source.text, "images": source.images, "seed": settings.seed}
        options |= {"samples": 1, "seqlen": min(settings.seqlen, 32), "instruction": settings.instruction}
        try:
            data = load_data(model, processor, sees=sees, **options)
            batches = [next(data.batches(modality, 1)) for modality in data.samples]
        except SpectrimError:  # they may be gone since
            batches = []
        if batches:
            return [model_inputs(model, batch) for batch in batches]
    return [few_tokens(model, 5)]
