"""Triton kernels: the arithmetic of ``quantizers``, ``methods.gptq`` and ``runtime`` on a GPU, one pass over memory each.

Every kernel computes what a few lines of torch compute elsewhere in microbat; the docstring says which, and whether the
bits are the same. They take and return plain tensors, so that any room above may call them, and are launched on the
tensors' own device (Triton left alone takes the current one). Callers ask
:func:`runs_on` and import a kernel's file where they call it: without Triton, everything but these functions works.
"""

import functools
import importlib.util

from microbat.formats.block import BlockFormat

DEVICE = (
    "cuda"  # the type of device that Triton compiles for (ROCm's GPUs have it too); tests say "cpu": its interpreter
)
RULES = ("floor", "even", "rceil", "ceil", "mse", "absmax", "full_range")
LARGEST_MAP = 128  # lanes of a transform's block


def runs_on(device: str) -> bool:
    """Whether these kernels run on a device of this type: on a GPU, where Triton is installed."""
    return device == DEVICE and _installed()


def knows(format: BlockFormat, rule: str = "") -> bool:
    """Whether the kernels compute this format, and scales by this rule."""
    return format.is_plain and (not rule or rule in RULES)


def has_map(block: int) -> bool:
    """Whether ``kernels.quantize`` knows transforms with blocks of this size."""
    return 16 <= block <= LARGEST_MAP and not block & (block - 1)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
