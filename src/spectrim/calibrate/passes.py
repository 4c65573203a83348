"""One batch through a model, and the state that the model is put into for it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from spectrim.anatomy import Linear
from spectrim.calibrate.hooks import Watch
from spectrim.calibrate.moments import Sums, wide
from spectrim.calibrate.positions import positions
from spectrim.errors import ModelError
from spectrim.samples import Batch


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


def run_batch(
    model: PreTrainedModel,
    modules: Mapping[Linear, nn.Module],
    batch: Batch,
    sums: Sums,
    *,
    image_tokens_only: bool = False,
    gradients: bool = False,
) -> None:
    """Run a batch through a :func:`prepared` model and add what its linears read to ``sums``.

    Args:
        model: on any device.
        modules: the linears to watch.
        batch: with ``gradients``, one text sample.
        sums: of the batch's modality.
        image_tokens_only: the backbone counts only positions of image tokens.
        gradients: gather weight gradients of the mean next-token cross-entropy as well.

    Raises:
        ModelError: ``gradients`` with a model that returns no logits.
        NumericalError: NaN or infinity; names the linear and the batch.
    """
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.inputs.items()
    }
    counted = positions(model, inputs, image_tokens_only=image_tokens_only)
    options: dict[str, int] = {"use_cache": False}
    if not gradients and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # spares the product with the vocabulary
    ids = inputs["input_ids"]
    scale = 1 / (ids.shape[1] - 1) if gradients else None
    with torch.set_grad_enabled(gradients), Watch(modules, sums, counted, gradient_scale=scale) as watch:
        output = model(**inputs, **options)
        if gradients:
            if getattr(output, "logits", None) is None:
                raise ModelError(
                    f"{type(model).__name__} returns no logits; gradients need a model with a language head"
                )
            # The sum, scaled to the mean afterwards: gradients of a mean would underflow in float16.
            functional.cross_entropy(wide(output.logits[0, :-1]), ids[0, 1:], reduction="sum").backward()
    watch.finish(f"{batch.modality} batch {sums.batches + 1}")
    sums.batches += 1
    sums.samples += batch.samples
