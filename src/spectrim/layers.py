"""Layers that a compressed model is made of, and the exchange of dense linears for them.

A factored layer has two plain ``nn.Linear`` children: LoRA, GPTQ, vLLM and ``torch.compile`` see what they know.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import skip_init

from spectrim.errors import ModelError


class LowRankLinear(nn.Module):
    """A linear layer whose weight is the product of two factors: ``y = A (B x) + bias``.

    Children ``A`` (``A.weight`` [out, rank]) and ``B`` (``B.weight`` [rank, in]) are bias-free ``nn.Linear`` modules;
    ``bias`` [out] is a parameter or None. There is no ``weight``. Factors and bias start as NaN, so that a layer that
    nobody filled shows in the first logits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ModelError(f"a low-rank layer needs a rank of at least 1, not {rank}; keep the layer dense instead")
        device = torch.get_default_device() if device is None else torch.device(device)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.B = skip_init(nn.Linear, in_features, rank, bias=False, device=device, dtype=dtype)
        self.A = skip_init(nn.Linear, rank, out_features, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(torch.nan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out] in the dtype of the factors."""
        y: torch.Tensor = self.A(self.B(x))
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """The dense layer of the same map, in the same dtype and on the same device.

        The product of the factors is formed in float32 (float64 for float64 factors) and rounded once. Raises
        ModelError for factors that are offloaded (on the meta device) or carry an adapter: both would be lost.
        """
        for name, factor in (("A", self.A), ("B", self.B)):
            if not isinstance(factor, nn.Linear):
                raise ModelError(
                    f"factor {name} is a {type(factor).__name__}, not a plain linear; merge its adapter before the "
                    "layer is made dense"
                )
        A, B = self.A.weight, self.B.weight  # [out, k], [k, in]
        if A.is_meta or B.is_meta:
            raise ModelError("factors on the meta device cannot be multiplied; load the model without offloading")
        wide = torch.promote_types(A.dtype, torch.float32)
        dense = skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None, device=A.device, dtype=A.dtype
        )
        dense.weight.copy_(A.to(wide) @ B.to(wide))
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Shape of the layer, as ``nn.Linear`` shows its own."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def replace_linears(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Exchange dense linears of `model`, in place, for LowRankLinear layers of the same shape, dtype and device.

    `ranks` maps runtime names (``model.get_submodule(name)``) to ranks. The bias parameter is handed over; the factors
    are NaN, or meta tensors where the dense weight is one. Raises ModelError, before anything is changed, for a name
    that is not exactly an ``nn.Linear`` and for a rank below 1.
    """
    layers: dict[str, LowRankLinear] = {}
    for name, rank in ranks.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"the model has no module {name!r}; ranks are keyed by the names of its linears") from None
        if type(linear) is not nn.Linear:  # a subclass may compute something else
            raise ModelError(f"{name!r} is a {type(linear).__name__}, not an nn.Linear; leave it out of the ranks")
        layer = LowRankLinear(
            linear.in_features,
            linear.out_features,
            rank,
            bias=False,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.bias = linear.bias
        layers[name] = layer.requires_grad_(linear.weight.requires_grad).train(linear.training)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
