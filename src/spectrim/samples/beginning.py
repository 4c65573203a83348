"""How a text begins for a model: the tokens that its tokenizer puts before every text, such as BOS."""

from transformers import PreTrainedTokenizerBase

from spectrim.errors import SampleError

_PROBE = 200  # characters of a text that are enough to see what comes before them


def beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids that the tokenizer puts before ``text`` when it adds special tokens; often BOS, often none.

    What it adds is looked at and not looked up, for names and settings of tokenizers contradict what they do. Tokens
    after a text, such as EOS or SEP, are none of it. A model that is always shown these tokens never saw a text
    without, so every window of text begins with them: in calibration, in probes and in evaluation.

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
        "cannot be told; repair the tokenizer"
    )


def beginning_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The tokens of :func:`beginning` as they are written in a prompt."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(beginning(tokenizer, text))))
