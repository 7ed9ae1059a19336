"""``microbat inspect``, ``verify`` and ``export``: what is in a folder, whether it is what it was, and its other layouts."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from microbat.cli.app import console, errors


class Layout(StrEnum):
    """What ``microbat export`` writes."""

    compressed_tensors = "compressed-tensors"
    gguf = "gguf"
    microbat = "microbat"


def inspect(folder: Annotated[Path, typer.Argument(help="A microbat folder.")]) -> None:
    """What is in a folder: bits per weight, sizes, formats, transforms with their parameter counts, per-layer errors, and
    the backend that runs each layer on this machine."""
    from microbat.account import read_report
    from microbat.export.folder import read_contract
    from microbat.pipeline import pick_device
    from microbat.scheme import formats

    with errors("inspect"):
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


def verify(
    folder: Annotated[Path, typer.Argument(help="A microbat folder, or what `microbat export` wrote.")],
    engine: Annotated[str, typer.Option(help="microbat, transformers, vllm, llama.cpp; empty: the folder's own.")] = "",
) -> None:
    """Compare a folder's codes, bit for bit, and an engine's logits with the calibrated model; exit status 1 if they differ.

    Example: `microbat verify qwen-mxfp4-ct --engine transformers`
    """
    from microbat.verify import Altered, verify

    with errors("verify"):
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
    with errors("export"):
        layout = format or Layout(pick("target", target, TARGETS).layout)
        written = exporters[layout].export(folder, out, target=target)
    console.print(f"{written}: {layout.value} for {target}", soft_wrap=True)
