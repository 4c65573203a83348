"""Checkpoints of compressed-tensors' own format, which transformers and vLLM load without spectrim.

They hold dense integers on one grid, and dense linears. The tensors are those of spectrim's own format; what differs is
what config.json says: all linears but those in ``ignore`` are on the grid.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from spectrim.checkpoint.names import checkpoint_names, stored_layers
from spectrim.checkpoint.saving import write_described
from spectrim.errors import CheckpointError
from spectrim.experts import layout, unfused
from spectrim.linear import Linear
from spectrim.maths.rounding import Grid, fitting_group
from spectrim.recipe import PLAIN_BITS, Recipe
from spectrim.storage import Spec
from spectrim.storage.packed import scheme

METHOD = "compressed-tensors"


def one_grid(layers: Mapping[str, tuple[str, Spec]]) -> Grid:
    """The grid that all these linears are on; each has a form and its spec.

    Raises CheckpointError where the format has no place for them: for other forms than dense integers, several grids,
    bits that releases of compressed-tensors pack in different ways, rotated inputs, and zero points, for which
    compressed-tensors 0.20 makes no room of the right shape while transformers loads a model.
    """
    grids: dict[Grid, str] = {}
    for name, (form, spec) in layers.items():
        if form != "integers":
            raise CheckpointError(
                f"compressed-tensors holds dense integers alone, and {name!r} has the form '{form}'; set "
                "quantize.format=spectrim, or plan integers for every linear"
            )
        grids.setdefault(Grid(**spec), name)
    if turned := next((name for grid, name in grids.items() if grid.rotated), None):
        raise CheckpointError(
            f"compressed-tensors has no rotated inputs, and {turned!r} has them; plan again with "
            "quantize.rotate=false, or keep quantize.format=spectrim"
        )
    if not grids:
        raise CheckpointError("there are no integers for compressed-tensors to hold; set quantize.format=spectrim")
    if len(grids) > 1:
        (one, first), (other, second) = list(grids.items())[:2]
        raise CheckpointError(
            f"quantize.format=compressed-tensors takes one grid for all linears, and {first!r} has {_said(one)}, "
            f"{second!r} {_said(other)}; set quantize.group to a size that divides the inputs of all, or to null"
        )
    (grid,) = grids
    if grid.bits not in PLAIN_BITS:
        raise CheckpointError(
            f"releases of compressed-tensors pack {grid.bits} bits in different ways; set quantize.bits to "
            f"{', '.join(map(str, PLAIN_BITS))}, or quantize.format=spectrim"
        )
    if not grid.symmetric:
        raise CheckpointError(
            "transformers cannot load compressed-tensors' zero points; set quantize.symmetric=true, or "
            "quantize.format=spectrim"
        )
    return grid


def check_experts(model: nn.Module, integers: Collection[str]) -> None:
    """Raise CheckpointError where experts of a model would stay dense; `integers` are runtime names of linears.

    transformers and vLLM fuse the experts of a layer by one rule for all of them. In transformers 5.24 it is one for
    the whole model, and dense experts beside integers load as random numbers.
    """
    for path, module in model.named_modules():
        dense = [path] if layout(module) is not None else []
        if unfused(module):
            names = (f"{path}.{name}" for name, child in module.named_modules() if isinstance(child, nn.Linear))
            dense = [name for name in names if name not in integers]
        if dense:
            raise CheckpointError(
                f"compressed-tensors loads the experts of a model all in one way, and {dense[0]!r} would stay dense; "
                "compress every expert, or set quantize.format=spectrim"
            )


def check_recipe(recipe: Recipe, model: nn.Module, linears: list[Linear]) -> None:
    """Whether the recipe's integers of these linears are on one grid, with all experts.

    Raises CheckpointError as `one_grid` and `check_experts` do.
    """
    part = recipe.quantize
    assert isinstance(part.bits, int)
    each = [x for x in linears if part.takes(x.role)]
    grids = {x.name: Grid(part.bits, fitting_group(x.in_features, part.group), part.symmetric) for x in each}
    one_grid({name: ("integers", grid.spec) for name, grid in grids.items()})
    check_experts(model, grids.keys())


def save_plain(model: PreTrainedModel, directory: Path, **options: Any) -> None:
    """Write config and tensors of a model whose compressed layers are on one grid; `options` of save_pretrained.

    Raises CheckpointError as `one_grid` does.
    """
    write_described(model, directory, plain_config(model), **options)


def plain_config(model: PreTrainedModel) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors (JSON types).

    Raises CheckpointError as `one_grid` and `check_experts` do.
    """
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    grid = one_grid({name: (layer.form, layer.spec) for name, layer in stored_layers(model).items()})
    check_experts(model, ())  # those in integers are no linears of torch any more
    # transformers asks by names at run time, vLLM by those of the file.
    saved = checkpoint_names(model)
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = QuantizationConfig(
        config_groups={"group_0": scheme(grid, ["Linear"])},
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=sorted({*dense, *(saved.get(name, name) for name in dense)}),
    )
    return dict(config.model_dump(mode="json", exclude_none=True))


def _said(grid: Grid) -> str:
    scales = "one scale by output" if grid.group is None else f"groups of {grid.group}"
    return f"{grid.bits} bits in {scales}" + ", asymmetric" * (not grid.symmetric)
