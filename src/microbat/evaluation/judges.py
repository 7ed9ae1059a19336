"""Is a model's answer right? Judges of mathematics and multiple choice (both by math-verify) and of programs.

A judge is made from a problem's fields. It gives None for an answer in which it finds nothing to judge: that is counted
and shown, it is neither right nor silently wrong.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from microbat.evaluation.sandbox import runs_to_its_end

Judge = Callable[[str], float | None]  # 1 (True) for right, 0 for wrong, between where there is partial credit

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def maths(fields: Mapping[str, str]) -> Judge:
    """Equality with ``fields["answer"]`` (LaTeX) of what is boxed or follows the word "answer".

    A number that merely stands somewhere, as in an answer that was cut off, is no answer.
    """
    verifier = _math_verify()
    boxed = verifier.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    named = verifier.ExprExtractionConfig(try_extract_without_anchor=False)
    gold = verifier.parse(f"\\boxed{{{fields['answer']}}}", [boxed], "no_fallback")
    return _verified(gold, [boxed, named], fields["answer"])


def choice(fields: Mapping[str, str]) -> Judge:
    """The letter ``fields["answer"]``, boxed or after the word "answer"; other letters and numbers are no answer."""
    verifier = _math_verify()
    boxed = verifier.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    named = verifier.StringExtractionConfig(strings=("A", "B", "C", "D"), try_extract_without_anchor=False)
    letter = fields["answer"]
    gold = [*verifier.parse(f"\\boxed{{{letter}}}", [boxed]), *verifier.parse(f"Answer: {letter}", [named])]
    return _verified(gold, [boxed, named], letter)


def program(fields: Mapping[str, str]) -> Judge:
    """The last code block that defines ``entry_point``, run between ``before`` and ``after``, the tests, to its end."""
    defines = re.compile(rf"^def {re.escape(fields['entry_point'])}\b", re.MULTILINE)

    def judge(text: str) -> bool | None:
        blocks = [block for block in FENCED.findall(final(text)) if defines.search(block)]
        return runs_to_its_end(f"{fields['before']}\n{blocks[-1]}\n{fields['after']}") if blocks else None

    return judge


def _verified(gold: list[Any], extraction: Sequence[Any], reference: str) -> Judge:
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {reference!r}")
    from math_verify.errors import TimeoutException

    verifier = _math_verify()

    def judge(text: str) -> bool | None:
        try:
            found = verifier.parse(final(text), extraction, "no_fallback", raise_on_error=True)
            return verifier.verify(gold, found, raise_on_error=True) if found else None
        except (Exception, TimeoutException):  # whatever sympy raises on what models write; None is how it is recorded
            return None

    return judge


def final(text: str) -> str:
    """What follows the thoughts. Thoughts that were cut off are followed by nothing."""
    thoughts, closed, answer = text.rpartition("</think>")
    return answer if closed or "<think>" not in text else ""


def _math_verify() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "answers are judged by math-verify, an extra: pip install 'microbat[tasks]'"
        ) from error
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("math-verify keeps its time limits with signals: benchmarks run in the main thread only")
    return math_verify
