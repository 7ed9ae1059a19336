"""Benchmarks that a model answers in its own words, as types: where rows come from and how they become problems."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from microbat.evaluation.judges import Judge
from microbat.evaluation.totals import Total, by_problem
from microbat.pictures import Picture

Row = Mapping[str, Any]
Fields = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where its rows are, what is asked, who judges, how many answers per problem its published scores average.

    ``picture``: the column of its pictures on the hub, empty where it asks about none; in the local twin it is always
    ``image``, a path relative to the file. ``total``: how problems' scores make the benchmark's. ``points``: what a problem's
    score of 1 counts for in the published one.
    """

    name: str
    hub: tuple[str, str | None, str] | None  # data set, configuration, split; None: there is only the twin
    file: str  # its twin below a data folder: jsonl with the columns that ``fields`` reads
    fields: Callable[[Row], Fields]
    prompt: str  # a template of fields
    judge: Callable[[Fields], Judge]
    samples: int
    picture: str = ""
    total: Total = by_problem
    points: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a model is asked, about which picture if any, and who judges its answer; ``fields`` of the row it comes from."""

    prompt: str
    judge: Judge
    picture: Picture | None = None
    fields: Fields = field(default_factory=dict)


def load_problems(benchmark: Benchmark, data: Path | None = None, limit: int | None = None) -> list[Problem]:
    """The first ``limit`` problems (None: all), from the folder ``data``, or from the hub without one.

    Errors: FileNotFoundError or OSError for missing data (both name the file and the hub's data set), ValueError for
    rows that lack a column, have an answer that the judge cannot read or a picture that is none, ModuleNotFoundError without
    the extra.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no problem; it must be at least 1, or None for all")
    path = None if data is None else data.expanduser() / benchmark.file
    rows = _from_hub(benchmark) if path is None else _from_file(benchmark, path)
    problems = []
    for number, row in enumerate(islice(rows, limit), start=1):
        try:
            shown = _picture(benchmark, rows, number - 1, row, path) if benchmark.picture else None
            problems.append(_problem(benchmark, row, shown))
        except KeyError as error:
            raise ValueError(
                f"{benchmark.name}, row {number}: no column {error} (columns: {', '.join(row)})"
            ) from error
        except ValueError as error:
            raise ValueError(f"{benchmark.name}, row {number}: {error}") from error
    if not problems:
        raise ValueError(f"{benchmark.name}: there are no rows")
    return problems


def _problem(benchmark: Benchmark, row: Row, shown: Picture | None) -> Problem:
    fields = benchmark.fields(row)
    prompt = benchmark.prompt.format(**fields)
    return Problem(prompt=prompt, judge=benchmark.judge(fields), picture=shown, fields=fields)


def _picture(benchmark: Benchmark, rows: Any, index: int, row: Row, path: Path | None) -> Picture:
    if path is not None:
        file = path.parent / row["image"]
        shown = Picture(name=str(file), read=file.read_bytes)
    else:  # not kept, but taken from the rows again when it is needed
        column = benchmark.picture
        shown = Picture(name=row[column]["path"] or column, read=lambda: rows[index][column]["bytes"])
    shown.check()
    return shown


def _from_file(benchmark: Benchmark, path: Path) -> Iterable[Row]:
    if not path.is_file():
        other = f"; without a data folder the hub's {benchmark.hub[0]!r} is used" if benchmark.hub else ""
        raise FileNotFoundError(f"{benchmark.name}: no file {path}{other}")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _from_hub(benchmark: Benchmark) -> Iterable[Row]:
    if benchmark.hub is None:
        raise FileNotFoundError(
            f"{benchmark.name} is not on the hub; give the folder that holds {benchmark.file} as data"
        )
    name, configuration, split = benchmark.hub
    try:
        from datasets import Image, load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{benchmark.name} comes from the hub and needs the package 'datasets': pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, configuration, split=split)
        return rows.cast_column(benchmark.picture, Image(decode=False)) if benchmark.picture else rows
    except OSError as error:  # no network, offline mode, gated or moved data set
        raise OSError(
            f"{benchmark.name}: hub data set {name!r} could not be loaded ({error}); "
            f"a file {benchmark.file} below a folder given as data works too"
        ) from error
