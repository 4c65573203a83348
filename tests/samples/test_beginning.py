"""BOS and its like: windows of calibration and of evaluation begin as the tokenizer begins every text."""

import itertools

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

from helpers.samples import noise
from spectrim.errors import SampleError
from spectrim.evaluate import perplexity
from spectrim.evaluate.language import read_text
from spectrim.samples import load_text, text_windows
from spectrim.samples.batches import model_tensors
from spectrim.samples.beginning import beginning

WORDS = " ".join(f"w{2 + i * 7 % 110}" for i in range(2000))
SPECIAL = {"<s>": 0, "</s>": 1, "[CLS]": 120, "[SEP]": 121, "[gMASK]": 122, "<sop>": 123, "<image>": 124}
FORMS = {  # template of the tokenizer, ids before a text
    "none": ("$A", []),
    "bos": ("<s> $A", [0]),
    "bos and eos": ("<s> $A </s>", [0]),
    "eos alone": ("$A </s>", []),
    "cls and sep": ("[CLS] $A [SEP]", [120]),
    "two": ("[gMASK] <sop> $A", [122, 123]),
}


def tokenizer(form: str, *, bos_token: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Word ``w7`` is token 7."""
    words = {f"w{i}": i for i in range(2, 120)} | SPECIAL | {"<unk>": 125}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    raw.post_processor = processors.TemplateProcessing(single=FORMS[form][0], special_tokens=list(SPECIAL.items()))
    named = {} if bos_token is None else {"bos_token": bos_token}
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="</s>", **named)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=126, max_position_embeddings=64, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bos_token", ["<s>", None])
def test_what_a_tokenizer_puts_first_is_seen_and_not_looked_up(form, bos_token):
    reader = tokenizer(form, bos_token=bos_token)
    assert beginning(reader, WORDS) == FORMS[form][1]
    assert beginning(reader, f"  <s> {WORDS}") == FORMS[form][1]  # a text that begins with such a token itself
    assert beginning(reader, "w5") == FORMS[form][1]


@pytest.mark.parametrize("form", FORMS)
def test_windows_of_calibration_and_of_evaluation_begin_alike(form):
    reader, first = tokenizer(form), FORMS[form][1]
    windows = text_windows(WORDS, reader, samples=40, seqlen=16, seed=0)
    read = read_text(model().config, reader, WORDS, seqlen=16, stride=None, max_tokens=500)
    shown = read.inputs(read.windows)
    assert windows.shape == (40, 16)
    assert shown.shape[1] == 16
    for each in (windows, shown):
        assert (each[:, : len(first)] == torch.tensor(first, dtype=torch.int64)).all()
    inside = windows[:, len(first) :]
    assert (inside < 120).all()
    assert (inside >= 2).all()
    places = [WORDS.index(" ".join(f"w{i}" for i in row)) for row in inside.tolist()]  # pieces of the text
    assert len(places) == 40


def test_windows_without_a_beginning_are_what_they_were():
    """Starts of windows are those of the rule, and no token is left out for a beginning that is not there."""
    reader = tokenizer("none")
    windows = text_windows(WORDS, reader, samples=125, seqlen=16, seed=3)  # all of the text
    ids = reader(WORDS)["input_ids"]
    assert sorted(windows.tolist()) == sorted(ids[i : i + 16] for i in range(0, 2000, 16))
    assert torch.equal(windows, text_windows(WORDS, tokenizer("eos alone"), samples=125, seqlen=16, seed=3))


@pytest.mark.parametrize(("seqlen", "stride"), [(16, 16), (16, 5), (7, 1), (3, 3)])
@pytest.mark.parametrize("form", ["bos", "two"])
def test_perplexity_equals_one_token_at_a_time(form, seqlen, stride):
    """Every token is predicted once, from the beginning and from what stands before it in its window."""
    llama, reader, first = model(), tokenizer(form), FORMS[form][1]
    text = " ".join(WORDS.split()[:60])
    ids, inner = reader(text, add_special_tokens=False)["input_ids"], seqlen - len(first) + 1
    result = perplexity(llama, reader, text, seqlen=seqlen, stride=stride)
    read = read_text(llama.config, reader, text, seqlen=seqlen, stride=stride, max_tokens=None)
    nll, counted = 0.0, []
    with torch.no_grad():
        for window in read.windows:
            for target in range(window.score, window.end):  # the target-th token of the text
                context = [*first, *ids[window.begin : target]]
                logits = llama(input_ids=torch.tensor([context])).logits[0, -1]
                nll += (logits.logsumexp(0) - logits[ids[target]]).item()
                counted.append(target)
                assert len(context) <= seqlen
    assert counted == list(range(60))
    assert {window.end - window.begin for window in read.windows} == {inner}
    assert (result.tokens, result.bytes) == (60, len(text.encode()))
    assert result.nll == pytest.approx(nll, rel=1e-7)


def test_windows_too_short_for_their_beginning_are_refused():
    with pytest.raises(SampleError, match="begins each with 2 of its own"):
        text_windows(WORDS, tokenizer("two"), samples=1, seqlen=2, seed=0)
    with pytest.raises(SampleError, match="no room for text"):
        perplexity(model(), tokenizer("two"), WORDS, seqlen=1)
    assert text_windows(WORDS, tokenizer("two"), samples=1, seqlen=3, seed=0).shape == (1, 3)


def test_positions_count_the_beginning():
    assert perplexity(model(), tokenizer("bos"), WORDS, seqlen=64, max_tokens=90).tokens == 90
    with pytest.raises(SampleError, match="windows of 65 tokens exceed the model's 64 positions"):
        perplexity(model(), tokenizer("bos"), WORDS, seqlen=65)


def processor(form: str, bos_token: str | None = "<s>") -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer(form, bos_token=bos_token),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("form", FORMS)
def test_prompts_begin_once_whether_template_or_tokenizer_writes_it(form):
    """In a batch, too, whose prompts differ in that; a tokenizer that adds nothing leaves prompts as they are."""
    first, reader = FORMS[form][1], processor(form)
    written = " ".join(reader.tokenizer.convert_ids_to_tokens(first))
    for prompts in itertools.product([f"{written} <image> w5", "<image> w5"], repeat=2):
        inputs = model_tensors(reader, prompts, [[noise(0)], [noise(1)]], ["a", "b"], padding=True)
        for ids in inputs["input_ids"].tolist():
            assert ids[: len(first) + 1] == [*first, 124]
            assert ids.count(first[0] if first else 0) == len(first[:1])


def test_a_template_that_writes_bos_gets_no_second_one_and_no_end():
    """Where the tokenizer's own settings add an end, which would end the prompt before its answer."""
    inputs = model_tensors(processor("bos and eos"), ["<s> <image> w5"], [[noise(0)]], ["a"])
    assert inputs["input_ids"].tolist() == [[0, 124, 124, 124, 124, 5]]


def test_the_built_in_text_begins_as_the_tokenizer_says():
    reader = tokenizer("bos")
    windows = text_windows(load_text("builtin"), reader, samples=3, seqlen=8, seed=0)
    assert windows[:, 0].tolist() == [0, 0, 0]
