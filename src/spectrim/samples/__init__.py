"""Where samples come from and how they become model inputs: text, images with an instruction, batches."""

from spectrim.samples.batches import Batch, Modality, chat_prompt, data_fingerprint, image_batches, text_batches
from spectrim.samples.chat import question
from spectrim.samples.images import ImageSample, ImageSamples, load_images
from spectrim.samples.text import load_text, load_windows, text_windows
from spectrim.samples.tokens import check_tokens, media_ids, media_tokens

__all__ = [
    "Batch",
    "ImageSample",
    "ImageSamples",
    "Modality",
    "chat_prompt",
    "check_tokens",
    "data_fingerprint",
    "image_batches",
    "load_images",
    "load_text",
    "load_windows",
    "media_ids",
    "media_tokens",
    "question",
    "text_batches",
    "text_windows",
]
