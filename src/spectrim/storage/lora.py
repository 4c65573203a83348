"""What of a compressed model LoRA can adapt."""

import logging
from contextlib import suppress

from torch import nn

from spectrim.anatomy import anatomy
from spectrim.errors import ModelError
from spectrim.storage.base import StoredLayer, stored_layers

logger = logging.getLogger(__name__)


def lora_targets(model: nn.Module) -> list[str]:
    """Names of all float factors of `model`, for ``peft.LoraConfig(target_modules=…)``: plain linears, every one.

    These are the linears inside stored layers: a layer of factors ``name`` has ``name.B`` and ``name.A``, or
    ``name.A.0``, ``name.A.1``, … where it is factored head by head.
    Dense linears are not among them, unless all factors are integers, to which PEFT adds nothing: then the linears that
    stayed dense are the targets. Integers that are left out are one line of logging. Raises ModelError if no layer is
    compressed, and if nothing but integers is.
    """
    layers = stored_layers(model)
    stored = [module for module in model.modules() if isinstance(module, StoredLayer)]  # factors, too
    integers = sum(not layer.trained() and len(_stored_in(layer)) == 1 for layer in stored)
    if not layers:
        raise ModelError("the model has no factored layer to adapt; name its linears to PEFT as for any dense model")
    targets = [
        f"{name}.{factor}"
        for name, layer in layers.items()
        for factor, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not targets:
        inside = tuple(f"{name}." for name in layers)
        with suppress(ModelError):  # nothing that stayed dense can be adapted
            targets = [x.name for x in anatomy(model).linears if not x.name.startswith(inside)]
    if not targets:
        what = f"all {integers} matrices are integers" if integers else "no factor is a plain linear"
        raise ModelError(
            f"{what} in the model's compressed layers, to which LoRA cannot be added; dequantize the model first, or "
            "compress it with float factors or with some linears left dense"
        )
    if integers:
        logger.info("LoRA leaves out %d matrices of integers; it adapts %d float matrices", integers, len(targets))
    return targets


def _stored_in(layer: StoredLayer) -> list[nn.Module]:
    return [module for module in layer.modules() if isinstance(module, StoredLayer)]
