"""Plain text and the windows of tokens that are cut from it."""

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from spectrim.errors import SampleError
from spectrim.samples.beginning import beginning, without_beginning
from spectrim.samples.chat import TURNS, read_chat, render, texts
from spectrim.samples.named import NAMED
from spectrim.samples.sources import by_key, check_positive, hub_rows, local_path, named_columns
from spectrim.samples.tables import is_table, read_rows
from spectrim.samples.tokens import refuse_media
from spectrim.settings import counts

_SUFFIXES = frozenset({".txt", ".md"})
_KEYS = ("text", *TURNS, "prompt", "completion", "system")  # of a row
_HUB_CHARACTERS = 16_000_000  # read from a data set at most; WikiText-2 (train) has 11 million


def load_text(
    source: str,
    *,
    split: str = "calibration",
    processor: Any = None,
    refused: Collection[str] = (),
    check: bool = False,
) -> str:
    """Text of a source.

    Args:
        source: ``builtin``; a ``.txt`` or ``.md`` file; a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file with
            ``text`` or conversations (see ``read_chat``); ``wikitext-2``, ``wikitext-103``, ``ptb`` or ``c4`` (see
            ``named.py``); else a Hugging Face data set id with such columns, ``id[:config[:split]]``, read up to 16
            million characters. Other columns stand in brackets behind it (see ``named_columns``).
        split: "train", "calibration" or "heldout"; local files have one split only and ignore it.
        processor: has the chat template that renders conversations: the model's processor or tokenizer.
        refused: tokens that stand for media, which no text may hold (see ``media_tokens``).
        check: only look at the source; conversations then need no template and are not rendered.

    Raises:
        SampleError: the source is missing, unreadable, malformed or empty; the message names the line.
    """
    join, path = "\n\n", None if source == "builtin" else local_path(source)
    if source == "builtin":
        from spectrim.demo.text import split_text

        passages = iter([_Passage("the built-in text", split_text(split))])
    else:
        read = partial(_row, processor=processor, check=check)
        if path is None and (named := NAMED.get(source)) is not None:
            join, where, count = named.join, named.split(split), named.rows if split == "heldout" else None
            hub = _read_hub(f"{named.source}:{where}", {"text": named.column}, where, read, named.revision)
            passages = islice(hub, count)
        else:
            columns = named_columns(source, _KEYS)
            passages = _read_hub(source, columns, split, read) if path is None else _read_file(path, columns, read)
    parts: list[str] = []
    for passage in passages:
        refuse_media(passage.text, refused, passage.place(refused))
        parts += [passage.text, "" if passage.chat else join]  # a template writes its own white space
    text = "".join(parts[:-1])
    if not text.strip():
        raise SampleError(f"text source '{source}' is empty; give one that holds text")
    return text


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Windows of consecutive tokens at random places that never overlap; every such choice is equally likely.

    Each window begins with what the tokenizer puts before every text (see ``beginning``), which counts as a part of it.

    Returns:
        int64 ``[samples, seqlen]`` on the CPU, in random order; the same for the same arguments.

    Raises:
        SampleError: the text or the windows are too short, or ``samples`` or ``seqlen`` is not positive.
    """
    check_positive(samples=samples, seqlen=seqlen, seed=seed)
    first = beginning(tokenizer, text)
    length = seqlen - len(first)  # of the text in a window
    if length < 1:
        raise SampleError(
            f"windows of {seqlen} tokens hold no text, since the tokenizer begins each with {len(first)} of its own; "
            "make the windows longer"
        )
    tokens = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    slack = len(tokens) - samples * length
    if slack < 0:
        raise SampleError(
            f"the text has {len(tokens)} tokens, room for {len(tokens) // length} windows of {seqlen}, and {samples} "
            "were asked for; give a longer text or lower the samples or the window length"
        )
    # Places i₀ < i₁ < … out of slack + samples stand for gaps i_j - j, non-decreasing in [0, slack].
    rng = random.Random(seed)
    places = sorted(rng.sample(range(slack + samples), samples))
    starts = [place - j + j * length for j, place in enumerate(places)]
    rng.shuffle(starts)
    return torch.tensor([first + tokens[start : start + length] for start in starts], dtype=torch.int64)


def load_windows(
    sources: str | tuple[str, ...],
    processor: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    refused: Collection[str] = (),
) -> torch.Tensor:
    """Windows of a text source (see :func:`load_text`), or of several, each with its share of them.

    Args:
        sources: one, or ``NAME`` and ``NAME:WEIGHT`` of several (see ``settings.counts``).
        processor: the model's processor or tokenizer.
        samples: windows of all sources together.
        seqlen: tokens of a window.
        seed: of the choice and the order.
        refused: as for :func:`load_text`.

    Returns:
        int64 ``[samples, seqlen]`` on the CPU, in random order; the same for the same arguments.

    Raises:
        SampleError: as :func:`load_text` and :func:`text_windows`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found = []
    for name, count in counts(sources, samples).items():
        if count or samples < 1:
            text = load_text(name, processor=processor, refused=refused)
            try:
                found.append(text_windows(text, tokenizer, samples=count, seqlen=seqlen, seed=seed))
            except SampleError as error:
                if isinstance(sources, str):
                    raise
                raise SampleError(f"text source '{name}': {error}") from error
    if len(found) == 1:
        return found[0]
    order = list(range(samples))
    random.Random(seed).shuffle(order)
    return torch.cat(found)[order]


