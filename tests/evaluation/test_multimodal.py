"""Benchmarks about pictures: hub and local rows make equal problems, pictures are read or named, scores are as published."""

import io
import json
import statistics
import sys
from types import ModuleType

import pytest
from PIL import Image as Pil

from microbat.evaluation.benchmarks import BENCHMARKS
from microbat.evaluation.generation import Answer, Sampling
from microbat.evaluation.multimodal import MULTIMODAL
from microbat.evaluation.problems import load_problems
from microbat.evaluation.sampled import run_sampled

ROWS = {
    "mme": {
        "question_id": "artwork/1.jpg",
        "question": "Is it? Please answer yes or no.",
        "answer": "Yes",
        "category": "artwork",
    },
    "ocrbench": {
        "dataset": "IIIT5K",
        "question": "What is written?",
        "answer": ["CENTRE"],
        "question_type": "Regular Text",
    },
    "docvqa": {"question": "Which year?", "answers": ["1997", "the year 1997"]},
    "realworldqa": {"question": "Which way? A. Left B. Right", "answer": "A"},
    "vlmblind": {"prompt": "How many, e.g. {2}?", "groundtruth": "1", "task": "Line Plot Intersections"},
}
RIGHT = {"mme": "Yes", "ocrbench": "centre", "docvqa": "1997", "realworldqa": "A", "vlmblind": "{1}"}


def png(colour="red"):
    file = io.BytesIO()
    Pil.new("RGB", (7, 5), colour).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def written(tmp_path):
    """Writes rows as a benchmark's local twin, each with a picture unless it has one."""

    def write(name, rows):
        file = tmp_path / BENCHMARKS[name].file
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "a.png").write_bytes(png())
        file.write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
        return tmp_path

    return write


class Rows(list):
    """A data set of the hub, before and after its pictures stay encoded."""

    def cast_column(self, column, kind):
        assert column == "image"
        assert kind.decode is False
        return Rows({**row, column: {"bytes": png(), "path": "a.png"}} for row in self)


@pytest.fixture
def hub(monkeypatch):
    asked, module = [], ModuleType("datasets")

    class Image:
        def __init__(self, decode):
            self.decode = decode

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return Rows([ROWS[next(b.name for b in MULTIMODAL if b.hub == asked[-1])]])

    module.Image, module.load_dataset = Image, load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize("name", ROWS)
def test_both_copies_make_the_same_problem(name, written, hub):
    (here,) = load_problems(BENCHMARKS[name], written(name, [ROWS[name]]))
    (there,) = load_problems(BENCHMARKS[name])
    assert hub == [BENCHMARKS[name].hub]
    assert here.prompt == there.prompt
    assert here.fields == there.fields
    assert here.picture.read() == there.picture.read() == png()
    assert here.judge(RIGHT[name]) == there.judge(RIGHT[name]) == 1
    assert here.judge("{2} wrong") in (0, None)


def test_the_local_copy_of_vlms_are_blind_has_its_own_column_names(written):
    row = {"question": "Do they overlap? Answer with Yes/No.", "answer": "No", "task": "overlapping_circles"}
    (problem,) = load_problems(BENCHMARKS["vlmblind"], written("vlmblind", [row]))
    assert problem.judge("No.")


