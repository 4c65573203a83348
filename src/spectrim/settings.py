"""The options of a calibration and of an evaluation: one record each, and mixtures of sources of samples.

Names, defaults, limits and help of the library's arguments and of the command line's options are those of the fields.
Nothing heavy is imported, so that the command line can print its help at once.
"""

import math
import re
from collections.abc import Collection, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from spectrim.errors import SampleError, UsageError

TASKS = ("perplexity", "vqa", "kl")

_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Name = Annotated[str, Field(min_length=1)]
_WEIGHT = re.compile(r"(.+):(\d+\.?\d*(?:e[-+]?\d+)?|\.\d+)", re.DOTALL)  # only what follows the last colon


UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}B": base**power
    for power, letter in enumerate("KMGT", 1)
    for kind, base in (("", 1000), ("i", 1024))
}


def read_bytes(text: str) -> tuple[float, str]:
    """Bytes as a user writes them, such as 3.5GB or 20GiB: the number and the unit (see ``UNITS``).

    Raises:
        ValueError: the rest of a sentence that begins with what was written.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = None if found is None else next((x for x in UNITS if x.casefold() == found[2].casefold()), None)
    if found is None or unit is None or not math.isfinite(float(found[1])):
        raise ValueError("is no size; write it as 3.5GB, 900MB or 2GiB")
    return float(found[1]), unit


def _as_memory(value: Any) -> Any:
    """A limit of memory as a string, which a number of bytes may be as well."""
    if value is None:
        return None
    try:
        number, unit = read_bytes(str(value))
    except ValueError as error:
        raise ValueError(f"{value!r} {error}") from error
    if number * UNITS[unit] < 1:
        raise ValueError(f"{value!r} is too little; write it as 20GiB")
    return str(value)


Memory = Annotated[str | None, BeforeValidator(_as_memory)]
"""The most that a process may hold, such as 20GiB; None: what is free."""


def split_weight(source: str) -> tuple[str, Fraction | None]:
    """A source of a mixture, ``NAME`` or ``NAME:WEIGHT``, as its name and its weight."""
    found = _WEIGHT.fullmatch(source)
    return (source, None) if found is None else (found[1], Fraction(found[2]))


def as_sources(value: Any) -> Any:
    """Sources of samples as a string, for one source, or a tuple of strings ``NAME`` or ``NAME:WEIGHT``, for several.

    A source may be a pair of its name and its weight instead. One source alone is its name: it gives all samples.

    Raises:
        ValueError: the rest of a sentence that begins with the name of the option.
    """
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("needs a source, or a list of sources; give one")
    names = [_written(item) for item in value]
    if len(names) == 1:
        return value[0] if isinstance(value[0], str) else split_weight(names[0])[0]
    parts = [split_weight(name) for name in names]
    for number, (name, weight) in enumerate(parts):
        if name == "none":
            raise ValueError("names sources and 'none'; leave one of them out")
        if name in (before for before, _ in parts[:number]):
            raise ValueError(f"names {name!r} twice; give each source once")
        if weight is not None and weight <= 0:
            raise ValueError(f"gives {name!r} the weight 0; give it more, or leave it out")
    given = sum(weight for _, weight in parts if weight is not None)
    if given >= 1 and any(weight is None for _, weight in parts):
        raise ValueError("gives the whole to some sources and no weight to others; give each a weight, or none")
    return tuple(names)


def _written(item: Any) -> str:
    if isinstance(item, str) and item:
        return item
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str) and item[0]:
        name, weight = item
        if weight is None:
            return f"{name}"
        if isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0:
            return f"{name}:{weight!r}"
    raise ValueError(f"cannot be {item!r}; give a name, or a pair of a name and a weight")


def counts(sources: str | tuple[str, ...], samples: int) -> dict[str, int]:
    """How many of the samples each source gives, by name; they add up to ``samples``.

    Weights are shares. Sources without one share equally what the others leave of 1. What is left of rounding down
    goes to the largest remainders, and of equal ones to the first.
    """
    if isinstance(sources, str):
        return {sources: samples}
    parts = dict(map(split_weight, sources))
    given = sum((weight for weight in parts.values() if weight is not None), Fraction(0))
    free = sum(weight is None for weight in parts.values())
    shares = {name: (1 - given) / free if weight is None else weight for name, weight in parts.items()}
    whole = sum(shares.values())
    exact = {name: samples * share / whole for name, share in shares.items()}
    found = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: found[name] - exact[name])  # stable: of equals the first
    for name in by_rest[: samples - sum(found.values())]:
        found[name] += 1
    return found


Sources = Annotated[_Name | tuple[_Name, ...] | None, BeforeValidator(as_sources)]
"""One source of samples, several with weights, or none."""


_Idle = tuple[tuple[str, ...], bool, str]
"""Names of options, whether they have an effect, and where they have none."""


def _flag(name: str) -> dict[str, Any]:
    """For a field whose option has another name."""
    return {"flag": name}


class OptionRecord(BaseModel):
    """A record of options; what the command line says of each is in its field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """The record; SampleError, in one sentence, where a value is out of its limits."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name, limits = str(first["loc"][0]), first.get("ctx", {})
            rule = {
                "greater_than_equal": "at least {ge}",
                "greater_than": "more than {gt}",
                "less_than": "less than {lt}",
            }.get(first["type"])
            if first["type"] == "value_error":
                raise SampleError(f"{name} {limits['error']}") from error
            if rule is None:
                raise SampleError(f"{name} cannot be {first['input']!r} ({first['msg']}); correct it") from error
            raise SampleError(f"{name} must be {rule.format(**limits)}, not {first['input']}") from error

    @classmethod
    def flag(cls, name: str) -> str:
        """An option as the command line spells it."""
        extra = cls.model_fields[name].json_schema_extra
        return str(extra["flag"]) if isinstance(extra, dict) else f"--{name.replace('_', '-')}"

    def check_effect(self, given: Collection[str]) -> None:
        """UsageError where an option was given that has no effect beside the others."""
        for names, acts, where in self._effects():
            if not acts and (idle := [name for name in names if name in given]):
                raise UsageError(f"{self.flag(idle[0])} has no effect {where}; leave it out")

    def _effects(self) -> Iterator[_Idle]:
        raise NotImplementedError


class CalibrationSettings(OptionRecord):
    """What the moments of a calibration depend on beside the model and its samples."""

    samples: _Count = Field(default=128, description="Samples of each modality.")
    seqlen: _Count = Field(default=128, description="Tokens of a text sample.")
    batch_size: _Count = Field(default=8, description="Samples that run together.")
    seed: _Seed = Field(default=0, description="Chooses the samples.")
    instruction: str = Field(default="Describe this image.", description="Asked of images that bring none.")
    image_tokens_only: bool = Field(
        default=False, description="Count only image tokens in the backbone; experts count all that are routed to them."
    )
    all_experts: bool = Field(
        default=False, description="Every expert reads all tokens (in calibration only; their outputs stay routed)."
    )
    gradients: bool = Field(default=False, description="Gather gradients of text as well (fwsvd needs them).")
    curvature: bool = Field(
        default=True, description="Gather output gradients as well (spectrim, laser and curvature need them)."
    )
    labels: Literal["given", "sampled"] = Field(
        default="given", description="Of gradients: the samples' own tokens, or drawn from the model (true Fisher)."
    )
    answer_tokens: _Count = Field(default=32, description="Of an answer that the model draws for an image, at most.")
    curvature_forms: dict[str, str] = Field(
        default={},
        description="Form of a role's output moments, such as gate=sketch:256; repeatable.",
        json_schema_extra=_flag("--curvature-form"),
    )


class CalibrationOptions(CalibrationSettings):
    """All that a calibration takes beside the model and the directory."""

    text: Sources = Field(
        default="builtin",
        description="A .txt, .md, .jsonl, .csv or .parquet file, a dataset id, 'builtin' or 'none'; repeatable, with "
        "weights as in a.jsonl:0.7.",
    )
    images: Sources = Field(
        default="builtin",
        description="A folder, a .jsonl, .csv or .parquet file, a dataset id, 'builtin' or 'none'; repeatable, with "
        "weights.",
    )
    memory: Memory = Field(
        default=None, description="The most that the process may hold, such as 20GiB; what is free if not given."
    )
    checkpoint_seconds: float = Field(default=120.0, ge=0, allow_inf_nan=False, description="Time between snapshots.")

    @property
    def settings(self) -> CalibrationSettings:
        """Those that the moments depend on."""
        return CalibrationSettings(**{name: getattr(self, name) for name in CalibrationSettings.model_fields})

    def check_together(self) -> None:
        """SampleError where options contradict each other."""
        if self.text is None and self.images is None:
            raise SampleError("calibration needs samples; give a text source, an image source or both")
        if self.gradients and self.text is None:
            raise SampleError("gradients need text; give a text source or leave them out")
        if (self.gradients or self.curvature) and self.text is not None and self.seqlen < 2:
            raise SampleError("gradients need text in windows of at least 2 tokens; make the windows longer")
        for kind, sources in (("text", self.text), ("images", self.images)):
            for name, count in counts(sources, self.samples).items() if sources is not None else ():
                if not count:
                    raise SampleError(
                        f"of {self.samples} samples none is left for '{name}' ({kind}); raise the samples or its weight"
                    )

    def _effects(self) -> Iterator[_Idle]:
        yield ("seqlen",), self.text is not None, "without text"
        yield ("instruction", "image_tokens_only"), self.images is not None, "without images"
        yield ("labels",), self.gradients or self.curvature, "without gradients or curvature"
        yield ("answer_tokens",), self.curvature and self.images is not None, "without the curvature of images"
        yield ("curvature_forms",), self.curvature, "without curvature"


REPLACED = {"curvature_gib": "memory", "curvature_passes": "memory"}
"""Options of earlier versions, and what to use in their place."""


class Effort(BaseModel):
    """What one level of ``--effort`` sets where nothing else is said: samples, compensation and the end-to-end pass.

    ``compensation`` are changes of a recipe that compensates; one that does not is left as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: _Count
    compensation: dict[str, str | int | float]


