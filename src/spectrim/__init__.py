"""spectrim: low-rank compression of vision-language models, after training and without labels.

Importing it makes the checkpoint format known to transformers, so that ``from_pretrained`` opens compressed models. All
else is imported when it is first used.
"""

from typing import TYPE_CHECKING

from spectrim.public import import_when_asked as _import_when_asked
from spectrim.registration import register as _register

if TYPE_CHECKING:
    from spectrim.anatomy import anatomy
    from spectrim.calibrate import Statistics, calibrate
    from spectrim.checkpoint import load, load_processor, push, read_provenance, save
    from spectrim.errors import SpectrimError
    from spectrim.evaluate import evaluate
    from spectrim.latent import LatentCache
    from spectrim.mismatch.analysis import inspect
    from spectrim.pipeline import compress, compression, pareto
    from spectrim.pipeline.stages import Compression
    from spectrim.plan.plan import Plan
    from spectrim.recipe import Recipe
    from spectrim.report import report
    from spectrim.storage.lora import lora_targets

_HOMES = {
    "LatentCache": "latent",
    "anatomy": "anatomy",
    "Statistics": "calibrate",
    "calibrate": "calibrate",
    "load": "checkpoint",
    "load_processor": "checkpoint",
    "push": "checkpoint",
    "read_provenance": "checkpoint",
    "save": "checkpoint",
    "SpectrimError": "errors",
    "evaluate": "evaluate",
    "inspect": "mismatch.analysis",
    "lora_targets": "storage.lora",
    "Compression": "pipeline.stages",
    "compress": "pipeline",
    "compression": "pipeline",
    "pareto": "pipeline",
    "Plan": "plan",
    "Recipe": "recipe",
    "report": "report",
}

__all__ = [
    "Compression",
    "LatentCache",
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
    "pareto",
    "push",
    "read_provenance",
    "report",
    "save",
]


_import_when_asked(__name__, _HOMES)
_register()
