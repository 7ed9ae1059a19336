"""Suites: a comparison as plain data, one model under many methods, schemes and seeds. All of it is checked at once.

A suite is a YAML file:

    title: what is compared
    model: folder or hub name
    calibration: {source: self, samples: 64, length: 512}
    evaluation: {text: wikitext-2-raw, window: 1024, windows: 16, tasks: [piqa, gsm8k], sampling: {max_new_tokens: 4096}}
                                        # and modes: [no_think, slow_think], of families that have such modes
    schemes: [W4A4KV16, W4A8KV16]
    seeds: [0, 1]                                             # for what trains or starts at random
    rows:
      - {label: BATQuant + GPTQ, method: batquant, solver: gptq, settings: {epochs: 3}}    # and other fields of a Recipe
      - {label: BATQuant + RTN, method: batquant, solver: rtn, schemes: [W4A4KV16], seeds: [0]}    # some of the suite's
    ablations:
      - title: Transform block size
        row: {label: BATQuant, method: batquant, solver: gptq}
        vary: {g: [16, 32, 64]}                               # every combination of the settings' values is a row
        schemes: [W4A4KV16]                                   # the suite's where not given, seeds likewise
    quick: {seeds: [0], ablations: []}                        # what --quick replaces
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from microbat.evaluation.generation import Sampling
from microbat.recipe import Recipe
from microbat.registry import unknown

T = TypeVar("T")
AXES = ("model", "scheme", "seed")  # fields of a Recipe that the suite decides for all its rows


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """What every row is calibrated on, where the row does not say otherwise."""

    source: str = "self"
    samples: int = 64
    length: int = 512


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What every cell is measured on: windows of a text, or answers in a folder of images with questions (empty: none), after
    the first ``skip``, on which settings may have been chosen; and benchmarks (see
    :class:`microbat.evaluation.scores.Tasks`), those in the model's own words once in each of its ``modes`` of thinking; models
    that have none are asked once."""

    text: str = "python-docs"
    window: int = 1024
    windows: int = 16
    skip: int = 0
    tasks: tuple[str, ...] = ()
    data: str = ""
    limit: int | None = None
    modes: tuple[str, ...] = ()
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if not self.text and not self.tasks:
            raise ValueError("nothing is measured: it needs a text, or tasks")
        if self.skip < 0:
            raise ValueError(f"skip={self.skip} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A labelled method: ``fields`` of a Recipe. ``schemes`` and ``seeds``: those of the suite's under which it
    runs; empty for all."""

    label: str
    fields: dict[str, Any]
    schemes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A row of which some settings are varied: every combination of the values in ``vary``."""

    title: str
    row: Row
    vary: dict[str, list[Any]]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a row under a scheme and a seed. ``group`` is the ablation's title, empty in the main table."""

    label: str
    recipe: Recipe
    group: str = ""
    varied: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A readable folder name, unique in its suite."""
        parts = (self.group, self.label, self.recipe.scheme, f"seed{self.recipe.seed}")
        return "-".join(re.sub(r"[^a-z0-9.=_]+", "-", part.lower()).strip("-.") for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A comparison. Raises ValueError, naming the row, for whatever a run would refuse."""

    title: str
    model: str
    schemes: tuple[str, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)
    calibration: CalibrationText = CalibrationText()
    evaluation: Evaluation = Evaluation()
    ablations: tuple[Ablation, ...] = ()

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("no model is named; give one with --model")
        for name in ("schemes", "rows", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; at least one is needed")
        seen: dict[str, Cell] = {}
        for cell in self.cells():
            if cell.name in seen:
                raise ValueError(
                    f"labels {seen[cell.name].label!r} and {cell.label!r} both give the name {cell.name!r}"
                )
            seen[cell.name] = cell

    @classmethod
    def read(
        cls, path: Path, *, model: str = "", calibration: str = "", text: str = "", quick: bool = False
    ) -> "Suite":
        """The suite in a YAML file, with the given ``model``, ``calibration`` source and evaluation ``text`` in place of its
        own; its quick form is checked in any case."""
        with _naming(f"suite {path}"):
            content = _mapping(yaml.safe_load(path.read_text(encoding="utf-8")), "a suite")
            content = content | ({"model": model} if model else {})
            changes = _mapping(content.pop("quick", {}), "quick")
            if quick and not changes:
                raise ValueError("it has no section 'quick'")
            given = {"evaluation": {"text": text}} if text else {}
            given |= {"calibration": {"source": calibration}} if calibration else {}
            whole, short = (cls._parse(_merged(_merged(content, form), given)) for form in ({}, changes))
            for row, name in itertools.product(whole.rows, ("schemes", "seeds")):
                for value in set(getattr(row, name)) - set(getattr(whole, name)):
                    raise ValueError(f"row {row.label!r}: {value!r} is not among the suite's {name}")
        return short if quick else whole

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> "Suite":
        nested: dict[str, Any] = {"model": "", "title": ""} | content
        for name, kind in (("calibration", CalibrationText), ("evaluation", Evaluation)):
            with _naming(name):
                section = _mapping(content.get(name, {}), name)
                if "sampling" in section:
                    section["sampling"] = Sampling.of(_mapping(section["sampling"], "sampling"))
                nested[name] = _build(kind, section)
        nested["rows"] = tuple(_row(item, f"row {n}") for n, item in enumerate(_list(content.get("rows"), "rows"), 1))
        shared = {name: content[name] for name in ("schemes", "seeds") if name in content}
        nested["ablations"] = tuple(
            _ablation(item, shared, f"ablation {number}")
            for number, item in enumerate(_list(content.get("ablations", []), "ablations"), 1)
        )
        return _build(cls, nested)

    def cells(self) -> list[Cell]:
        """Every run, those of the first seed first; what the seed does not change runs once."""
        made = [
            Cell(label=row.label, recipe=recipe)
            for seed, scheme in itertools.product(self.seeds, self.schemes)
            for row in self.rows
            if scheme in (row.schemes or self.schemes) and seed in (row.seeds or self.seeds)
            if (recipe := self._recipe(row, row.fields, scheme, seed, row.seeds or self.seeds)) is not None
        ]
        for ablation in self.ablations:
            for seed, scheme in itertools.product(ablation.seeds, ablation.schemes):
                for values in itertools.product(*ablation.vary.values()):
                    varied = dict(zip(ablation.vary, values, strict=True))
                    fields = {**ablation.row.fields, "settings": {**ablation.row.fields.get("settings", {}), **varied}}
                    label = ", ".join(f"{key}={value}" for key, value in varied.items())
                    recipe = self._recipe(ablation.row, fields, scheme, seed, ablation.seeds)
                    if recipe is not None:
                        made.append(Cell(label=label, recipe=recipe, group=ablation.title, varied=varied))
        return made

    def _recipe(
        self, row: Row, fields: dict[str, Any], scheme: str, seed: int, seeds: tuple[int, ...]
    ) -> Recipe | None:
        """The checked recipe, or None for a further seed of what the seed does not change."""
        shared = {
            "calibration": self.calibration.source,
            "num_calibration_samples": self.calibration.samples,
            "max_seq_length": self.calibration.length,
        }
        with _naming(f"row {row.label!r}"):
            recipe = Recipe(model=self.model, scheme=scheme, seed=seed, **{**shared, **fields})
            preparers, solver = recipe.methods()
            recipe.parsed_scheme()
        return recipe if seed == seeds[0] or any(method.seeded for method in (*preparers, solver)) else None


def _merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``content`` with ``changes`` in place of its own: sections entry by entry, everything else whole."""
    sections = {k: {**_mapping(content.get(k, {}), k), **v} for k, v in changes.items() if isinstance(v, dict)}
    return {**content, **changes, **sections}


def _row(content: Any, what: str) -> Row:
    with _naming(what):
        content = _mapping(content, "a row")
        label = content.pop("label", "")
        if not isinstance(label, str) or not label:
            raise ValueError("it has no label")
    with _naming(f"row {label!r}"):
        for name in AXES:
            if name in content:
                raise ValueError(f"{name!r} is for the whole suite to say, not for a row")
        places = {name: tuple(_list(content.pop(name, []), name)) for name in ("schemes", "seeds")}
        return Row(label=label, fields=_typed(Recipe, content, hidden=AXES), **places)


def _ablation(content: Any, shared: dict[str, Any], what: str) -> Ablation:
    with _naming(what):
        content = {**shared, "title": "", **_mapping(content, "an ablation")}
        if not content["title"] or not content.get("vary"):
            raise ValueError("it needs a title, a row, and settings to vary")
    with _naming(f"ablation {content['title']!r}"):
        row = _row(content.get("row"), "its row")
        if row.schemes or row.seeds:
            raise ValueError("schemes and seeds are for the ablation to say, not for its row")
        return _build(Ablation, {**content, "row": row})


def _build(kind: type[T], content: dict[str, Any]) -> T:
    """A dataclass from plain data: unknown and missing entries and wrong types are refused by name."""
    values = _typed(kind, content)
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"entry {missing[0]!r} is missing")
    return kind(**values)


def _typed(kind: type, content: dict[str, Any], hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    types = {f.name: f.type for f in dataclasses.fields(kind) if f.name not in hidden}
    values = {}
    for key, value in content.items():
        if key not in types:
            raise unknown("entry", str(key), types)
        try:
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"entry {key}={value!r}: {error.errors()[0]['msg']}") from error
    return values


def _mapping(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{what} is a mapping of names to values, not {content!r}")
    return dict(content)


def _list(content: Any, what: str) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError(f"{what} is a list, not {content!r}")
    return content


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Errors inside say where in the suite they arose."""
    try:
        yield
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{what}: {error}") from error
