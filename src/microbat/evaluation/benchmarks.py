"""The benchmarks that a model answers in its own words, as plain data: a new one is one entry of :data:`BENCHMARKS`.

The reasoning benchmarks of BATQuant (arXiv 2603.16590, Appendix A: GSM8K Avg@1, MATH-500 Avg@3, AIME24 and AIME25
Avg@16, GPQA-Diamond Avg@10) and two of programs, HumanEval and MBPP. The paper gives no prompts; the one for mathematics
is that of the Qwen3 model cards.
"""

import random

from microbat.evaluation.judges import choice, maths, program
from microbat.evaluation.multimodal import MULTIMODAL
from microbat.evaluation.problems import Benchmark, Fields, Row

STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."
MATHS = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
CHOICE = (
    "{question}\n\nA) {A}\nB) {B}\nC) {C}\nD) {D}\n\n"
    "Please reason step by step, and put the letter of your final choice (A, B, C or D) within \\boxed{{}}."
)
PROGRAM = "Write a self-contained Python program that solves this problem, in one markdown code block.\n```python\n{task}\n```"


def _gsm8k(row: Row) -> Fields:
    """The final answer follows "####", with commas between thousands."""
    return {"problem": row["question"], "answer": row["answer"].rpartition("####")[2].replace(",", "").strip()}


def _maths(row: Row) -> Fields:
    """Some copies end each problem with the instruction already."""
    return {"problem": row["problem"].removesuffix(STEP_BY_STEP).rstrip(), "answer": str(row["answer"])}


def _gpqa(row: Row) -> Fields:
    """The choices in an order drawn from the question, the same for every model and run."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    order = random.Random(row["Question"]).sample(names, k=4)
    choices = {letter: row[name].strip() for letter, name in zip("ABCD", order, strict=True)}
    return {"question": row["Question"].strip(), **choices, "answer": "ABCD"[order.index("Correct Answer")]}


def _humaneval(row: Row) -> Fields:
    """The prompt runs before the answer: it may hold imports and helpers that the answer leaves out."""
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    return {"task": row["prompt"], "entry_point": row["entry_point"], "before": row["prompt"], "after": tests}


def _mbpp(row: Row) -> Fields:
    """MBPP's own tests for the problems that EvalPlus kept: its release file, or its data set on the hub."""
    if "assertion" in row:
        imports = "import math" if "math." in row["assertion"] else ""  # the hub has it in a column
        tests, entry_point, task = f"{imports}\n{row['assertion']}", row["entry_point"], row["prompt"].strip()
    else:
        tests = "\n".join([*row["test_imports"], *row["test_list"]])
        defined = (line[4:].partition("(")[0] for line in row["code"].splitlines() if line.startswith("def "))
        entry_point = next(name for name in defined if name in row["test_list"][0])
        task = f'"""\n{row["prompt"]}\n{row["test_list"][0]}\n"""'
    return {"task": task, "entry_point": entry_point, "before": "", "after": tests}


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="gsm8k",
            hub=("openai/gsm8k", "main", "test"),
            file="gsm8k/test.jsonl",
            fields=_gsm8k,
            prompt=MATHS,
            judge=maths,
            samples=1,
        ),
        Benchmark(
            name="math500",
            hub=("HuggingFaceH4/MATH-500", None, "test"),
            file="math500/test.jsonl",
            fields=_maths,
            prompt=MATHS,
            judge=maths,
            samples=3,
        ),
        Benchmark(
            name="aime24",
            hub=("HuggingFaceH4/aime_2024", None, "train"),
            file="aime/aime24.jsonl",
            fields=_maths,
            prompt=MATHS,
            judge=maths,
            samples=16,
        ),
        Benchmark(
            name="aime25",
            hub=("math-ai/aime25", None, "test"),
            file="aime/aime25.jsonl",
            fields=_maths,
            prompt=MATHS,
            judge=maths,
            samples=16,
        ),
        Benchmark(
            name="gpqa_diamond",
            hub=("Idavidrein/gpqa", "gpqa_diamond", "train"),
            file="gpqa/gpqa_diamond.jsonl",
            fields=_gpqa,
            prompt=CHOICE,
            judge=choice,
            samples=10,
        ),
        Benchmark(
            name="humaneval",
            hub=("openai/openai_humaneval", None, "test"),
            file="humaneval/HumanEval.jsonl",
            fields=_humaneval,
            prompt=PROGRAM,
            judge=program,
            samples=1,
        ),
        Benchmark(
            name="mbpp",
            hub=("evalplus/mbppplus", None, "test"),
            file="mbpp/MbppPlus.jsonl",
            fields=_mbpp,
            prompt=PROGRAM,
            judge=program,
            samples=1,
        ),
        *MULTIMODAL,
    )
}
