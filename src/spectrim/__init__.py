"""spectrim: low-rank compression of vision-language models, after training and without labels.

Importing it makes the checkpoint format known to transformers, so that ``from_pretrained`` opens compressed models. All
else is imported when it is first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spectrim.registration import register as _register

if TYPE_CHECKING:
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

_HOMES = {
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
    "inspect": "inspect_",
    "lora_targets": "layers",
    "Compression": "pipeline",
    "compress": "pipeline",
    "compression": "pipeline",
    "Plan": "plan",
    "Recipe": "recipe",
}

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


class _Package(ModuleType):
    """This package, whose public names are imported when they are asked for.

    Some functions are called as the module that they live in (``anatomy``, ``calibrate``, ``evaluate``). The import
    system sets a module as an attribute of its package when it is loaded; here the function keeps the name.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'spectrim' has no attribute '{name}'")
        value = getattr(importlib.import_module(f"spectrim.{_HOMES[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules[__name__].__class__ = _Package
_register()
