"""Names to things, by looking at what is there: a new file in a package is found because it is there."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def modules(package: str) -> list[ModuleType]:
    """Every module directly inside ``package``, imported, sorted by name."""
    path = importlib.import_module(package).__path__
    return [importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(path)]


def instances(package: str, kind: type[T]) -> dict[str, T]:
    """``name`` attribute -> value for every module-level value of ``kind`` in ``package``, sorted by name."""
    found = {v.name: v for m in modules(package) for v in vars(m).values() if isinstance(v, kind)}  # type: ignore[attr-defined]
    return dict(sorted(found.items()))


def subclasses(package: str, kind: type[T]) -> dict[str, type[T]]:
    """``name`` attribute -> class for every concrete subclass of ``kind`` that is defined in ``package``."""
    found = {}
    for module in modules(package):
        for value in vars(module).values():
            here = isinstance(value, type) and issubclass(value, kind) and value.__module__ == module.__name__
            if here and "name" in vars(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def unknown(what: str, name: str, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not there: what was asked, the nearest names, all names."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ValueError(f"unknown {what} {name!r}{hint} (known: {', '.join(allowed)})")


def pick(what: str, name: str, table: dict[str, T]) -> T:
    """``table[name]``, or a ValueError that suggests the nearest names."""
    if name not in table:
        raise unknown(what, name, table)
    return table[name]
