"""The residual streams of a dense and a compressed model, and what a model holds before and after."""

from functools import partial

import torch

import families
from helpers.matrices import normal
from helpers.samples import processor
from spectrim.calibrate import calibrate
from spectrim.calibrate.data import load_data


def shifted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [6, 10], inputs X of the dense model and X' of a compressed one, [60, 10]."""
    W, X = normal(6, 10, seed=seed), normal(60, 10, seed=seed + 1)
    return W, X, X @ (torch.eye(10, dtype=torch.float64) + 0.3 * normal(10, 10, seed=seed + 2)) + 0.2 * normal(60, 10)


def prepare(family: str, words: str, path, dtype: torch.dtype = torch.float32, samples: int = 12):
    """A model and its statistics."""
    model = families.FAMILIES[family]().to(dtype)
    given = {"processor": processor(family), "text": words, "samples": samples, "seqlen": 16, "batch_size": 4}
    return model, calibrate(model, path, **given, curvature=True)


def batches(model, family: str, words: str, samples: int = 12, take: int | None = None):
    """(modality, inputs) of the calibration."""
    data = load_data(
        model, processor(family), text=words, images="builtin", samples=samples, seqlen=16, seed=0,
        instruction="Describe this image.", sees=family == "llava",
    )  # fmt: skip
    sizes = data.samples
    for modality in sizes:
        seen = 0
        for batch in data.batches(modality, 4):
            if take is None or seen < take:
                inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
                yield modality, inputs
            seen += batch.samples


@torch.no_grad()
def record(model, inputs, names=None) -> dict[str, tuple[torch.Tensor, torch.Tensor, tuple]]:
    """By module, of all or of these names: what it read and gave in one run."""
    found, handles = {}, []

    def after(name, _module, args, kwargs, output):
        x = args[0] if args else next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None)
        found[name] = (x, output[0] if isinstance(output, tuple) else output)

    for name, module in model.named_modules():
        if names is not None and name not in names:
            continue
        handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def stream(found, linear) -> torch.Tensor | None:
    """The residual stream to which a linear of a pre-norm block adds its output; None for other linears."""
    if linear.block is None or linear.role not in ("o", "down", "fc2"):
        return None
    second_norm = "layer_norm2" if "vision" in linear.name else "post_attention_layernorm"
    return found[linear.block if linear.role == "o" else f"{linear.block}.{second_norm}"][0]


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def weights(one) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in one.state_dict().items()}


def assert_same(one, before: dict[str, torch.Tensor]) -> None:
    after = one.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
