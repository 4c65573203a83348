"""The joint metric of an expert: modalities weigh by the tokens that it saw of them."""

from types import SimpleNamespace

import pytest
import torch

from spectrim.calibrate import Moment
from spectrim.calibrate.experts import ExpertStatistics
from spectrim.linear import Linear
from spectrim.maths.sums import Gram
from spectrim.metrics import metric
from spectrim.recipe import Recipe

NAMES = ["b.experts.0.up_proj", "b.experts.1.up_proj", "b.experts.2.up_proj", "b.experts.3.up_proj"]
COUNTS = {"text": (10, 30, 0, 0), "image": (6, 2, 4, 0)}


def moment(name, modality):
    number = NAMES.index(name)
    if not (count := COUNTS[modality][number]):
        return None
    x = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(number + len(modality)))
    return Moment(Gram.of(x.T @ x), x.abs().sum(0), count)


@pytest.fixture
def statistics():
    manifest = SimpleNamespace(data=SimpleNamespace(modalities=("text", "image")))
    positions = lambda name, modality: COUNTS[modality][NAMES.index(name)]  # noqa: E731
    labels = lambda name, modality: 1000  # noqa: E731
    whole = SimpleNamespace(path=None, manifest=manifest, moment=moment, positions=positions, labels=labels)
    return ExpertStatistics(whole, NAMES, 1.5)


def test_modalities_weigh_by_the_experts_shares(statistics, monkeypatch):
    """s_T C_T + γ α s_I C_I, up to a factor, with the shares of both modalities that chose this expert."""
    monkeypatch.setattr(metric, "expert_statistics", lambda whole, _: statistics)
    part = Recipe.read("jw-svd", {"metric.gamma": 0.7}).metric
    for number in (0, 1):
        linear = Linear(NAMES[number], "backbone", "b", "up", 3, 5, None, torch.float32)
        found = metric.layer_metric(part, linear, statistics)
        means = {}
        for modality, counts in COUNTS.items():
            own = moment(linear.name, modality)
            mean = sum(x.second for name in NAMES if (x := moment(name, modality))) / sum(counts)
            scaled = mean * own.second.trace() / mean.trace()
            means[modality] = (own.second + 1.5 * scaled / counts[number]) / (counts[number] + 1.5)
        text, image = means["text"], means["image"]
        shares = {modality: counts[number] / sum(counts) for modality, counts in COUNTS.items()}
        expected = shares["text"] * text + 0.7 * shares["image"] * image * text.trace() / image.trace()
        torch.testing.assert_close(found.value, expected / shares["text"])
        assert found.source == "joint"


def test_an_expert_of_one_modality_has_nothing_of_the_other(statistics):
    assert statistics.moment(NAMES[2], "text") is None
    assert statistics.moment(NAMES[2], "image").count == 4


def test_an_expert_that_nothing_chose_has_its_layers_means_and_the_weight_of_a_token(statistics):
    assert statistics.lean(NAMES[3]) == 1
    for modality, counts in COUNTS.items():
        found = statistics.moment(NAMES[3], modality)
        mean = sum(x.second for name in NAMES if (x := moment(name, modality))) / sum(counts)
        assert found.count == statistics.positions(NAMES[3], modality) == 1
        torch.testing.assert_close(found.second, mean)


def test_positions_behind_an_expert_are_those_of_the_modalities_that_chose_it(statistics, monkeypatch):
    """Joint, with γ times the ratio of both shares, where both did; one where none did."""
    monkeypatch.setattr(metric, "expert_statistics", lambda whole, _: statistics)
    part = Recipe.read("jw-svd", {"metric.gamma": 0.7}).metric
    found = []
    for name in NAMES:
        linear = Linear(name, "backbone", "b", "up", 3, 5, None, torch.float32)
        found.append(metric.positions_behind(part, linear, statistics)[0])
    gammas = [0.7 * (COUNTS["image"][n] / 12) / (COUNTS["text"][n] / 40) for n in (0, 1)]
    both = [(1 + g) ** 2 / (1 / COUNTS["text"][n] + g**2 / COUNTS["image"][n]) for n, g in enumerate(gammas)]
    assert found == [pytest.approx(both[0]), pytest.approx(both[1]), 4, pytest.approx((1.7) ** 2 / (1 + 0.49))]
    assert statistics.lean(NAMES[2]) == 1
