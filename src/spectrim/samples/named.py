"""Text data sets by the short names that papers give them, with the split and the join that they measure on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """One data set on the Hugging Face hub.

    ``heldout`` is the split that perplexity is measured on, calibration reads train. ``column`` holds the text,
    ``join`` stands between two rows, ``revision`` is that of the repository, and ``rows`` is how many rows of the
    held-out split are read, None for all.
    """

    source: str  # id:config
    column: str
    join: str
    revision: str | None = None
    heldout: str = "test"
    rows: int | None = None

    def split(self, split: str) -> str:
        """The author's name of "train", "calibration" or "heldout"."""
        return self.heldout if split == "heldout" else "train"


# As in GPTQ's scripts (Frantar et al., ICLR 2023), which SVD-LLM's and most later ones follow. C4 has 356,317 held-out
# documents; the first 1100 of its first file hold the 256 windows of 2048 tokens that papers measure on.
NAMED = {
    "wikitext-2": Named("Salesforce/wikitext:wikitext-2-raw-v1", "text", "\n\n"),
    "wikitext-103": Named("Salesforce/wikitext:wikitext-103-raw-v1", "text", "\n\n"),
    # The main branch holds a script, which the package datasets no longer runs.
    "ptb": Named("ptb-text-only/ptb_text_only:penn_treebank", "sentence", " ", "refs/convert/parquet"),
    "c4": Named("allenai/c4:en", "text", " ", heldout="validation", rows=1100),
}
