"""How a text begins for a model: the tokens that its tokenizer puts before every text, such as BOS."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from spectrim.errors import SampleError

_PROBE = 200  # characters of a text that are enough to see what comes before them


def beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids that the tokenizer puts before ``text`` when it adds special tokens; often BOS, often none.

    They are read off an encoded text, since names and settings of tokenizers may contradict what they do. Tokens after
    a text, such as EOS or SEP, do not count. A model that is always shown these tokens never saw a text without them,
    so every window of text begins with them: in calibration, in probes and in evaluation.

    Raises:
        SampleError: the text cannot be found between the special tokens.
    """
    probe = text.strip()[:_PROBE]
    plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(probe, verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    raise SampleError(
        f"{type(tokenizer).__name__} changes a text when it adds special tokens, so that what it puts before one "
        "is unknown; repair the tokenizer"
    )


def without_beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without the tokens that the tokenizer puts before one, where they are written out in it."""
    for token in tokenizer.convert_ids_to_tokens(beginning(tokenizer, text)):
        text = text.removeprefix(str(token))
    return text


def with_beginning(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str] | None:
    """The texts, each with the tokenizer's beginning written out, if at least one of them has it already; else None.

    Chat templates may write BOS themselves, and the tokenizer must then add nothing.
    """
    first = beginning(tokenizer, texts[0])
    written = "".join(map(str, tokenizer.convert_ids_to_tokens(first)))
    starts = [start for start in (first, [tokenizer.bos_token_id]) if start and start != [None]]

    def has_one(text: str) -> bool:
        ids = tokenizer(text[:_PROBE], add_special_tokens=False, verbose=False)["input_ids"]
        return any(ids[: len(start)] == start for start in starts)

    has = [has_one(text) for text in texts]
    return [text if there else written + text for text, there in zip(texts, has, strict=True)] if any(has) else None
