"""The exceptions that a user can act on.

Each message is one sentence that names the thing at fault and the remedy. The command line prints it and exits with
code 2; library callers catch :class:`SpectrimError` or one of its kinds.
"""


def printable(text: str) -> str:
    """`text` on one line of printable characters: what a name or a file brings besides is written as an escape.

    Messages quote names and contents of files that somebody else made, which may hold line ends, terminal commands or
    marks that turn the direction of writing.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, without its period, else its type; more lines are often advice."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


class SpectrimError(Exception):
    """Base of every error that comes from the user's input or environment rather than from a defect."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(SpectrimError):
    """Options that cannot be, contradict each other or have no effect: a device, a file to write, a doubled value."""


class ModelError(SpectrimError):
    """A model that cannot be read, or that holds something that cannot be compressed (NaN weights, no linears)."""


class RecipeError(SpectrimError):
    """A recipe with an unknown key, an impossible value, or a need that the statistics do not meet."""


class SampleError(SpectrimError):
    """Calibration or evaluation samples that are missing, empty or malformed."""


class StatisticsError(SpectrimError):
    """A statistics directory that is truncated, foreign, or does not fit the model or the data."""


class BudgetError(SpectrimError):
    """A byte budget that the model and the recipe cannot meet."""


class CheckpointError(SpectrimError):
    """A compressed checkpoint that cannot be written or read."""


class NumericalError(SpectrimError):
    """NaN or infinity in weights, moments, spectra or logits; the message names the layer."""


class ReportError(SpectrimError):
    """Plots or reports that cannot be drawn or written: a missing extra, a full disk."""
