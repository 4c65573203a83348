"""Recipes: which metric, which allocation, which storage, which compensation. Frozen, versioned, readable from YAML.

The built-in ones are in recipes/.
"""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from spectrim.errors import RecipeError
from spectrim.files import parse_yaml, user_path
from spectrim.linear import PLACES, Linear, Place

Format = Literal["spectrim", "compressed-tensors"]
PLAIN_BITS = (2, 4, 8)  # of the second; its releases pack 3 bits in different ways
FEED_FORWARD = ("gate", "up", "down", "gate_up", "fc1", "fc2")


# Dampening of the error feedback: with many positions, for each input by position, and with few
# (benchmarks/left_out.py; docs/results.md, "Dampening of the feedback").
_LEAST_DAMPING, _DAMPING_BY_NOISE, _MOST_DAMPING = 0.01, 0.2, 0.1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)  # true is no number, and "4" is none


class MetricPart(_Part):
    """The metrics in which the error of a layer is measured.

    Kinds: ``identity`` (plain SVD), ``fisher-rows`` (FWSVD), ``activation-diagonal`` (ASVD; ``alpha`` is its exponent),
    ``whitening`` (SVD-LLM, JW-SVD: the second moment of the inputs) and ``curvature`` (LASER: the same, with the second
    moment G of the output gradients as the output metric). ``modality`` says which samples the moments are of.
    ``gamma`` is the weight of images in the joint input moment, ``beta`` that in the joint output moment. ``unreached``
    is the metric of linears that only the other modality reaches, such as the vision tower with text: the identity, or
    image moments.

    For ``curvature`` alone: the dampening ``damping`` δ adds δ·tr(G)/out to the diagonal of G. ``eta`` is the
    trace-ratio correction of predicted losses, by token, by sequence or none. ``image_price`` is the factor of image
    losses, relative to text losses, where the allocation compares predicted losses. ``per_head`` factors q, k and v
    head by head.
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

    Rules: ``uniform`` (one retention for all linears), ``global-sigma`` (one threshold for raw singular values, with
    moments that are sums over all positions, JW-SVD as written), ``global-sigma-mean`` (the same with means, so that
    the number of samples has no effect), ``global-energy`` (one threshold for the relative energy per byte),
    ``sensitivity`` (ASVD: one threshold for the loss that is measured while a single linear is truncated), ``adacr``
    (AdaSVD: the retention of a block follows its importance) and ``loss-aware`` (LASER: one threshold for the predicted
    loss per byte; needs the metric ``curvature``). ``places`` are the parts of the model that may be compressed; others
    stay dense and count at their full size, as do linears whose names match a pattern in ``keep``, or none in ``only``
    where there is one (``*`` stands for anything, as in ``model.layers.0.*``).

    For ``adacr`` alone: ``importance`` is the cosine between the input and the output of a block, or one minus it, and
    ``floor`` is the retention of every block regardless of its importance, the paper's minimal retention ratio.
    """

    rule: Literal[
        "uniform", "global-sigma", "global-sigma-mean", "global-energy", "sensitivity", "adacr", "loss-aware"
    ] = "uniform"
    importance: Literal["cos", "1-cos"] = "cos"
    floor: float = Field(default=0.0, ge=0, lt=1)
    places: tuple[Place, ...] = Field(default=PLACES, min_length=1, strict=False)  # files have lists
    keep: tuple[str, ...] = Field(default=(), strict=False)
    only: tuple[str, ...] = Field(default=(), strict=False)

    def reason(self, linear: Linear) -> str | None:
        """Why a linear has to stay dense; None where it need not."""
        if linear.place not in self.places:
            return f"outside {', '.join(self.places)}"
        if pattern := next((pattern for pattern in self.keep if fnmatchcase(linear.name, pattern)), None):
            return f"kept by the pattern {pattern}"
        if self.only and not any(fnmatchcase(linear.name, pattern) for pattern in self.only):
            return f"matches none of {', '.join(self.only)}"
        return None


