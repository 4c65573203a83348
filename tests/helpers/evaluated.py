"""Opinionated random models, a processor and questions: what evaluations are tested on."""

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from spectrim.evaluate import Question

TEXT = "Sight and language share one budget; naïve rules spend it on one of them – and the other goes blind. " * 3


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} => "
)


COLOURS = ["red", "green", "blue", "black", "white", "orange", "purple", "yellow"]


def make_tokenizer(*, bos: bool = True, in_prompts: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Which colour is the shape there and how many are one budget"], trainer)
    if in_prompts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **names)


TOKENIZER = make_tokenizer()


def backbone() -> LlamaConfig:
    # A wide initialization makes a random model opinionated, so that its answers differ and no argmax is a near tie.
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
    return LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=1, **sizes, **more)


def make_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(backbone()).double().eval()


def make_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = LlavaConfig(vision_config=tower, text_config=backbone(), image_token_index=2, image_seq_length=4)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.vision_tower.parameters():  # CLIP's own initialization hardly sees the image
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def make_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=make_tokenizer(in_prompts=True),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_questions() -> list[Question]:
    texts = {"colour": "Which colour is it?", "count": "How many shapes are there in the picture, all in all?"}
    return [
        Question(task, Image.new("RGB", (40, 30), colour), text, "one")
        for colour in COLOURS
        for task, text in texts.items()
    ]
