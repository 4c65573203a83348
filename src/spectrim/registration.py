"""Makes the checkpoint format known to transformers, without importing transformers before somebody else does.

The format is registered by ``spectrim.checkpoint.saving``, which takes seconds to import, and has to be known before
anybody opens or saves a checkpoint. All who do so import ``transformers.modeling_utils``, which has
``from_pretrained``, or at least ``transformers.quantizers``, which reads the quantization config (lm-eval does that
first). Where one of them is loaded already, the format is registered at once, else as soon as one is. Where a module of
spectrim imported it and is not whole yet, that waits for the next import after it: what registers the format may need
that module. A model's class is one.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_MODELS, _QUANTIZERS = "transformers.modeling_utils", "transformers.quantizers"


class _AfterImport:
    """Lets the other finders find the module, and registers the format once that has run."""

    def __init__(self) -> None:
        self._due = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self._due and not _is_own(name):  # else what registers could import that module beneath its own import
            self._register()
        if name not in (_MODELS, _QUANTIZERS):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((candidate for finder in others if (candidate := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # the loader's own method again
            run(module)
            if name == _QUANTIZERS and _MODELS in sys.modules:
                return  # imported by the models, which are not whole yet; their turn comes
            self._due = True
            self._register()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _register(self) -> None:
        ours = [x for name, x in list(sys.modules.items()) if _is_own(name)]
        if any(getattr(getattr(x, "__spec__", None), "_initializing", False) for x in ours):
            return
        self._due = False
        importlib.import_module("spectrim.checkpoint.saving")
        if self in sys.meta_path:  # until here, so that an import that fails can be tried again
            sys.meta_path.remove(self)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == "spectrim"


def register() -> None:
    """Register the format now, or when transformers' models or quantizers are imported."""
    if {_MODELS, _QUANTIZERS} & sys.modules.keys():
        importlib.import_module("spectrim.checkpoint.saving")
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
