"""Evaluation texts by name or by path."""

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

DEFAULT_TEXT = "python-docs"
JOINT = "\n\n"  # between the parts of a text; what published wikitext-2 perplexities use


@dataclass(frozen=True, kw_only=True)
class NamedText:
    """A text and the name under which its numbers are reported."""

    name: str
    text: str


def load_text(source: str = DEFAULT_TEXT) -> NamedText:
    """The evaluation text that ``source`` names; nothing is cut or normalised.

    ``source`` is one of :func:`text_names` (``python-docs`` needs no download, the others come from the Hugging Face
    hub) or the path of a .txt or .raw file (taken whole) or of a .jsonl file (field ``text`` of each line).
    Errors: ValueError for an unknown name or an empty text, FileNotFoundError for a path that is not there.
    """
    named = _NAMES[source]() if source in _NAMES else _from_path(source)
    if not named.text.strip():
        raise ValueError(f"text {source!r} is empty")
    return named


def text_names() -> list[str]:
    """The names that :func:`load_text` knows, sorted."""
    return sorted(_NAMES)


def _python_docs() -> NamedText:
    """The documentation topics that come with every Python; they change with its version, hence the name."""
    from pydoc_data.topics import topics

    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return NamedText(name=f"python-docs {version}", text=JOINT.join(topics[key] for key in sorted(topics)))


def _from_hub(name: str, path: str, config: str) -> NamedText:
    """The test split of a hub data set."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"text {name!r} comes from the hub and needs the package 'datasets': pip install datasets"
        ) from error
    try:
        rows = load_dataset(path, config, split="test")
    except OSError as error:  # no network, offline mode, moved data set
        raise OSError(
            f"text {name!r}: hub data set {path!r} ({config}) could not be loaded; "
            f"the path of a local .txt copy works too, and {DEFAULT_TEXT!r} needs no download"
        ) from error
    return NamedText(name=name, text=JOINT.join(rows["text"]))


_NAMES: dict[str, Callable[[], NamedText]] = {
    DEFAULT_TEXT: _python_docs,
    "wikitext-2": partial(_from_hub, "wikitext-2", "Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext-2-raw": partial(_from_hub, "wikitext-2-raw", "Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103-raw": partial(_from_hub, "wikitext-103-raw", "Salesforce/wikitext", "wikitext-103-raw-v1"),
}


def _from_path(source: str) -> NamedText:
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix)
    if reader and path.is_file():
        return NamedText(name=path.name, text=reader(path))
    if reader:
        raise FileNotFoundError(f"text {source!r}: no such file")
    if path.exists():
        raise ValueError(f"text {source!r} is not a {', '.join(sorted(_READERS))} file")
    near = difflib.get_close_matches(source, _NAMES, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    kinds = ", ".join(sorted(_READERS))
    raise ValueError(f"unknown text {source!r}{hint} (names: {', '.join(text_names())}; or the path of a {kinds} file)")


def _read_whole(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _read_jsonl(path: Path) -> str:
    return JOINT.join(_text_fields(path))


def _text_fields(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"text {str(path)!r}, line {number}: not JSON ({error.msg})") from error
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"text {str(path)!r}, line {number}: no field 'text' with a string")
            yield text


_READERS: dict[str, Callable[[Path], str]] = {".txt": _read_whole, ".raw": _read_whole, ".jsonl": _read_jsonl}
