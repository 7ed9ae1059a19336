"""Calibration on images with questions: a local folder (:mod:`microbat.models.pairs`), or a data set of the hub by name.

A pair without an answer is the question alone. ``gqa`` is the training split of GQA (arXiv 1902.09506), which BATQuant
calibrates on (section 4.1.2: 128 pairs). Images go through the model's own image processor, questions and answers through its
chat template.
"""

# Shapes: L tokens of a pair, T patches of its image, P numbers of a patch.

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from microbat.calibrate.stream import Sample
from microbat.models.checkpoint import Checkpoint
from microbat.models.pairs import Pair, pairs_in
from microbat.models.processor import FILES, Processor, has_processor
from microbat.pictures import Picture, pillow

HUB_PAIRS = {"gqa": ("lmms-lab/GQA", "train_balanced_images", "train_balanced_instructions", "train")}


def are_pairs(source: str) -> bool:
    """Whether a calibration source holds images."""
    return source in HUB_PAIRS or Path(source).is_dir()


def check(source: str, checkpoint: Checkpoint) -> None:
    """Raise ValueError for a folder without readable lines, and for a model that takes no images or lacks what prepares them."""
    if not checkpoint.family.towers:
        raise ValueError(
            f"calibration {source!r} holds images, and family {checkpoint.family.name!r} takes none; give text, or a "
            "vision-language model"
        )
    if not has_processor(checkpoint.path):
        raise ValueError(
            f"{checkpoint.path} has no {FILES[0]}: the model's image processor is missing. Copy it from the model's "
            "page, or calibrate the language model alone, on text"
        )
    pillow()
    if source not in HUB_PAIRS:
        pairs_in(Path(source))


def samples(
    source: str, checkpoint: Checkpoint, num: int, length: int, generator: torch.Generator, *, skip_bad: bool
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """``num`` pairs as the model is called with them, at most ``length`` tokens each, and why each skipped one was.

    Drawn at random from the folder, or the first of a data set of the hub. A pair that is too long loses the end of its text.
    Raises ValueError, naming the pair: for an image that cannot be read (with ``skip_bad`` it is left out), for one whose
    tokens alone are more than ``length``, and where text and image disagree on how many tokens the image takes.
    """
    processor = Processor(checkpoint.path)
    made: list[Sample] = []
    skipped: list[str] = []
    for pair in _hub(source) if source in HUB_PAIRS else _shuffled(pairs_in(Path(source)), generator):
        if len(made) == num:
            break
        try:
            image = pair.picture.image()
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{error}; --skip-bad leaves such pairs out") from error
            skipped.append(str(error))
            continue
        made.append(_sample(processor, pair, image, length))
    if len(made) < num:
        left = f", {len(skipped)} of them unreadable" if skipped else ""
        raise ValueError(f"calibration {source!r} has {len(made) + len(skipped)} pairs{left}; {num} are asked for")
    return tuple(made), tuple(skipped)


def _sample(processor: Processor, pair: Pair, image: Any, length: int) -> Sample:
    """A pair as the model is called with it, at most ``length`` tokens of it."""
    whole = processor(pair.name, image, pair.question, pair.answer)
    kept = {name: whole[name][:, :length] for name in ("input_ids", "mm_token_type_ids")}
    wanted, found = processor.tokens_of(whole["image_grid_thw"]), int(kept["mm_token_type_ids"].sum())
    if found != wanted:
        raise ValueError(
            f"{pair.name}: {found} tokens for an image that takes {wanted}, in a pair of {whole['input_ids'].shape[1]} of which "
            f"{kept['input_ids'].shape[1]} are kept; raise --max-seq-length, or make the image smaller"
        )
    return {**whole, **kept}


def _shuffled(pairs: list[Pair], generator: torch.Generator) -> Iterator[Pair]:
    for index in torch.randperm(len(pairs), generator=generator).tolist():
        yield pairs[index]


def _hub(source: str) -> Iterator[Pair]:
    """The first pairs of a data set of the hub, an image at a time."""
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise ValueError(f"calibration source {source!r} needs the 'datasets' package: pip install datasets") from error
    name, images, questions, split = HUB_PAIRS[source]
    rows = load_dataset(name, questions, split=split, streaming=True)
    asked = {row["imageId"]: (row["question"], row["fullAnswer"]) for row in rows}
    for row in load_dataset(name, images, split=split, streaming=True).cast_column("image", Image(decode=False)):
        if (own := asked.get(row["id"])) is not None:
            picture = Picture(name=f"{source} image {row['id']}", read=partial(row["image"].__getitem__, "bytes"))
            yield Pair(picture=picture, question=own[0], answer=own[1])