@dataclass(frozen=True)
class _Passage:
    where: str
    text: str
    lines: bool = False  # a file of text, in which a line can be named
    chat: bool = False

    def place(self, words: Collection[str]) -> str:
        """Where the first of these words stands, with the line if the text has lines."""
        starts = [self.text.find(word) for word in words if word in self.text]
        if not starts or not self.lines:
            return self.where
        return f"{self.where}, line {self.text.count(chr(10), 0, min(starts)) + 1}"


_Reader = Callable[[str, dict[str, Any]], _Passage]


def _read_file(path: Path, columns: dict[str, str], read: _Reader) -> Iterator[_Passage]:
    if path.is_dir():
        raise SampleError(f"text source '{path}' is a folder; give a .txt, .md or .jsonl file")
    if is_table(path):
        for where, row in read_rows(path, _KEYS, columns):
            yield read(where, row)
        return
    if columns:
        raise SampleError(f"text source '{path}' has no columns; leave out those in brackets")
    if path.suffix.lower() not in _SUFFIXES:
        raise SampleError(
            f"text source '{path}' ends in none of .txt, .md, .jsonl, .csv, .tsv and .parquet; rename or convert it"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise SampleError(f"text source '{path}' is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise SampleError(f"text source '{path}' cannot be read ({error.strerror}); make it readable") from error
    if "\0" in text:
        raise SampleError(f"text source '{path}' holds null bytes, as UTF-16 and binary files do; convert it to UTF-8")
    yield _Passage(str(path), text, lines=True)


def _row(where: str, row: dict[str, Any], *, processor: Any, check: bool) -> _Passage:
    text = row.get("text")
    chat = read_chat(row, None, where)
    if chat is None:
        if not isinstance(text, str):
            raise SampleError(f'{where} has no string "text"; write {{"text": "..."}} on every line, or "messages"')
        return _Passage(where, text)
    if text is not None:
        raise SampleError(f'{where} has both "text" and a conversation; keep one of them')
    if chat.images:
        raise SampleError(f"{where} shows images; give it as an image source")
    if check:
        return _Passage(where, "\n".join(texts(chat.turns)))
    if processor is None:
        raise SampleError(f"{where} is a conversation, which needs the model's chat template; give its tokenizer")
    written = without_beginning(getattr(processor, "tokenizer", processor), render(processor, chat.turns, where))
    return _Passage(where, written, chat=True)  # windows bring the beginning themselves


def _read_hub(
    source: str, columns: dict[str, str], split: str, read: _Reader, revision: str | None = None
) -> Iterator[_Passage]:
    size = 0
    wanted = tuple(columns.values()) or ("text", *TURNS, "prompt")
    for where, row in hub_rows(source, split, columns=wanted, revision=revision):
        passage = read(where, by_key(row, columns))
        yield passage
        size += len(passage.text)
        if size >= _HUB_CHARACTERS:
            break
