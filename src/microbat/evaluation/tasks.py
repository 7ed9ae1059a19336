"""Benchmarks through lm-evaluation-harness, an extra: ``pip install 'microbat[tasks]'``.

Six tasks also run offline, from local jsonl copies in a folder ``DATA/<task>/validation.jsonl``; their prompts and
metrics are those of the harness's own tasks (``task_files/*.yaml`` say where the data differ).
"""

import copy
import difflib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from microbat.evaluation.benchmarks import BENCHMARKS

TASK_FILES = "microbat.evaluation.task_files"
FEWSHOT_SEED = 1234  # lm_eval.defaults.DEFAULT_OTHER_SEED, what its command line uses


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of a loaded transformers causal LM, on its own device: task -> acc, acc_norm, acc_stderr, ..., n, and
    ``items``: acc and acc_norm of every document.

    With ``data``, a folder of local copies, only :func:`task_names` can be asked for and nothing is downloaded; without
    it, any task or group of the harness can, with the harness's own data from the hub. A task reports the metrics it
    has (WinoGrande and BoolQ no acc_norm); ``n`` counts its documents, the first ``limit`` at most. ``num_fewshot``
    None keeps each task's own number (0 where it has none); from local copies the shots are other documents of the same
    split, where the harness's own tasks draw them from the training split.
    Errors, all before any data or request is prepared: ValueError for unknown tasks, FileNotFoundError for a missing
    copy, ModuleNotFoundError without the extra.
    """
    if not tasks:
        raise ValueError(f"no tasks given (tasks with local copies: {', '.join(task_names())})")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no document; it must be at least 1, or None for all")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot} is negative")
    copies = _local_copies(tasks, Path(data)) if data is not None else {}
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError("tasks run in lm-evaluation-harness, an extra: pip install 'microbat[tasks]'")
    from lm_eval.tasks import TaskManager

    with TemporaryDirectory(prefix="microbat-tasks-") as folder:
        if copies:
            write_task_files(copies, Path(folder))
            manager = TaskManager(include_path=folder, include_defaults=False)
        else:
            manager = TaskManager()
            _check_names(tasks, manager.all_tasks)
        return _run(model, tokenizer, manager.load(list(tasks)), limit, batch_size, num_fewshot)


def check_tasks(tasks: Sequence[str], data: Path | None) -> None:
    """Raise, before any model is loaded, for names that have no local copy in the folder ``data``."""
    if data is not None:
        _local_copies(tasks, Path(data))


def task_names() -> list[str]:
    """The tasks that run from local copies, sorted."""
    return sorted(
        item.name.removesuffix(".yaml") for item in files(TASK_FILES).iterdir() if item.name.endswith(".yaml")
    )


def write_task_files(copies: dict[str, Path], folder: Path) -> None:
    """The harness's task files for ``copies`` (task -> jsonl) in ``folder``, where their data sets are cached too.

    The paths in them are absolute: the harness resolves others against the working directory.
    """
    cache = json.dumps(str(folder.resolve() / "cache"))  # a JSON string is also a YAML string
    for task, path in copies.items():
        template = Template(files(TASK_FILES).joinpath(f"{task}.yaml").read_text(encoding="utf-8"))
        text = template.substitute(validation=json.dumps(str(path.resolve())), cache=cache)
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


def _local_copies(tasks: Sequence[str], data: Path) -> dict[str, Path]:
    _check_names(tasks, task_names())
    copies = {task: data.expanduser() / task / "validation.jsonl" for task in tasks}
    missing = [str(path) for path in copies.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no local copy at {', '.join(missing)}; without a data folder the hub's are used")
    return copies


def _check_names(tasks: Iterable[str], known: Sequence[str]) -> None:
    unknown = [task for task in tasks if task not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*known, *BENCHMARKS], n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"unknown task {', '.join(map(repr, unknown))}{hint} "
            f"(tasks with local copies: {', '.join([*task_names(), *BENCHMARKS])})"
        )


def _run(
    model: nn.Module, tokenizer: Any, loaded: Any, limit: int | None, batch_size: int, num_fewshot: int | None
) -> dict[str, dict[str, Any]]:
    """What lm_eval.simple_evaluate does, without its seeding of all global generators."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that fixes 0 is meant to keep it
            task.set_config(key="num_fewshot", value=num_fewshot if num_fewshot is not None else own or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    training = model.training
    try:
        with _errors_only(logging.getLogger("lm_eval")):  # it warns that a loaded model was passed, which is the plan
            wrapper = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        results = evaluate(lm=wrapper, task_dict=loaded, limit=limit, log_samples=True)
    finally:
        model.train(training)
    counts, samples = results["n-samples"], results["samples"]
    return {
        task: _scores(metrics, counts.get(task)) | {"items": _items(samples.get(task, []))}
        for task, metrics in results["results"].items()
    }


def _scores(metrics: dict[str, Any], counts: dict[str, int] | None) -> dict[str, float]:
    """``{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}`` as ``{"acc": 0.5, "acc_stderr": 0.1, "n": 4}``.

    Other filters than "none" stay in the name; a value that is no number (a missing error reads "N/A") is left out.
    """
    numbers = {
        key.removesuffix(",none"): float(value)
        for key, value in metrics.items()
        if "," in key and isinstance(value, int | float)
    }
    return numbers | ({"n": counts["effective"]} if counts else {})


def _items(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each document's accuracies, in the order of the documents: metric -> numbers whose mean it is."""
    plain = sorted((s for s in samples if s["filter"] == "none"), key=lambda sample: sample["doc_id"])
    return {key: [float(s[key]) for s in plain] for key in ("acc", "acc_norm") if plain and key in plain[0]}


@contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
