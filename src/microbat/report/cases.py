"""Case studies: pictures, what was asked about them, what each model answered; in the manner of Figures 12 and 13 of BATQuant
(arXiv:2603.16590)."""

from __future__ import annotations

from microbat.report.sections import section
from microbat.report.text import DASH, escape, fixed

LONGEST = 600  # characters of an answer, from its beginning
HOW = (
    "Questions that the float model answers right and on which the methods, under {scheme} and their first seed, differ most: "
    "chosen by that alone, whichever method it favours. ✓ right, ✗ wrong, – nothing that could be judged; where there is "
    "partial credit, the share of it."
)


def case_studies(cases: list[dict]) -> str:
    """The section, empty without cases: each has scheme, benchmark, task, question, answer (the reference), picture (a data
    URL), and answers, each with label, text and score (None: nothing to judge)."""
    if not cases:
        return ""
    how = HOW.format(scheme=cases[0]["scheme"])
    return section("cases", "Case studies", how, "".join(map(_case, cases)))


def _case(case: dict) -> str:
    rows = "".join(
        f'<tr><td>{escape(own["label"])}</td><td class="{_standing(own["score"])}">{_mark(own["score"])}</td>'
        f"<td>{escape(_cut(own['text'])) or DASH}</td></tr>"
        for own in case["answers"]
    )
    where = " · ".join(escape(part) for part in (case["benchmark"], case["task"]) if part)
    return (
        f'<figure class="case"><img src="{escape(case["picture"])}" alt="what the question is about"><figcaption>'
        f'<p class="how">{where}</p><p><b>{escape(case["question"])}</b></p>'
        f"<p>Right: {escape(', '.join(case['answer'].splitlines()))}</p><table>{rows}</table></figcaption></figure>"
    )


def _mark(score: float | None) -> str:
    if score is None:
        return DASH
    return {0.0: "✗", 1.0: "✓"}.get(score, fixed(score, 2))


def _standing(score: float | None) -> str:
    return "right" if score == 1 else "wrong"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
