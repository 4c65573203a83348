"""Makes the checkpoint format known to transformers, without importing transformers before somebody else does.

The format is registered by ``spectrim.checkpoint.quantizer``, which takes seconds to import, and has to be known before
the first ``from_pretrained`` of a model. All of these are in ``transformers.modeling_utils``: where that is loaded
already, the format is registered at once, else as soon as it is.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_WAITED_FOR = "transformers.modeling_utils"


class _AfterImport:
    """A finder that finds nothing by itself: it lets the others find the module, and registers once that has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _WAITED_FOR:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader is its own self again
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the format now, or when transformers' models are imported."""
    if _WAITED_FOR in sys.modules:
        importlib.import_module("spectrim.checkpoint.quantizer")
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
