"""Gradient passes: samples forward and backward, and what their linears' output gradients add to the sums."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from spectrim.calibrate.forms import CurvatureForm
from spectrim.calibrate.hooks import Hooked, given
from spectrim.calibrate.labels import Labelled
from spectrim.calibrate.moments import Sums
from spectrim.calibrate.positions import Positions, positions
from spectrim.calibrate.recompute import recomputing
from spectrim.calibrate.relay import Leg, Relay
from spectrim.errors import ModelError, first_line
from spectrim.linear import Linear
from spectrim.maths.roots import wide


class _MixedError(BaseException):
    """Ends a forward pass in which a linear reads several samples that cannot be told apart."""


class GradientWatch(Hooked):
    """Watches the linears of a model while samples of equal shapes run through it, forward and backward.

    Parameters are frozen; the graph begins at the outputs of the first linears, so that a linear costs nothing before
    them. No gradient of a weight is formed unless ``fisher`` asks for it (or it is the cheaper way to a trace).
    Outputs and inputs are those of the linear itself, whatever the model writes into them afterwards.

    Args:
        modules: the linears and their modules.
        sums: grows by these samples.
        counted: the positions of these samples that count.
        forms: by linear, how output moments are kept; none are gathered for others.
        fisher: gather the gradient statistic of weights, with each sample's gradients multiplied by its entry here;
            None gathers none.
        copied: linears whose inputs and outputs are copied, since the model writes into them.
    """

    def __init__(
        self,
        modules: Mapping[Linear, nn.Module],
        sums: Sums,
        counted: Positions,
        forms: Mapping[str, CurvatureForm],
        fisher: Sequence[float] | None,
        copied: Collection[str] = (),
    ) -> None:
        super().__init__(modules)
        self._copied = copied
        self._seen: list[tuple[str, torch.Tensor, int]] = []  # linear, what it read or gave, and its version then
        self._sums, self._counted = sums, counted
        self._forms, self._fisher = forms, fisher
        self._calls: Counter[str] = Counter()
        self._waiting: dict[Linear, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self._again = False  # whether a block runs again, in the backward pass

    def _hook(self, linear: Linear, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(partial(self._after, linear), with_kwargs=True)

    def finish(self, where: str) -> None:
        """Add the gradients of linears that ran several times; then as :meth:`Hooked.finish`."""
        for linear, calls in self._waiting.items():
            samples = [[torch.cat(parts) for parts in zip(*one, strict=True)] for one in zip(*calls, strict=True)]
            g, x = (torch.cat(parts) for parts in zip(*samples, strict=True))
            self._add(linear, g, x, [len(one[0]) for one in samples])
        super().finish(where)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside the block, what runs makes a graph again whose gradients are watched already."""
        self._again = True
        try:
            yield
        finally:
            self._again = False

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
        if self._again:
            return output.clone() if begins or copied else output
        if self._counted.shape[0] > 1 and self._counted.split(linear.place, output.shape[:-1]) is None:
            raise _MixedError
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
        sizes = self._counted.split(linear.place, g.shape[:-1])
        assert sizes is not None  # seen in the forward pass
        g, x = self._counted.select(linear.place, g), self._counted.select(linear.place, x)
        if self._calls[linear.name] == 1:
            self._add(linear, g, x, sizes)
        else:  # a linear that runs several times: its calls are one gradient
            self._waiting.setdefault(linear, []).append([*zip(g.split(sizes), x.split(sizes), strict=True)])

    def _add(self, linear: Linear, g: torch.Tensor, x: torch.Tensor, sizes: list[int]) -> None:
        """Gradients [positions, out] and inputs [positions, in] of whole samples, of so many positions each."""
        if self._fisher is not None:
            for one, read, factor in zip(g.split(sizes), x.split(sizes), self._fisher, strict=True):
                gradient = wide(one).T @ wide(read) * factor  # [out, in]
                self._finite.append((f"the gradient of {linear.name}", self._sums.add_fisher(linear.name, gradient)))
        if (form := self._forms.get(linear.name)) is not None:
            self._finite.append((f"the gradient of {linear.name}", self._sums.output(linear, form).add(g, x, sizes)))


