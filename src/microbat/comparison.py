"""One model under many methods, schemes and seeds: every cell quantized, measured, and told from noise.

What is done is never done again, so that an interrupted comparison goes on. Its folder holds

    cells/<name>/        the checkpoint folder of each run, with numbers.json: what it was measured to be, and answers/
    tokens/              calibration tokens, one file for all runs on the same text
    locks/               who works at what: several processes may share a comparison, say one for each GPU
    numbers.json         the float model's own, with its answers/
    comparison.json      the result, and the page of it: comparison.html
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from microbat import account, measure, pipeline
from microbat.documents import read_json, write_json
from microbat.evaluation.cases import cases
from microbat.evaluation.scores import Scores, Tasks, flips, recovered, recovered_items
from microbat.evaluation.spread import Estimate, estimate, indistinct, overlap
from microbat.recipe import describe, to_json
from microbat.report.comparison import write_comparison
from microbat.sharing import alone, share
from microbat.suite import Cell, Suite

NUMBERS = "numbers.json"
AT_ONCE = 8  # cells measured together: the float model's pass is a ninth of the work
QUALITY = ("perplexity", "ratio", "kl", "top1")
WINDOWS = {"ratio": "window_nll", "kl": "window_kl"}  # what they are told from noise by
COUNTS = ("unparsed", "truncated", "samples")  # of a benchmark's answers, over all runs


def compare(
    suite: str | Path, *, out: str | Path, model: str = "", calibration: str = "", text: str = "", quick: bool = False
) -> dict[str, Any]:
    """Run the suite in a YAML file (see :mod:`microbat.suite`) into the folder ``out``; the content of comparison.json.

    ``model``, ``calibration`` and ``text`` replace the suite's own, ``quick`` takes its quick form. Raises ValueError, before
    any work, for whatever is wrong with the suite, and for a folder that holds another comparison. A cell that fails on the
    way, because its training diverges or the device has too little memory, is recorded with the reason and does not stop the
    others. Called by several processes on one folder, they share the cells and return the same.
    """
    chosen = Suite.read(Path(suite), model=model, calibration=calibration, text=text, quick=quick)
    place = Path(out)
    tasks = _check(chosen, place)
    (place / "tokens").mkdir(parents=True, exist_ok=True)
    with alone(place / "locks", "comparison"):
        _measure_tasks(chosen, tasks, chosen.model, place)  # the float model first: what is missing shows at once
    failures = _make(place, chosen.cells())
    done = [cell for cell in chosen.cells() if cell.name not in failures]
    if chosen.evaluation.text:
        _measure_quality(chosen, place, done)
    _measure_answers(chosen, tasks, place, done)
    content = _content(chosen, place, failures)
    with alone(place / "locks", "comparison"):
        write_json(place / "comparison.json", content)
        write_comparison(
            content, _pictures(chosen, place, done), _cases(chosen, tasks, place, done), place / "comparison.html"
        )
    return content


def _make(place: Path, cells: Sequence[Cell]) -> dict[str, str]:
    """Quantize the cells that are not there yet; why those failed that did, by name."""
    failures: dict[str, str] = {}
    by_name = {cell.name: cell for cell in cells}
    missing = [name for name, cell in by_name.items() if not _folder(place, cell).exists()]
    for name in missing:
        with alone(place / "locks", "comparison"):
            pipeline.write_tokens(by_name[name].recipe, _tokens(place, by_name[name]))

    def work(names: list[str]) -> None:
        for name in names:
            cell = by_name[name]
            title = f"{missing.index(name) + 1}/{len(missing)} {name}"
            try:
                pipeline.run(cell.recipe, _folder(place, cell), tokens=_tokens(place, cell), title=title)
            except (ValueError, FloatingPointError, torch.OutOfMemoryError) as error:
                failures[name] = str(error)

    def todo() -> list[str]:
        return [name for name in missing if name not in failures and not _folder(place, by_name[name]).exists()]

    share(place / "locks", todo, work)
    return failures


def _check(suite: Suite, place: Path) -> Tasks:
    """Raise for whatever is wrong with the request; the suite's benchmarks."""
    evaluation = suite.evaluation
    for cell in suite.cells():
        made = _folder(place, cell) / "recipe.json"
        if not made.parent.exists():
            try:
                pipeline.check(cell.recipe)
            except ValueError as error:
                raise ValueError(f"row {cell.label!r}: {error}") from error
        elif read_json(made)["recipe"] != to_json(cell.recipe):
            raise ValueError(f"{made.parent} was made by another recipe; remove it or choose another output folder")
    if evaluation.text:
        measure.protocol(suite.model, **_reading(suite))
    data = Path(evaluation.data) if evaluation.data else None
    thinking = measure.thinking(suite.model, evaluation.modes)
    return Tasks(
        names=evaluation.tasks, data=data, limit=evaluation.limit, sampling=evaluation.sampling, thinking=thinking
    )


