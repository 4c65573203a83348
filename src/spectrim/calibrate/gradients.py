"""Gradient passes: one sample forward and backward, and what its linears' output gradients add to the sums."""

from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.hooks import Hooked, given
from spectrim.calibrate.labels import Labelled
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.positions import Positions, positions
from spectrim.errors import ModelError, first_line
from spectrim.linear import Linear
from spectrim.maths.roots import wide


class GradientWatch(Hooked):
    """Watches the linears of a model while one sample runs through it, forward and backward.

    Parameters are frozen; the graph begins at the outputs of the first linears, so that a linear costs nothing before
    them. No gradient of a weight is formed unless ``fisher`` asks for it (or it is the cheaper way to a trace).
    Outputs and inputs are those of the linear itself, whatever the model writes into them afterwards.

    Args:
        modules: the linears and their modules.
        sums: grows by this sample.
        counted: the positions of this sample that count.
        forms: by linear, how output moments are kept; none are gathered for others.
        fisher: gather the gradient statistic of weights, with gradients multiplied by this; None gathers none.
        copied: linears whose inputs and outputs are copied, since the model writes into them.
    """

    def __init__(
        self,
        modules: Mapping[Linear, nn.Module],
        sums: Sums,
        counted: Positions,
        forms: Mapping[str, CurvatureForm],
        fisher: float | None,
        copied: Collection[str] = (),
    ) -> None:
        super().__init__(modules)
        self._copied = copied
        self._seen: list[tuple[str, torch.Tensor, int]] = []  # linear, what it read or gave, and its version then
        self._sums, self._counted = sums, counted
        self._forms, self._fisher = forms, fisher
        self._calls: Counter[str] = Counter()
        self._waiting: dict[Linear, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def _hook(self, linear: Linear, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(partial(self._after, linear), with_kwargs=True)

    def finish(self, where: str) -> None:
        """Add the gradients of linears that ran several times; then as :meth:`Hooked.finish`."""
        for linear, parts in self._waiting.items():
            self._add(linear, torch.cat([g for g, _ in parts]), torch.cat([x for _, x in parts]))
        super().finish(where)

    def written(self) -> set[str]:
        """Linears whose input or output the model has written into since; asked once, between the two passes."""
        written = {name for name, seen, version in self._seen if seen._version != version}
        self._seen.clear()
        return written

    def _after(
        self,
        linear: Linear,
        _module: nn.Module,
        args: tuple[torch.Tensor, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> Any:
        x, begins, copied = given(args, kwargs).detach(), not output.requires_grad, linear.name in self._copied
        if begins:
            output.requires_grad_()
        if copied:
            x = x.clone()
        self._seen += [(linear.name, x, x._version), (linear.name, output, output._version)]
        self._calls[linear.name] += 1
        output.register_hook(partial(self._backward, linear, x))
        # Autograd lets nobody write into a leaf, and loses the hooks of other outputs that are written into.
        return output.clone() if begins or copied else output

    def _backward(self, linear: Linear, x: torch.Tensor, g: torch.Tensor) -> None:
        if x.numel() == 0:  # an expert that no token chose
            return
        g, x = self._counted.select(linear.place, g), self._counted.select(linear.place, x)
        if self._calls[linear.name] == 1:
            self._add(linear, g, x)
        else:  # a linear that runs several times: its calls are one gradient
            self._waiting.setdefault(linear, []).append((g, x))

    def _add(self, linear: Linear, g: torch.Tensor, x: torch.Tensor) -> None:
        """Gradients [positions, out] and inputs [positions, in] of the whole sample."""
        if self._fisher is not None:
            gradient = wide(g).T @ wide(x) * self._fisher  # [out, in]
            self._finite.append((f"the gradient of {linear.name}", self._sums.add_fisher(linear.name, gradient)))
        if (form := self._forms.get(linear.name)) is not None:
            self._finite.append((f"the gradient of {linear.name}", self._sums.output(linear, form).add(g, x)))


def run_gradients(
    model: PreTrainedModel,
    modules: Mapping[Linear, nn.Module],
    sample: Labelled,
    sums: Sums,
    forms: Mapping[str, CurvatureForm],
    *,
    fisher: bool,
) -> None:
    """Run one sample through a prepared model and back, and add its gradients to ``sums``.

    The loss is the sum of the cross-entropies of the labelled tokens, in nats; a mean would underflow in float16 and
    depend on the sample's length.

    Raises:
        ModelError: the model returns no logits for its tokens, or cannot be differentiated.
        NumericalError: NaN or infinity; names the linear and the sample.
    """
    inputs, where = sample.inputs, sample.labelled
    counted = positions(model, inputs, image_tokens_only=False)
    scale = 1 / int(where.sum()) if fisher else None

    def forward(copied: Collection[str] = ()) -> tuple[GradientWatch, torch.Tensor | None]:
        with GradientWatch(modules, sums, counted, forms, scale, copied) as watch:
            return watch, getattr(model(**inputs, use_cache=False), "logits", None)

    with torch.enable_grad():
        watch, logits = forward()
        if written := watch.written():
            watch, logits = forward(written)
        if logits is None or logits.shape[1] != inputs["input_ids"].shape[1]:
            raise ModelError(
                f"{type(model).__name__} returns no logits for its tokens; gradients need a model with a language head"
            )
        predicted = wide(logits[0, :-1][where])  # [labels, vocabulary]
        loss = functional.cross_entropy(predicted, sample.targets(predicted), reduction="sum")
        try:
            loss.backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a part that knows no derivative, or that wrote into what its own needs
            raise ModelError(
                f"{type(model).__name__} cannot be differentiated ({first_line(error)}); choose a recipe that "
                "needs no gradients, such as jw-svd"
            ) from error
    watch.finish(f"{sample.modality} sample {sums.batches + 1} (gradients)")
    sums.batches += 1
    sums.samples += 1
    sums.labels += int(where.sum())
