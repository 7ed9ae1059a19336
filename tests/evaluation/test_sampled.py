"""Scores of sampled answers: Avg@k and its error, what is kept, what an interrupted run draws again."""

import json
import statistics

import pytest

from microbat.evaluation.benchmarks import BENCHMARKS
from microbat.evaluation.generation import Answer, Sampling
from microbat.evaluation.problems import Problem
from microbat.evaluation.sampled import run_sampled

VERDICTS = {"right": True, "wrong": False, "": None}
PROBLEMS = [Problem(prompt=f"problem {i}", judge=VERDICTS.__getitem__) for i in range(5)]


class Fake:
    """Answers by prompt and seed; stops with an error after ``patience`` answers."""

    def __init__(self, patience=1000):
        self.patience, self.asked = patience, []

    def __call__(self, requests):
        for request in requests:
            if len(self.asked) == self.patience:
                raise KeyboardInterrupt
            self.asked.append(request)
            number = int(request.prompt[-1]) + request.seed
            yield request, Answer(text=["right", "wrong", "", "right"][number % 4], truncated=number % 4 == 2)


@pytest.fixture
def score(tmp_path):
    def run(generate, problems=PROBLEMS, model="m", **settings):
        sampling = Sampling(**{"samples": 3, **settings})
        file = tmp_path / "m" / "math500.jsonl"
        return run_sampled(BENCHMARKS["math500"], problems, generate, sampling, model, file, progress=False)

    run.file = tmp_path / "m" / "math500.jsonl"
    return run


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


def test_the_mean_is_over_problems_and_so_is_its_error(score):
    fake = Fake()
    result = score(fake)
    kept = {(row["problem"], row["sample"]): row for row in rows(score.file)}
    assert len(kept) == len(fake.asked) == 15
    assert len({(request.prompt, request.seed) for request in fake.asked}) == 15
    ids = dict.fromkeys(problem for problem, _ in kept)
    shares = [sum(kept[id_, s]["score"] == 1 for s in range(3)) / 3 for id_ in ids]
    assert result["score"] == pytest.approx(sum(shares) / 5)
    assert result["stderr"] == pytest.approx(statistics.stdev(shares) / 5**0.5)
    assert result["items"] == [pytest.approx(shares)]
    assert result["unparsed"] == sum(row["score"] is None for row in kept.values()) > 0
    assert result["truncated"] == sum(row["truncated"] for row in kept.values()) > 0
    assert (result["n"], result["samples"]) == (5, 3)


def test_the_benchmarks_own_number_of_samples_is_the_default(score):
    assert score(Fake(), samples=None)["samples"] == BENCHMARKS["math500"].samples == 3


def test_one_problem_has_no_error(score):
    assert score(Fake(), problems=PROBLEMS[:1])["stderr"] is None


def test_an_interrupted_run_draws_only_what_is_missing(score, tmp_path):
    whole = score(Fake())
    text = score.file.read_text()
    score.file.unlink()
    with pytest.raises(KeyboardInterrupt):
        score(Fake(patience=7))
    assert len(rows(score.file)) == 7
    with score.file.open("a") as file:
        file.write('{"problem": "half a li')
    again = Fake()
    assert score(again) == whole
    assert len(again.asked) == 8
    assert score.file.read_text() == text
    assert score(Fake(patience=0)) == whole


def test_more_samples_and_problems_go_on_from_fewer(score):
    score(Fake(), problems=PROBLEMS[:2], samples=1)
    more = Fake()
    score(more, samples=2, batch_size=3)
    assert len(more.asked) == 8


def test_seeds_change_the_draws_and_equal_seeds_repeat_them(score):
    draws = []
    for seed in (0, 0, 1):
        fake = Fake()
        score(fake, seed=seed)
        score.file.unlink()
        draws.append({(request.prompt, request.seed) for request in fake.asked})
    assert draws[0] == draws[1]
    assert draws[0].isdisjoint(draws[2])


@pytest.mark.parametrize(("change", "message"), [({"model": "other"}, "'m', now 'other'"), ({"top_k": 5}, "20, now 5")])
def test_answers_of_another_run_are_not_mixed_in(score, change, message):
    score(Fake())
    before = score.file.read_text()
    with pytest.raises(ValueError, match=f"holds the answers of another run .*{message}"):
        score(Fake(), **change)
    assert score.file.read_text() == before
