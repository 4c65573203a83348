"""How the layers of a model run: as fast as they can, in as little memory, or as their definition says."""

import logging
from collections import Counter

from torch import nn

from spectrim.errors import ModelError
from spectrim.experts import stack_experts
from spectrim.storage.base import StoredLayer

logger = logging.getLogger("spectrim")

RUNTIMES = ("auto", "speed", "memory", "reference")


def set_runtime(model: nn.Module, runtime: str) -> dict[str, int]:
    """Choose how the layers of a model run (see `run_as` of each); returns how many run in which layout.

    Logs them. Raises ModelError for a name that is none of the runtimes.
    """
    if runtime not in RUNTIMES:
        raise ModelError(f"there is no runtime {runtime!r}; choose from {', '.join(RUNTIMES)}")
    found = [module.run_as(runtime) for module in model.modules() if isinstance(module, StoredLayer)]
    if runtime != "reference":
        stack_experts(model)
    layouts = Counter(layout for layout in found if layout is not None)
    if layouts:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(layouts.items()))
        logger.debug("layers run with the runtime %s in these layouts: %s", runtime, listed)
    return dict(layouts)
