"""Case studies are chosen by one rule: the float model is right, and the others differ most."""

import io
import json

import pytest

from microbat.evaluation.cases import CASES, cases
from microbat.evaluation.problems import Problem
from microbat.evaluation.sampled import identity
from microbat.pictures import Picture

Pil = pytest.importorskip("PIL.Image")


def problem(number: int, task: str, pictured: bool = True) -> Problem:
    file = io.BytesIO()
    Pil.new("RGB", (900, 300), (number, 0, 0)).save(file, format="PNG")
    shown = Picture(name=str(number), read=file.getvalue) if pictured else None
    fields = {"answer": "yes", "task": task}
    return Problem(prompt=f"Question {number}?", judge=float, picture=shown, fields=fields)


@pytest.fixture
def kept(tmp_path):
    """Writes a model's answers: one score per problem, with a second sample that must not count."""

    def write(label, problems, scores):
        rows = [{"benchmark": "b"}]
        for own, score in zip(problems, scores, strict=True):
            row = {"problem": identity(own), "text": f"{label} says {score}", "truncated": False}
            rows += [{**row, "sample": 1, "score": 0.5}, {**row, "sample": 0, "score": score}]
        file = tmp_path / f"{label}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def test_the_float_model_is_right_and_the_others_differ(kept):
    problems = [problem(number, "lines") for number in range(5)]
    scores = {"float": [1, 1, 0, 1, 1], "A": [1, 0, 0, 1, 0.9], "B": [1, 1, 1, None, 1]}
    files = {label: kept(label, problems, own) for label, own in scores.items()}
    found = cases(problems, files, "float")
    assert [case["question"] for case in found] == ["Question 1?", "Question 3?", "Question 4?"]
    first = found[0]
    assert [(own["label"], own["score"]) for own in first["answers"]] == [("float", 1), ("A", 0), ("B", 1)]
    assert first["answers"][1]["text"] == "A says 0"
    assert first["answer"] == "yes"
    assert first["picture"].startswith("data:image/png;base64,")
    assert found[1]["answers"][2]["score"] is None


def test_every_task_has_its_share(kept):
    problems = [problem(number, "ab"[number % 2] if number < 40 else "c") for number in range(41)]
    files = {"float": kept("float", problems, [1] * 41), "A": kept("A", problems, [0] * 41)}
    files["B"] = kept("B", problems, [1] * 41)
    tasks = [case["task"] for case in cases(problems, files, "float")]
    assert {task: tasks.count(task) for task in tasks} == {"a": 3, "b": 3, "c": 1}
    assert len(cases(problems[:1], {"float": files["float"], "A": files["A"], "B": files["B"]}, "float")) == 1
    assert CASES == 8


def test_without_pictures_or_others_there_is_none(kept):
    problems = [problem(1, "", pictured=False)]
    files = {label: kept(label, problems, [1]) for label in ("float", "A")}
    assert cases(problems, files, "float") == []
    assert cases([problem(1, "")], {"float": files["float"]}, "float") == []
