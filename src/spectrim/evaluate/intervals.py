"""Inference on counts of right answers: Wilson intervals, McNemar's test, paired differences. No models, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

from spectrim.errors import SampleError

Z = NormalDist().inv_cdf(0.975)  # two-sided 95 %


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a model minus that of the reference, on the same questions.

    `mean` is the observed difference in [-1, 1]; `low` and `high` bound it at 95 %; `gained` counts the questions that
    only the model answers correctly, `lost` those that only the reference does; `p_value` is McNemar's exact one.
    """

    mean: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int
    questions: int


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, JASA 22, 1927): all p with |correct/total - p| ≤ z √(p(1-p)/total).

    Raises:
        SampleError: when `total` is 0.
    """
    if total < 1:
        raise SampleError("an accuracy needs at least one question; add questions to the task")
    rate, weight = correct / total, Z**2 / total
    centre = (rate + weight / 2) / (1 + weight)
    half = Z * sqrt(rate * (1 - rate) / total + weight / (4 * total)) / (1 + weight)
    # The end at an observed 0 or 1 is exactly 0 or 1; rounding alone would miss it.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test (Psychometrika 12, 1947): a binomial(gained + lost, 1/2) sign test."""
    discordant = gained + lost
    tail = sum(comb(discordant, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def paired_difference(model: Sequence[bool], reference: Sequence[bool]) -> PairedDifference:
    """Difference of two accuracies over the same questions in the same order.

    The interval is the adjusted Wald interval of Bonett and Price (J. Educ. Behav. Stat. 37, 2012): half a pair is
    added to each of the four cells, which keeps the coverage near 95 % in small samples and at 0 discordant pairs.

    Raises:
        SampleError: when the two differ in length or are empty.
    """
    if len(model) != len(reference) or not model:
        raise SampleError(
            f"a paired difference needs the same questions twice, not {len(model)} and {len(reference)} answers; "
            "evaluate both directories on one set of questions"
        )
    n = len(model)
    gained = sum(ours and not theirs for ours, theirs in zip(model, reference, strict=True))
    lost = sum(theirs and not ours for ours, theirs in zip(model, reference, strict=True))
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * sqrt((up + down - (up - down) ** 2) / (n + 2))
    return PairedDifference(
        mean=(gained - lost) / n,
        low=max(-1.0, up - down - half),
        high=min(1.0, up - down + half),
        p_value=mcnemar(gained, lost),
        gained=gained,
        lost=lost,
        questions=n,
    )
