"""``microbat quantize``: the table of layers, the run, its report."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from microbat.cli.app import console, errors


def quantize(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")] = "",
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist.")] = ...,  # type: ignore[assignment]
    method: Annotated[str, typer.Option(help="See `microbat list methods`.")] = "batquant",
    solver: Annotated[str, typer.Option(help="The last step that picks the codes; empty: the method's own.")] = "",
    scheme: Annotated[str, typer.Option(help="See `microbat list schemes`.")] = "W4A4KV16",
    scale_rule: Annotated[str, typer.Option(help="floor, even, rceil, ceil, mse; empty: each format's best.")] = "",
    ignore: Annotated[
        list[str] | None, typer.Option(help="A layer to leave in float: its full name, or `re:` and a pattern.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="A layer outside the blocks to round as well: lm_head, or `re:merger` for a tower's mergers."
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="`self` (the model's own text), a .txt or .jsonl file, a folder of images with a .jsonl (image, question, "
            "answer), or a data set of the hub."
        ),
    ] = "self",
    num_calibration_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    min_expert_tokens: Annotated[
        int | None,
        typer.Option(
            help="Experts that saw fewer get statistics of the block's other tokens too; default: 4 x their width."
        ),
    ] = None,
    max_seq_length: Annotated[int, typer.Option(help="Tokens in each; with images, at most.")] = 512,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pairs whose image cannot be read.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyper-parameter: key=value, as `microbat list methods` names it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    precision: Annotated[str, typer.Option(help="Of products in calibration: auto, bfloat16, float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe.json of an earlier run, or your YAML; options are then taken from it.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop where the table of layers has a surprise in it.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that train blocks side by side, where the method allows it (extra: microbat[ray])."
        ),
    ] = 1,
    address: Annotated[
        str, typer.Option(help="The Ray cluster that has the workers, as head:6379 or auto; empty: this machine.")
    ] = "",
) -> None:
    """Quantize a model into a folder. An interrupted run goes on where it stopped when the same command runs again.

    Example: `microbat quantize Qwen/Qwen3-0.6B --scheme W4A4KV16 --out qwen-mxfp4`
    """
    from microbat import pipeline
    from microbat.account import read_report
    from microbat.recipe import Recipe, parse_settings

    with errors("quantize", "a lower --max-seq-length", "fewer --num-calibration-samples", device=device):
        if recipe is not None:
            chosen = Recipe.read(recipe)
            chosen = dataclasses.replace(chosen, model=model) if model else chosen
        else:
            if not model:
                raise ValueError("give a MODEL, or a --recipe that names one")
            chosen = Recipe(
                model=model,
                method=method,
                solver=solver,
                scheme=scheme,
                scale_rule=scale_rule,
                ignore=tuple(ignore or ()),
                also=tuple(also or ()),
                calibration=calibration,
                num_calibration_samples=num_calibration_samples,
                max_seq_length=max_seq_length,
                min_expert_tokens=min_expert_tokens,
                skip_bad=skip_bad,
                settings=parse_settings(set_ or []),
                seed=seed,
                precision=precision,
                device=device,
            )
        _print_coverage(pipeline.coverage(chosen), strict)
        if (workers > 1 or address) and (why := pipeline.in_order(chosen)):
            console.print(f"{why}: blocks are calibrated in order, by one process", soft_wrap=True, highlight=False)
        folder = pipeline.run(chosen, out, workers=workers, address=address)
        page = pipeline.write_report(folder)
    content = read_report(folder)
    for reason in content["recipe"].get("calibration_skipped", ()):
        console.print(f"left out: {reason}", style="yellow", highlight=False, markup=False)
    console.print(f"{folder}: {content['bits_per_weight']:.3f} bits per weight, report {page}", soft_wrap=True)


def _print_coverage(rows: list[Any], strict: bool) -> None:
    """What will be quantized and what not, before any work; ValueError for a surprise when ``strict``."""
    from microbat.calibrate.coverage import summarized

    table = Table(title="what will be quantized")
    for column in ("layers", "how many", "shape", "weights", "activations", ""):
        table.add_column(column, justify="right" if column == "how many" else "left", no_wrap=column == "layers")
    for row, count in summarized(rows):
        formats = ("float", "") if row.weights is None else (row.weights, row.activations or "16 bits")
        shape = "x".join(map(str, row.shape))
        table.add_row(Text(row.layer), str(count), shape, *formats, row.reason, style="yellow" if row.surprise else "")
    console.print(table)
    surprises = [row for row in rows if row.surprise]
    if strict and surprises:
        raise ValueError(
            f"--strict: {surprises[0].layer}: {surprises[0].reason}"
            + (f", and {len(surprises) - 1} more surprises" if surprises[1:] else "")
            + "; to leave a layer in float on purpose, --ignore it"
        )
