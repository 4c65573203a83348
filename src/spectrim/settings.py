"""The options of a calibration and of an evaluation: one record each.

Names, defaults, limits and help of the library's arguments and of the command line's options are those of the fields.
Nothing heavy is imported, so that the command line can print its help at once.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectrim.errors import SampleError, UsageError

TASKS = ("perplexity", "vqa", "kl")

_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]


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
    image_tokens_only: bool = Field(default=False, description="Count only image tokens in the backbone.")
    gradients: bool = Field(default=False, description="Gather gradients of text as well (fwsvd needs them).")
    curvature: bool = Field(
        default=True, description="Gather output gradients as well (spectrim, laser and curvature need them)."
    )
    labels: Literal["given", "sampled"] = Field(
        default="given", description="Of gradients: the samples' own tokens, or drawn from the model (true Fisher)."
    )
    answer_tokens: _Count = Field(default=32, description="Of an answer that the model draws for an image, at most.")
    curvature_gib: float = Field(
        default=8.0, gt=0, allow_inf_nan=False, description="Memory for output moments of one modality and pass."
    )
    curvature_passes: _Count = Field(default=1, description="Gradient passes that may share the linears.")
    curvature_forms: dict[str, str] = Field(
        default={},
        description="Form of a role's output moments, such as gate=sketch:256; repeatable.",
        json_schema_extra=_flag("--curvature-form"),
    )


class CalibrationOptions(CalibrationSettings):
    """All that a calibration takes beside the model and the directory."""

    text: str | None = Field(
        default="builtin", description="A .txt, .md or .jsonl file, a dataset id, 'builtin' or 'none'.", min_length=1
    )
    images: str | None = Field(
        default="builtin", description="A folder, a .jsonl file, a dataset id, 'builtin' or 'none'.", min_length=1
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

    def _effects(self) -> Iterator[_Idle]:
        yield ("seqlen",), self.text is not None, "without text"
        yield ("instruction", "image_tokens_only"), self.images is not None, "without images"
        yield ("labels",), self.gradients or self.curvature, "without gradients or curvature"
        yield ("answer_tokens",), self.curvature and self.images is not None, "without the curvature of images"
        yield ("curvature_gib", "curvature_passes", "curvature_forms"), self.curvature, "without curvature"


class Effort(BaseModel):
    """What one level of ``--effort`` sets where nothing else is said: samples, compensation and refinement together.

    ``compensation`` are changes of a recipe that compensates; one that does not is left as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: _Count
    compensation: dict[str, str | int]


EFFORTS = {
    "quick": Effort(samples=32, compensation={"compensate.kind": "none"}),
    "standard": Effort(samples=CalibrationSettings().samples, compensation={}),
    "thorough": Effort(samples=256, compensation={"compensate.samples": 128, "compensate.refine": 50}),
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
        default="builtin", description="'builtin', or a .jsonl file with image, question, answer.", min_length=1
    )
    prompts: str | None = Field(
        default=None,
        description="Your own images and prompts for kl, as --images of calibrate takes them.",
        min_length=1,
    )
    batch_size: _Count | None = Field(default=None, description="Samples that run together.")
    blind: bool = Field(default=True, description="Also ask with swapped images: the blind floor.")

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
