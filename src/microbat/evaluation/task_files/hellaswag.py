"""HellaSwag's documents as lm-eval's own task prepares them (Zellers et al., 2019, arXiv 1905.07830)."""

import re
from typing import Any


def clean(text: str) -> str:
    """The text without the marks that WikiHow left in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def prepare(doc: dict[str, Any]) -> dict[str, Any]:
    """``query`` and ``choices`` of one document."""
    context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
    return {"query": clean(context), "choices": [clean(ending) for ending in doc["endings"]]}


def process_docs(dataset: Any) -> Any:
    """The data set with ``query`` and ``choices`` added."""
    return dataset.map(prepare)