def _folder(place: Path, cell: Cell) -> Path:
    return place / "cells" / cell.name


def _tokens(place: Path, cell: Cell) -> Path:
    """A file for what decides the calibration tokens."""
    recipe = cell.recipe
    parts = (recipe.calibration, recipe.num_calibration_samples, recipe.max_seq_length, recipe.seed, recipe.skip_bad)
    return place / "tokens" / f"{_key([recipe.model, *parts])}.safetensors"


def _key(content: Any) -> str:
    """A short name for plain data."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _measure_quality(suite: Suite, place: Path, cells: Sequence[Cell]) -> None:
    """Perplexity and distance from the float model of what has not been measured yet, as many at once as memory holds, up to
    :data:`AT_ONCE`: they share one pass of the float model over the text."""
    on = _reading(suite)
    protocol = {"model": suite.model, **on}
    folders = {cell.name: _folder(place, cell) for cell in cells}

    def work(names: list[str]) -> None:
        result = measure.evaluate({"float": suite.model, **{name: folders[name] for name in names}}, **on)
        rows = {row["name"]: row for row in result.pop("rows")}
        for name in names:
            _keep(folders[name], "quality", protocol, rows[name])
        with alone(place / "locks", "comparison"):
            _keep(place, "quality", protocol, {**result, **rows["float"]})

    def todo() -> list[str]:
        return [name for name, folder in folders.items() if _kept(folder, "quality", protocol) is None]

    share(place / "locks", todo, work, min(AT_ONCE, max(1, measure.held_together(suite.model) - 1)))
    if _kept(place, "quality", protocol) is None:  # no cell was left to be measured beside it
        work([])


def _reading(suite: Suite) -> dict[str, Any]:
    """What every model reads."""
    names = ("text", "window", "windows", *(["skip"] if suite.evaluation.skip else []))
    return {name: getattr(suite.evaluation, name) for name in names}


def _measure_answers(suite: Suite, tasks: Tasks, place: Path, cells: Sequence[Cell]) -> None:
    """Benchmark scores of what has not been measured yet."""
    folders = {cell.name: _folder(place, cell) for cell in cells}

    def work(names: list[str]) -> None:
        for name in names:
            _measure_tasks(suite, tasks, folders[name], folders[name])

    def todo() -> list[str]:
        return [name for name, folder in folders.items() if not _has_tasks(suite, tasks, folder)]

    share(place / "locks", todo, work)


def _measure_tasks(suite: Suite, tasks: Tasks, model: str | Path, place: Path) -> None:
    """Benchmark scores of ``model``, kept in ``place``; its answers too, apart for each way of drawing them."""
    if not _has_tasks(suite, tasks, place):
        scores = measure.task_scores(model, tasks, answers=_answers(tasks, place))
        _keep(place, "tasks", _task_protocol(suite, tasks), scores)


def _has_tasks(suite: Suite, tasks: Tasks, place: Path) -> bool:
    return not tasks.names or _kept(place, "tasks", _task_protocol(suite, tasks)) is not None


def _task_protocol(suite: Suite, tasks: Tasks) -> dict[str, Any]:
    return {"model": suite.model, **tasks.protocol}


def _answers(tasks: Tasks, place: Path) -> Path:
    return place / "answers" / _key(tasks.sampling.draws)


def _numbers(place: Path) -> dict[str, Any]:
    file = place / NUMBERS
    return read_json(file) if file.is_file() else {}


def _kept(place: Path, kind: str, protocol: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured before, if it was measured in the same way."""
    entry = _numbers(place).get(kind)
    return entry["result"] if entry and entry["protocol"] == protocol else None


