"""A key/value cache that keeps the latents of keys and values factored head by head (docs/methods.md, section 10).

Names are imported when they are asked for: transformers is imported with them.
"""

from typing import TYPE_CHECKING

from spectrim.public import import_when_asked as _import_when_asked

if TYPE_CHECKING:
    from spectrim.latent.cache import LatentCache
    from spectrim.latent.generation import use_latent_cache, use_ordinary_cache

_HOMES = {"LatentCache": "cache", "use_latent_cache": "generation", "use_ordinary_cache": "generation"}

__all__ = ["LatentCache", "use_latent_cache", "use_ordinary_cache"]

_import_when_asked(__name__, _HOMES)
