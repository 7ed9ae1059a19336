"""``microbat list``: what there is to choose from."""

import dataclasses
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.table import Table

from microbat.cli.app import console


class Listed(StrEnum):
    """What ``microbat list`` lists."""

    formats = "formats"
    methods = "methods"
    families = "families"
    schemes = "schemes"
    benchmarks = "benchmarks"


def list_(
    what: Annotated[
        Listed | None, typer.Argument(help="formats, methods, families, schemes or benchmarks", show_default="all")
    ] = None,
) -> None:
    """What there is to choose from."""
    lists = {
        Listed.formats: _list_formats,
        Listed.methods: _list_methods,
        Listed.families: _list_families,
        Listed.schemes: _list_schemes,
        Listed.benchmarks: _list_benchmarks,
    }
    for one in [what] if what else Listed:
        if not what:
            console.rule(one.value)
        lists[one]()


def _list_formats() -> None:
    from microbat.formats.scales import default_rule, rules_for
    from microbat.scheme import formats

    table = Table()
    for column in ("format", "element", "largest", "scales", "bits per element", "scale rules (default first)"):
        table.add_column(column)
    for name, format in formats().items():
        scales = " + ".join(f"{level.element.name} / {level.group}" for level in format.levels)
        scales += "".join(f" + {term.element.name} x {term.factor.name}" for term in format.terms)
        default = default_rule(format)
        rules = ", ".join([default, *(r for r in rules_for(format) if r != default)])
        bits = f"{format.bits_per_element((4096, 4096)):.3f}"
        table.add_row(name, format.element.name, f"{format.element.max:g}", scales, bits, rules)
    console.print(table)


def _list_methods() -> None:
    from microbat.methods.base import Solver
    from microbat.recipe import methods

    for name, kind in methods().items():
        role = "solver" if issubclass(kind, Solver) else f"preparer, then {kind.default_solver}"  # type: ignore[attr-defined]
        console.print(f"[bold]{name}[/] ({role}): {kind.summary}", highlight=False)
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            line = f"    --set {field.name}={field.default}    {_allowed(field.type)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _allowed(kind: Any) -> str:
    """What a hyper-parameter of this type may be: the names to choose from, or the type's."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_args(kind):
        return " | ".join(map(_allowed, get_args(kind)))
    return "None" if kind is type(None) else kind.__name__


def _list_families() -> None:
    from microbat.models.base import families

    for name, family in families().items():
        stacks = []
        for stack in family.stacks:
            sites = (f"{s.name}: {', '.join(c.rsplit('.', 1)[-1] for c in s.consumers)}" for s in stack.sites)
            stacks.append(f"{stack.blocks}: " * (stack is not family) + "; ".join(sites))
        console.print(f"[bold]{name}[/] ({' | '.join(reversed(stacks))})", highlight=False)


def _list_schemes() -> None:
    from microbat.scheme import EXAMPLES, Scheme

    console.print("W<bits>A<bits>[KV<bits>][:format,...]; a format replaces the default of its width")
    for text in EXAMPLES:
        scheme = Scheme.parse(text)
        roles = {"weights": scheme.weight, "activations": scheme.activation}
        console.print(
            f"[bold]{text}[/]  " + ", ".join(f"{k} {q.format.name if q else 'float'}" for k, q in roles.items()),
            highlight=False,
        )


def _list_benchmarks() -> None:
    from microbat.evaluation.benchmarks import BENCHMARKS
    from microbat.evaluation.tasks import task_names

    table = Table(title="answered in the model's own words")
    for column in ("benchmark", "score", "judge", "on the hub", "file below --data"):
        table.add_column(column)
    for name, benchmark in BENCHMARKS.items():
        judge = benchmark.judge.__name__
        hub = benchmark.hub[0] if benchmark.hub else "scripts/train_tiny_vlm.py makes it"
        table.add_row(name, f"Avg@{benchmark.samples}", judge, hub, benchmark.file)
    console.print(table)
    console.print(f"by lm-evaluation-harness, from DATA/<name>/validation.jsonl too: {', '.join(task_names())}")
