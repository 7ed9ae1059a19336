"""Measuring: models side by side on a text and on benchmarks, each loaded from its folder, the hub or a server."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from microbat.documents import read_json
from microbat.evaluation.generation import Sampling, Served
from microbat.evaluation.quality import compare
from microbat.evaluation.scores import Scores, Tasks, by_likelihood, flips, recovered
from microbat.evaluation.text import load_text
from microbat.evaluation.windows import Answers, Inputs, Windows, tokenize
from microbat.evaluation.windows import windows as cut_windows
from microbat.export import folder as folders
from microbat.models.base import Thinking
from microbat.models.checkpoint import Checkpoint, resolve
from microbat.models.pairs import Pair, pairs_in
from microbat.models.processor import Processor
from microbat.pipeline import load, pick_device, processor_of, tokenizer_of
from microbat.registry import pick
from microbat.runtime.cache import new_cache

HELD_TOGETHER = 8 << 30  # bytes; models that fit are held together, so that they share the reference's passes


def evaluate(
    models: Mapping[str, str | Path],
    *,
    text: str = "python-docs",
    window: int = 1024,
    windows: int = 16,
    skip: int = 0,
    device: str = "auto",
    reference: str = "float",
) -> dict[str, Any]:
    """Perplexity, KL divergence and top-1 agreement of ``models`` (name -> folder or hub name) on one text, or on the answers to
    questions about pictures: ``windows`` of them, after the first ``skip``.

    ``reference`` names the one that the others are compared with; a microbat folder brings its own float model when the
    reference is not among the models and its recipe says where that is. Plain data, as the report wants it.
    """
    models = dict(models)
    if reference not in models:
        models = {reference: _float_model(next(iter(models.values()))), **models}
    chosen = pick_device(device)
    name, cut = protocol(models[reference], text, window, windows, skip)
    loaders = {name: partial(load, path, device=chosen) for name, path in models.items()}
    if sum(_float32_bytes(path) for path in models.values()) < HELD_TOGETHER:
        candidates: dict[str, Any] = {name: loader() for name, loader in loaders.items()}
    else:
        candidates = dict(loaders)
    return {"text": name, **dataclasses.asdict(compare(candidates, reference, cut))}


def text_windows(model: str | Path, text: str, window: int, windows: int, skip: int = 0) -> tuple[str, Windows]:
    """The text's full name, and ``windows`` of its windows in the tokens of ``model``, after the first ``skip``."""
    named = load_text(text)
    return named.name, cut_windows(tokenize(named.text, tokenizer_of(model)), window=window, limit=windows, skip=skip)


def protocol(model: str | Path, text: str, window: int, windows: int, skip: int = 0) -> tuple[str, Windows | Answers]:
    """The name of what ``text`` stands for, and what is read of it: windows, or where it is a folder of pictures with questions
    ``windows`` of their answers, after the first ``skip``.

    Errors: ValueError, naming it, for a picture that cannot be read, a question without answer, a model that takes no pictures.
    """
    folder = Path(text)
    if not folder.is_dir():
        return text_windows(model, text, window, windows, skip)
    pairs = pairs_in(folder)[skip:][:windows]
    if not pairs:
        raise ValueError(f"{folder} has no pair after the first {skip}")
    for pair in pairs:
        if pair.answer is None:
            raise ValueError(f"{pair.name} has no answer; a model is measured on those")
        pair.picture.image()
    processor = processor_of(model)
    return folder.name, Answers([partial(_answered, processor, pair) for pair in pairs], skip)


def _answered(processor: Processor, pair: Pair) -> tuple[Inputs, int]:
    return processor.answered(pair.name, pair.picture.image(), pair.question, str(pair.answer))


def thinking(model: str | Path, modes: Sequence[str]) -> Thinking | None:
    """How ``model`` is told to think in each of ``modes``; None without modes and for a family that has none."""
    known = Checkpoint(resolve(model)).family.thinking if modes else None
    if known is None:
        return None
    suffixes = dict(known.modes)
    return dataclasses.replace(known, modes=tuple((mode, pick("mode of thinking", mode, suffixes)) for mode in modes))


def evaluate_tasks(
    models: Mapping[str, str | Path],
    tasks: list[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    reference: str = "float",
    sampling: Sampling | None = None,
    answers: Path = Path("microbat-answers"),
) -> dict[str, Any]:
    """Benchmarks for each of ``models``, and each one's recovery and flips against ``reference``.

    ``tasks``, ``data``, ``limit`` and ``sampling`` (None: as in the paper) are those of :class:`Tasks`; finished answers
    are kept below ``answers``. For benchmarks in the model's own words, a model may also be the URL of an
    OpenAI-compatible server. Recovery is None where it has no meaning: for a served model without a reference, and where
    the reference scores 0; flips where a benchmark does not tell its items.
    """
    served = [name for name, path in models.items() if _is_url(path)]
    if served and (harness := by_likelihood(tasks)):
        raise ValueError(
            f"{', '.join(harness)} need a model's likelihoods: give {served[0]!r} as a folder, not a server"
        )
    chosen = Tasks(names=tuple(tasks), data=data, limit=limit, sampling=sampling or Sampling())
    first = next(iter(models.values()))
    if reference not in models and not _is_url(first):
        models = {reference: _float_model(first), **models}
    scores = {name: task_scores(path, chosen, answers=answers / name, device=device) for name, path in models.items()}
    base = scores.get(reference, {})
    rows: dict[str, dict[str, Any]] = {}
    for name, own in scores.items():
        rows[name] = {"tasks": own}
        for key, measured in (("recovery", recovered), ("flips", flips)):
            value, stderr = measured(own, base) or (None, None)
            rows[name] |= {key: value, f"{key}_stderr": None if own is base else stderr}
    return {"reference": reference if base else None, "models": rows}


def task_scores(model: str | Path, tasks: Tasks, *, answers: Path, device: str = "auto") -> Scores:
    """Benchmark -> ``score``, ``stderr`` and all else that was counted, of one model; ``answers`` keeps what it wrote."""
    if _is_url(model):
        return tasks.answered(Served(url=str(model), sampling=tasks.sampling), _identity(model), answers)
    loaded = load(model, device=pick_device(device))
    processor = processor_of(model) if tasks.pictured else None
    return tasks.scores(loaded, tokenizer_of(model), _identity(model), answers, new_cache, processor)


def held_together(model: str | Path) -> int:
    """How many models of this size are in memory at once when they are evaluated; they share the reference's passes."""
    return (HELD_TOGETHER - 1) // _float32_bytes(model)


def _is_url(model: str | Path) -> bool:
    return str(model).startswith(("http://", "https://"))


def _identity(model: str | Path) -> str:
    """What tells a model's answers from those of another: a microbat folder may be written anew at the same place."""
    if _is_url(model):
        return f"{Served(url=str(model), sampling=Sampling()).model} at {model}"
    path = resolve(model).resolve()
    if not folders.is_microbat_folder(path):
        return str(path)
    return f"{path}, recipe {hashlib.sha256((path / 'recipe.json').read_bytes()).hexdigest()[:16]}"


def _float32_bytes(model: str | Path) -> int:
    path = resolve(model)
    ours = folders.is_microbat_folder(path)
    checkpoint = Checkpoint(path, index=folders.INDEX) if ours else Checkpoint(path)
    return 4 * sum(parameter.numel() for parameter in checkpoint.skeleton().parameters())


def _float_model(folder: str | Path) -> str:
    path = resolve(folder)
    if not folders.is_microbat_folder(path):
        return str(folder)
    return read_json(path / "recipe.json")["recipe"]["model"]
