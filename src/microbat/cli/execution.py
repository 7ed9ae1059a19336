"""``microbat generate`` and ``microbat bench``: a folder at work."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from microbat.cli.app import Backend, Device, console, errors


class Dtype(StrEnum):
    """What ``microbat generate`` computes in, beside the products of low-bit codes."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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

    with errors("generate", "a shorter --prompt", "fewer --max-new-tokens", device=device):
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

    with errors("bench", "fewer --prompt and --tokens", device=device):
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