def run_gradients(
    model: PreTrainedModel,
    modules: Mapping[Linear, nn.Module],
    samples: Sequence[Labelled],
    sums: Sums,
    forms: Mapping[str, CurvatureForm],
    *,
    fisher: bool,
    blocks: Mapping[str, nn.Module] | None = None,
    relay: Relay | None = None,
) -> bool:
    """Run samples of equal shapes through a prepared model and back, and add their gradients to ``sums``.

    The loss is the sum of the cross-entropies of the labelled tokens, in nats; a mean would underflow in float16 and
    depend on the sample's length. `blocks` are run again in the backward pass, unless the model writes into what they
    are called with. With a `relay`, passes hand gradients on. Returns False, with nothing added, where several samples
    cannot be told apart in what some linear reads, as with experts.

    Raises:
        ModelError: the model returns no logits for its tokens, or cannot be differentiated.
        NumericalError: NaN or infinity; names the linear and the sample.
    """
    inputs = {name: torch.cat([sample.inputs[name] for sample in samples]) for name in samples[0].inputs}
    counted = positions(model, inputs, image_tokens_only=False)
    labels = [int(sample.labelled.sum()) for sample in samples]
    scales = [1 / count for count in labels] if fisher else None
    copied: Collection[str] = ()
    blocks = blocks or {}
    key = (sums.samples, len(samples))
    if relay is not None:
        relay.ready(inputs)
    for attempt in range(2):
        with torch.enable_grad(), GradientWatch(modules, sums, counted, forms, scales, copied) as watch:
            logits = None
            leg = nullcontext(Leg()) if relay is None else relay.leg(key)
            try:
                with recomputing(blocks, watch.again) as boundaries, leg as end:
                    logits = getattr(model(**inputs, use_cache=False), "logits", None)
            except _MixedError:
                return False
            written, moved = watch.written(), boundaries.written()
            if attempt == 0 and (written or moved):
                copied, blocks, logits = written, {} if moved else blocks, None
                continue
            output, gradient = end.output, end.gradient
            if output is None:
                output, gradient = _slope(model, logits, samples)
            if output.requires_grad or relay is None:  # linears of one of several passes may not lead there
                _backward(model, output, gradient)
            break
    several = f" to {sums.samples + len(samples)}" if len(samples) > 1 else ""
    watch.finish(f"{samples[0].modality} sample {sums.samples + 1}{several} (gradients)")
    sums.batches += 1
    sums.samples += len(samples)
    sums.labels += sum(labels)
    return True


def _slope(
    model: PreTrainedModel, logits: torch.Tensor | None, samples: Sequence[Labelled]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits [samples, tokens, vocabulary] and the gradient of the loss there: softmax less one at the labels.

    One sample's logits at a time are in float32. Raises ModelError where there are none.
    """
    if logits is None or logits.shape[1] != samples[0].inputs["input_ids"].shape[1]:
        raise ModelError(
            f"{type(model).__name__} returns no logits for its tokens; gradients need a model with a language head"
        )
    gradient = torch.zeros_like(logits)
    with torch.no_grad():
        for row, into, sample in zip(logits, gradient, samples, strict=True):
            where = sample.labelled.nonzero()[:, 0]
            predicted = wide(row[where])  # [labels, vocabulary]
            targets = sample.targets(predicted)
            slope = predicted.softmax(-1)
            slope[torch.arange(len(targets), device=targets.device), targets] -= 1
            into[where] = slope.to(into.dtype)
            del predicted, slope
    return logits, gradient


def _backward(model: PreTrainedModel, output: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """From an output back, with its gradient; raises ModelError as :func:`run_gradients` does."""
    try:
        output.backward(gradient)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a part that knows no derivative, or that wrote into what its own needs
        raise ModelError(
            f"{type(model).__name__} cannot be differentiated ({first_line(error)}); choose a recipe that "
            "needs no gradients, such as jw-svd"
        ) from error
