"""The command line: verbs over :mod:`microbat.pipeline`. Errors of the user's making print one line and exit with 2."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Turn a pretrained language model into a 4-bit checkpoint that keeps its accuracy, and prove what was lost.",
)
# A pipe or a file has no width of its own: tables are not cut there.
console = Console(width=None if sys.stdout.isatty() else 200)
NAMES = {"perplexity": "perplexity", "ratio": "times float", "kl": "KL (nats)", "recovery": "recovery %"}


Device = Annotated[str, typer.Option(help="auto, cpu, cuda ...")]
Backend = Annotated[
    str, typer.Option(help="What multiplies by the packed bits: auto, native, triton, torch; `microbat inspect` says.")
]


class Layout(StrEnum):
    """What ``microbat export`` writes."""

    compressed_tensors = "compressed-tensors"
    gguf = "gguf"
    microbat = "microbat"


class Dtype(StrEnum):
    """What ``microbat generate`` computes in, beside the products of low-bit codes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Listed(StrEnum):
    """What ``microbat list`` lists."""

    formats = "formats"
    methods = "methods"
    families = "families"
    schemes = "schemes"
    benchmarks = "benchmarks"


@contextlib.contextmanager
def _errors(command: str, *less: str, device: str = "cpu") -> Iterator[None]:
    """What ``command`` raises, in one line. ``less``: options that make it take less memory; ``device``: what it runs on."""
    from torch import OutOfMemoryError

    try:
        yield
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        _fail(str(error), error)
    except OutOfMemoryError as error:
        advice = [*less, *(["--device cpu"] if device != "cpu" else []), "a device with more memory and no other work"]
        _fail(f"{command} does not fit the device's memory; try {', or '.join(advice)} ({error})", error)


def _fail(message: str, cause: Exception) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2) from cause


