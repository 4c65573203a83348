"""Truncation sensitivity: the loss that each linear causes when it alone is truncated (ASVD, section 3.3)."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from spectrim.anatomy import Anatomy
from spectrim.away import here
from spectrim.maths.decompose import factors
from spectrim.maths.roots import check_finite
from spectrim.metrics.spectra import Spectra

RETENTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
WINDOWS = 8


@torch.no_grad()
def probe(model: PreTrainedModel, parts: Anatomy, spectra: Spectra, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The measured loss that each direction of each linear prevents; [m] float64 by linear, non-increasing.

    Each linear alone is truncated to five retentions, and the text loss (nats per token, above the dense model's) is
    measured on `windows` [n, seqlen]. The score of a direction is the loss of the model without this direction and all
    that follow it, interpolated between the retentions. A threshold on the scores is ASVD's search.
    """
    dense = _loss(model, windows)
    wanted = {}
    for linear in parts.linears:
        held: Any = model.get_submodule(linear.name)
        module = here(held)
        original = module.weight.detach().clone()
        full = linear.params / (linear.out_features + linear.in_features)
        spectrum = spectra.spectrum(linear.name)
        size = len(spectrum.s)
        ranks = [max(1, int(share * full)) for share in RETENTIONS]
        losses = []
        for rank in ranks:
            A, B = factors(original, *spectrum.directions(spectrum.rank(rank), original.device))
            module.weight.copy_(A @ B)
            try:
                model.set_submodule(linear.name, module)
                losses.append(_loss(model, windows) - dense)
            finally:
                module.weight.copy_(original)
                model.set_submodule(linear.name, held)
        curve = np.interp(np.arange(size), [*ranks, size], [*losses, 0.0])
        wanted[linear.name] = torch.from_numpy(np.maximum.accumulate(curve[::-1])[::-1].copy())
    return wanted


def _loss(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean next-token cross-entropy over the windows, nats per token."""
    total = 0.0
    for window in windows.to(model.device):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        check_finite("the logits of the sensitivity probe", logits)
        total += float(torch.nn.functional.cross_entropy(logits, window[1:]))
    return total / len(windows)
