"""Where samples come from and how they become model inputs: text, images with an instruction, batches."""

from spectrim.samples.batches import Batch, Modality, data_fingerprint, image_batches, text_batches
from spectrim.samples.images import ImageSample, load_images
from spectrim.samples.text import load_text, text_windows

__all__ = [
    "Batch",
    "ImageSample",
    "Modality",
    "data_fingerprint",
    "image_batches",
    "load_images",
    "load_text",
    "text_batches",
    "text_windows",
]
