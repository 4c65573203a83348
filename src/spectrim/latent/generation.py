"""Latent caches for every `generate` of a model."""

from types import MethodType
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from spectrim.errors import ModelError
from spectrim.latent.cache import LatentCache
from spectrim.latent.folding import unfold

_PREPARE = "_prepare_cache_for_generation"  # of transformers: makes the cache of one `generate`, by what was asked for


def use_latent_cache(model: PreTrainedModel, latent_dtype: str | None = None, folded: bool = False) -> None:
    """Let every `generate` of a model make a `LatentCache` where it would make the ordinary cache.

    Caches that are passed to `generate`, and ``use_cache=False``, are as before. Raises ModelError as `LatentCache`
    does; and from `generate`, for another kind of cache that its config asks for.
    """
    if not callable(getattr(type(model), _PREPARE, None)):
        raise ModelError(f"{type(model).__name__} does not generate with caches; leave latent_cache out")
    LatentCache(model, latent_dtype, folded)  # what it refuses is refused now
    vars(model)["_latent_cache"] = (latent_dtype, folded)
    vars(model)[_PREPARE] = MethodType(_prepare, model)  # copies of the model have a method of their own


def use_ordinary_cache(model: PreTrainedModel) -> None:
    """Take that back, and products that were folded."""
    vars(model).pop(_PREPARE, None)
    unfold(model)


def _prepare(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Make a latent cache where transformers would make an ordinary one."""
    given = {name for name in ("cache", "past_key_values") if model_kwargs.get(name) is not None}
    getattr(type(model), _PREPARE)(model, generation_config, model_kwargs, *args, **kwargs)
    for name in {"cache", "past_key_values"} & model_kwargs.keys() - given:
        made = model_kwargs[name]
        if type(made) is not DynamicCache or made.offloading:
            asked = generation_config.cache_implementation
            raise ModelError(f"a latent cache is no cache of the kind {asked!r}; leave cache_implementation out")
        model_kwargs[name] = LatentCache(model, *model._latent_cache)
        if generation_config.is_assistant:
            model_kwargs[name].activate_past_recording()
