"""The truncation probe of ASVD, against a model whose weight is cut by hand."""

import pytest
import torch

import families
from spectrim.anatomy import anatomy
from spectrim.metrics.spectra import make_spectra
from spectrim.plan.sensitivity import RETENTIONS, probe
from spectrim.recipe import MetricPart


@torch.no_grad()
def loss(model, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()))


def test_a_direction_is_worth_the_loss_without_it_and_those_after_it(tmp_path):
    model = families.FAMILIES["llama"]()
    parts = anatomy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # what the model says itself, so that every cut costs
        windows = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(0))
        for at in range(1, 12):
            windows[:, at] = model(input_ids=windows[:, :at], use_cache=False).logits[:, -1].argmax(-1)
    spectra = make_spectra(model, parts, MetricPart(kind="identity"), None, tmp_path)
    found = probe(model, parts, spectra, windows)
    assert found.keys() == {linear.name for linear in parts.linears}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dense = loss(model, windows)
    compared = 0
    for linear in parts.linears:
        module, values = model.get_submodule(linear.name), found[linear.name]
        W = module.weight.detach().clone()
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        assert values.tolist() == sorted(values.tolist(), reverse=True)
        measured = {}
        for rank in (int(share * W.numel() / sum(W.shape)) for share in RETENTIONS):
            module.weight.data = U[:, :rank] * sigma[:rank] @ Vh[:rank]
            measured[rank] = loss(model, windows) - dense
        module.weight.data = W
        for rank in measured:
            worst = max(cost for other, cost in measured.items() if other >= rank)
            if worst > 1e-4:  # else it is the way from there to zero that counts
                compared += 1
                assert float(values[rank]) == pytest.approx(worst, abs=2e-6)
        assert float(values[0]) == float(values[min(measured)])
    assert compared > 5
