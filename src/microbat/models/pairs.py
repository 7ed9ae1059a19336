"""Images with questions and answers in a local folder: its images and one ``.jsonl`` file, a line a pair::

    {"image": "images/0001.png", "question": "How many circles touch?", "answer": "2"}

``image`` is a path below the folder; ``prompt`` may stand for ``question``; ``answer`` may be missing.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from microbat.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class Pair:
    picture: Picture
    question: str
    answer: str | None

    @property
    def name(self) -> str:
        """How errors call it."""
        return self.picture.name


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
            file = folder / row["image"]
            pairs.append(
                Pair(
                    picture=Picture(name=f"{name} ({row['image']})", read=file.read_bytes),
                    question=row["question"] if "question" in row else row["prompt"],
                    answer=row.get("answer"),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is not a pair with image, question (or prompt) and answer ({error})") from error
    return pairs
