"""A model's score on problems that it answers in its own words: draw, judge, keep, average (Avg@k).

Finished answers are kept in a JSONL file, and a run that was interrupted draws only those that are missing.
"""

import dataclasses
import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microbat.evaluation.generation import Generate, Request, Sampling
from microbat.evaluation.problems import Benchmark, Problem
from microbat.evaluation.progress import bar
from microbat.evaluation.totals import averaged, summed


def run_sampled(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    generate: Generate,
    sampling: Sampling,
    model: str,
    file: Path,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Avg@k of what ``generate`` answers to the ``problems`` of ``benchmark``: score, stderr, items and what was counted.

    ``score`` is the benchmark's total of the mean scores of each problem's answers, ``stderr`` its standard error over problems
    (None where there is a single one), ``items`` the groups of numbers whose means add up to it. ``unparsed`` counts the answers
    in which the judge found nothing to judge, they add nothing to ``score``; ``truncated`` those that ran out of tokens;
    ``samples`` a problem's answers, ``n`` the problems. ``by_task``, where the problems are of several tasks, has each one's
    mean score, of 1, and number. ``model`` says whose answers ``file`` holds: ValueError where it holds those of another model
    or sampling.
    """
    samples = sampling.samples or benchmark.samples
    kept = Kept(file, {"benchmark": benchmark.name, "model": model, **sampling.draws})
    ids = [identity(problem) for problem in problems]
    judges = {id_: problem.judge for id_, problem in zip(ids, problems, strict=True)}
    missing = {
        Request(prompt=problem.prompt, picture=problem.picture, seed=_seed(sampling.seed, id_, sample)): (id_, sample)
        for id_, problem in zip(ids, problems, strict=True)
        for sample in range(samples)
        if (id_, sample) not in kept.rows
    }
    with bar(benchmark.name, len(missing), progress) as advance:
        for request, answer in generate(list(missing)) if missing else ():
            id_, sample = missing[request]
            score = judges[id_](answer.text)
            kept.add(
                {
                    "problem": id_,
                    "sample": sample,
                    "score": None if score is None else float(score),
                    **dataclasses.asdict(answer),
                }
            )
            advance("")
    return _result(benchmark, problems, [[kept.rows[id_, sample] for sample in range(samples)] for id_ in ids])


def identity(problem: Problem) -> str:
    """What tells a problem from others in a file of answers."""
    shown = problem.picture.read() if problem.picture else b""
    return hashlib.sha256(problem.prompt.encode() + shown).hexdigest()[:16]


def first_answers(file: Path) -> dict[str, dict[str, Any]]:
    """The first answer to each problem, by its :func:`identity`, of those that a run kept in ``file``: text and score."""
    _, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {row["problem"]: row for row in rows if row["sample"] == 0}


def _result(benchmark: Benchmark, problems: Sequence[Problem], rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """From the rows of each problem's answers."""
    scores = [[row["score"] or 0.0 for row in answers] for answers in rows]
    fields = [problem.fields for problem in problems]
    groups = averaged([benchmark.total(fields, draw) for draw in zip(*scores, strict=True)])
    groups = [[benchmark.points * item for item in group] for group in groups]
    score, stderr = summed(groups)
    every = [row for answers in rows for row in answers]
    tasks: dict[str, list[float]] = {}
    for problem, own in zip(problems, scores, strict=True):
        tasks.setdefault(problem.fields.get("task", ""), []).append(statistics.fmean(own))
    return {
        "score": score,
        "stderr": stderr,
        "items": groups,
        "unparsed": sum(row["score"] is None for row in every),
        "truncated": sum(row["truncated"] for row in every),
        "samples": len(rows[0]),
        "n": len(rows),
    } | ({"by_task": {t: {"score": statistics.fmean(o), "n": len(o)} for t, o in tasks.items()}} if any(tasks) else {})


class Kept:
    """The answers in a JSONL file: a first line that says whose they are, then a line each, written as it comes.

    A line that a killed run left half-written is dropped.
    """

    def __init__(self, file: Path, run: dict[str, Any]) -> None:
        self.file = file
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(file, len(whole))
        if not whole:
            self._write(run)
            return
        first, *rows = map(json.loads, whole.splitlines())
        if first != run:
            changed = ", ".join(
                f"{key}: {first.get(key)!r}, now {run[key]!r}" for key in run if first.get(key) != run[key]
            )
            raise ValueError(
                f"{file} holds the answers of another run ({changed}); remove it or keep answers elsewhere"
            )
        for row in rows:
            self.rows[row["problem"], row["sample"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Keep one answer, on disk before anything else happens."""
        self._write(row)
        self.rows[row["problem"], row["sample"]] = row

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _seed(seed: int, problem: str, sample: int) -> int:
    """31 bits, the same whatever other problems and samples are drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}/{sample}".encode()).digest()[:4]) >> 1
