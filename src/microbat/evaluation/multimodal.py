"""Benchmarks of questions about pictures, as plain data: those of BATQuant (arXiv 2603.16590, section 4.1.1 and Appendix A.1)
with the scores that they are published with, and the held-out set of ``scripts/train_tiny_vlm.py``.

The paper gives no prompts: these are the data sets' own questions, for DocVQA with the usual request for a short answer.
"""

from microbat.evaluation.problems import Benchmark, Fields, Row
from microbat.evaluation.short_answers import anls, blind, contains, exact, yes_or_no
from microbat.evaluation.totals import by_picture_and_task


def _mme(row: Row) -> Fields:
    """Both questions about a picture have its identifier."""
    return {
        "question": row["question"].strip(),
        "answer": row["answer"],
        "task": row["category"],
        "picture": str(row["question_id"]),
    }


def _ocrbench(row: Row) -> Fields:
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    return {
        "question": row["question"].strip(),
        "answer": "\n".join(answer.strip().replace("\n", " ") for answer in answers),
        "dataset": row["dataset"],
        "task": row["question_type"],
    }


def _docvqa(row: Row) -> Fields:
    return {"question": row["question"].strip(), "answer": "\n".join(row["answers"])}


def _question(row: Row) -> Fields:
    return {"question": row["question"].strip(), "answer": row["answer"]}


def _blind(row: Row) -> Fields:
    """The hub and the local copy call columns differently."""
    question, answer = (row["prompt"], row["groundtruth"]) if "prompt" in row else (row["question"], row["answer"])
    return {"question": question.strip(), "answer": str(answer), "task": row["task"]}


def _tiny(row: Row) -> Fields:
    return _question(row) | {"task": row["task"]}


MULTIMODAL = (
    Benchmark(
        name="mme",
        hub=("lmms-lab/MME", None, "test"),
        file="mme/test.jsonl",
        fields=_mme,
        prompt="{question}",
        judge=yes_or_no,
        samples=1,
        picture="image",
        total=by_picture_and_task,  # at most 2800: ten tasks of perception, four of cognition
    ),
    Benchmark(
        name="ocrbench",
        hub=("echo840/OCRBench", None, "test"),
        file="ocrbench/test.jsonl",
        fields=_ocrbench,
        prompt="{question}",
        judge=contains,
        samples=1,
        picture="image",
        points=1000,  # published as right answers, of a thousand
    ),
    Benchmark(
        name="docvqa",
        hub=("lmms-lab/DocVQA", "DocVQA", "validation"),
        file="docvqa/validation.jsonl",
        fields=_docvqa,
        prompt="{question}\nAnswer the question using a single word or phrase.",
        judge=anls,
        samples=1,
        picture="image",
        points=100,
    ),
    Benchmark(
        name="realworldqa",
        hub=("xai-org/RealworldQA", None, "test"),
        file="realworldqa/test.jsonl",
        fields=_question,
        prompt="{question}",
        judge=exact,
        samples=1,
        picture="image",
        points=100,
    ),
    Benchmark(
        name="vlmblind",
        hub=("XAI/vlmsareblind", None, "valid"),
        file="vlms-are-blind/test.jsonl",
        fields=_blind,
        prompt="{question}",
        judge=blind,
        samples=1,
        picture="image",
        points=100,
    ),
    Benchmark(
        name="tiny_vlm",
        hub=None,
        file="held-out/test.jsonl",
        fields=_tiny,
        prompt="{question}",
        judge=exact,
        samples=1,
        picture="image",
        points=100,
    ),
)
