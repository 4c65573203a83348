"""Metrics from moments, against the formulas of the papers computed from the samples themselves."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectrim.calibrate import Moment, Statistics
from spectrim.calibrate.moments import GradMoment
from spectrim.errors import NumericalError, RecipeError
from spectrim.linear import Linear
from spectrim.maths.sums import Gram
from spectrim.metrics.metric import joint_second_moment, joint_weights, layer_metric, positions_behind
from spectrim.recipe import MetricPart, Recipe

IN = 6
BACKBONE = Linear("backbone.up", "backbone", None, "up", 4, IN, None, torch.float32)
TOWER = Linear("tower.fc1", "tower", None, "fc1", 4, IN, None, torch.float32)


def samples(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(count, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(X: torch.Tensor) -> Moment:
    return Moment(Gram.of(X.T @ X), X.abs().sum(0), len(X))


@dataclass
class Stub:
    """Statistics by modality and linear; a modality that is present was gathered, whatever it reached."""

    moments: dict[str, dict[str, Moment]]
    gradients: dict[str, GradMoment] | None = None
    labelled: int = 0
    path: Path = field(default=Path("stats"))

    @property
    def manifest(self):
        settings = SimpleNamespace(gradients=self.gradients is not None, curvature=False)
        return SimpleNamespace(data=SimpleNamespace(modalities=tuple(self.moments)), settings=settings)

    def moment(self, linear: str, modality: str) -> Moment | None:
        return self.moments.get(modality, {}).get(linear)

    def positions(self, linear: str, modality: str) -> int:
        found = self.moment(linear, modality)
        return 0 if found is None else found.count

    def labels(self, linear: str, modality: str) -> int:
        return self.labelled

    def gradient(self, linear: str, modality: str) -> GradMoment | None:
        return None if modality != "text" or self.gradients is None else self.gradients.get(linear)


TEXT, IMAGE = samples(20, 0), samples(50, 1, 7.0)
BOTH = Stub(
    {"text": {"backbone.up": moment(TEXT)}, "image": {"backbone.up": moment(IMAGE), "tower.fc1": moment(3 * IMAGE)}}
)


def test_the_stub_has_what_metrics_read():
    read = {name for name, value in vars(Stub).items() if not name.startswith("_") and (callable(value))}
    assert read == {"moment", "positions", "labels", "gradient"} <= vars(Statistics).keys()


def metric(part: MetricPart, linear: Linear = BACKBONE, statistics=BOTH):
    return layer_metric(part, linear, statistics)


def test_identity_reads_no_statistics():
    found = metric(MetricPart(kind="identity"), statistics=None)
    assert (found.value, found.source) == (None, "identity")


@pytest.mark.parametrize(("modality", "X"), [("text", TEXT), ("image", IMAGE)])
def test_whitening_is_the_mean_over_positions(modality, X):
    found = metric(MetricPart(kind="whitening", modality=modality))
    assert found.source == modality
    torch.testing.assert_close(found.value, torch.einsum("ni,nj->ij", X, X) / len(X), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0])
def test_joint_whitening_balances_by_the_trace(gamma):
    """Both modalities, scaled to one mean energy, and γ times the image one: the paper's text and image halves."""
    found = metric(MetricPart(kind="whitening", modality="joint", gamma=gamma))
    assert found.source == "joint"
    T, I = (X / X.square().sum(1).mean().sqrt() for X in (TEXT, IMAGE))  # noqa: E741
    energy = TEXT.square().sum(1).mean()
    expected = energy * (T.T @ T / len(T) + gamma * I.T @ I / len(I))
    torch.testing.assert_close(found.value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.value.trace(), (1 + gamma) * energy)


def test_joint_whitening_ignores_scale_and_number_of_images():
    part = MetricPart(kind="whitening", modality="joint")
    many = moment(torch.cat([100 * IMAGE] * 5))
    other = Stub({"text": {"backbone.up": moment(TEXT)}, "image": {"backbone.up": many}})
    torch.testing.assert_close(metric(part, statistics=other).value, metric(part).value)


@pytest.mark.parametrize("silent", ["text", "image"])
def test_a_modality_that_is_silent_leaves_the_other(silent):
    moments = [moment(0 * TEXT), moment(IMAGE)] if silent == "text" else [moment(TEXT), moment(0 * IMAGE)]
    heard = IMAGE if silent == "text" else TEXT
    weights = joint_weights([float(one.second.trace()) for one in moments], 0.3)
    torch.testing.assert_close(joint_second_moment(moments, weights), heard.T @ heard / len(heard))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_activation_diagonal(alpha):
    """ASVD scales column i of W by mean|x_i|^α, so the metric is the square of that."""
    for modality, X in (("text", TEXT), ("image", IMAGE), ("joint", torch.cat([TEXT, IMAGE]))):
        found = metric(MetricPart(kind="activation-diagonal", modality=modality, alpha=alpha))
        assert found.source == modality
        torch.testing.assert_close(found.value, (X.abs().mean(0) ** alpha).square(), rtol=1e-12, atol=0)