EFFORTS = {
    "quick": Effort(samples=32, compensation={"compensate.kind": "none"}),
    "standard": Effort(samples=CalibrationSettings().samples, compensation={}),
    "thorough": Effort(samples=256, compensation={"compensate.samples": 128, "tune.epochs": 4, "tune.samples": 128}),
}
EFFORT = "standard"


def effort(name: str) -> Effort:
    """The level of this name. Raises UsageError where there is none."""
    if name not in EFFORTS:
        raise UsageError(f"there is no effort '{name}'; choose from {', '.join(EFFORTS)}")
    return EFFORTS[name]


class EvaluationSettings(OptionRecord):
    """What the scores of an evaluation depend on beside the models and the samples."""

    tasks: tuple[str, ...] = Field(
        default=TASKS[:2], description="perplexity, vqa, kl (divergence from the dense model); several by commas."
    )
    samples: _Count = Field(default=100, description="Questions of each task.")
    seed: _Seed = Field(default=0, description="Chooses the questions.")
    seqlen: _Count = Field(default=512, description="Tokens of a window.")
    stride: _Count | None = Field(default=None, description="Tokens between windows; as long as the window if absent.")
    max_tokens: _Count | None = Field(default=None, description="Tokens of text to read at most.")
    max_new_tokens: _Count = Field(default=8, description="Tokens of an answer at most.")
    kl_tokens: _Count = Field(default=1024, description="Tokens of text, and of answers, that the task kl compares.")