@app.command()
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

    with _errors("quantize", "a lower --max-seq-length", "fewer --num-calibration-samples", device=device):
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


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A microbat folder.")],
    out: Annotated[Path, typer.Option(help="The folder (gguf: the file) to write; must not exist.")],
    target: Annotated[
        str,
        typer.Option(
            help="Who will load it: transformers, vllm, vllm-hopper, vllm-blackwell, vllm-cpu, vllm-plugin, llama.cpp.",
        ),
    ],
    format: Annotated[Layout | None, typer.Option(help="The layout; the target's own if not given.")] = None,
) -> None:
    """Write a folder in another layout, its bits unchanged. What the target would drop or compute otherwise is refused.

    Example: `microbat export qwen-mxfp4 --target transformers --out qwen-mxfp4-ct`
    """
    from microbat.export import as_it_is, compressed_tensors, gguf
    from microbat.export.targets import TARGETS
    from microbat.registry import pick

    exporters = {Layout.compressed_tensors: compressed_tensors, Layout.gguf: gguf, Layout.microbat: as_it_is}
    with _errors("export"):
        layout = format or Layout(pick("target", target, TARGETS).layout)
        written = exporters[layout].export(folder, out, target=target)
    console.print(f"{written}: {layout.value} for {target}", soft_wrap=True)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A microbat folder, or what `microbat export` wrote.")],
    engine: Annotated[str, typer.Option(help="microbat, transformers, vllm, llama.cpp; empty: the folder's own.")] = "",
) -> None:
    """Compare a folder's codes, bit for bit, and an engine's logits with the calibrated model; exit status 1 if they differ.

    Example: `microbat verify qwen-mxfp4-ct --engine transformers`
    """
    from microbat.verify import Altered, verify

    with _errors("verify"):
        try:
            verdict = verify(folder, engine=engine)
        except Altered as error:
            Console(stderr=True).print(f"[bold red]FAILED:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
    console.print(f"codes of {verdict.layers} linear layers: equal, bit for bit", highlight=False)
    if verdict.error is not None:
        console.print(
            f"their outputs in {verdict.engine}, on equal inputs: at most {verdict.error:.1e} off ({verdict.worst}), "
            f"bound {verdict.error_bound:.1e}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"logits of {verdict.tokens} tokens: {verdict.divergence:.1e} nats from the calibrated model, "
        f"bound {verdict.divergence_bound:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    console.print("[bold green]passed[/]" if verdict.passed else "[bold red]FAILED[/]")
    if not verdict.passed:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders or names on the hub; a name=path gives a row its name.")],
    text: Annotated[
        str, typer.Option(help="python-docs (comes with Python), a .txt/.raw/.jsonl file, or wikitext-2-raw.")
    ] = "python-docs",
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 16,
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

    with _errors("eval", "a smaller --window", device=device):
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


@app.command()
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
    with _errors("compare", "--quick", "a suite with a smaller window"):
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
                rows = [("float", result["tasks"], "100")]
                rows += [(e["label"], e["tasks"], _standing(e, "recovery", 2)) for e in own if "tasks" in e]
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
    return mark + _with_error(entry[metric]["value"], entry[metric]["error"], digits)


def _named(argument: str) -> tuple[str, str]:
    name, separator, path = argument.partition("=")
    return (name, path) if separator else (Path(argument).name, argument)


def _print_quality(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['text']}: {result['windows']} windows of {result['window']}, stride {result['stride']}"
    )
    for column in ("model", "perplexity", "ratio", "KL (nats)", "top-1 agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            _with_error(row["perplexity"], row["perplexity_stderr"], 2),
            _with_error(row["ratio"], row["ratio_stderr"], 3),
            _with_error(row["kl"], row["kl_stderr"], 4),
            _with_error(row["top1"], row["top1_stderr"], 3),
        )
    console.print(table)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def _print_tasks(result: dict[str, Any]) -> None:
    rows = []
    for name, row in result["models"].items():
        scores = {task: {**s, "value": s["score"], "error": s["stderr"]} for task, s in row["tasks"].items()}
        recovered = "" if row["recovery"] is None else _with_error(row["recovery"], row["recovery_stderr"], 2)
        rows.append((name, scores, recovered))
    _print_scores(f"recovery against {result['reference']}" if result["reference"] else "benchmarks", rows)


def _print_scores(title: str, rows: list[tuple[str, dict[str, Any], str]]) -> None:
    """One row per model: its name, its benchmarks' estimates, its recovery."""
    from microbat.report.text import remarks

    table = Table(title=title)
    for column in ("model", *rows[0][1], NAMES["recovery"]):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, scores, recovered in rows:
        cells = [
            _with_error(score["value"], score["error"], 3 if score["value"] <= 1 else 2) + remarks(score)
            for score in scores.values()
        ]
        table.add_row(Text(name), *cells, recovered)
    console.print(table)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A microbat folder, a model folder, or a name on the hub.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="At most so many; the end of the context ends it too.")
    ] = 128,
    device: Device = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of all that is not in low-bit codes, and of larger products.")] = (
        Dtype.float32
    ),
    backend: Backend = "auto",
) -> None:
    """Continue a text, greedily, printed as it comes. A scheme with KV8 or KV4 keeps its cache in those bits.

    Example: `microbat generate qwen-mxfp4 --prompt 'The bat'`
    """
    import torch

    from microbat import pipeline

    with _errors("generate", "a shorter --prompt", "fewer --max-new-tokens", device=device):
        pipeline.generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=getattr(torch, dtype),
            backend=backend,
            show=lambda piece: print(piece, end="", flush=True),
        )
    print()


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="A microbat folder.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens to time.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens before them.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Both sides take turns so many times; the best time counts.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a CPU; 0: torch's own number.")] = 0,
    device: Device = "auto",
    backend: Backend = "auto",
) -> None:
    """Decoding speed, peak memory and sizes on this machine: the packed folder beside the model in BF16, each in a process of
    its own.

    Example: `microbat bench qwen-mxfp4 --threads 1`
    """
    from microbat.bench import SIZES, bench
    from microbat.pipeline import pick_device

    with _errors("bench", "fewer --prompt and --tokens", device=device):
        result = bench(
            folder,
            device=pick_device(device),
            tokens=tokens,
            prompt=prompt,
            rounds=rounds,
            threads=threads,
            backend=backend,
        )
    table = Table(title=str(folder))
    for column in ("MB, if not said otherwise", "packed", "BF16", "packed / BF16"):
        table.add_column(column, justify="right" if table.columns else "left")
    table.add_row("tokens/s", f"{result.packed.speed:.2f}", f"{result.bf16.speed:.2f}", f"{result.ratio('speed'):.2f}")
    for name, what in SIZES.items():
        sides = (f"{getattr(side, what) / 1e6:.1f}" for side in (result.packed, result.bf16))
        table.add_row(name, *sides, f"{result.ratio(what):.3f}")
    console.print(table)
    console.print(
        f"{result.packed.online / 1e6:.2f} MB of the packed linear layers are transforms and clips", highlight=False
    )
    console.print(result.setting, highlight=False, soft_wrap=True)


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A microbat folder.")]) -> None:
    """What is in a folder: bits per weight, sizes, formats, transforms with their parameter counts, per-layer errors, and
    the backend that runs each layer on this machine."""
    from microbat.account import read_report
    from microbat.export.folder import read_contract
    from microbat.pipeline import pick_device
    from microbat.scheme import formats

    with _errors("inspect"):
        contract = read_contract(folder)
        content = read_report(folder)
    size = content["bytes"]
    console.print(
        f"[bold]{folder}[/]: {content['model']} ({content['family']}), "
        f"{' + '.join(dict.fromkeys((content['method'], content['solver'])))}, {content['scheme']}",
        highlight=False,
    )
    for role in ("weights", "activations"):
        stored = contract[role]
        console.print(f"{role}: " + (f"{stored['format']}, scale rule {stored['scale_rule']}" if stored else "float"))
    console.print(
        f"{content['bits_per_weight']:.3f} bits per quantized weight (codes, scales, transforms, clips); "
        f"quantized layers {size['quantized_layers'] / 1e6:.1f} MB, transforms and clips {size['transforms'] / 1e6:.2f} MB, "
        f"other {size['other'] / 1e6:.1f} MB, total {size['total'] / 1e6:.1f} MB (bfloat16: {size['bf16_total'] / 1e6:.1f} MB)"
    )
    table, device = Table(), pick_device("auto")
    activations = contract["activations"] and formats()[contract["activations"]["format"]]
    for column in (
        "layer",
        "shape",
        "format",
        "bits",
        "backend",
        "transform",
        "parameters",
        "weight error",
        "output error",
    ):
        left = column in ("layer", "format", "backend", "transform")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for layer in content["layers"]:
        table.add_row(
            layer["name"],
            "x".join(map(str, layer["shape"])),
            layer["format"] + (f" + {extra} channels" if (extra := layer.get("residual_channels")) else ""),
            f"{layer['bits']:.2f}",
            _backends(layer["format"], activations, device),
            layer["transform"] or "none",
            str(layer["transform_params"]),
            f"{layer['weight_error']:.4f}",
            f"{layer['output_error']:.4f}",
        )
    for layer in content.get("outside", ()):
        shape, runs = "x".join(map(str, layer["shape"])), _backends(layer["format"], activations, device)
        table.add_row(layer["name"], shape, layer["format"], f"{layer['bits']:.2f}", runs, "none", "0", "", "")
    console.print(table)
    parameters = {(layer["block"], layer["site"]): layer["transform_params"] for layer in content["layers"]}
    console.print(
        f"{sum(parameters.values())} transform parameters in all; backends are those of this machine's {device.type}"
    )


def _backends(names: str, activations: Any, device: Any) -> str:
    """What runs a layer of one format, or of several side by side, each followed by its number of columns."""
    from microbat.runtime.packed import described
    from microbat.scheme import formats

    mixed = [name.split(" x ")[0] for name in names.split(", ")]
    met = activations if len(mixed) == 1 else None  # groups meet values
    return ", ".join(dict.fromkeys(described(formats()[name], met, device) for name in mixed))


@app.command("list")
def list_(what: Annotated[Listed, typer.Argument(help="formats, methods, families, schemes or benchmarks")]) -> None:
    """What there is to choose from."""
    {
        Listed.formats: _list_formats,
        Listed.methods: _list_methods,
        Listed.families: _list_families,
        Listed.schemes: _list_schemes,
        Listed.benchmarks: _list_benchmarks,
    }[what]()


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


if __name__ == "__main__":
    app()
