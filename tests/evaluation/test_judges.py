"""Judges: right and wrong in the forms that models write, None where there is nothing to judge."""

import json
import threading

import pytest

from microbat.evaluation.judges import choice, maths, program

pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("18", "She makes \\boxed{18} dollars.", True),
        ("18", "\\[\n\\boxed{18.00}\n\\]", True),
        ("1234", "The total is $\\boxed{1{,}234}$.", True),
        ("\\frac{14}{3}", "So 5 - 1/3, that is \\boxed{\\dfrac{14}{3}}", True),
        ("\\frac{3}{2}", "\\boxed{1.5}", True),
        ("p - q", "\\boxed{-q+p}", True),
        ("1,-2", "$\\boxed{-2, 1}$", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(\\pi/2, 3)}", False),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", True),
        ("\\text{Evelyn}", "\\boxed{\\text{Carla}}", False),
        ("18", "First I thought $\\boxed{17}$.\n\nBut no:\n\n$\\boxed{18}$", True),
        ("18", "The answer is 18.", True),
        ("18", "\\boxed{81}", False),
        ("18", "**Answer:** $18$", True),
        ("18", "She makes 9 * 2 = 18 and then", None),
        ("18", "I do not know.", None),
        ("18", "", None),
        ("18", "\\boxed{\\frac{1}{", None),
        ("18", "<think>Maybe \\boxed{17}? No.</think>\n\\boxed{18}", True),
        ("18", "<think>Maybe \\boxed{18}? But then", None),
        ("18", "Maybe 17.</think>\\boxed{18}", True),  # the template opened the thoughts
    ],
)
def test_maths(reference, answer, verdict):
    assert maths({"answer": reference})(answer) is verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A is too small, so \\boxed{B}.", True),
        ("\\boxed{\\text{B}}", True),
        ("$\\boxed{(B)}$", True),
        ("**Answer: B**", True),
        ("The answer is B.", True),
        ("\\boxed{C}", False),
        ("Answer: A\n\nNo, wait.\n\nAnswer: C", False),
        ("It has 12 atoms.", None),
        ("A friend told me.", None),
    ],
)
def test_choice(answer, verdict):
    assert choice({"answer": "B"})(answer) is verdict


FIELDS = {"entry_point": "double", "before": "import math", "after": "assert double(3) == 6"}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Here:\n```python\ndef double(x):\n    return math.floor(2 * x)\n```\nDone.", True),
        ("```\ndef double(x):\n    return x * x\n```\nNo:\n```py\ndef double(x): return 2 * x\n```", True),
        ("```python\ndef double(x): return 2 * x\n```\nUse it:\n```python\nprint(double(input()))\n```", True),
        ("```python\ndef double(x): return 2 * x", True),  # ended without closing the block
        ("<think>```python\ndef double(x): return 2 * x\n```</think>I cannot.", None),
        ("```python\ndef double(x): return x\n```", False),
        ("```python\ndef double(x) return 2 * x\n```", False),
        ("```python\nimport sys\ndef double(x): return 0\nsys.exit(0)\n```", False),
        ("```python\ndef doubled(x): return 2 * x\n```", None),
        ("Just multiply by two.", None),
    ],
)
def test_program(answer, verdict):
    assert program(FIELDS)(answer) is verdict


def test_references_that_cannot_be_read_are_errors():
    with pytest.raises(ValueError, match="cannot read the reference answer"):
        maths({"answer": "\\frac{1}{"})


def test_a_thread_is_refused_instead_of_judging_nothing():
    caught = []

    def judge():
        try:
            maths({"answer": "18"})
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_every_real_reference_is_right_and_its_neighbour_is_wrong(shared):
    for name in ("math500/test", "aime/aime24", "aime/aime25"):
        lines = (shared / "data" / f"{name}.jsonl").read_text().splitlines()
        references = [json.loads(line)["answer"] for line in lines]
        judges = [maths({"answer": reference}) for reference in references]
        assert all(judge(f"Thus $$\\boxed{{{ref}}}$$.") for judge, ref in zip(judges, references, strict=True))
        shifted = [judge(f"\\boxed{{{ref} + 7919}}") for judge, ref in zip(judges, references, strict=True)]
        assert not any(shifted)
