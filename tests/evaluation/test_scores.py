"""Scores of both kinds of benchmarks at once, and recovery with its error."""

import json

import pytest
import torch

from microbat.evaluation.generation import Answer, Sampling
from microbat.evaluation.scores import Tasks, by_likelihood, flips, recovered, recovered_items
from microbat.evaluation.totals import summed
from microbat.models.base import Thinking


def score(value, stderr=0.1):
    return {"score": value, "stderr": stderr}


def test_recovery_comes_with_the_error_of_its_scores():
    value, error = recovered({"a": score(0.6, 0.02), "b": score(0.5, 0.04)}, {"a": score(0.8), "b": score(0.5)})
    assert value == pytest.approx(87.5)
    assert error == pytest.approx(100 * ((0.02 / 0.8) ** 2 + (0.04 / 0.5) ** 2) ** 0.5 / 2)


def test_what_both_sides_find_hard_is_no_error_of_recovery():
    """Benchmarks whose items are known: the error is that of a ratio on the same items, and simulated draws of items agree."""
    generator = torch.Generator().manual_seed(0)
    given = (torch.rand(4000, generator=generator) < 0.75).double()
    own = torch.where(torch.rand(4000, generator=generator) < 0.04, 1 - given, given)

    def scored(items):
        return {"a": {"score": items.mean().item(), "stderr": 0.01, "items": [items.tolist()]}}

    value, error = recovered(scored(own), scored(given))
    assert value == pytest.approx(100 * own.mean().item() / given.mean().item())
    draws = torch.randint(4000, (2000, 4000), generator=generator)
    again = 100 * own[draws].mean(1) / given[draws].mean(1)
    assert error == pytest.approx(again.std().item(), rel=0.05)
    assert error < 0.5 * 100 * 0.01 / 0.75
    assert summed(recovered_items(scored(own), scored(given)))[0] == pytest.approx(value)
    assert recovered_items({"a": score(0.6)}, {"a": score(0.8)}) is None


def test_recovery_has_no_error_where_a_score_has_none_and_no_value_where_the_reference_is_none_or_0():
    assert recovered({"a": score(0.6, None)}, {"a": score(0.8)}) == (pytest.approx(75.0), None)
    assert recovered({"a": score(0.6)}, {"a": score(0.0)}) is None
    assert recovered({"a": score(0.6)}, {}) is None


def test_flips_count_what_cancels_in_a_score():
    given = {"a": score(2 / 3) | {"items": [[1, 1, 0]]}, "b": score(3.0) | {"items": [[1, 0], [2, 2]]}}
    own = {"a": score(2 / 3) | {"items": [[0, 1, 1]]}, "b": score(3.0) | {"items": [[1, 0], [2, 0]]}}
    value, error = flips(own, given)
    assert value == pytest.approx(100 * (2 / 3 + 1 / 4) / 2)
    assert error == pytest.approx(50 * ((1 / 3) / 3 + (1 / 4) / 4) ** 0.5)
    assert flips(given, given)[0] == 0
    assert flips(own, {}) is None
    assert flips({"a": score(0.5)}, given) is None


def test_tasks_tell_the_kinds_apart_and_check_both(tmp_path):
    assert by_likelihood(["piqa", "gsm8k", "mmlu"]) == ["piqa", "mmlu"]
    with pytest.raises(FileNotFoundError, match="piqa"):
        Tasks(names=("piqa",), data=tmp_path)
    with pytest.raises(FileNotFoundError, match="gsm8k/test.jsonl"):
        Tasks(names=("gsm8k",), data=tmp_path)


def test_the_protocol_is_what_decides_the_scores(tmp_path):
    assert Tasks(names=("mmlu",), limit=3).protocol == {"tasks": ["mmlu"], "data": "", "limit": 3}
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    protocols = [
        Tasks(names=("gsm8k",), data=tmp_path, sampling=Sampling(**settings)).protocol
        for settings in ({}, {"batch_size": 2}, {"samples": 2}, {"top_k": 5})
    ]
    assert protocols[0] == protocols[1]
    assert protocols[0] not in protocols[2:]
    assert json.loads(json.dumps(protocols)) == protocols


def test_answers_are_scored_by_name(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"1 + {i}?", "answer": f"#### {1 + i}"} for i in range(3)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    two = lambda requests: ((r, Answer(text="\\boxed{2}", truncated=False)) for r in requests)  # noqa: E731
    scores = Tasks(names=("gsm8k",), data=tmp_path).answered(two, "me", tmp_path / "answers")
    assert scores["gsm8k"].items() >= {"score": pytest.approx(1 / 3), "stderr": pytest.approx(1 / 3), "n": 3}.items()
    assert len((tmp_path / "answers" / "gsm8k.jsonl").read_text().splitlines()) == 1 + 3


def test_a_mode_of_thinking_is_a_benchmark_of_its_own(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}))
    thinking = Thinking(modes=(("quick", " /quick"), ("slow", "")), opening="[a]", closing="[b]")
    tasks = Tasks(names=("gsm8k",), data=tmp_path, thinking=thinking)
    assert tasks.protocol["modes"] == ["quick", "slow"]
    asked = []

    def only_when_slow(requests):
        asked.extend(request.prompt for request in requests)
        return (
            (r, Answer(text="" if r.prompt.endswith("/quick") else "\\boxed{2}", truncated=False)) for r in requests
        )

    scores = tasks.answered(only_when_slow, "me", tmp_path / "answers")
    assert {name: score["score"] for name, score in scores.items()} == {"gsm8k-quick": 0, "gsm8k-slow": 1}
    assert asked[0] == asked[1] + " /quick"
    assert {file.name for file in (tmp_path / "answers").iterdir()} == {"gsm8k-quick.jsonl", "gsm8k-slow.jsonl"}
