"""spectrim: low-rank compression of vision-language models, after training and without labels.

Importing it registers the checkpoint format with transformers, so that ``from_pretrained`` opens compressed models.
"""

from spectrim.anatomy import anatomy
from spectrim.calibrate import Statistics, calibrate
from spectrim.checkpoint import load, load_processor, push, read_provenance, save
from spectrim.errors import SpectrimError
from spectrim.evaluate import evaluate
from spectrim.inspect_ import inspect
from spectrim.layers import lora_targets
from spectrim.pipeline import Compression, compress, compression
from spectrim.plan import Plan
from spectrim.recipe import Recipe

__all__ = [
    "Compression",
    "Plan",
    "Recipe",
    "SpectrimError",
    "Statistics",
    "anatomy",
    "calibrate",
    "compress",
    "compression",
    "evaluate",
    "inspect",
    "load",
    "load_processor",
    "lora_targets",
    "push",
    "read_provenance",
    "save",
]
