"""The benchmarks as data: rows of every copy become the same problems, and missing or odd data is named."""

import json
from dataclasses import replace

import pytest

from microbat.evaluation.benchmarks import BENCHMARKS
from microbat.evaluation.problems import load_problems

pytest.importorskip("math_verify")

GSM8K = [{"question": "How many {eggs}?", "answer": "1000 + 234 = <<1000+234=1234>>1,234\n#### 1,234"}]
GPQA = [
    {
        "Question": f"Which letter is number {i}?",
        "Correct Answer": "this one",
        "Incorrect Answer 1": "no",
        "Incorrect Answer 2": "nor this",
        "Incorrect Answer 3": "not at all",
    }
    for i in range(12)
]
MBPP_CODE = "import re\ndef helper(x):\n  return x\ndef area(r):\n  return math.pi * r * helper(r)\n"
MBPP_TEST = "assert math.isclose(area(1), 3.14159, rel_tol=1e-3)"
MBPP_FILE = [
    {
        "prompt": f'"""\nWrite a function for the area of a circle.\n{MBPP_TEST}\n"""\n',
        "entry_point": "area",
        "assertion": f"\n{MBPP_TEST}\n",
    }
]
MBPP_HUB = [
    {
        "prompt": "Write a function for the area of a circle.",
        "code": MBPP_CODE,
        "test_imports": ["import math"],
        "test_list": [MBPP_TEST],
    }
]
REAL = {"gsm8k": 1319, "math500": 500, "aime24": 30, "aime25": 30, "humaneval": 164, "mbpp": 378}


@pytest.fixture
def written(tmp_path):
    def write(name, rows):
        path = tmp_path / BENCHMARKS[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return write


def test_the_papers_numbers_of_samples():
    published = {"gsm8k": 1, "math500": 3, "aime24": 16, "aime25": 16, "gpqa_diamond": 10}
    assert {name: BENCHMARKS[name].samples for name in published} == published
    asked_in_words = {benchmark.name for benchmark in BENCHMARKS.values() if not benchmark.picture}
    assert asked_in_words == {*REAL, "gpqa_diamond"}


def test_gsm8k_answers_follow_the_hashes(written):
    (problem,) = load_problems(BENCHMARKS["gsm8k"], written("gsm8k", GSM8K))
    assert problem.prompt.startswith("How many {eggs}?\nPlease reason step by step")
    assert problem.prompt.endswith("\\boxed{}.")
    assert problem.judge("So \\boxed{1234}.")
    assert not problem.judge("So \\boxed{234}.")


def test_copies_with_and_without_the_instruction_ask_the_same(written):
    plain = {"problem": "What is $1+1$?", "answer": 2, "level": 1}
    instructed = {"problem": load_problems(BENCHMARKS["math500"], written("math500", [plain]))[0].prompt, "answer": "2"}
    assert plain["problem"] != instructed["problem"]
    prompts = [load_problems(BENCHMARKS["aime24"], written("aime24", [row]))[0].prompt for row in (plain, instructed)]
    assert prompts == [instructed["problem"]] * 2


def test_gpqa_choices_are_shuffled_the_same_every_time_and_judged_by_their_place(written):
    first, again = (load_problems(BENCHMARKS["gpqa_diamond"], written("gpqa_diamond", GPQA)) for _ in range(2))
    assert [p.prompt for p in first] == [p.prompt for p in again]
    places = [p.prompt[p.prompt.index(") this one") - 1] for p in first]
    assert len(set(places)) > 2
    for problem, place in zip(first, places, strict=True):
        assert [bool(problem.judge(f"\\boxed{{{letter}}}")) for letter in "ABCD"] == [c == place for c in "ABCD"]


def test_both_copies_of_mbpp_ask_the_same_and_judge_the_same(written):
    answers = [f"```python\n{code}\n```" for code in ("import math\n" + MBPP_CODE, "def area(r): return r")]
    for rows in (MBPP_FILE, MBPP_HUB):
        (problem,) = load_problems(BENCHMARKS["mbpp"], written("mbpp", rows))
        assert MBPP_FILE[0]["prompt"].strip() in problem.prompt
        assert [problem.judge(answer) for answer in answers] == [True, False]


def test_missing_data_says_what_would_serve(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"gsm8k/test\.jsonl.*'openai/gsm8k'"):
        load_problems(BENCHMARKS["gsm8k"], tmp_path)
    datasets = pytest.importorskip("datasets")

    def offline(*arguments, **named):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(OSError, match=r"'Idavidrein/gpqa' could not be loaded \(offline\).*gpqa/gpqa_diamond\.jsonl"):
        load_problems(BENCHMARKS["gpqa_diamond"])


def test_rows_come_from_the_hub_without_a_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **named: asked.append((*a, named["split"])) or GSM8K)
    assert len(load_problems(BENCHMARKS["gsm8k"])) == 1
    assert asked == [("openai/gsm8k", "main", "test")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Why?"}], "gsm8k, row 1: no column 'answer' .columns: question"),
        ([*GSM8K, {"question": "Why?", "answer": "#### \\frac{"}], "gsm8k, row 2: math-verify cannot read"),
        ([], "gsm8k: there are no rows"),
    ],
)
def test_odd_rows_are_named(written, rows, message):
    with pytest.raises(ValueError, match=message):
        load_problems(BENCHMARKS["gsm8k"], written("gsm8k", rows))


def test_limit(written):
    data = written("gpqa_diamond", GPQA)
    assert len(load_problems(BENCHMARKS["gpqa_diamond"], data, limit=5)) == 5
    with pytest.raises(ValueError, match="limit=0"):
        load_problems(BENCHMARKS["gpqa_diamond"], data, limit=0)


def test_a_benchmark_is_one_entry(written):
    mine = replace(BENCHMARKS["gsm8k"], name="mine", prompt="{problem} Answer in one line.")
    assert load_problems(mine, written("gsm8k", GSM8K))[0].prompt == "How many {eggs}? Answer in one line."


def test_the_real_files_are_read_whole_and_no_problem_twice(shared):
    for name, count in REAL.items():
        problems = load_problems(BENCHMARKS[name], shared / "data")
        assert len(problems) == len({problem.prompt for problem in problems}) == count, name


@pytest.mark.parametrize(("name", "file"), [("humaneval", "HumanEval"), ("mbpp", "MbppPlus")])
def test_the_authors_own_programs_are_right_and_empty_ones_wrong(shared, name, file):
    rows = [json.loads(line) for line in (shared / "data" / name / f"{file}.jsonl").read_text().splitlines()]
    problems = load_problems(BENCHMARKS[name], shared / "data")
    for row, problem in list(zip(rows, problems, strict=True))[::19]:
        before = row["prompt"] if name == "humaneval" else ""
        assert problem.judge(f"```python\n{before}{row['canonical_solution']}\n```"), row["task_id"]
        assert problem.judge(f"```python\ndef {row['entry_point']}(*_): pass\n```") is False, row["task_id"]
