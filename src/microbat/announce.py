"""Makes transformers know microbat folders without loading it: transformers has no entry points for quantizers.

``import microbat`` leaves a note with Python's import system. When transformers loads its registry of quantizers, today or
never, :mod:`microbat.runtime.transformers` is imported right after it and registers. Nothing else about transformers
changes, and importing microbat stays instant.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

REGISTRY = "transformers.quantizers.auto"
OURS = "microbat.runtime.transformers"


class _Note(MetaPathFinder):
    """Finds the registry as everyone else does, once, and has our module imported after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                importlib.import_module(OURS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def announce() -> None:
    """Register microbat's quantizer now if transformers has its registry, else when it gets it."""
    if REGISTRY in sys.modules:
        importlib.import_module(OURS)
    else:
        sys.meta_path.insert(0, _Note())
