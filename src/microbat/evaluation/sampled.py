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

from microbat.evaluation.benchmarks import Benchmark, Problem
from microbat.evaluation.generation import Generate, Request, Sampling
from microbat.evaluation.progress import bar


def run_sampled(
    benchmark: Benchmark,
    problems: Sequence[Problem],
    generate: Generate,
    sampling: Sampling,
    model: str,
    file: Path,
    *,
    progress: bool = True,
) -> dict[str, float]:
    """Avg@k of what ``generate`` answers to the ``problems`` of ``benchmark``: acc, acc_stderr, unparsed, truncated, samples, n.

    ``acc`` is the mean over problems of the share of right answers, ``acc_stderr`` its standard error over problems
    (left out for a single one). ``unparsed`` counts the answers in which the judge found nothing to judge, they add
    nothing to ``acc``; ``truncated`` those that ran out of tokens. ``model`` says whose answers ``file`` holds:
    ValueError where it holds those of another model or sampling.
    """
    samples = sampling.samples or benchmark.samples
    kept = Kept(file, {"benchmark": benchmark.name, "model": model, **sampling.draws})
    ids = [hashlib.sha256(problem.prompt.encode()).hexdigest()[:16] for problem in problems]
    judges = {id_: problem.judge for id_, problem in zip(ids, problems, strict=True)}
    missing = {
        Request(prompt=problem.prompt, seed=_seed(sampling.seed, id_, sample)): (id_, sample)
        for id_, problem in zip(ids, problems, strict=True)
        for sample in range(samples)
        if (id_, sample) not in kept.rows
    }
    with bar(benchmark.name, len(missing), progress) as advance:
        for request, answer in generate(list(missing)) if missing else ():
            id_, sample = missing[request]
            verdict = judges[id_](answer.text)
            kept.add(
                {
                    "problem": id_,
                    "sample": sample,
                    "verdict": {True: "right", False: "wrong", None: "unparsed"}[verdict],
                    **dataclasses.asdict(answer),
                }
            )
            advance("")
    return _score([[kept.rows[id_, sample] for sample in range(samples)] for id_ in ids])


def _score(rows: list[list[dict[str, Any]]]) -> dict[str, float]:
    """From the rows of each problem's answers."""
    shares = [statistics.fmean(row["verdict"] == "right" for row in answers) for answers in rows]
    every = [row for answers in rows for row in answers]
    score: dict[str, float] = {"acc": statistics.fmean(shares)}
    if len(shares) > 1:
        score["acc_stderr"] = statistics.stdev(shares) / len(shares) ** 0.5
    return score | {
        "unparsed": sum(row["verdict"] == "unparsed" for row in every),
        "truncated": sum(row["truncated"] for row in every),
        "samples": len(rows[0]),
        "n": len(rows),
    }


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
