"""JSON files: written whole or not at all, read with their name in every error."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; ValueError, naming it, where there is something else. OSError where there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object of JSON")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(temporary, path)
