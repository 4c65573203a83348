"""Inputs that a weight can do without: against least squares, brute force and diagonal metrics."""

import numpy as np
import pytest
import torch

from helpers.matrices import metric, normal
from spectrim.errors import NumericalError
from spectrim.maths.removal import fitted, removal
from spectrim.maths.rounding import error


def case(out: int = 6, size: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    C, G = (metric(n, n) + 0.01 * torch.eye(n, dtype=torch.float64) for n in (size, out))
    return normal(out, size), C, G


def stored(W: torch.Tensor, kept: torch.Tensor, C: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros_like(W).index_copy(1, kept, fitted(W, kept, C, 1e-8))


@pytest.mark.parametrize("metrics", ["none", "diagonal", "inputs", "both"])
def test_the_error_is_that_of_the_weight_fitted_again(metrics: str) -> None:
    W, C, G = case()
    given = {"none": None, "diagonal": C.diagonal()}.get(metrics, C), G if metrics == "both" else None
    found = removal(W, *given, damping=1e-8)
    true = [error(W - stored(W, found.kept(12 - gone), given[0]), *given) for gone in range(13)]
    assert found.error.tolist() == pytest.approx(true, rel=1e-5, abs=1e-9)
    assert bool((found.error.diff() >= 0).all())


def test_the_fit_is_that_of_least_squares() -> None:
    W, X = normal(6, 12), normal(80, 12, seed=1)
    kept = torch.tensor([0, 3, 4, 9])
    wanted = torch.linalg.lstsq(X[:, kept], X @ W.T).solution.T
    torch.testing.assert_close(fitted(W, kept, X.T @ X, 1e-8), wanted, rtol=1e-6, atol=1e-6)


def test_the_first_to_go_costs_least_of_all() -> None:
    W, C, G = case()
    each = [torch.tensor([j for j in range(12) if j != gone]) for gone in range(12)]
    costs = [error(W - stored(W, kept, C), C, G) for kept in each]
    found = removal(W, C, G, 1e-8)
    assert int(found.order[0]) == int(np.argmin(costs))
    assert found.kept(11).tolist() == each[int(np.argmin(costs))].tolist()


def test_some_inputs_go_in_one_step() -> None:
    W, C, G = case(6, 200)  # three at once
    found = removal(W, C, G, 1e-8)
    assert sorted(found.order.tolist()) == list(range(200))
    for gone in (3, 99, 198):
        true = error(W - stored(W, found.kept(200 - gone), C), C, G)
        assert float(found.error[gone]) == pytest.approx(true, rel=1e-4)


def test_twins_and_inputs_that_nothing_reads_go_first_and_cost_nothing() -> None:
    X = normal(50, 6)
    X = torch.cat([X, X[:, :1], torch.zeros(50, 1).double()], 1)  # input 6 is input 0 again, 7 is dead
    W = normal(4, 8)
    found = removal(W, X.T @ X)
    assert 7 in found.order[:2]
    assert {0, 6} & set(found.order[:2].tolist())
    assert found.error[2] < 1e-5 * found.error[8]
    assert fitted(W, torch.tensor([1, 2]), torch.zeros(8, 8).double()).equal(W[:, [1, 2]])


@pytest.mark.parametrize("positions", [4, 8, 16])
def test_what_few_positions_show_by_chance_is_not_relied_on(positions: int) -> None:
    """With fewer positions than inputs the others give every input back exactly, there; sums are of float32."""
    W, X = normal(16, 32), normal(positions, 32, seed=1)
    seen, all_over = (X.T @ X / positions).float().double(), torch.eye(32, dtype=torch.float64)
    damping = 0.01 * 32 / positions
    found = removal(W, seen, damping=damping)
    kept = found.kept(24)
    E = W - torch.zeros_like(W).index_copy(1, kept, fitted(W, kept, seen, damping))
    assert error(E, all_over) < 3 * error(W.index_fill(1, kept, 0), all_over)
    assert error(E, seen) < 0.2 * error(W.index_fill(1, kept, 0), seen)
    priced = error(E, seen) + damping * float(seen.diagonal().mean()) * error(E, all_over)
    assert float(found.error[8]) == pytest.approx(priced, rel=1e-5)


def test_a_metric_that_rounding_made_indefinite_is_dampened_more() -> None:
    W, X = normal(6, 12), normal(8, 12, seed=3)
    C = X.T @ X
    C = C - 3e-5 * C.diagonal().mean() * torch.eye(12, dtype=C.dtype)
    found = removal(W, C, damping=1e-6)
    assert sorted(found.order.tolist()) == list(range(12))
    assert bool(fitted(W, found.kept(4), C, 1e-6).isfinite().all())
    with pytest.raises(NumericalError, match="not positive definite"):
        removal(W, -C)
