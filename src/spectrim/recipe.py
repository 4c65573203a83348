"""Recipes: which metric, which allocation, which storage, which compensation. Frozen, versioned, readable from YAML.

The built-in ones are in recipes/.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spectrim.errors import RecipeError
from spectrim.files import parse_yaml, user_path
from spectrim.linear import PLACES, Place


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)  # true is no number, and "4" is none


class MetricPart(_Part):
    """The metrics in which the error of a layer is measured.

    Kinds: ``identity`` (plain SVD), ``fisher-rows`` (FWSVD), ``activation-diagonal`` (ASVD; ``alpha``), ``whitening``
    (SVD-LLM, JW-SVD) and ``curvature`` (LASER: whitening, with output gradients as the output metric). ``modality``
    says whose samples count, ``gamma`` weighs image against text in the joint input moment and ``beta`` in the joint
    output moment, and ``unreached`` is the metric of linears that the modality never reaches, such as the vision tower
    under text: the identity, or image moments.

    Of ``curvature``: ``damping`` δ adds δ·tr(G)/out to the diagonal of G; ``eta`` is the trace-ratio correction of
    predicted losses, by token, by sequence or none; ``image_price`` is what a nat of image loss counts, in nats of
    text, where predicted losses of linears are compared; ``per_head`` factors q, k and v head by head.
    """

    kind: Literal["identity", "fisher-rows", "activation-diagonal", "whitening", "curvature"]
    modality: Literal["text", "image", "joint"] = "text"
    gamma: float = Field(1.0, gt=0, allow_inf_nan=False)
    beta: float = Field(1.0, gt=0, allow_inf_nan=False)
    image_price: float = Field(1.0, gt=0, allow_inf_nan=False)
    alpha: float = Field(0.5, ge=0, allow_inf_nan=False)
    damping: float = Field(0.01, gt=0, allow_inf_nan=False)
    eta: Literal["none", "token", "sequence"] = "none"
    per_head: bool = False
    unreached: Literal["identity", "image"] = "identity"


class AllocationPart(_Part):
    """How the byte budget is shared.

    Rules: ``uniform`` (one retention for all), ``global-sigma`` (one threshold on raw singular values under moments
    that are sums over all positions, JW-SVD as written), ``global-sigma-mean`` (the same under means, so that the
    number of samples does not count), ``global-energy`` (one threshold on each layer's relative energy per parameter),
    ``sensitivity`` (ASVD: one threshold on the loss that each layer causes alone), ``adacr`` (AdaSVD: each block's
    retention follows its importance) and ``loss-aware`` (LASER: one threshold on the predicted loss per byte, which the
    metric ``curvature`` gives). Places that are not listed stay dense and count at their full size.

    Of ``adacr``: ``importance`` is the cosine between what a block reads and what it gives, or one minus it, and
    ``floor`` is the retention that importance does not touch, the paper's minimal retention ratio.
    """

    rule: Literal[
        "uniform", "global-sigma", "global-sigma-mean", "global-energy", "sensitivity", "adacr", "loss-aware"
    ] = "uniform"
    importance: Literal["cos", "1-cos"] = "cos"
    floor: float = Field(default=0.0, ge=0, lt=1)
    places: tuple[Place, ...] = Field(default=PLACES, min_length=1, strict=False)  # files have lists


class StoragePart(_Part):
    """How factors are stored; the model computes the same.

    ``pivoted`` keeps rank k in k (in + out − k) numbers and k indices instead of k (in + out) numbers, wherever that is
    smaller; linears that are factored head by head stay as they are. Ranks are multiples of ``multiple``, which some
    hardware is faster with; by head they are not rounded.
    """

    pivoted: bool = False
    multiple: int = Field(default=1, ge=1)


class CompensatePart(_Part):
    """Whether factors answer to what the compressed layers before them do.

    Kind ``anchored``: block by block, each weight is first moved to the least-squares map from the inputs that the
    compressed prefix produces to the outputs of the dense model, then factored. With ``residual``, a matrix whose
    output is added to a residual stream also makes up for what the prefix did to that stream. ``damping`` δ holds the
    map to the dense weight by δ·tr/in on the diagonal.

    Kind ``adacomp``: the same walk, but the factors of the recipe without compensation are fitted in turn to that map,
    ``rounds`` times each.

    Of both: ``weight`` is the share of the compressed model's inputs in the fit, the rest is that of the dense inputs;
    ``samples`` limits how many calibration samples of each modality run through both models (None for all),
    ``buckets`` averages them in so many groups before anything is summed (stack-of-batch; None sums all), and
    ``refine`` is how many steps of Adam then bring each block nearer to the dense one.
    """

    kind: Literal["none", "anchored", "adacomp"] = "none"
    residual: bool = True
    weight: float = Field(default=0.3, ge=0, le=1)
    damping: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    samples: int | None = Field(default=None, ge=1)
    refine: int = Field(default=0, ge=0)
    rounds: int = Field(default=1, ge=1)
    buckets: int | None = Field(default=None, ge=1)


class QuantizePart(_Part):
    """Whether weights are stored as integers.

    ``bits``: None for none; 2, 3, 4 or 8 for all factors, and for what would stay dense; ``auto`` lets the allocation
    choose for every linear among dense and integer weights, factors, integer factors, and both together. ``group``
    inputs share a scale, all inputs of an output where it is None or does not divide them; ``symmetric`` grids have no
    zero points. ``method`` gptq feeds rounding errors on in the recipe's metric, rtn rounds to nearest.
    ``damping`` is the share of the mean of each metric's diagonal that is added to it there: more keeps errors away
    from what the samples do not show. ``roles`` says which linears may hold integers.
    """

    bits: Literal[2, 3, 4, 8, "auto"] | None = None
    group: Literal[32, 64, 128] | None = 128
    symmetric: bool = True
    method: Literal["gptq", "rtn"] = "gptq"
    damping: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    roles: Literal["all", "feed-forward"] = "all"

    @property
    def feedback(self) -> float | None:
        """The damping of the metrics in which errors are fed on; None where entries are rounded to nearest."""
        return self.damping if self.method == "gptq" else None


class Recipe(_Part):
    """A compression method by name. ``summary`` and ``paper`` are what `spectrim recipes` prints."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")
    summary: str
    paper: str
    metric: MetricPart
    allocation: AllocationPart = AllocationPart()
    storage: StoragePart = StoragePart()
    compensate: CompensatePart = CompensatePart()
    quantize: QuantizePart = QuantizePart()

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration must come first."""
        return self.metric.kind != "identity" or self.needs_samples

    @property
    def needs_samples(self) -> bool:
        """Whether the samples of the calibration are run through the model again."""
        return self.allocation.rule in ("sensitivity", "adacr") or self.compensate.kind != "none"

    @property
    def needs_gradients(self) -> bool:
        """Whether that calibration must gather gradients of weights."""
        return self.metric.kind == "fisher-rows"

    @property
    def needs_curvature(self) -> bool:
        """Whether that calibration must gather moments of output gradients."""
        return self.metric.kind == "curvature"

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.allocation.rule == "loss-aware" and self.metric.kind != "curvature":
            raise ValueError("allocation 'loss-aware' needs predicted losses; set metric.kind=curvature")
        if self.quantize.bits is not None and self.compensate.kind == "adacomp":
            raise ValueError("adaComp fits factors that are no integers; set compensate.kind=anchored or none")
        return self

    @classmethod
    def read(cls, source: "str | Path | Recipe", changes: dict[str, Any] | None = None) -> "Recipe":
        """A recipe by built-in name or from a YAML file, with single values changed.

        `changes` maps dotted keys to values: ``{"metric.gamma": 0.5}``.

        Raises:
            RecipeError: there is no such recipe, it is not YAML, or a key or value is not one that recipes have.
        """
        if isinstance(source, Recipe):
            content, where = source.model_dump(mode="json"), f"recipe '{source.name}'"
        else:
            path = _path(source)
            where = f"recipe '{source}'"
            try:
                content = parse_yaml(path.read_bytes())
            except (OSError, ValueError) as error:
                raise RecipeError(f"{where} cannot be read ({error}); correct the file") from error
        if not isinstance(content, dict):
            raise RecipeError(f"{where} is not a table of keys and values; see the built-in recipes for the form")
        for key, value in (changes or {}).items():
            if whole := next((other for other in changes or {} if key.startswith(f"{other}.")), None):
                raise RecipeError(f"recipe keys '{whole}' and '{key}' set one value twice; give one of them")
            *parents, last = key.split(".")
            part = content
            for name in parents:
                inner = part.get(name, {})
                if not isinstance(inner, dict):
                    raise RecipeError(f"recipe key '{key}' leads nowhere; write it as in metric.gamma")
                part[name] = dict(inner)  # a file may use one table in two places
                part = part[name]
            part[last] = value
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:  # keys that contradict each other; the message has the remedy
                raise RecipeError(f"{where}: {said}") from error
            at = ".".join(map(str, first["loc"]))
            raise RecipeError(f"{where}: key '{at}': {said}; docs/recipes.md lists the keys") from error


def _path(source: str | Path) -> Path:
    """A YAML file as it is named, or the file of a built-in recipe."""
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        return user_path(source)
    if str(source) not in builtin_names():
        raise RecipeError(
            f"there is no recipe '{source}'; choose from {', '.join(builtin_names())} or name a .yaml file"
        )
    return Path(str(files("spectrim").joinpath("recipes", f"{source}.yaml")))


def builtin_names() -> tuple[str, ...]:
    """Names of the built-in recipes, sorted."""
    found = files("spectrim").joinpath("recipes").iterdir()
    return tuple(sorted(path.name.removesuffix(".yaml") for path in found if path.name.endswith(".yaml")))
