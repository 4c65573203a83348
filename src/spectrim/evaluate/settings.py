"""Settings of an evaluation: one record, from which the library and the command line take names and defaults."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spectrim.errors import SampleError

TASKS = ("perplexity", "vqa")


class Settings(BaseModel):
    """Everything that the scores depend on besides the models and the samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = Field(TASKS, description="perplexity, vqa, or both.")
    samples: int = Field(100, ge=1, description="Questions of each task.")
    seed: int = Field(0, ge=0, description="Chooses the questions.")
    seqlen: int = Field(512, ge=1, description="Tokens of a window.")
    stride: int | None = Field(None, ge=1, description="Tokens between windows; as long as the window if absent.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens of text to read at most.")
    max_new_tokens: int = Field(8, ge=1, description="Tokens of an answer at most.")


class EvaluationSettings(Settings):
    """The arguments of :func:`spectrim.evaluate.evaluate`, which also say where samples come from."""

    text: str = Field("builtin", description="Text for perplexity, as for calibrate.")
    questions: str = Field("builtin", description="'builtin', or a .jsonl file with image, question, answer.")
    batch_size: int | None = Field(None, ge=1, description="Samples that run together.")

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if not tasks:
            raise ValueError(f"no evaluation task is named; choose from {', '.join(TASKS)}")
        if unknown := [task for task in tasks if task not in TASKS]:
            raise ValueError(f"there is no evaluation task '{unknown[0]}'; choose from {', '.join(TASKS)}")
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice; name each once")
        return tasks

    @model_validator(mode="after")
    def _strided(self) -> "EvaluationSettings":
        if self.stride is not None and self.stride > self.seqlen:
            raise ValueError(f"stride {self.stride} is longer than the window, seqlen {self.seqlen}; make it shorter")
        return self

    @classmethod
    def of(cls, **settings: Any) -> "EvaluationSettings":
        """Settings that differ from the defaults in these.

        Raises:
            SampleError: there is no such setting, or it cannot have the value.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            at, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            given = f" (not {first['input']!r})" if first["type"] != "value_error" else ""
            raise SampleError(f"evaluation {at and f'setting {at!r}'}: {said}{given}") from error

    @property
    def scored(self) -> Settings:
        """What the scores depend on, for the record."""
        kept = {name: getattr(self, name) for name in Settings.model_fields}
        return Settings(**kept | {"stride": self.stride or self.seqlen})
