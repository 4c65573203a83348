"""Integer weights on a GPU, in float16 and bfloat16: the products of humming-kernels, and unpacking in one pass.

humming reads the words and zero points of compressed-tensors' format ``pack-quantized`` and lays them out anew for the
tensor cores of the device; its layout cannot be read back, so whoever drops the words has to keep a copy elsewhere.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("spectrim")

BITS = (2, 3, 4, 8)
GROUPS = (None, 32, 64, 128)
_OUTPUTS, _INPUTS = 128, 128  # humming pads a weight to multiples of these, which its faster kernels ask for
HELD = ("codes", "scales", "zeros", "locks")  # the tensors of a `Layout`
_GROUPED = '{"gemm_type": "grouped_contiguous"}'  # humming's name for a product of several weights, one after another
_TOLERANCE = 0.02  # of a product against that of the unpacked weight, relative; bfloat16 rounds to 0.004


@dataclass(frozen=True)
class Layout:
    """What `product` takes: humming's description of the layer, and its tensors on the device."""

    config: Any
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    locks: torch.Tensor


def takes(scale: torch.Tensor) -> bool:
    """Whether a weight with these scales could run on integers here: on a CUDA device, in a dtype of 16 bits."""
    return scale.is_cuda and scale.dtype in (torch.float16, torch.bfloat16)


def misfit(out: int, size: int, bits: int, group: int | None) -> str | None:
    """What humming cannot do with a weight [out, in] on a grid, in words; None where it fits."""
    if bits not in BITS:
        return f"{bits} bits"
    if group not in GROUPS:
        return f"groups of {group}"
    if out % 32 or size % 32:  # its words of weights and of zero points are whole
        return "outputs or inputs in no multiples of 32"
    return None


def prepare(
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: tuple[int, int | None],
    shape: tuple[int, int],
    dense: Callable[[], torch.Tensor],
) -> Layout | None:
    """humming's layout of a weight, or None where it cannot run; why not is logged, once for each kind of reason.

    The layout multiplies two random rows before it is handed out: that compiles the kernel when the model is loaded,
    not at the first token, and a layout whose product is not that of the weight is refused.

    Args:
        words: int32 [out, in · bits / 32].
        scale: [out, groups], float16 or bfloat16.
        zero: packed zero points, int32 [out · bits / 32, groups]; None where all are zero.
        grid: bits, and the size of the groups or None.
        shape: outputs and inputs.
        dense: gives the weight [out, in].
    """
    kind = reason = misfit(*shape, *grid)
    if reason is None:
        layouts: list[Layout] = []

        def products() -> tuple[torch.Tensor, torch.Tensor]:
            layouts.append(layout := humming_layout(words, scale, zero, grid, shape))
            x = random_rows(2, shape[1], scale)
            return product(x, layout), x.float() @ dense().float().T

        fault = fault_of(products)
        if fault is None:
            return layouts[0]
        kind, reason = fault
    named = f"{grid[0]} bits of {shape[0]} × {shape[1]}: {reason}"
    say_once(str(kind), f"some integers are unpacked in every pass, since humming-kernels cannot run them ({named})")
    return None


def random_rows(count: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Inputs [count, size] to try a product with, the same every time; loading leaves the user's generator alone."""
    numbers = torch.Generator(like.device).manual_seed(0)
    return torch.randn(count, size, dtype=like.dtype, device=like.device, generator=numbers)


def fault_of(products: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[str, str] | None:
    """What keeps a product from being used, as a kind and in words: it fails, or is not the second of `products`."""
    try:
        found, truth = (y.float() for y in products())
    except Exception as failed:  # no package, no compiler, a shape that it asserts away: all have the same remedy
        return type(failed).__name__, f"{type(failed).__name__}: {failed}".splitlines()[0]
    error = (found - truth).norm() / truth.norm().clamp_min(1e-30)
    return None if error < _TOLERANCE else ("product", f"its product is off by {float(error):.2g}")


def humming_layout(
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    grid: tuple[int, int | None],
    shape: tuple[int, int],
) -> Layout:
    """The layout, of arguments as `prepare` has them. Raises ImportError without humming, and what humming raises."""
    from humming.transform import prepare_and_transform_humming_tensors

    (out, size), device = shape, scale.device
    schema = humming_schema(grid, symmetric=zero is None)
    source = {"weight_packed": words.contiguous(), "weight_scale": scale.contiguous()}
    if zero is not None:
        source["weight_zero_point"] = zero.contiguous()
    schema, tensors = schema.convert_humming(source, [out], [size], scale.dtype, device=device)
    config, tensors = prepare_and_transform_humming_tensors(
        tensors,
        out,
        size,
        schema,
        pad_n_to_multiple=_OUTPUTS,
        pad_k_to_multiple=_INPUTS,
        torch_dtype=scale.dtype,
        device=device,
    )
    # Counters of programs that add to one tile, as many as humming's own layer has. They are zero again after every
    # product; a layer has its own, since products on two streams must not share them.
    locks = torch.zeros(2048, dtype=torch.int32, device=device)
    return Layout(config, tensors["weight"], tensors["weight_scale"], tensors.get("zero_point"), locks)


def humming_schema(grid: tuple[int, int | None], symmetric: bool) -> Any:
    """humming's name for a grid of compressed-tensors."""
    from humming.schema import CompressedTensorsWeightSchema

    bits, group = grid
    return CompressedTensorsWeightSchema(
        format="pack-quantized",
        type="int",
        num_bits=bits,
        strategy="channel" if group is None else "group",
        group_size=group,
        symmetric=symmetric,
    )


def product(x: torch.Tensor, layout: Layout, starts: torch.Tensor | None = None) -> torch.Tensor:
    """``x Wᵀ`` of x [rows, in] in the dtype of the scales, [rows, out]; any number of rows.

    With n weights side by side (`grouped.group`), `starts`, int32 [n + 1], says where the rows of each begin and end.
    """
    from humming.forward import humming_forward

    several = {} if starts is None else {"expert_layout": starts, "compute_config": _GROUPED}
    y: torch.Tensor = humming_forward(
        layout.config,
        inputs=x.contiguous(),
        weight=layout.codes,
        weight_scale=layout.scales,
        zero_point=layout.zeros,
        locks=layout.locks,
        **several,
    )
    return y


def latent_kernels() -> ModuleType | None:
    """`latent_decode_triton`; None without triton, which is logged."""
    try:
        from spectrim.kernels import latent_decode_triton
    except ImportError:
        say_once("latents", "a latent cache on the GPU runs in torch's own kernels, since there is no triton")
        return None
    return latent_decode_triton


def unpacked(
    words: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, bits: int, size: int
) -> torch.Tensor | None:
    """The weight [out, in] by one kernel, as `unpack_triton.unpack_weight`; None without triton, which is logged."""
    try:
        from spectrim.kernels.unpack_triton import unpack_weight
    except ImportError:
        say_once("unpack", "integers on the GPU are unpacked in several passes over memory, since there is no triton")
        return None
    return unpack_weight(words, scale, zeros, bits, size)


def say_once(kind: str, text: str) -> None:
    """Log a line, the first of its kind."""
    if kind not in _SAID:
        _SAID.add(kind)
        logger.warning(text)


_SAID: set[str] = set()