class StoragePart(_Part):
    """How factors are stored; the weight that they stand for does not change.

    ``pivoted`` stores factors of rank k in k (in + out − k) numbers and k indices instead of k (in + out) numbers, if
    that is smaller; linears that are factored head by head are not pivoted. Ranks are multiples of ``multiple``, with
    which some hardware is faster. ``heads`` says so of layers that are factored head by head: their ranks are ``free``,
    a ``multiple`` each, or one multiple that is ``equal`` for all heads of a layer. ``experts`` says whether ``each``
    expert has its own form, ranks and bits, or all experts of a layer have the ``same`` in one role, which kernels for
    all of them need. ``narrow`` lets the allocation take hidden units out of MLPs: rows of gate and up, columns of
    down, which is then fitted again; it has no effect under other rules than loss-aware, and with adaComp.
    """

    pivoted: bool = False
    narrow: bool = False
    multiple: int = Field(default=1, ge=1)
    heads: Literal["free", "multiple", "equal"] = "free"
    experts: Literal["each", "same"] = "each"


def _or_auto(wanted: str, fits: Callable[[float], bool]) -> BeforeValidator:
    """Lets numbers that fit and auto pass; ValueError that says what is `wanted` for anything else."""

    def checked(value: object) -> object:
        if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and fits(value)):
            return value
        raise ValueError(f"give a number {wanted}, or auto")

    return BeforeValidator(checked)


