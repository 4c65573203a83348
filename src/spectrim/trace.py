"""Which weights a model uses outside their linear's forward: Mamba's time-step projection, fused kernels, ties.

A factored layer would compute the whole matrix for each such read (see `lazy`), which is right and slow, and no
statistics of inputs are gathered there: these linears are kept dense.
"""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from spectrim.errors import first_line
from spectrim.lazy import DESCRIBING

logger = logging.getLogger("spectrim")

_TOKENS = 3

# Results by model, while it exists: a forward may change a model so that the next one finds less (RWKV rescales once).
_known: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@torch.no_grad()
def used_outside(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Linears whose weight one forward pass over a few tokens uses outside their own forward.

    Reads of a weight's shape, dtype or device do not count. What these tokens do not reach is not found. For a model
    that does not run on tokens alone (or not on the meta device, if it is there) the error is logged.
    """
    if model in _known:
        return _known[model] & set(names)
    linears = {name: model.get_submodule(name) for name in names}
    watch = _WeightUses({id(linear.weight): name for name, linear in linears.items()})
    with quiet(model), watch.running(linears):
        try:
            inputs = few_tokens(model, _TOKENS)
            with watch:
                model(**inputs)
            _known[model] = watch.found
        except Exception as error:  # whatever the code of a model may raise
            logger.info("%s was not traced for uses of its weights: %s", type(model).__name__, first_line(error))
    return watch.found


def as_traced(model: PreTrainedModel, empty: PreTrainedModel) -> None:
    """Let a model use its weights as the same one on the meta device does: weights that come and go are not traced."""
    _known[model] = _known.get(empty, set())


def few_tokens(model: PreTrainedModel, count: int) -> dict[str, torch.Tensor]:
    """Inputs [1, count] of a forward pass that needs no sample: token ids, of a decoder beside its encoder, too."""
    inputs = {name: value[:1, :count].to(model.device) for name, value in model.dummy_inputs.items()}
    if getattr(model.config, "is_encoder_decoder", False) and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    return inputs


class _WeightUses(TorchFunctionMode):
    """Records which weights, known by id, functions get while the linear's own forward is not running."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.found: set[str] = set()
        self._active: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in DESCRIBING:
            used = {self.weights.get(id(leaf)) for leaf in tree_leaves((args, kwargs))} - {None, *self._active}
            self.found |= {name for name in used if name is not None}
        return func(*args, **kwargs)

    @contextmanager
    def running(self, linears: dict[str, Any]) -> Iterator[None]:
        """Inside the block, the forwards of these linears say that they run."""
        hooks = []
        for name, linear in linears.items():
            begin = linear.register_forward_pre_hook(lambda *_, name=name: self._active.append(name))
            end = linear.register_forward_hook(lambda *_, name=name: self._active.remove(name), always_call=True)
            hooks += [begin, end]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block, without warnings, and without an effect on later random numbers."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    model.eval()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=devices):
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in training:
            module.training = True
