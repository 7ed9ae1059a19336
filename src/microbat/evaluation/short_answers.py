"""Judges of the short answers that questions about pictures have. As in :mod:`microbat.evaluation.judges`, None is for an
answer in which there is nothing to judge."""

import re
from collections.abc import Mapping

from microbat.evaluation.judges import Judge, final

ANLS_THRESHOLD = 0.5  # below, an answer is another one rather than one misread; arXiv 2007.00398
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def yes_or_no(fields: Mapping[str, str]) -> Judge:
    """The word that the answer begins with."""
    reference = _short(fields["answer"])
    if reference not in ("yes", "no"):
        raise ValueError(f"the reference answer {fields['answer']!r} is neither yes nor no")

    def judge(text: str) -> bool | None:
        found = re.match(r"\W*(yes|no)\b", final(text).lower())
        return found[1] == reference if found else None

    return judge


def exact(fields: Mapping[str, str]) -> Judge:
    """Equality but for case, a full stop, and numbers as words; of choices, the letter that the answer begins with."""
    reference = _short(fields["answer"])

    def judge(text: str) -> bool | None:
        answer = _short(final(text))
        if re.fullmatch("[a-z]", reference):
            letter = re.match(r"\W*([a-z])\b(?!\s+\w)", answer)  # "B", "(b) left", "B. left", not "a dog"
            return letter[1] == reference if letter else None
        return answer == reference if answer else None

    return judge


def contains(fields: Mapping[str, str]) -> Judge:
    """OCRBench's (arXiv 2305.07895): one of the references, a line each, stands in the answer, whatever the case;
    in formulas, ``fields["dataset"]`` HME100k, case counts and spaces do not."""
    formula = fields["dataset"] == "HME100k"

    def plain(text: str) -> str:
        return re.sub(r"\s+", "", text) if formula else text.lower().strip().replace("\n", " ")

    references = [plain(line) for line in fields["answer"].split("\n")]

    def judge(text: str) -> bool | None:
        answer = plain(final(text))
        return any(reference in answer for reference in references) if answer else None

    return judge


def anls(fields: Mapping[str, str]) -> Judge:
    """Normalized Levenshtein similarity with the nearest reference, each a line (ANLS, as in DocVQA, arXiv 2007.00398):
    1 - distance / the longer length, and nothing below one half."""
    references = [_spaced(line) for line in fields["answer"].split("\n")]

    def judge(text: str) -> float | None:
        answer = _spaced(final(text))
        if not answer:
            return None
        nearest = max(1 - _distance(answer, each) / max(len(answer), len(each)) for each in references)
        return nearest if nearest >= ANLS_THRESHOLD else 0.0

    return judge


def blind(fields: Mapping[str, str]) -> Judge:
    """VLMs-are-blind's: what stands in the first curly brackets where the question asks for them; of grids the numbers of rows
    and columns; otherwise yes or no, or the number, as a word of its own."""
    reference = _short(fields["answer"])
    grid = re.fullmatch(r"\(?(\d+)\s*[x×,]\s*(\d+)\)?", reference)
    asks = "{" in fields["question"]

    def judge(text: str) -> bool | None:
        answer = final(text).lower()
        if grid:
            found = _grid(answer)
            return found == (int(grid[1]), int(grid[2])) if found else None
        if asks:
            braces = re.search(r"\{(.*?)\}", answer)
            return braces[1].strip() == reference if braces else None
        words = re.findall(r"\byes\b|\bno\b" if reference in ("yes", "no") else r"\d+", answer)
        return reference in words if words else None

    return judge


def _grid(answer: str) -> tuple[int, int] | None:
    """The numbers of rows and columns that an answer in lower case names."""
    for before, after in ((r"(\d+)[}*\s]*", ""), ("", r"[^\d\n]{0,20}?(\d+)")):
        rows, columns = (re.search(f"{before}{noun}{after}", answer) for noun in ("rows?", "col(?:umn)?s?"))
        if rows and columns:
            return int(rows[1]), int(columns[1])
    pair = re.search(r"(\d+)\s*(?:rows?)?\s*(?:x|×|,|by|and)\s*(\d+)", answer)
    return (int(pair[1]), int(pair[2])) if pair else None


def _short(text: str) -> str:
    plain = text.strip().lower().rstrip(".").strip()
    return str(NUMBERS.index(plain)) if plain in NUMBERS else plain


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of a character that make ``b`` of ``a``."""
    row = list(range(len(b) + 1))
    for above, left in enumerate(a, 1):
        diagonal, row[0] = row[0], above
        for column, right in enumerate(b, 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (left != right))
    return row[-1]
