"""Texts by name and by path, and the errors for what is not there."""

import json
import sys
from types import SimpleNamespace

import pytest

from microbat.evaluation.text import load_text, text_names


def test_default_comes_with_python_and_is_always_the_same():
    first, second = load_text(), load_text("python-docs")
    assert first == second
    assert first.name.startswith("python-docs 3.")
    assert len(first.text) > 200_000


@pytest.mark.parametrize("suffix", [".txt", ".raw"])
def test_files_are_taken_whole(tmp_path, suffix):
    path = tmp_path / f"words{suffix}"
    path.write_bytes(" = Ein Titel = \n\n Größe \n".encode())
    named = load_text(str(path))
    assert (named.name, named.text) == (path.name, " = Ein Titel = \n\n Größe \n")


def test_jsonl_joins_the_field_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 3}) for text in ("one", "two")) + "\n\n")
    assert load_text(str(path)).text == "one\n\ntwo"


@pytest.mark.parametrize(("line", "problem"), [("{", "line 2: not JSON"), ('{"txt": ""}', "line 2: no field 'text'")])
def test_jsonl_errors_name_the_line(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=problem):
        load_text(str(path))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown text 'wikitext2-raw'; did you mean 'wikitext-2-raw'"):
        load_text("wikitext2-raw")


def test_missing_file_wrong_kind_and_empty_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_text(str(tmp_path / "nowhere.txt"))
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not a \.jsonl, \.raw, \.txt file"):
        load_text(str(tmp_path / "image.png"))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        load_text(str(tmp_path / "blank.txt"))


def test_hub_texts_join_rows_by_blank_lines(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"text": ["", " = Title = \n", " Words . \n"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_text("wikitext-2-raw").text == "\n\n = Title = \n\n\n Words . \n"
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_hub_texts_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        load_text("wikitext-2")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(OSError, match=r"'wikitext-2'.*a local .txt copy works too"):
        load_text("wikitext-2")


def test_names_are_listed():
    assert text_names() == ["python-docs", "wikitext-103-raw", "wikitext-2", "wikitext-2-raw"]
