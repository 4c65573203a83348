"""What the rest of the house knows of a form of storage, and the register of forms.

A form says which options a linear has in it (bytes and predicted error), makes the stored tensors of the one that is
chosen, and builds the layer that runs them. Planning, compensation, saving, loading and LoRA ask the classes here, and
never for a type. A new form is one file with a :class:`Form` and a :class:`StoredLayer`, and one call of `register`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.away import here
from spectrim.errors import ModelError, NumericalError
from spectrim.lazy import LazyWeight
from spectrim.linear import Linear
from spectrim.maths.roots import check_finite
from spectrim.recipe import QuantizePart
from spectrim.storage.problem import Problem

DENSE = "dense"  # the form of a linear that is left as it is

Spec = Mapping[str, Any]
"""What a plan and a config say of one linear beside the name of its form; JSON types."""

Tensors = Mapping[str, torch.Tensor]
"""The stored tensors of one linear without its bias, by their names in the layer: ``A.weight``, ``weight_packed``."""


@dataclass(frozen=True)
class Options:
    """Ways to store one linear in one form.

    ``bytes`` int64 [n]; ``error`` float64 [n] in the unit of :attr:`Problem.left`; ``spec`` gives the spec of each.
    """

    form: str
    bytes: np.ndarray
    error: np.ndarray
    spec: Callable[[int], Spec]

    @classmethod
    def listed(cls, form: str, rows: Sequence[tuple[int, float, Spec]]) -> "Options":
        """Of bytes, error and spec one by one."""
        sizes, errors, specs = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(form, np.array(sizes, np.int64), np.array(errors, np.float64), specs.__getitem__)


class StoredLayer(nn.Module, ABC):
    """A layer that runs a linear in a stored form. Its state dict is what a file holds."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    runtime = "reference"  # what `run_as` was asked for last

    @property
    @abstractmethod
    def form(self) -> str:
        """Name of its form."""

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """What makes an empty layer of the same shapes, by :meth:`Form.build`."""

    @abstractmethod
    def product(self) -> torch.Tensor:
        """The weight [out, in] that the layer computes with, in its dtype; gradients flow to its parameters.

        Raises ModelError where tensors have no values (offloaded) or carry an adapter.
        """

    def change(self, W: torch.Tensor) -> torch.Tensor:
        """What taking the place of the dense weight W [out, in] changes in it, as far as anything reads it."""
        return self.product() - W

    def loaded(self) -> None:
        """Bring what is not stored up to date after tensors were written. Raises ModelError for impossible values."""

    def run_as(self, runtime: str) -> str | None:
        """Choose a faster or a smaller way to run; returns the name of the layout, None where there is no choice.

        The state dict stays the same. `runtime` is ``auto``, ``speed``, ``memory`` or ``reference``. Layers that have a
        choice keep it in ``runtime``.
        """
        return None

    def _load_from_state_dict(self, *args: Any) -> None:
        self.run_as("reference")  # whose tensors are those of files
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        runtime = self.runtime  # a layout may not be there in another dtype or on another device
        self.run_as("reference")
        super()._apply(fn, recurse)
        if runtime != "reference":
            self.run_as(runtime)
        return self

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out, in] for code that asks for it; its values are computed whenever they are read."""
        trained = any(parameter.requires_grad for parameter in self.trained())
        return LazyWeight.of(self.product, (self.out_features, self.in_features), self.some_float(), trained)

    def trained(self) -> list[nn.Parameter]:
        """Its parameters but for the bias; none where all that is stored is integers."""
        return [parameter for name, parameter in self.named_parameters() if name != "bias"]

    def some_float(self) -> torch.Tensor:
        """A tensor of the dtype and on the device of the layer."""
        return next(x for x in chain(self.parameters(), self.buffers()) if x.is_floating_point())

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The dense layer of the same map, in the same dtype and on the same device; ModelError as of `product`."""
        W = self.product()
        like: dict[str, Any] = {"device": W.device, "dtype": W.dtype}
        dense = skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None, **like)
        dense.weight.copy_(W)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def tensors(self) -> Tensors:
        """The stored tensors of the layer by name, without its bias."""
        return {name: tensor for name, tensor in self.state_dict().items() if name != "bias"}

    def expected(self) -> Tensors:
        """The same of an empty layer of this form, shape and spec, on the meta device."""
        return tensors_of(self.form, self.in_features, self.out_features, self.spec, self.some_float().dtype)

    def check_values(self) -> None:
        """Raise ModelError for a layer that is offloaded, in whole or in part."""
        if any(tensor.is_meta for tensor in chain(self.parameters(), self.buffers())):
            raise ModelError("tensors on the meta device have no values; load the model without offloading")


