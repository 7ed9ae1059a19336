"""``microbat eval`` and ``microbat compare``: measured numbers with their errors, as tables."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from microbat.cli.app import Device, console, errors, with_error

NAMES = {
    "perplexity": "perplexity",
    "ratio": "times float",
    "kl": "KL (nats)",
    "recovery": "recovery %",
    "flips": "flips %",
}


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders or names on the hub; a name=path gives a row its name.")],
    text: Annotated[
        str,
        typer.Option(
            help="python-docs (comes with Python), a .txt/.raw/.jsonl file, wikitext-2-raw, or a folder of images with answers."
        ),
    ] = "python-docs",
    windows: Annotated[int, typer.Option(help="How many windows of the text, or answers of the folder.")] = 16,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    tasks: Annotated[
        str, typer.Option(help="Benchmarks instead of a text, as piqa,gsm8k (extra: microbat[tasks]).")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="A folder of local jsonl copies of the benchmarks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each benchmark; all when not given.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="How answers are sampled: temperature, top_p, top_k, max_new_tokens, samples, ..."),
    ] = None,
    answers: Annotated[
        Path, typer.Option(help="Where finished answers are kept; an interrupted run goes on from them.")
    ] = Path("microbat-answers"),
    device: Device = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Measure models side by side: perplexity, KL divergence and top-1 agreement with the float model, or benchmarks.

    Benchmarks in the model's own words (gsm8k, math500, aime24, aime25, gpqa_diamond, humaneval, mbpp) also take the URL
    of an OpenAI-compatible server as a model.

    Example: `microbat eval float=Qwen/Qwen3-0.6B mxfp4=qwen-mxfp4 --text wikitext-2-raw`
    """
    from microbat import measure, pipeline
    from microbat.evaluation.generation import Sampling
    from microbat.recipe import parse_settings

    with errors("eval", "a smaller --window", device=device):
        named = dict(_named(m) for m in models)
        sampling = Sampling.of(parse_settings(set_ or []))
        if tasks:
            result = measure.evaluate_tasks(
                named, tasks.split(","), data=data, limit=limit, device=device, sampling=sampling, answers=answers
            )
            _print_tasks(result)
        else:
            result = measure.evaluate(named, text=text, window=window, windows=windows, device=device)
            _print_quality(result)
            for path in named.values():
                pipeline.attach(path, result)
        if json_out is not None:
            json_out.write_text(json.dumps(result, indent=1) + "\n")


def compare(
    suite: Annotated[Path, typer.Option(help="A YAML file: model, schemes, seeds and rows; see suites/.")],
    model: Annotated[str, typer.Option(help="A folder or a name on the hub, instead of the suite's.")] = "",
    calibration: Annotated[str, typer.Option(help="A calibration source, instead of the suite's.")] = "",
    text: Annotated[str, typer.Option(help="An evaluation text, instead of the suite's.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The suite's quick form.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder to work in; microbat-compare/ and the suite's name when not given.")
    ] = None,
) -> None:
    """Compare many methods, schemes and seeds on one model. An interrupted comparison goes on where it stopped; the same command
    beside one that runs, say with another GPU, takes its share of the cells.

    Example: `microbat compare --suite suites/small.yaml --quick`
    """
    from microbat.comparison import compare as run

    place = out or Path("microbat-compare") / (suite.stem + ("-quick" if quick else ""))
    with errors("compare", "--quick", "a suite with a smaller window"):
        result = run(suite, out=place, model=model, calibration=calibration, text=text, quick=quick)
    _print_comparison(result)
    console.print(f"{place / 'comparison.json'}, page {place / 'comparison.html'}", soft_wrap=True)
    if any(entry["failed"] for group in result["groups"] for entry in group["entries"]):
        raise typer.Exit(1)


def _print_comparison(result: dict[str, Any]) -> None:
    for group in result["groups"]:
        for scheme in dict.fromkeys(entry["scheme"] for entry in group["entries"]):
            own = [entry for entry in group["entries"] if entry["scheme"] == scheme]
            table = Table(title=f"{group['title'] or result['title']}, {scheme}")
            metrics = (("perplexity", 2), ("ratio", 3), ("kl", 4)) if result["evaluation"] else ()
            for column in ("method", *(NAMES[name] for name, _ in metrics), "minutes"):
                table.add_column(column, justify="left" if column == "method" else "right")
            for entry in own:
                cells = [_standing(entry, name, digits) for name, digits in metrics]
                minutes = f"{entry['seconds'] / 60:.1f}" if "seconds" in entry else ""
                table.add_row(Text(entry["label"]), *cells, minutes)
            console.print(table)
            if result["tasks"]:
                rows = [("float", result["tasks"], "100", "0")]
                rows += [
                    (e["label"], e["tasks"], _standing(e, "recovery", 2), _standing(e, "flips", 2))
                    for e in own
                    if "tasks" in e
                ]
                _print_scores(f"{table.title}: benchmarks", rows)
            for entry in own:
                for seed, reason in entry["failed"].items():
                    console.print(f"{entry['label']}, seed {seed}: {reason}", style="red", markup=False, soft_wrap=True)
    console.print(
        "± over seeds where there are several, else over windows or items; * best, ≈ not distinguishable from the best",
        style="dim",
    )


def _standing(entry: dict[str, Any], metric: str, digits: int) -> str:
    if metric not in entry:
        return "" if entry["seeds"] else "failed"
    mark = {"best": "* ", "tied": "≈ "}.get(entry["standing"].get(metric, ""), "")
    return mark + with_error(entry[metric]["value"], entry[metric]["error"], digits)


def _named(argument: str) -> tuple[str, str]:
    name, separator, path = argument.partition("=")
    return (name, path) if separator else (Path(argument).name, argument)


def _print_quality(result: dict[str, Any]) -> None:
    from microbat.report.text import extent

    table = Table(title=f"{result['text']}: {extent(result)}")
    for column in ("model", "perplexity", "ratio", "KL (nats)", "top-1 agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            with_error(row["perplexity"], row["perplexity_stderr"], 2),
            with_error(row["ratio"], row["ratio_stderr"], 3),
            with_error(row["kl"], row["kl_stderr"], 4),
            with_error(row["top1"], row["top1_stderr"], 3),
        )
    console.print(table)


def _print_tasks(result: dict[str, Any]) -> None:
    rows = []
    for name, row in result["models"].items():
        scores = {task: {**s, "value": s["score"], "error": s["stderr"]} for task, s in row["tasks"].items()}
        both = [
            "" if row[key] is None else with_error(row[key], row[f"{key}_stderr"], 2) for key in ("recovery", "flips")
        ]
        rows.append((name, scores, *both))
    _print_scores(f"recovery against {result['reference']}" if result["reference"] else "benchmarks", rows)


def _print_scores(title: str, rows: list[tuple[str, dict[str, Any], str, str]]) -> None:
    """One row per model: its name, its benchmarks' estimates, its recovery, its flips."""
    from microbat.report.text import remarks

    table = Table(title=title)
    for column in ("model", *rows[0][1], NAMES["recovery"], NAMES["flips"]):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, scores, *against in rows:
        cells = [
            with_error(score["value"], score["error"], 3 if score["value"] <= 1 else 2) + remarks(score)
            for score in scores.values()
        ]
        table.add_row(Text(name), *cells, *against)
    console.print(table)
