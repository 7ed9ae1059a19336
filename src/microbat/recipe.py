"""Recipes: a run as plain data, checked name by name and type by type, and the method objects that it asks for."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from microbat.methods.base import Method, Preparer, Solver
from microbat.registry import pick, subclasses, unknown
from microbat.scheme import Scheme

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a result. Equal recipes on one machine give equal bytes.

    ``method`` is a preparer or a solver by name, ``solver`` the last step (empty: the method's own). ``settings`` are
    hyper-parameters by name; one that method and solver share is written ``method.name``. ``scale_rule`` empty means the
    method's, or each format's default. ``ignore`` and ``also`` name layers: :class:`~microbat.scheme.Scheme`. ``calibration`` is
    ``self`` (the model's own generations), a .txt or .jsonl file, a folder of images with a .jsonl (``skip_bad``: images that
    cannot be read are left out), or a data set of the hub.
    ``min_expert_tokens``: statistics of an expert that saw fewer calibration tokens are filled up
    with the block's other tokens (:mod:`microbat.calibrate.experts`); None: four times the experts' width, 0: not at all.
    ``precision`` is that of the products in calibration: ``auto`` takes bfloat16 where the hardware multiplies it.
    """

    model: str
    method: str = "batquant"
    solver: str = ""
    scheme: str = "W4A4KV16"
    scale_rule: str = ""
    ignore: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    calibration: str = "self"
    num_calibration_samples: int = 64
    max_seq_length: int = 512
    min_expert_tokens: int | None = None
    skip_bad: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_calibration_samples", "max_seq_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.min_expert_tokens is not None and self.min_expert_tokens < 0:
            raise ValueError(f"min_expert_tokens={self.min_expert_tokens} must be 0 or more, or left out")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in a YAML or JSON file, as a run writes it (recipe.json) or as a person does."""
        content = yaml.safe_load(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"recipe {path} is not a mapping of names to values")
        content = content.get("recipe", content)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in content:
            if name not in known:
                raise unknown(f"entry in recipe {path}:", name, known)
        return cls(**{k: tuple(v) if k in ("ignore", "also") else v for k, v in content.items()})

    def parsed_scheme(self) -> Scheme:
        preferred = pick("method", self.method, methods()).default_scale_rule
        return Scheme.parse(
            self.scheme, scale_rule=self.scale_rule, preferred_rule=preferred, ignore=self.ignore, also=self.also
        )

    def methods(self) -> tuple[tuple[Preparer, ...], Solver]:
        """The preparers and the solver with their hyper-parameters; unknown names, wrong types, and a scheme that means
        nothing to one of them raise."""
        known = methods()
        chosen = pick("method", self.method, known)
        if issubclass(chosen, Solver):
            if self.solver not in ("", self.method):
                raise ValueError(f"method {self.method!r} is itself a solver; leave out solver {self.solver!r}")
            classes: list[type[Method]] = [chosen]
        else:
            solvers = {name: m for name, m in known.items() if issubclass(m, Solver)}
            classes = [chosen, pick("solver", self.solver or chosen.default_solver, solvers)]
        arguments = _assign(self.settings, classes)
        built = [kind(**arguments[kind.name]) for kind in classes]
        preparers = tuple(m for m in built if isinstance(m, Preparer))
        solver = next(m for m in built if isinstance(m, Solver))
        if solver.weight_lr is not None and not preparers:
            raise ValueError(f"{self.method!r} needs a method that trains: --method batquant --solver {self.method}")
        for method in built:
            method.check(self.parsed_scheme())
        for preparer in preparers:
            if solver.reorders:
                raise ValueError(
                    f"{solver.name} takes channels in an order of its own, and {preparer.name} may map them before it: "
                    "leave their order with --set order=natural"
                )
            if preparer.solvers and solver.name not in preparer.solvers:
                raise ValueError(
                    f"solver {solver.name!r} does not know the weights of {preparer.name!r}; it goes with "
                    f"{' and '.join(preparer.solvers)}"
                )
        return preparers, solver


def methods() -> dict[str, type[Method]]:
    """Every method by name."""
    return subclasses("microbat.methods", Method)


def describe(method: Method) -> dict[str, Any]:
    """A method's name and all its hyper-parameters, as plain data."""
    return {"name": method.name, **dataclasses.asdict(method)}  # type: ignore[call-overload]


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` strings as a dictionary; values read as YAML scalars."""
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"setting {pair!r} is not key=value")
        settings[key] = _number(value)
    return settings


def _number(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(settings: dict[str, Any], classes: list[type[Method]]) -> dict[str, dict[str, Any]]:
    """Each setting to the class that has it, its value checked against the field's type."""
    fields = {f"{c.name}.{f.name}": (c, f) for c in classes for f in dataclasses.fields(c)}  # type: ignore[arg-type]
    arguments: dict[str, dict[str, Any]] = {c.name: {} for c in classes}
    for key, value in settings.items():
        matches = [full for full in fields if key in (full, full.split(".", 1)[1])]
        if not matches:
            raise unknown("setting", key, [full.split(".", 1)[1] for full in fields])
        if len(matches) > 1:
            raise ValueError(f"setting {key!r} is ambiguous: {' or '.join(matches)}")
        owner, declared = fields[matches[0]]
        try:
            arguments[owner.name][declared.name] = TypeAdapter(declared.type).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"setting {key}={value!r} of {owner.name}: {reason}") from error
    return arguments


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data that :meth:`Recipe.read` takes."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
