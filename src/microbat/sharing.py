"""Several processes share the items of one list of work, each item by one of them: a file lock says whose it is.

Nobody has to know of the others. A lock goes with the process that holds it, so that the work of one that died is taken up by
those that are left.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone(locks: Path, name: str) -> Iterator[None]:
    """The only process at ``name`` among those that have ``locks``, a folder, in common; waits for it."""
    with FileLock(_file(locks, name)):
        yield


def share(locks: Path, todo: Callable[[], list[str]], work: Callable[[list[str]], None], at_once: int = 1) -> None:
    """Call ``work`` on names that ``todo()`` lists, up to ``at_once`` of them, until the list is empty.

    Names that others hold are left to them; when nothing else is left, their end is waited for. ``todo`` has to drop what is
    done, and what failed.
    """
    while names := todo():
        with ExitStack() as held:
            mine: list[str] = []
            for name in names:
                if len(mine) < at_once and _taken(held, _file(locks, name)):
                    mine.append(name)
            left = todo()  # others may have done some since
            if own := [name for name in mine if name in left]:
                work(own)
        if not mine:
            with alone(locks, names[0]):
                pass


def _taken(held: ExitStack, file: Path) -> bool:
    try:
        held.enter_context(FileLock(file, blocking=False))
    except Timeout:
        return False
    return True


def _file(locks: Path, name: str) -> Path:
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{name}.lock"
