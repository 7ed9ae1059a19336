"""Numbers with their noise, and whether two methods differ by more than it.

Two things are random in a measured number: the text it was measured on, and the seed that it was made with. The first is
seen in the differences from window to window, the second in runs that differ by nothing but their seed.
"""

# Shapes: R runs of one method (seeds), W windows.

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FACTOR = 2.0  # standard errors that a difference must exceed to count as one


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number, and its error ``over`` the seeds (standard deviation) or over windows or items (standard error)."""

    value: float
    error: float | None
    over: str


def estimate(values: Sequence[float], stderrs: Sequence[float | None], over: str = "windows") -> Estimate:
    """The mean of several runs with their standard deviation, or one run's value with its own standard error."""
    if len(values) > 1:
        return Estimate(value=statistics.fmean(values), error=statistics.stdev(values), over="seeds")
    return Estimate(value=values[0], error=stderrs[0], over=over)


def indistinct(one_RW: Sequence[Sequence[float]], other_RW: Sequence[Sequence[float]]) -> bool:
    """Whether two methods' means, measured on the same windows, differ by no more than ``FACTOR`` times the noise.

    The noise has three independent parts: the standard error over windows of the paired difference (of the means over
    runs), and each side's standard deviation over its runs, undivided: whoever quantizes a model has one run, not their
    mean. From a single window nothing can be told.
    """
    one_W, other_W = ([statistics.fmean(column) for column in zip(*runs, strict=True)] for runs in (one_RW, other_RW))
    difference_W = [a - b for a, b in zip(one_W, other_W, strict=True)]
    if len(difference_W) < 2:
        return True
    over_windows = statistics.stdev(difference_W) / math.sqrt(len(difference_W))
    noise = math.hypot(over_windows, _over_runs(one_RW), _over_runs(other_RW))
    return abs(statistics.fmean(difference_W)) <= FACTOR * noise


def overlap(one: Estimate, other: Estimate) -> bool:
    """The same for two numbers whose errors are independent; what has no error tells nothing."""
    if one.error is None or other.error is None:
        return True
    return abs(one.value - other.value) <= FACTOR * math.hypot(one.error, other.error)


def _over_runs(values_RW: Sequence[Sequence[float]]) -> float:
    means = [statistics.fmean(row) for row in values_RW]
    return statistics.stdev(means) if len(means) > 1 else 0.0
