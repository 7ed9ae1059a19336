"""Triton kernels: the arithmetic of ``quantizers``, ``methods.gptq`` and ``runtime`` on a GPU, one pass over memory each.

Every kernel computes what a few lines of torch compute elsewhere in microbat; the docstring says which, and whether the
bits are the same. They take and return plain tensors, so that any room above may call them. Nothing else in microbat
imports this room at its own import: without Triton, everything but these functions works.
"""

try:
    import triton  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("microbat.kernels needs Triton: pip install triton", name="triton") from error
