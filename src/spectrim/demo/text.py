"""The built-in text: the language reference that every CPython carries (`pydoc_data.topics`, PSF licence)."""

import re
from pydoc_data.topics import topics

from spectrim.errors import SampleError

_CALIBRATION = ("debugger", "string-methods", "types", "typesseq")
_HELDOUT = ("comparisons", "formatstrings", "import", "strings", "typesmapping")
SPLITS = ("train", "calibration", "heldout")


def _paragraphs(topic: str) -> set[str]:
    """Paragraphs of 40 characters and more, white space folded."""
    return {p for p in (" ".join(p.split()) for p in re.split(r"\n\s*\n", topics[topic])) if len(p) >= 40}


def split_text(split: str) -> str:
    """Text of one split; no split shares a topic with another, and training shares no paragraph with the other two.

    Calibration and held-out are fixed topics; training is every other topic that repeats no paragraph of theirs
    (topics overlap: a chapter is there as a whole and by section).

    Raises:
        SampleError: for a split that does not exist.
    """
    if split == "calibration":
        names = list(_CALIBRATION)
    elif split == "heldout":
        names = list(_HELDOUT)
    elif split == "train":
        reserved = set[str]().union(*(_paragraphs(name) for name in _CALIBRATION + _HELDOUT))
        names = [name for name in sorted(topics) if not _paragraphs(name) & reserved]
    else:
        raise SampleError(f"no split is called '{split}'; choose from {', '.join(SPLITS)}")
    return "\n\n".join(topics[name].strip() for name in names)
