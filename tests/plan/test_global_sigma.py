"""The raw singular values that JW-SVD pools, from the inputs that the linears of a model really read."""

import pytest
import torch

from helpers.calibrated import tiny
from helpers.samples import llava_processor
from spectrim.anatomy import anatomy
from spectrim.calibrate import calibrate
from spectrim.pipeline import compression

GAMMA = 0.5


@pytest.fixture
def read(words, pictures, tmp_path):
    """A model, its statistics, and all that each linear read by modality: [positions, in] by name."""
    model = tiny("llava")
    seen: dict[str, dict[str, list[torch.Tensor]]] = {"text": {}, "image": {}}
    now = ["text"]

    def begin(_module, _args, inputs):
        now[0] = "image" if "pixel_values" in inputs else "text"

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    for linear in anatomy(model).linears:

        def keep(_module, args, name=linear.name):
            seen[now[0]].setdefault(name, []).append(args[0].detach().flatten(0, -2))

        handles.append(model.get_submodule(linear.name).register_forward_pre_hook(keep))
    sizes = {"samples": 6, "seqlen": 24, "curvature": False}
    options = {"processor": llava_processor(), "text": words, "images": pictures, **sizes}
    statistics = calibrate(model, tmp_path / "s", **options)
    for handle in handles:
        handle.remove()
    return model, statistics, {m: {name: torch.cat(parts) for name, parts in x.items()} for m, x in seen.items()}


def singular_values(model, rows, rule: str) -> dict[str, torch.Tensor]:
    """Of W S, where S Sᵀ is the paper's joint moment: the samples themselves, images weighed by γ tr C_T / tr C_I."""
    found = {}
    for linear in anatomy(model).linears:
        each = [x[linear.name] for x in rows.values() if linear.name in x]
        if rule == "global-sigma-mean":
            each = [X / len(X) ** 0.5 for X in each]
        if len(each) == 2:
            each[1] = each[1] * (GAMMA * each[0].square().sum() / each[1].square().sum()).sqrt()
        W = model.get_submodule(linear.name).weight.detach()
        found[linear.name] = torch.linalg.svdvals(W @ torch.cat(each).T)
    return found


def expected(model, values: dict[str, torch.Tensor], quantile: float) -> tuple[dict[str, int | None], int]:
    """Ranks, and bytes, of what is above one threshold for all; at a gap between the values.

    The weight stays dense where its last directions are worth their bytes together: it takes fewer than they do.
    """
    pool = torch.cat(list(values.values())).sort().values
    near = slice(int(quantile * len(pool)) - 5, int(quantile * len(pool)) + 5)
    gap = int((pool[near][1:] / pool[near][:-1]).argmax())
    threshold = float(pool[near][gap : gap + 2].mean())
    ranks, total = {}, 0
    for linear in anatomy(model).linears:
        s, step = values[linear.name], linear.dtype.itemsize * (linear.in_features + linear.out_features)
        most = (linear.nbytes - 1) // step  # factors of a larger rank are no smaller than the weight
        rank: int | None = max(1, int((s > threshold).sum()))
        worth = float(s[rank : most + 1].sum()) * step
        if rank > most or worth > threshold * (linear.nbytes - rank * step):
            rank = None
        ranks[linear.name] = rank
        total += linear.nbytes if rank is None else rank * step
    return ranks, total


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_both_rules_are_one_threshold_on_the_values_of_the_samples(read, quantile):
    model, statistics, rows = read
    assert len(rows["image"]) > len(rows["text"]) > 0  # only the backbone reads both
    ranks = {}
    dense = sum(linear.nbytes for linear in anatomy(model).linears)
    for rule in ("global-sigma", "global-sigma-mean"):
        ranks[rule], size = expected(model, singular_values(model, rows, rule), quantile)
        changes = {"metric.gamma": GAMMA, "allocation.rule": rule}
        with compression(model, "jw-svd", stats=statistics, changes=changes) as prepared:
            plan = prepared.plan((size + 0.5) / dense)
        assert {name: row.rank for name, row in plan.linears.items()} == ranks[rule]
    assert ranks["global-sigma"] != ranks["global-sigma-mean"]
    assert {rank is None for rank in ranks["global-sigma"].values()} == {True, False}


@pytest.mark.parametrize("recipe", ["svd", "asvd"])
def test_metrics_that_no_sum_made_have_one_form(read, recipe):
    model, statistics, _ = read
    plans = []
    for rule in ("global-sigma", "global-sigma-mean"):
        with compression(model, recipe, stats=statistics, changes={"allocation.rule": rule}) as prepared:
            plans.append(prepared.plan(0.5))
    assert plans[0] == plans[1]
