"""Judges of short answers: right, wrong and unreadable ones; ANLS against values worked out by hand."""

import pytest

from microbat.evaluation.short_answers import anls, blind, contains, exact, yes_or_no


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Yes", True),
        ("yes.", True),
        ("**Yes**, there is.", True),
        ("<think>no?</think>\nYes", True),
        ("No", False),
        ("no, there is none", False),
        ("Not that I see", None),
        ("It is, yes", None),  # MME reads the beginning alone
        ("Yesterday", None),
        ("", None),
    ],
)
def test_yes_or_no(answer, verdict):
    assert yes_or_no({"answer": "Yes"})(answer) is verdict


def test_a_reference_that_is_neither_is_named():
    with pytest.raises(ValueError, match="'Maybe' is neither yes nor no"):
        yes_or_no({"answer": "Maybe"})


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("B", "B", True),
        ("B", "(b) left", True),
        ("B", "B. Left", True),
        ("B", "C", False),
        ("B", "a dog", None),
        ("B", "The answer is B", None),
        ("3", "three", True),
        ("3", "3.", True),
        ("Two", "2", True),
        ("3", "There are 3", False),
        ("red", "Red", True),
        ("red", "blue", False),
        ("KTB", "KTB", True),
        ("KTB", "KTD", False),
        ("KTB", " ", None),
    ],
)
def test_exact(reference, answer, verdict):
    assert exact({"answer": reference})(answer) is verdict


@pytest.mark.parametrize(
    ("dataset", "references", "answer", "verdict"),
    [
        ("IIIT5K", "CENTRE", "The word is 'centre'.", True),
        ("IIIT5K", "CENTRE", "center", False),
        ("TextVQA", "055 05995\n05505995", "It is 055\n05995.", True),
        ("TextVQA", "055 05995\n05505995", "055", False),  # the paper's figure 13
        ("HME100k", "\\frac { a } { b }", "\\frac{a}{b}", True),
        ("HME100k", "A + b", "a+b", False),
        ("IIIT5K", "CENTRE", "", None),
    ],
)
def test_contains(dataset, references, answer, verdict):
    assert contains({"dataset": dataset, "answer": references})(answer) is verdict


@pytest.mark.parametrize(
    ("references", "answer", "similarity"),
    [
        ("1997", "1997", 1.0),
        ("University of California", "university  of california", 1.0),
        ("1997", "1998", 3 / 4),
        ("kitten", "sitting", 4 / 7),  # two replaced, one inserted
        ("kitten\nsitting", "sitting", 1.0),  # the nearest reference counts
        ("abcd", "abxy", 1 / 2),  # one half is still enough
        ("abc", "axy", 0.0),  # 1/3 is not
        ("12", "The answer is 12", 0.0),  # 14 of 16 too much
        ("1997", "", None),
    ],
)
def test_anls(references, answer, similarity):
    assert anls({"answer": references})(answer) == (similarity if similarity is None else pytest.approx(similarity))


@pytest.mark.parametrize(
    ("question", "reference", "answer", "verdict"),
    [
        ("Put your answer in curly brackets, e.g., {2}.", "0", "{0}", True),
        ("Put your answer in curly brackets, e.g., {2}.", "0", "There is one: {1}", False),
        ("Put your answer in curly brackets, e.g., {2}.", "0", "There are 0", None),
        ("Put the letter in curly brackets, e.g., {a}.", "Q", "{q}", True),
        ("Are the two circles overlapping? Answer with Yes/No.", "Yes", "Yes, they are.", True),
        ("Are the two circles overlapping? Answer with Yes/No.", "Yes", "No.", False),
        ("Are the two circles overlapping? Answer with Yes/No.", "No", "I do not know", None),
        ("How many shapes?", "5", "There are 5 circles.", True),
        ("How many shapes?", "5", "There are 15 circles.", False),
        ("How many shapes?", "5", "Several.", None),
        ("Count the number of rows and columns. Answer as rows=N, columns=M.", "8x7", "rows=8, columns=7", True),
        ("Count the number of rows and columns. Answer as rows=N, columns=M.", "8x7", "rows=7, columns=8", False),
        ("Answer with numbers in curly brackets e.g. rows={5} columns={6}", "8,7", "rows={8} columns={7}", True),
        ("Count the number of rows and columns.", "8,7", "Columns: 7\nRows: 8", True),
        ("Count the number of rows and columns.", "8,7", "8 rows and 7 columns", True),
        ("Count the number of rows and columns.", "8,7", "It has **8** rows and **7** columns with 56 cells", True),
        ("Count the number of rows and columns.", "8,7", "(8, 6)", False),
        ("Count the number of rows and columns.", "8,7", "Many.", None),
    ],
)
def test_blind(question, reference, answer, verdict):
    assert blind({"question": question, "answer": reference})(answer) is verdict
