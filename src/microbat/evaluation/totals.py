"""How the scores of problems make that of a benchmark: as items whose mean is taken, in one group or in several that add up."""

# Shapes: a list of groups, in each a list of items, in the order of the problems.

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

Groups = list[list[float]]
Total = Callable[[Sequence[Mapping[str, str]], Sequence[float]], Groups]  # of problems' fields and scores


def by_problem(fields: Sequence[Mapping[str, str]], scores: Sequence[float]) -> Groups:
    """The mean over problems."""
    return [list(scores)]


def by_picture_and_task(fields: Sequence[Mapping[str, str]], scores: Sequence[float]) -> Groups:
    """MME's (arXiv 2306.13394): per task, accuracy plus the share of pictures with all answers right, each of 100;
    tasks add up. ``fields`` name the ``task`` and the ``picture`` of each problem."""
    tasks: dict[str, dict[str, list[float]]] = {}
    for problem, score in zip(fields, scores, strict=True):
        tasks.setdefault(problem["task"], {}).setdefault(problem["picture"], []).append(score)
    return [[100 * (statistics.fmean(own) + min(own)) for own in pictures.values()] for pictures in tasks.values()]


def averaged(draws: Sequence[Groups]) -> Groups:
    """Of each item, the mean over draws."""
    return [[statistics.fmean(values) for values in zip(*same, strict=True)] for same in zip(*draws, strict=True)]


def summed(groups: Groups) -> tuple[float, float | None]:
    """The score, the sum of the groups' means, and its standard error over items, None where a group has a single one."""
    score = sum(map(statistics.fmean, groups))
    if any(len(items) == 1 for items in groups):
        return score, None
    return score, math.hypot(*(statistics.stdev(items) / len(items) ** 0.5 for items in groups))