def test_activation_diagonal_of_channels_that_were_never_on():
    X = TEXT.clone()
    X[:, 2] = 0
    found = metric(MetricPart(kind="activation-diagonal"), statistics=Stub({"text": {"backbone.up": moment(X)}}))
    assert 0 < found.value[2] <= 1e-5 * found.value.max()
    dead = metric(MetricPart(kind="activation-diagonal"), statistics=Stub({"text": {"backbone.up": moment(0 * X)}}))
    assert not dead.value.any()


def test_fisher_rows():
    gradients = samples(4, 9).square()
    statistics = Stub({"text": {}}, {"backbone.up": GradMoment(gradients.sum(0), 4)})
    part = MetricPart(kind="fisher-rows")
    found = metric(part, statistics=statistics)
    assert found.source == "text"
    torch.testing.assert_close(found.value, gradients.mean(0))
    assert metric(part, TOWER, statistics).value is None
    statistics.gradients["backbone.up"] = GradMoment(0 * gradients.sum(0), 4)
    assert metric(part, statistics=statistics).source == "identity"


def test_fisher_rows_need_gradients():
    with pytest.raises(RecipeError, match="needs gradients and stats has none; calibrate with --gradients"):
        metric(MetricPart(kind="fisher-rows"))


def test_linears_that_text_never_reaches():
    """SVD-LLM leaves the tower to the plain SVD; JW-SVD gives it image moments."""
    assert metric(Recipe.read("svd-llm").metric, TOWER).source == "identity"
    for part in (Recipe.read("jw-svd").metric, MetricPart(kind="whitening", modality="text", unreached="image")):
        found = metric(part, TOWER)
        assert found.source == "image"
        torch.testing.assert_close(found.value, 9 * IMAGE.T @ IMAGE / len(IMAGE))


def test_joint_is_text_in_a_language_model():
    found = metric(Recipe.read("jw-svd").metric, statistics=Stub({"text": {"backbone.up": moment(TEXT)}}))
    assert found.source == "text"
    torch.testing.assert_close(found.value, TEXT.T @ TEXT / len(TEXT))


@pytest.mark.parametrize(
    ("part", "linear", "statistics", "named"),
    [
        (MetricPart(kind="whitening"), BACKBONE, None, "metric 'whitening' needs calibration statistics"),
        (MetricPart(kind="whitening"), BACKBONE, Stub({"image": {}}), "needs text moments and stats has none"),
        (MetricPart(kind="activation-diagonal", modality="image"), BACKBONE, Stub({"text": {}}), "needs image moments"),
        (MetricPart(kind="whitening", modality="image"), TOWER, Stub({"text": {}}), "needs image moments"),
    ],
)
def test_missing_statistics_are_named(part, linear, statistics, named):
    with pytest.raises(RecipeError, match=named):
        metric(part, linear, statistics)


@pytest.mark.parametrize("kind", ["whitening", "activation-diagonal"])
@pytest.mark.parametrize("modality", ["text", "joint"])
def test_nan_in_moments_names_the_linear(kind, modality):
    X = TEXT.clone()
    X[3, 1] = torch.nan
    statistics = Stub({"text": {"backbone.up": moment(X)}, "image": {"backbone.up": moment(IMAGE)}})
    with pytest.raises(NumericalError, match=r"backbone\.up holds NaN"):
        metric(MetricPart(kind=kind, modality=modality), statistics=statistics)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_positions_behind_a_joint_metric_are_those_of_a_mean_as_noisy(gamma):
    """Equal noise of a position: the variance of ``(x̄_T + γ x̄_I) / (1 + γ)`` is that of a mean of so many."""
    part = MetricPart(kind="whitening", modality="joint", gamma=gamma)
    draws = torch.randn(20_000, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = (draws[:, :20].mean(1) + gamma * draws[:, 20:].mean(1)) / (1 + gamma)
    inputs, outputs = positions_behind(part, BACKBONE, BOTH)
    assert inputs == pytest.approx(1 / float(mean.var()), rel=0.05)
    assert outputs == pytest.approx(4 / (1 / 20 + 1 / 50))  # β is 1
    assert positions_behind(part.model_copy(update={"beta": gamma, "gamma": 1.0}), BACKBONE, BOTH) == (outputs, inputs)
    assert positions_behind(part, TOWER, BOTH) == (50, 50)


def test_positions_behind_the_metric_of_one_modality_are_its_own():
    assert positions_behind(MetricPart(kind="whitening", modality="text"), BACKBONE, BOTH) == (20, 20)
    assert positions_behind(MetricPart(kind="whitening", modality="image"), BACKBONE, BOTH) == (50, 50)
    assert positions_behind(MetricPart(kind="whitening", modality="text"), TOWER, BOTH) == (0, 0)
    assert positions_behind(MetricPart(kind="whitening", modality="text", unreached="image"), TOWER, BOTH) == (50, 50)
    assert positions_behind(MetricPart(kind="identity"), BACKBONE, None) == (0, 0)


def test_no_more_positions_stand_behind_outputs_than_labels():
    few = Stub(BOTH.moments, labelled=30)
    assert positions_behind(MetricPart(kind="curvature", modality="text"), BACKBONE, few) == (20, 20)
    assert positions_behind(MetricPart(kind="curvature", modality="image"), BACKBONE, few) == (50, 30)
