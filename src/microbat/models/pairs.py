"""Images with questions and answers in a local folder: its images and one ``.jsonl`` file, a line a pair::

    {"image": "images/0001.png", "question": "How many circles touch?", "answer": "2"}

``image`` is a path below the folder; ``prompt`` may stand for ``question``; ``answer`` may be missing.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Pair:
    """``name`` is how errors call it; ``image`` a file or the encoded bytes."""

    name: str
    image: Path | bytes
    question: str
    answer: str | None

    def picture(self) -> Any:
        """Its image, decoded, as RGB; ValueError, naming it, where it cannot be, ImportError without Pillow."""
        opener = pillow()
        try:
            with opener.open(io.BytesIO(self.image) if isinstance(self.image, bytes) else self.image) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow's errors for what is missing, truncated, or no image
            raise ValueError(f"{self.name}: the image cannot be read ({error})") from error


def pairs_in(folder: Path) -> list[Pair]:
    """The pairs of ``folder``, their images not read yet; ValueError, naming the line, for what is no pair."""
    files = sorted(folder.glob("*.jsonl"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"folder {folder} must hold one .jsonl file, a line a pair; it holds {found}")
    pairs = []
    for number, line in enumerate(files[0].read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        name = f"{files[0]}:{number}"
        try:
            row = json.loads(line)
            pairs.append(
                Pair(
                    name=f"{name} ({row['image']})",
                    image=folder / row["image"],
                    question=row["question"] if "question" in row else row["prompt"],
                    answer=row.get("answer"),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is not a pair with image, question (or prompt) and answer ({error})") from error
    return pairs


def pillow() -> Any:
    """Pillow's Image module; ImportError where it is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images are read by Pillow, an extra: pip install 'microbat[vision]'") from error
    return Image