class EvaluationOptions(EvaluationSettings):
    """All that an evaluation takes beside the models and where they run."""

    text: str = Field(default="builtin", description="Text for perplexity, as for calibrate.", min_length=1)
    questions: str = Field(
        default="builtin",
        description="'builtin', or a .jsonl, .csv or .parquet file with image, question, answer.",
        min_length=1,
    )
    prompts: Sources = Field(
        default=None, description="Your own images and prompts for kl, as --images of calibrate takes them."
    )
    batch_size: _Count | None = Field(default=None, description="Samples that run together.")
    blind: bool = Field(default=True, description="Also ask with swapped images: the blind floor.")
    memory: Memory = Field(
        default=None, description="Leave blocks of a model on disk that would take half of this, such as 20GiB."
    )

    @property
    def scored(self) -> EvaluationSettings:
        """Those that the scores depend on, for the record."""
        kept = {name: getattr(self, name) for name in EvaluationSettings.model_fields}
        return EvaluationSettings(**kept | {"stride": self.stride or self.seqlen})

    def check_together(self) -> None:
        """SampleError where options contradict each other or name unknown tasks."""
        if not self.tasks:
            raise SampleError(f"no evaluation task is named; choose from {', '.join(TASKS)}")
        for number, task in enumerate(self.tasks):
            if task not in TASKS:
                raise SampleError(f"there is no evaluation task '{task}'; choose from {', '.join(TASKS)}")
            if task in self.tasks[:number]:
                raise SampleError(f"the evaluation task '{task}' is named twice; name each once")
        if self.stride is not None and self.stride > self.seqlen:
            raise SampleError(
                f"stride must lie between 1 and seqlen, but stride is {self.stride} and seqlen is {self.seqlen}"
            )

    def _effects(self) -> Iterator[_Idle]:
        perplexity, vqa, kl = (task in self.tasks for task in TASKS)
        yield ("stride", "max_tokens"), perplexity, "without the task perplexity"
        yield ("text", "seqlen"), perplexity or kl, "without the tasks perplexity and kl"
        yield ("max_new_tokens", "blind"), vqa, "without the task vqa"
        yield ("questions", "samples", "seed"), vqa or kl, "without the tasks vqa and kl"
        yield ("prompts", "kl_tokens"), kl, "without the task kl"


class RunOptions(OptionRecord):
    """What a verb that runs a while says, and where; of the command line alone."""

    quiet: bool = Field(
        default=False, description="Say nothing but errors and results.", json_schema_extra=_flag("--quiet")
    )
    verbose: bool = Field(
        default=False, description="Say everything that the logger spectrim has.", json_schema_extra=_flag("--verbose")
    )
    log_file: Path | None = Field(default=None, description="Append everything to this file, with the time.")

    def check_together(self) -> None:
        """UsageError where options contradict each other."""
        if self.quiet and self.verbose:
            raise UsageError("--quiet and --verbose contradict each other; leave one out")


CALIBRATION = CalibrationOptions()
EVALUATION = EvaluationOptions()