class Form(ABC):
    """One form of storage."""

    name: str
    marker: str  # a tensor that every layer of the form stores, such as "B.weight": by it files find their layers
    searches = False  # options take long to find, and are kept on disk
    alternates = False  # has factors that adaComp can fit
    replaces: type[nn.Module] = nn.Linear  # exactly what modules its layers take the place of

    @abstractmethod
    def options(self, problem: Problem) -> Options:
        """The ways to store a linear in this form, and what each costs; none where the recipe rules the form out."""

    @abstractmethod
    def make(self, problem: Problem, spec: Spec) -> Tensors:
        """The stored tensors of one option, by the names of :meth:`build`'s state dict.

        Raises NumericalError for NaN or infinity.
        """

    @abstractmethod
    def build(self, linear: nn.Linear, spec: Spec) -> nn.Module:
        """An empty :class:`StoredLayer` of the shape, dtype and device of a dense one; it takes over the bias.

        None of its tensors may be called ``weight``: a file has an empty one there, which stops other loaders.

        Raises ModelError, before anything is allocated, for a spec that does not fit the shape.
        """

    def alternate(
        self, problem: Problem, spec: Spec, second: torch.Tensor, cross: torch.Tensor, rounds: int, formed: torch.dtype
    ) -> Tensors:
        """Tensors fitted in turn to targets t on inputs x' (adaComp); of forms that say so by ``alternates``.

        Args:
            problem: the weight, and the metrics of the fit before.
            second: E[x' x'ᵀ], [in, in] float64.
            cross: E[t x'ᵀ], [out, in] float64.
            rounds, formed: as of :func:`spectrim.maths.alternating.alternate`.
        """
        raise NotImplementedError

    def heads(self, spec: Spec) -> int | None:
        """Parts of the outputs that have to be factored apart; None where the form does not mind.

        Raises ModelError for a spec that no linear can have.
        """
        return None

    def least(self, linear: Linear, quantize: QuantizePart) -> int:
        """Bytes below which there is no option, as far as is known before samples run; 0 where that is not known."""
        return 0

    def check(self, linear: Linear, spec: Spec) -> None:
        """Raises ModelError for a spec that this linear cannot have, in words that continue "'NAME' …"."""
        self.build(empty_linear(linear.in_features, linear.out_features, linear.dtype), spec)

    def nbytes(self, linear: Linear, spec: Spec) -> int:
        """Stored bytes, bias not counted."""
        shape = linear.in_features, linear.out_features
        return sum(tensor.nbytes for tensor in tensors_of(self.name, *shape, spec, linear.dtype).values())

    def params(self, linear: Linear, spec: Spec) -> int:
        """Numbers that stand for the weight, as papers count them: those of all float tensors."""
        tensors = tensors_of(self.name, linear.in_features, linear.out_features, spec, linear.dtype).values()
        return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


_FORMS: dict[str, Form] = {}


def register(form: Form) -> Form:
    """Make a form known to planning, saving and loading; returns it. A form of the same name is replaced."""
    _FORMS[form.name] = form
    return form


def forms() -> tuple[Form, ...]:
    """All forms, in the order in which they were registered."""
    return tuple(_FORMS.values())


def form(name: str) -> Form:
    """A form by its name. Raises ModelError for one that nobody registered."""
    try:
        return _FORMS[name]
    except KeyError:
        raise ModelError(
            f"there is no form of storage '{name}', only {', '.join(_FORMS)}; import the package that registers it"
        ) from None


def empty_linear(in_features: int, out_features: int, dtype: torch.dtype) -> nn.Linear:
    """A linear on the meta device, without bias."""
    return nn.Linear(in_features, out_features, bias=False, dtype=dtype, device="meta")


def tensors_of(
    name: str, in_features: int, out_features: int, spec: Spec, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The stored tensors of a form by name, on the meta device: what a file of such a layer holds."""
    return form(name).build(empty_linear(in_features, out_features, dtype), spec).state_dict()


def checked_linear(model: nn.Module, name: str, kind: str = DENSE) -> Any:
    """The dense module of that name, of the class that a form replaces: an nn.Linear for almost all of them.

    Raises ModelError where there is none, or one of a subclass.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"the model has no module {name!r}; forms are keyed by the names of its linears") from None
    wanted = form(kind).replaces
    if type(module) is not wanted:  # a subclass may compute something else
        raise ModelError(f"{name!r} is a {type(module).__name__}, not an nn.{wanted.__name__}; keep it dense")
    return module


def exchange(model: nn.Module, layers: Mapping[str, tuple[str, Spec]]) -> None:
    """Exchange dense linears of `model`, in place, for empty layers of the same shape, dtype, device and bias.

    `layers` maps runtime names (``model.get_submodule(name)``) to a form and its spec. Stored numbers are NaN, or meta
    tensors where the dense weight is one. Raises ModelError, before anything is changed, for a name that is not exactly
    an ``nn.Linear`` and for a spec that its layer cannot have.
    """
    built: dict[str, nn.Module] = {}
    for name, (kind, spec) in layers.items():
        try:
            wanted = form(kind)
        except ModelError as error:
            raise ModelError(f"{name!r}: {error}") from None
        linear = checked_linear(model, name, kind)
        try:
            built[name] = wanted.build(linear, spec)
        except ModelError as error:
            raise ModelError(f"{name!r}: {error}") from None
    for name, layer in built.items():
        model.set_submodule(name, layer)


def made(problem: Problem, kind: str, spec: Spec) -> Tensors:
    """What :meth:`Form.make` makes. Raises NumericalError for NaN or infinity; names the linear."""
    try:
        check_finite("its weight", problem.W)
        return form(kind).make(problem, spec)
    except NumericalError as wrong:
        raise NumericalError(f"{problem.linear.name}: {wrong}") from wrong


def filled(linear: nn.Linear, kind: str, spec: Spec, tensors: Tensors) -> nn.Module:
    """The layer of a form that takes the place of a dense one, with its bias and these tensors."""
    layer = form(kind).build(here(linear), spec)
    missing, unexpected = layer.load_state_dict(dict(tensors), strict=False)
    if unexpected or set(missing) - {"bias"}:
        raise ModelError(f"the tensors {sorted(tensors)} are not those of the form '{kind}' with {dict(spec)}")
    return layer


def stored_layers(model: nn.Module) -> dict[str, StoredLayer]:
    """Every layer in a stored form by run-time name; the outermost alone, since factors may be stored layers, too."""
    layers: dict[str, StoredLayer] = {}
    inside: str | None = None
    for name, module in model.named_modules():  # parents come before their children
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, StoredLayer):
            inside = f"{name}." if name else ""
            layers[name] = module
    return layers
