"""WinoGrande by partial evaluation, as in lm-eval's own task (Sakaguchi et al., 2019, arXiv 1907.10641).

The contexts are the sentence up to the gap with either option in it; the continuation after the gap is scored. The
harness therefore wants the roles exchanged: "text" is the index of the right context, "choices" are the contexts.
"""

from typing import Any


def doc_to_text(doc: dict[str, Any]) -> int:
    return {"1": 0, "2": 1}[doc["answer"]]


def doc_to_target(doc: dict[str, Any]) -> str:
    return doc["sentence"][doc["sentence"].index("_") + 1 :].strip()


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    before = doc["sentence"][: doc["sentence"].index("_")]
    return [before + option for option in (doc["option1"], doc["option2"])]