def test_the_real_copy_of_vlms_are_blind(shared):
    problems = load_problems(BENCHMARKS["vlmblind"], shared / "data")
    assert len(problems) == 200
    tasks = [problem.fields["task"] for problem in problems]
    assert {task: tasks.count(task) for task in tasks} == dict.fromkeys(tasks, 40)
    for problem in problems:
        answer = problem.fields["answer"]
        rows, _, columns = answer.partition("x")
        assert problem.judge(f"rows={rows}, columns={columns}" if columns else answer) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no.png", "realworldqa, row 2: .*no.png: the picture cannot be read .*No such file"),
        ("text.png", "realworldqa, row 2: .*text.png: the picture cannot be read .Pillow knows no such format"),
        ("cut.png", "realworldqa, row 2: .*cut.png: the picture cannot be read"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(image, message, written):
    data = written("realworldqa", [ROWS["realworldqa"], {**ROWS["realworldqa"], "image": image}])
    (data / "realworldqa" / "text.png").write_text("no picture")
    (data / "realworldqa" / "cut.png").write_bytes(png()[:60])
    with pytest.raises(ValueError, match=message):
        load_problems(BENCHMARKS["realworldqa"], data)


def test_what_is_on_no_hub_asks_for_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny_vlm is not on the hub; give the folder that holds held-out/test"):
        load_problems(BENCHMARKS["tiny_vlm"])
    with pytest.raises(FileNotFoundError, match="tiny_vlm: no file .*test.jsonl$"):
        load_problems(BENCHMARKS["tiny_vlm"], tmp_path)


def scored(name, rows, answers, written, tmp_path):
    """The result where the answers are given, in order."""
    problems = load_problems(BENCHMARKS[name], written(name, rows))

    def generate(requests):
        assert [request.picture for request in requests] == [problem.picture for problem in problems]
        for request, text in zip(requests, answers, strict=True):
            yield request, Answer(text=text, truncated=False)

    sampling = Sampling(temperature=0)
    return run_sampled(BENCHMARKS[name], problems, generate, sampling, "m", tmp_path / "a.jsonl", progress=False)


def test_mme_adds_accuracy_and_pictures_that_are_all_right_over_its_tasks(written, tmp_path):
    pictures = [("count", 1), ("count", 2), ("count", 3), ("OCR", 1), ("OCR", 2)]
    rows = [
        {"question_id": f"{task}/{n}", "question": f"{task} {n} {question}", "answer": "Yes", "category": task}
        for task, n in pictures
        for question in "ab"
    ]
    answers = ["yes", "yes", "yes", "no", "no", "no", "yes", "yes", "yes", "well"]
    result = scored("mme", rows, answers, written, tmp_path)
    assert result["score"] == pytest.approx(100 * (3 / 6 + 1 / 3) + 100 * (3 / 4 + 1 / 2))
    count, ocr = [200, 50, 0], [200, 50]  # accuracy and accuracy+ of each picture
    errors = [statistics.stdev(count) / 3**0.5, statistics.stdev(ocr) / 2**0.5]
    assert result["stderr"] == pytest.approx(sum(error**2 for error in errors) ** 0.5)
    assert (result["unparsed"], result["n"]) == (1, 10)
    assert result["by_task"] == {"count": {"score": 0.5, "n": 6}, "OCR": {"score": 0.75, "n": 4}}


@pytest.mark.parametrize(
    ("name", "answers", "score"),
    [
        ("ocrbench", ["centre", "center", "CENTRE!", ""], 500),
        ("docvqa", ["1997", "1998", "2024", ""], 25 * (1 + 3 / 4)),
        ("realworldqa", ["A", "B", "A. Left", "right"], 50),
        ("vlmblind", ["{1}", "{1} or {2}", "{2}", "1"], 50),
    ],
)
def test_scores_are_in_the_published_points(name, answers, score, written, tmp_path):
    rows = [{k: (f"{v} {i}" if k in ("question", "prompt") else v) for k, v in ROWS[name].items()} for i in range(4)]
    result = scored(name, rows, answers, written, tmp_path)
    assert result["score"] == pytest.approx(score)
    assert result["unparsed"] == 1


def test_equal_questions_about_different_pictures_are_different_problems(written, tmp_path):
    data = written("realworldqa", [ROWS["realworldqa"], {**ROWS["realworldqa"], "image": "b.png"}])
    with pytest.raises(ValueError, match="b.png: the picture cannot be read .No such file"):
        load_problems(BENCHMARKS["realworldqa"], data)
    (data / "realworldqa" / "b.png").write_bytes(png("blue"))
    rows = [ROWS["realworldqa"], {**ROWS["realworldqa"], "image": "b.png"}]
    assert scored("realworldqa", rows, ["A", "B"], written, tmp_path)["score"] == 50


def test_pictures_travel_as_data(written):
    (problem,) = load_problems(BENCHMARKS["realworldqa"], written("realworldqa", [ROWS["realworldqa"]]))
    head, _, _ = problem.picture.data_url().partition(",")
    assert head == "data:image/png;base64"
    assert problem.picture.image().size == (7, 5)
    assert problem.picture.thumbnail().startswith("data:image/png;base64,")
