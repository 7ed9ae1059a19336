"""Numbers with their noise, and whether two methods differ by more than it.

Two things are random in a measured number: the text it was measured on, and the seed that it was made with. The first is
seen in the differences from window to window, the second in runs that differ by nothing but their seed.
"""

# Shapes: R runs of one method (seeds), G groups of I items (windows, problems), whose means add up to the number.

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from microbat.evaluation.totals import Groups, averaged, summed

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


def indistinct(one_RGI: Sequence[Groups], other_RGI: Sequence[Groups]) -> bool:
    """Whether two methods' numbers, measured on the same items, differ by no more than ``FACTOR`` times the noise.

    The noise has three independent parts: the standard error over items of the paired difference (of the means over
    runs), and each side's standard deviation over its runs, undivided: whoever quantizes a model has one run, not their
    mean. From a single item nothing can be told.
    """
    pairs = zip(averaged(one_RGI), averaged(other_RGI), strict=True)
    difference, over_items = summed([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs])
    if over_items is None:
        return True
    return abs(difference) <= FACTOR * math.hypot(over_items, _over_runs(one_RGI), _over_runs(other_RGI))


def overlap(one: Estimate, other: Estimate) -> bool:
    """The same for two numbers whose errors are independent; what has no error tells nothing."""
    if one.error is None or other.error is None:
        return True
    return abs(one.value - other.value) <= FACTOR * math.hypot(one.error, other.error)


def _over_runs(runs_RGI: Sequence[Groups]) -> float:
    numbers = [summed(run)[0] for run in runs_RGI]
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0