class CompensatePart(_Part):
    """Whether weights are fitted to the inputs that the compressed layers before them produce.

    Kind ``anchored``: block by block, each weight is first replaced by the least-squares fit from the inputs in the
    compressed model to the outputs in the dense model, then factored or quantized. With ``residual``, a linear whose
    output is added to a residual stream also corrects the error that earlier layers left in that stream. The dampening
    ``damping`` δ adds δ·tr/in to the diagonal of the input moment, which keeps the fit near the dense weight.

    Kind ``adacomp``: in the same order, the two factors of the recipe without compensation are fitted in turn to those
    outputs, ``rounds`` times each.

    For both: ``weight`` is the share of the compressed model's inputs in the fit, the dense model's have the rest; with
    ``auto`` each linear has the share that serves samples best which are not fitted to, the last eighth.
    ``samples`` limits how many calibration samples of each modality run through both models (None for all).
    ``buckets`` is the number of groups in which the samples are averaged first (stack-of-batch; None for no averaging).
    ``refine`` is the number of steps of Adam that then train each block towards the output of the dense block.
    """

    kind: Literal["none", "anchored", "adacomp"] = "none"
    residual: bool = True
    weight: Annotated[float | Literal["auto"], _or_auto("from 0 to 1", lambda x: 0 <= x <= 1)] = "auto"
    damping: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    samples: int | None = Field(default=None, ge=1)
    refine: int = Field(default=0, ge=0)
    rounds: int = Field(default=1, ge=1)
    buckets: int | None = Field(default=None, ge=1)

    def left_out(self, samples: int) -> int:
        """How many of so many samples of a modality no layer is fitted to; they are the last ones."""
        return max(1, samples // 8) if self.weight == "auto" and samples else 0


class QuantizePart(_Part):
    """Whether weights are stored as integers.

    ``bits``: None for no integers; 2, 3, 4 or 8 for all factors and all weights that stay dense; with ``auto`` the
    allocation chooses for every linear among a dense weight, a dense integer weight, factors, integer factors, and an
    integer weight with factors beside it. ``group`` is the group size, the number of inputs that share a scale; all
    inputs of an output share one where it is None or does not divide their number. ``symmetric`` grids have no zero
    points. ``method`` gptq rounds with error feedback in the recipe's metric, rtn rounds to nearest. The dampening
    ``damping`` is the share of the mean of each metric's diagonal that is added to the diagonal for the feedback; more
    of it keeps errors out of directions that the samples do not contain, and ``auto`` chooses it by how many positions
    stand behind the metric. ``rotate``: where that clearly lowers the predicted error, a linear rotates its inputs, 16
    neighbours at a time. ``roles`` says which linears may be quantized. ``format`` compressed-tensors makes checkpoints
    that others load without spectrim: all linears that may be quantized become dense integers on one grid, and all
    others stay dense. ``embeddings`` says in how many bits input embedding and output head are stored; with ``auto`` a
    size decides, and None leaves them dense.
    """

    bits: Literal[2, 3, 4, 8, "auto"] | None = None
    group: Literal[32, 64, 128] | None = 128
    symmetric: bool = True
    method: Literal["gptq", "rtn"] = "gptq"
    damping: Annotated[float | Literal["auto"], _or_auto("above 0", lambda x: 0 < x < math.inf)] = "auto"
    rotate: bool = False
    roles: Literal["all", "feed-forward"] = "all"
    format: Format = "spectrim"
    embeddings: Literal[4, 8, "auto"] | None = None

    @property
    def plain(self) -> bool:
        """Whether there may be dense integers alone."""
        return self.format != "spectrim"

    @property
    def signed(self) -> bool:
        """Whether scales may be negative: not where kernels that are not ours read them."""
        return not self.plain

    def takes(self, role: str) -> bool:
        """Whether linears of this role may be quantized."""
        return self.bits is not None and (self.roles == "all" or role in FEED_FORWARD)

    @property
    def fed(self) -> bool:
        """Whether rounding errors are fed on to what is rounded later."""
        return self.method == "gptq"

    def dampening(self, size: int, positions: float) -> float | None:
        """Of the metric of so many inputs or outputs in the error feedback; None with rounding to nearest.

        The noise of a mean of products over n positions grows by size / n (docs/methods.md, section 8).
        """
        if not self.fed:
            return None
        if self.damping != "auto":
            return self.damping
        noise = size / positions if positions else math.inf
        return min(_MOST_DAMPING, _LEAST_DAMPING + _DAMPING_BY_NOISE * noise)


class TunePart(_Part):
    """Whether the compressed model is trained as a whole, after its linears are made.

    ``epochs`` is how often Adam runs through the calibration samples (0: never); what it minimizes is the divergence of
    the predictions from those of the dense model. Factors, scales of integers, norms and biases change; integers, and
    all sizes, stay. The last eighth of the samples is not trained on: by these the best state is chosen, the first if
    none is better. ``rate`` is a step of Adam, as a share of the size of each tensor. ``samples`` limits how many
    calibration samples of each modality there are (None for all).
    """

    epochs: int = Field(default=0, ge=0)
    rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    samples: int | None = Field(default=None, ge=2)


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
    tune: TunePart = TunePart()

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration must come first."""
        return self.metric.kind != "identity" or self.needs_samples

    @property
    def needs_samples(self) -> bool:
        """Whether the samples of the calibration are run through the model again."""
        measured = self.allocation.rule in ("sensitivity", "adacr")
        return measured or self.compensate.kind != "none" or self.tune.epochs > 0

    @property
    def needs_gradients(self) -> bool:
        """Whether that calibration must gather gradients of weights."""
        return self.metric.kind == "fisher-rows"

    @property
    def stored(self) -> StoragePart:
        """`storage`, ``narrow`` only where losses are compared, and where compensation can fit such layers."""
        narrow = self.storage.narrow and self.allocation.rule == "loss-aware" and self.compensate.kind != "adacomp"
        return self.storage.model_copy(update={"narrow": narrow})

    @property
    def needs_curvature(self) -> bool:
        """Whether that calibration must gather moments of output gradients."""
        return self.metric.kind == "curvature"

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.allocation.rule == "loss-aware" and self.metric.kind != "curvature":
            raise ValueError("allocation 'loss-aware' needs predicted losses; set metric.kind=curvature")
        if self.quantize.plain and (self.quantize.bits not in PLAIN_BITS or not self.quantize.symmetric):
            raise ValueError(
                "quantize.format 'compressed-tensors' holds dense integers on one symmetric grid of "
                f"{', '.join(map(str, PLAIN_BITS))} bits; set quantize.bits to one of these and quantize.symmetric to "
                "true"
            )
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
