"""microbat: pretrained models to 4-bit checkpoints (or 2- to 8-bit) that keep their accuracy, with proof of the loss.

folder = microbat.quantize("Qwen/Qwen3-0.6B", out="qwen-mxfp4")
model = microbat.load(folder)
numbers = microbat.evaluate({"mxfp4": folder})
page = microbat.write_report(folder, numbers)
table = microbat.compare("suites/small.yaml", out="comparison")
"""

import importlib
from typing import Any

_WHERE = {
    "QuantizedCache": "microbat.runtime.cache",
    "Recipe": "microbat.recipe",
    "compare": "microbat.comparison",
    "evaluate": "microbat.measure",
    "load": "microbat.pipeline",
    "quantize": "microbat.pipeline",
    "run": "microbat.pipeline",
    "write_report": "microbat.pipeline",
}
__all__ = ["QuantizedCache", "Recipe", "compare", "evaluate", "load", "quantize", "run", "write_report"]


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that importing microbat stays instant and has no effect.
    if name not in _WHERE:
        raise AttributeError(f"module 'microbat' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
