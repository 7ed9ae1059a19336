"""Which questions about pictures show best in what models differ."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

from microbat.evaluation.problems import Problem
from microbat.evaluation.sampled import first_answers, identity

CASES = 8  # of a benchmark, about: as many of each of its tasks


def cases(problems: Sequence[Problem], files: Mapping[str, Path], reference: str) -> list[dict[str, Any]]:
    """Those that the ``reference`` answers right and on which the scores of all others differ most, as plain data.

    ``files`` holds each model's kept answers, by its label. A case has task, question, answer (the right one), picture (a data
    URL) and answers: label, text and score of each model's first. Nothing on which all others agree is one.
    """
    pictured = {identity(problem): problem for problem in problems if problem.picture}
    if not pictured or len(files) < 2:
        return []
    answers = {label: first_answers(file) for label, file in files.items()}
    differ = {
        id_: pstdev(own[id_]["score"] or 0.0 for label, own in answers.items() if label != reference)
        for id_ in pictured
        if answers[reference][id_]["score"] == 1
    }
    by_task: dict[str, list[str]] = {}
    for id_ in sorted(filter(differ.__getitem__, differ), key=differ.__getitem__, reverse=True):
        by_task.setdefault(pictured[id_].fields.get("task", ""), []).append(id_)
    each = math.ceil(CASES / max(1, len(by_task)))
    return [_case(pictured[id_], id_, answers) for ids in by_task.values() for id_ in ids[:each]]


def _case(problem: Problem, id_: str, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "task": problem.fields.get("task", ""),
        "question": problem.prompt,
        "answer": problem.fields["answer"],
        "picture": problem.picture.thumbnail() if problem.picture else "",
        "answers": [
            {"label": label, "text": own[id_]["text"], "score": own[id_]["score"]} for label, own in answers.items()
        ],
    }
