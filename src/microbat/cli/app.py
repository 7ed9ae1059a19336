"""What all verbs share: the application, the console, options, and errors of the user's making in one line."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Turn a pretrained language model into a 4-bit checkpoint that keeps its accuracy, and prove what was lost.",
)
# A pipe or a file has no width of its own: tables are not cut there.
console = Console(width=None if sys.stdout.isatty() else 200)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda ...")]
Backend = Annotated[
    str, typer.Option(help="What multiplies by the packed bits: auto, native, triton, torch; `microbat inspect` says.")
]


@contextlib.contextmanager
def errors(command: str, *less: str, device: str = "cpu") -> Iterator[None]:
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


def with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")
