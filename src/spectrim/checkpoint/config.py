"""``quantization_config`` of a compressed checkpoint (docs/architecture.md has an example).

``config.json`` of such a checkpoint carries::

    "quantization_config": {"quant_method": "spectrim", "version": 1, "spectrim_version": "…", "ranks": {name: rank},
                            "pivoted": [name, …], "inner": …, "rotated": [target, …], "forms": {name: {"form": …, …}}}

with the checkpoint names of the compressed linears. Tensors of a linear in `ranks` are ``name.A.weight`` [out, rank],
``name.B.weight`` [rank, in] and, if the layer has one, ``name.bias`` [out]. A linear whose H heads are factored one by
one has a list of H ranks; its tensors are ``name.A.0.weight`` [out / H, rank[0]], ``name.A.1.weight``, …, and one
``name.B.weight`` [sum(rank), in]. A linear in the list ``pivoted`` has ``name.B.weight`` [rank, in], ``name.A.weight``
[out - rank, rank] and ``name.pivots``, int32 [rank]: B holds those rows of the weight, A the coefficients of all other
rows, ascending.

Where weights are integers, ``inner`` is a compressed-tensors config of the format ``pack-quantized`` whose targets are
the checkpoint names of all integer linears, one by one: dense ones (``name``), factors (``name.A``, ``name.B``,
``name.A.0``) and what is added to a product of factors (``name.R``, [out, in]). In place of ``weight`` these have
``weight_packed``, ``weight_scale``, ``weight_shape`` and, where asymmetric, ``weight_zero_point``. Those of them in
the list ``rotated`` multiply rotated inputs (``maths.rotation``), so that compressed-tensors alone cannot run them.

Linears in any other form stand in ``forms``, each with the name of the form and its spec; their tensors are those that
the form stores.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from packaging.version import InvalidVersion, Version
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectrim.checkpoint.names import shortened
from spectrim.errors import CheckpointError
from spectrim.maths.decompose import Rank
from spectrim.maths.rounding import Grid
from spectrim.storage import Spec
from spectrim.storage.packed import inner_config, inner_grids
from spectrim.storage.runtime import RUNTIMES
from spectrim.versions import release

METHOD = "spectrim"
# `latent_cache` as the arguments of `use_latent_cache` after the model; None for the ordinary cache.
LATENT_CACHES: Mapping[bool | str, tuple[str | None, bool] | None] = {
    False: None,
    True: (None, False),
    "int8": ("int8", False),
    "folded": (None, True),
    "int8-folded": ("int8", True),
}
VERSION = 1
_FACTORED = ("low-rank", "integer-factors", "integers+factors")  # forms that `ranks` stands for
_INTEGERS = "integers"  # and the one that `inner` alone stands for


def latent_options(asked: bool | str) -> tuple[str | None, bool] | None:
    """One of LATENT_CACHES. Raises CheckpointError for what is none."""
    if not isinstance(asked, bool | str) or asked not in LATENT_CACHES:
        raise CheckpointError(
            f"there is no latent_cache {asked!r}; choose true, false, 'int8', 'folded' or 'int8-folded'"
        )
    return LATENT_CACHES[asked]


@register_quantization_config(METHOD)
class SpectrimConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint with factored linears.

    `ranks` maps checkpoint names of linears, without ``.weight``, to ranks, or lists of ranks by head; `pivoted` names
    those of them that are stored by pivots; `inner` is the compressed-tensors config of the integer weights, None where
    there are none, and `rotated` names those of its targets whose inputs are rotated; `forms` maps the names of linears
    in any other form to ``{"form": its name, …its spec}``; `runtime` says how layers run once they are loaded (see
    ``storage.runtime``), `latent_cache` whether every ``generate`` keeps latents in place of keys and values (see
    `LATENT_CACHES`); `spectrim_version` is the release that wrote the checkpoint. Raises CheckpointError for another
    format version, unknown entries, impossible ranks, pivots without a rank, an inner config of another kind, and forms
    without names.
    """

    def __init__(
        self,
        ranks: Mapping[str, int | Sequence[int]] | None = None,
        pivoted: Sequence[str] = (),
        version: int = VERSION,
        spectrim_version: str | None = None,
        quant_method: str = METHOD,
        inner: Mapping[str, Any] | None = None,
        forms: Mapping[str, Mapping[str, Any]] | None = None,
        rotated: Sequence[str] = (),
        runtime: str = "auto",
        latent_cache: bool | str = False,
        **unknown: Any,
    ) -> None:
        if version != VERSION:
            wrote = "--upgrade spectrim"
            with suppress(InvalidVersion, TypeError):  # somebody's file, of which nothing else gets into a shell line
                wrote = f"'spectrim>={Version(spectrim_version or '')}'"
            raise CheckpointError(
                f"the checkpoint has format version {version!r} and this spectrim reads version {VERSION}; install the "
                f"release that wrote it: pip install {wrote}"
            )
        if unknown:
            raise CheckpointError(f"quantization_config has unknown entries: {shortened(sorted(unknown))}; remove them")
        if not isinstance(ranks, Mapping) or not (ranks or inner or forms):
            raise CheckpointError("quantization_config has no ranks; copy the checkpoint's config.json again")
        checked: dict[str, Rank] = {}
        for name, rank in ranks.items():
            each = tuple(rank) if isinstance(rank, list | tuple) else (rank,)
            if not each or any(type(k) is not int or k < 1 for k in each):
                raise CheckpointError(f"quantization_config gives {name!r} the rank {rank!r}; ranks are whole and ≥ 1")
            checked[name] = rank if isinstance(rank, int) else each
        if not isinstance(pivoted, list | tuple) or not all(isinstance(name, str) for name in pivoted):
            raise CheckpointError("quantization_config has pivots that are no list of names; copy config.json again")
        if repeated := sorted({name for name in pivoted if pivoted.count(name) > 1}):
            raise CheckpointError(f"quantization_config names {shortened(repeated)} as pivoted twice; copy it again")
        if strange := sorted(name for name in pivoted if not isinstance(checked.get(name), int)):
            raise CheckpointError(
                f"quantization_config names {shortened(strange)} as pivoted, without one rank for the whole layer; "
                "copy the checkpoint's config.json again"
            )
        if inner is not None and not isinstance(inner, Mapping):
            raise CheckpointError("quantization_config has an inner config that is no object; copy config.json again")
        entries = {} if forms is None else forms
        if not isinstance(entries, Mapping) or not all(
            isinstance(entry, Mapping) and isinstance(entry.get("form"), str) for entry in entries.values()
        ):
            raise CheckpointError("quantization_config has forms without names; copy config.json again")
        if repeated := sorted(entries.keys() & checked.keys()):
            raise CheckpointError(f"quantization_config gives {shortened(repeated)} a rank and a form; copy it again")
        self.quant_method: Any = quant_method
        self.version = version
        self.spectrim_version = spectrim_version or release()
        self.ranks = checked
        self.pivoted = sorted(pivoted)
        self.inner = None if inner is None else dict(inner)
        if not isinstance(rotated, list | tuple) or not all(isinstance(name, str) for name in rotated):
            raise CheckpointError("quantization_config has rotations that are no list of names; copy config.json again")
        self.rotated = sorted(rotated)
        self.forms = {name: dict(entry) for name, entry in entries.items()}
        if runtime not in RUNTIMES:
            raise CheckpointError(f"quantization_config has the runtime {runtime!r}; set one of {', '.join(RUNTIMES)}")
        self.runtime = runtime
        latent_options(latent_cache)
        self.latent_cache = latent_cache

    @classmethod
    def of(cls, layers: Mapping[str, tuple[str, Spec]]) -> "SpectrimConfig":
        """The config of linears by checkpoint name, each in a form with its spec; the inverse of `layers`."""
        ranks: dict[str, Rank] = {}
        grids: dict[str, Grid] = {}
        forms: dict[str, Any] = {}
        for name, (form, spec) in layers.items():
            if form in _FACTORED:
                ranks[name] = spec["rank"]
                grids |= {f"{name}.{part}": Grid(**grid) for part, grid in spec.get("grids", {}).items()}
            elif form == _INTEGERS:
                grids[name] = Grid(**spec)
            else:
                forms[name] = {"form": form, **spec}
        pivoted = [name for name, (_, spec) in layers.items() if name in ranks and spec.get("pivoted")]
        rotated = [name for name, grid in grids.items() if grid.rotated]
        return cls(ranks, pivoted, inner=inner_config(grids) if grids else None, forms=forms, rotated=rotated)

    def layers(self) -> dict[str, tuple[str, Spec]]:
        """Form and spec of every compressed linear by its checkpoint name.

        Raises CheckpointError for an inner config that holds anything else than packed integer weights.
        """
        grids, pivoted, found = self.grids(), set(self.pivoted), dict[str, tuple[str, Spec]]()
        for name, rank in self.ranks.items():
            spec: dict[str, Any] = {"rank": rank}
            if parts := grids.pop(name, {}):
                spec["grids"] = {part: grid.spec for part, grid in parts.items()}
            if not parts or name in pivoted:
                spec["pivoted"] = name in pivoted
            form = "integers+factors" if "R" in parts else "integer-factors" if "B" in parts else "low-rank"
            found[name] = (form, spec)
        found |= {name: (_INTEGERS, parts[""].spec) for name, parts in grids.items()}
        for name, entry in self.forms.items():
            found[name] = (entry["form"], {key: value for key, value in entry.items() if key != "form"})
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON types; as older releases wrote it, without `forms`, `rotated` and what else says nothing."""
        content: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        silent = {"forms": {}, "rotated": [], "runtime": "auto", "latent_cache": False}
        return {key: value for key, value in content.items() if key not in silent or value != silent[key]}

    def grids(self) -> dict[str, dict[str, Grid]]:
        """Grids of the integers by linear and part: ``""`` for a dense weight, ``A``, ``A.0``, ``B`` or ``R``.

        Raises CheckpointError for an inner config that holds anything else than packed integer weights, and for
        rotations of others.
        """
        found: dict[str, dict[str, Grid]] = {}
        inner = {} if self.inner is None else inner_grids(self.inner)
        if strange := sorted(set(self.rotated) - inner.keys()):
            raise CheckpointError(
                f"quantization_config rotates inputs of {shortened(strange)}, which are no integers of it; copy the "
                "checkpoint's config.json again"
            )
        for target, grid in inner.items():
            path = target.split(".")
            owners = (".".join(path[:-1]), ".".join(path[:-2]))
            owner = next((name for name in owners if name in self.ranks), target)
            part = target.removeprefix(owner).removeprefix(".")
            found.setdefault(owner, {})[part] = replace(grid, rotated=target in self.rotated)
        return found