def _keep(place: Path, kind: str, protocol: dict[str, Any], result: dict[str, Any]) -> None:
    write_json(place / NUMBERS, {**_numbers(place), kind: {"protocol": protocol, "result": result}})


def _content(suite: Suite, place: Path, failures: dict[str, str]) -> dict[str, Any]:
    """The whole comparison as plain data: what the terminal shows and the page draws."""
    reference = _numbers(place)
    measured = ("text", "windows", "window", "stride", "skipped", "tokens", "perplexity", "perplexity_stderr")
    groups = {cell.group: [c for c in suite.cells() if c.group == cell.group] for cell in suite.cells()}
    scores = reference["tasks"]["result"] if suite.evaluation.tasks else {}
    return {
        "microbat": version("microbat"),
        "title": suite.title,
        "model": suite.model,
        "calibration": asdict(suite.calibration),
        "evaluation": {name: reference["quality"]["result"].get(name) for name in measured}
        if suite.evaluation.text
        else {},
        "tasks": _tasks([scores]),
        "groups": [
            {"title": title, "entries": _entries(suite, cells, place, failures, scores)}
            for title, cells in groups.items()
        ],
    }


def _entries(
    suite: Suite, cells: list[Cell], place: Path, failures: dict[str, str], scores: dict[str, Any]
) -> list[dict[str, Any]]:
    """One entry per label and scheme over its seeds, each with its standing among those of the same scheme, and in its
    family: the rows that differ in their last step only."""
    entries, runs, families = [], [], []
    metrics = QUALITY if suite.evaluation.text else ()
    for label, scheme in dict.fromkeys((cell.label, cell.recipe.scheme) for cell in cells):
        own = [cell for cell in cells if (cell.label, cell.recipe.scheme) == (label, scheme)]
        done = [_folder(place, cell) for cell in own if cell.name not in failures]
        runs.append([_run(folder, bool(metrics), scores) for folder in done])
        preparers, solver = own[0].recipe.methods()
        family = (preparers, own[0].recipe.scale_rule)
        families += [family] if family not in families else []
        entry: dict[str, Any] = {
            "label": label,
            "scheme": scheme,
            "seeds": [cell.recipe.seed for cell in own if cell.name not in failures],
            "failed": {str(cell.recipe.seed): failures[cell.name] for cell in own if cell.name in failures},
            "varied": own[0].varied,
            "recipe": to_json(own[0].recipe),
            "preparers": [describe(method) for method in preparers],
            "solver": describe(solver),
            "family": families.index(family),
            "standing": {},
            "standing_in_family": {},
        }
        if done:
            for metric in metrics:
                stderrs = [run[f"{metric}_stderr"] for run in runs[-1]]
                entry[metric] = asdict(estimate([run[metric] for run in runs[-1]], stderrs))
            if metrics:
                entry["runs"] = [{name: run[name] for name in (*metrics, *WINDOWS.values())} for run in runs[-1]]
            reports = [account.read_report(folder) for folder in done]
            entry["seconds"] = fmean(account.calibration_seconds(report) for report in reports)
            entry["machines"] = sorted({report["machine"] for report in reports if "machine" in report})
            entry["bits_per_weight"] = reports[0]["bits_per_weight"]
            if scores:
                entry |= _scored([_numbers(folder)["tasks"]["result"] for folder in done], scores)
        entries.append(entry)
    measured = [(entry, own) for entry, own in zip(entries, runs, strict=True) if own]
    for scheme in dict.fromkeys(entry["scheme"] for entry in entries):
        rivals = [(entry, own) for entry, own in measured if entry["scheme"] == scheme]
        _rank("standing", rivals)
        for family in {entry["family"] for entry, _ in rivals}:
            _rank("standing_in_family", [(entry, own) for entry, own in rivals if entry["family"] == family])
    return entries


