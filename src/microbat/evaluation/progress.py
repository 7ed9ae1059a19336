"""A bar on stderr that shows how far a long evaluation is, and the time left."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def bar(title: str, total: int, shown: bool) -> AbstractContextManager[Callable[[str], None]]:
    """A function that moves the bar on by one step and sets the remark beside it."""
    return _rich_bar(title, total) if shown else nullcontext(lambda remark: None)


@contextmanager
def _rich_bar(title: str, total: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[remark]}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=total, remark="")
        yield lambda remark: shown.update(task, advance=1, remark=remark)
