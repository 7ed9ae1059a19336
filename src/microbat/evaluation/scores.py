"""One model's scores on named benchmarks: those that it answers in its own words, and lm-evaluation-harness's tasks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from microbat.evaluation.benchmarks import BENCHMARKS, Benchmark
from microbat.evaluation.generation import Generate, OnTheSpot, Sampling
from microbat.evaluation.problems import Problem, load_problems
from microbat.evaluation.quality import recovery
from microbat.evaluation.sampled import run_sampled
from microbat.evaluation.tasks import check_tasks, run_tasks
from microbat.evaluation.totals import Groups, summed
from microbat.models.base import Thinking

Scores = dict[str, dict[str, Any]]  # benchmark -> score, stderr (None for a single item), and all else that was counted


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What models are scored on; making it finds whatever can be found wrong before a model is loaded.

    Names in ``BENCHMARKS`` are answered in the model's own words, as ``sampling`` says; all others are the harness's.
    ``data`` is a folder of local copies (None: from the hub), ``limit`` takes the first items of each (None: all).
    ``thinking`` asks each of the former once in every mode of it: ``humaneval-no_think``.
    Errors: those of :func:`check_tasks` and :func:`load_problems`.
    """

    names: tuple[str, ...]
    data: Path | None = None
    limit: int | None = None
    sampling: Sampling = Sampling()
    thinking: Thinking | None = None
    problems: dict[str, tuple[Benchmark, list[Problem]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_tasks(by_likelihood(self.names), self.data)
        asked = [BENCHMARKS[name] for name in self.names if name in BENCHMARKS]
        found = [(benchmark, load_problems(benchmark, self.data, self.limit)) for benchmark in asked]
        if self.thinking is not None:
            found = [_told(*pair, mode, suffix) for pair in found for mode, suffix in self.thinking.modes]
        object.__setattr__(self, "problems", {benchmark.name: (benchmark, problems) for benchmark, problems in found})

    @property
    def protocol(self) -> dict[str, Any]:
        """What decides the scores, as plain data."""
        drawn = {"samples": self.sampling.samples, **self.sampling.draws}
        what = {"tasks": list(self.names), "data": str(self.data or ""), "limit": self.limit}
        what |= {"modes": [mode for mode, _ in self.thinking.modes]} if self.thinking else {}
        return what | ({"sampling": drawn} if self.problems else {})

    @property
    def pictured(self) -> bool:
        """Whether some problems are about pictures."""
        return any(problem.picture for _, problems in self.problems.values() for problem in problems)

    def scores(
        self,
        model: nn.Module,
        tokenizer: Any,
        identity: str,
        answers: Path,
        cache: Callable[[nn.Module], Any],
        processor: Any = None,
    ) -> Scores:
        """Of a transformers causal LM on its own device; ``cache`` and ``processor`` as :class:`OnTheSpot` takes them, the
        other arguments as :meth:`answered`."""
        harness = by_likelihood(self.names)
        found = run_tasks(model, tokenizer, harness, data=self.data, limit=self.limit) if harness else {}
        generate = OnTheSpot(
            model=model,
            tokenizer=tokenizer,
            sampling=self.sampling,
            cache=cache,
            processor=processor,
            thinking=self.thinking,
        )
        return {name: _headed(result) for name, result in found.items()} | self.answered(generate, identity, answers)

    def answered(self, generate: Generate, identity: str, answers: Path) -> Scores:
        """On the benchmarks in the model's own words alone.

        Finished answers are kept in the folder ``answers``, where an interrupted run goes on; ``identity`` says whose they are.
        """
        return {
            name: run_sampled(benchmark, problems, generate, self.sampling, identity, answers / f"{name}.jsonl")
            for name, (benchmark, problems) in self.problems.items()
        }


def by_likelihood(names: Sequence[str]) -> list[str]:
    """Those of the ``names`` that need a model's likelihoods: the harness's."""
    return [name for name in names if name not in BENCHMARKS]


def recovered(scores: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """Recovery in per cent and its standard error; None where there is none: no reference, or one that scores 0 somewhere.

    The error is that of a ratio measured on the same items on both sides (to first order); where items are not known, that of
    ``scores``, the reference's being given. None where one of them has none.
    """
    base = {name: score["score"] for name, score in reference.items()}
    if not base or not all(base.values()):
        return None
    value = recovery({name: score["score"] for name, score in scores.items()}, base)
    own = recovered_items(scores, reference)
    given = recovered_items({name: reference[name] for name in scores}, reference)
    if own is not None and given is not None:
        shares = [score["score"] / base[name] for name, score in scores.items() for _ in score["items"]]
        pairs = zip(own, given, shares, strict=True)
        excess = [[a - share * b for a, b in zip(mine, theirs, strict=True)] for mine, theirs, share in pairs]
        return value, summed(excess)[1]
    if any(score["stderr"] is None for score in scores.values()):
        return value, None
    return value, 100 * math.hypot(*(s["stderr"] / base[name] for name, s in scores.items())) / len(scores)


def recovered_items(scores: Mapping[str, Any], reference: Mapping[str, Any]) -> Groups | None:
    """The recovery, in per cent, as groups of items whose means add up to it; None where a benchmark does not tell its items."""
    if any("items" not in score for score in scores.values()):
        return None
    shares = {name: 100 / (len(scores) * reference[name]["score"]) for name in scores}
    return [[shares[name] * item for item in group] for name, score in scores.items() for group in score["items"]]


def flips(scores: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[float, float | None] | None:
    """Of a hundred items, how many score otherwise than ``reference``'s, the mean over benchmarks, and its standard error; None
    where a benchmark does not tell its items.

    Answers lost and answers won cancel in a score, and not here (Dutta et al., 2024, arXiv 2407.09141). Where answers are
    drawn at random, some differ by that alone.
    """
    if any("items" not in side.get(name, {}) for name in scores for side in (scores, reference)):
        return None
    share = 100 / len(scores)
    pairs = [
        zip(chain(*score["items"]), chain(*reference[name]["items"]), strict=True) for name, score in scores.items()
    ]
    return summed([[share * (own != given) for own, given in items] for items in pairs])


def _told(benchmark: Benchmark, problems: list[Problem], mode: str, suffix: str) -> tuple[Benchmark, list[Problem]]:
    """The benchmark under a mode of thinking: as another, whose prompts end in ``suffix``."""
    return replace(benchmark, name=f"{benchmark.name}-{mode}"), [replace(p, prompt=p.prompt + suffix) for p in problems]


def _headed(result: Mapping[str, Any]) -> dict[str, Any]:
    """``result`` behind its one score and standard error: length-normalised accuracy where it has that."""
    key = "acc_norm" if result.get("acc_norm") is not None else "acc"
    numbers = {name: value for name, value in result.items() if name != "items"}
    items = {"items": [result["items"][key]]} if key in result["items"] else {}  # a group of tasks has none of its own
    return {"score": result[key], "stderr": result.get(f"{key}_stderr"), **numbers, **items}
