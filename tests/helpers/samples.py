"""Tokenizers, processors, texts and pictures for few-layer models, and files and data sets of them."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from spectrim.samples import ImageSample, load_text, question, text_windows

WORDS = " ".join(f"w{(7 * i * i + 3 * i) % 115 + 2}" for i in range(600))

# Writes the beginning-of-sequence token itself, as the templates of many models do.
TEMPLATE = (
    "<s>{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %} {{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} w99{% endif %}"
)


def word_tokenizer(words: int = 119, begins: bool = True) -> PreTrainedTokenizerFast:
    """Word ``w7`` is token 7; ``<s>`` is 1 and stands before every text if it ``begins``; ``<image>`` is 120."""
    vocabulary = {f"w{i}": i for i in range(words) if i not in (1, 120)} | {"<s>": 1, "<image>": 120}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": len(vocabulary) + 5}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", extra_special_tokens={"image_token": "<image>"}
    )


def llava_processor(chat_template: str | None = TEMPLATE) -> LlavaProcessor:
    """For the tiny LLaVA of families.py: 16×16 pixels, 16 image tokens."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=word_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def processor(family: str):
    return llava_processor() if family == "llava" else word_tokenizer()


def noise(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(i).save(folder / f"{i:03}.png")
    return folder


def write_jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample(seed: int, text: str, answer: str | None = None) -> ImageSample:
    return ImageSample((noise(seed),), question(text), answer)


class FakeRows(list):
    """What ``datasets.load_dataset(..., streaming=True)`` returns, as far as it is used."""

    features = None

    def shuffle(self, seed, buffer_size):
        order = np.random.default_rng(seed).permutation(len(self))
        return FakeRows(self[i] for i in order)

    def cast_column(self, column, feature):
        assert feature.decode is False
        return FakeRows({**row, column: {"bytes": row[column], "path": None}} for row in self)


class FakeImage:
    def __init__(self, decode=True):
        self.decode = decode


def fake_datasets(monkeypatch, rows, features=None):
    calls = []

    def load_dataset(name, config, *, split, streaming, revision):
        calls.append((name, config, split, streaming) if revision is None else (name, config, split, revision))
        if split == "none":
            raise ValueError("Bad split: none")
        result = FakeRows(rows)
        result.features = features
        return result

    module = types.SimpleNamespace(load_dataset=load_dataset, Image=FakeImage)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def calibrated_windows(source, *, samples, seqlen, seed=0) -> torch.Tensor:
    return text_windows(load_text(source), word_tokenizer(), samples=samples, seqlen=seqlen, seed=seed)
