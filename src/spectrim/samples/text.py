"""Plain text and the windows of tokens that are cut from it."""

import random
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spectrim.errors import SampleError
from spectrim.samples.sources import hub_rows, local_path, read_jsonl

_SUFFIXES = frozenset({".txt", ".md"})
_HUB_CHARACTERS = 16_000_000  # read from a data set at most; WikiText-2 (train) has 11 million


def load_text(source: str, *, split: str = "calibration") -> str:
    """Text of a source.

    Args:
        source: ``builtin``; a ``.txt`` or ``.md`` file; a ``.jsonl`` file of ``{"text": ...}``; else a Hugging Face
            data set id with a column ``text``, ``id[:config[:split]]``, read up to 16 million characters.
        split: "train", "calibration" or "heldout"; local files have one split only and ignore it.

    Raises:
        SampleError: the source is missing, unreadable, malformed or empty.
    """
    if source == "builtin":
        from spectrim.demo.text import split_text

        text = split_text(split)
    elif (path := local_path(source, _SUFFIXES)) is not None:
        text = _read_file(path)
    else:
        text = _read_hub(source, split)
    if not text.strip():
        raise SampleError(f"text source '{source}' is empty; give one that holds text")
    return text


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Windows of consecutive tokens at random places that never overlap; every such choice is equally likely.

    Returns:
        int64 ``[samples, seqlen]`` on the CPU, in random order; the same for the same arguments.

    Raises:
        SampleError: the text is too short, or ``samples`` or ``seqlen`` is not positive.
    """
    if samples < 1 or seqlen < 1:
        raise SampleError(f"samples and seqlen must be at least 1, not {samples} and {seqlen}")
    tokens = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    slack = len(tokens) - samples * seqlen
    if slack < 0:
        raise SampleError(
            f"the text has {len(tokens)} tokens, room for {len(tokens) // seqlen} windows of {seqlen}, and {samples} "
            "were asked for; give a longer text or lower the samples or the window length"
        )
    # Places i₀ < i₁ < … out of slack + samples stand for gaps i_j - j, non-decreasing in [0, slack].
    rng = random.Random(seed)
    places = sorted(rng.sample(range(slack + samples), samples))
    starts = [place - j + j * seqlen for j, place in enumerate(places)]
    rng.shuffle(starts)
    return torch.tensor([tokens[start : start + seqlen] for start in starts], dtype=torch.int64)


def _read_file(path: Path) -> str:
    if path.is_dir():
        raise SampleError(f"text source '{path}' is a folder; give a .txt, .md or .jsonl file")
    if path.suffix.lower() == ".jsonl":
        return "\n\n".join(_jsonl_text(path, number, row.get("text")) for number, row in read_jsonl(path))
    if path.suffix.lower() not in _SUFFIXES:
        raise SampleError(f"text source '{path}' ends in none of .txt, .md and .jsonl; rename or convert it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"text source '{path}' is not UTF-8 (byte {error.start}); convert it to UTF-8") from error


def _jsonl_text(path: Path, number: int, text: object) -> str:
    if not isinstance(text, str):
        raise SampleError(f'{path}, line {number} has no string "text"; write {{"text": "..."}} on every line')
    return text


def _read_hub(source: str, split: str) -> str:
    parts: list[str] = []
    size = 0
    for row in hub_rows(source, split, column="text"):
        parts.append(str(row["text"]))
        size += len(parts[-1])
        if size >= _HUB_CHARACTERS:
            break
    return "\n\n".join(parts)