def _run(folder: Path, on_text: bool, reference: dict[str, Any]) -> dict[str, Any]:
    """What one run was measured to be: on the text, and ``recovered``, the items of its recovery where it and they are known."""
    numbers = _numbers(folder)
    own = numbers["tasks"]["result"] if reference else {}
    known = own and recovered(own, reference) is not None
    quality = numbers["quality"]["result"] if on_text else {}
    return {**quality, "recovered": recovered_items(own, reference) if known else None}


def _scored(runs: list[Scores], reference: Scores) -> dict[str, Any]:
    """Each benchmark's score, and recovery and flips where they have a meaning, over the runs."""
    entry: dict[str, Any] = {"tasks": _tasks(runs)}
    for name, measured in (("recovery", recovered), ("flips", flips)):
        if pairs := [pair for pair in (measured(run, reference) for run in runs) if pair is not None]:
            entry[name] = asdict(estimate([v for v, _ in pairs], [error for _, error in pairs], over="items"))
    return entry


def _tasks(runs: list[Scores]) -> dict[str, Any]:
    """Each benchmark's score over the runs, with what was counted of answers that were drawn."""
    return {
        task: asdict(
            estimate([run[task]["score"] for run in runs], [run[task]["stderr"] for run in runs], over="items")
        )
        | {name: sum(run[task][name] for run in runs) for name in COUNTS if name in first}
        | {"n": first.get("n")}
        | ({"by_task": _shares([run[task]["by_task"] for run in runs])} if "by_task" in first else {})
        for task, first in runs[0].items()
    }


def _shares(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of a benchmark's tasks, the mean score over the runs."""
    return {task: fmean(run[task]["score"] for run in runs) for task in runs[0]}


def _rank(key: str, measured: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
    """Write into each entry how it stands: ``best``, ``tied`` (not distinguishable from the best) or ``behind``."""
    for metric, per_window in WINDOWS.items():
        if on_text := [(entry, runs) for entry, runs in measured if metric in entry]:
            best, best_runs = min(on_text, key=lambda pair: pair[0][metric]["value"])
            for entry, runs in on_text:
                same = indistinct([[run[per_window]] for run in runs], [[run[per_window]] for run in best_runs])
                entry[key][metric] = "best" if entry is best else "tied" if same else "behind"
    if scored := [(entry, runs) for entry, runs in measured if "recovery" in entry]:
        best, best_runs = max(scored, key=lambda pair: pair[0]["recovery"]["value"])
        for entry, runs in scored:
            if all(run["recovered"] for run in (*runs, *best_runs)):
                same = indistinct([run["recovered"] for run in runs], [run["recovered"] for run in best_runs])
            else:
                same = overlap(Estimate(**entry["recovery"]), Estimate(**best["recovery"]))
            entry[key]["recovery"] = "best" if entry is best else "tied" if same else "behind"


def _pictures(suite: Suite, place: Path, done: list[Cell]) -> list[dict[str, Any]]:
    """The activations of one layer that every method of the main table has a picture of, at the first scheme."""
    records: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in done:
        if not cell.group and cell.recipe.scheme == suite.schemes[0] and cell.label not in records:
            report = account.read_report(_folder(place, cell))
            records[cell.label] = {record["layer"]: record for record in report["activations"]}
    common = set.intersection(*(set(layers) for layers in records.values())) if records else set()
    layer = next((name for layers in records.values() for name in reversed(layers) if name in common), "")
    return [{"label": label, **layers[layer]} for label, layers in records.items() if layer]


def _cases(suite: Suite, tasks: Tasks, place: Path, done: list[Cell]) -> list[dict[str, Any]]:
    """Case studies of the main table's methods, under the first scheme and each one's first seed, beside the float model."""
    folders = {"float": place}
    for cell in done:
        if not cell.group and cell.recipe.scheme == suite.schemes[0]:
            folders.setdefault(cell.label, _folder(place, cell))
    return [
        {"scheme": suite.schemes[0], "benchmark": name, **case}
        for name, (_, problems) in tasks.problems.items()
        for case in cases(problems, {k: _answers(tasks, v) / f"{name}.jsonl" for k, v in folders.items()}, "float")
    ]
