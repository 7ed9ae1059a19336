"""Compile kernels for a GPU that is not here: ``python compile_ahead.py FOLDER KERNEL.TARGET...`` writes their assembly, and
for NVIDIA after it what the assembler says of registers and stack.

A program of its own, because Triton decides at its import whether kernels are interpreted or compiled.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from microbat.formats.element import E4M3
from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP6_E3M2, MXFP8_E4M3, NVFP4
from microbat.kernels import fake_quantize, folding, gptq, matmul, matvec, quantize
from microbat.kernels.element import EXACT

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

FAKE = {
    "x_ptr": "*bf16",
    "low_ptr": "*fp32",
    "high_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "B": 32,
    "R": 128,
    "L": 32,
    "F": MXFP4,
}
PACK = {
    "x_ptr": "*bf16", "low_ptr": "*fp32", "high_ptr": "*fp32", "code_ptr": "*u8", "scale_ptr": "*u8", "W": 32, "B": 32,
    "M": 64, "F": MXFP4, "RULE": "even", "PRECISION": "ieee",
}  # fmt: skip
FAKE_TRANSFORMED = PACK | {"matrix_ptr": "*fp32", "y_ptr": "*fp32", "code_ptr": None, "scale_ptr": None}
TILE = {**matmul.TILE, "STRIPE": matmul.STRIPE, "y_ptr": "*bf16"}
WEIGHT = {"code_ptr": "*u8", "scale_ptr": "*u8"}
SCALED = {
    "x_ptr": "*u8",
    "x_scale_ptr": "*u8",
    **WEIGHT,
    **TILE,
    "BK": 128,
    "F": MXFP4,
    "FX": MXFP4,
    "X": "e2m1",
    "W": "e2m1",
}

# name: the kernel, its pointers' types and its constants; what is not named is an int32, and None for a pointer.
CASES = {
    "fake_forward": (fake_quantize.forward_kernel, FAKE | {"y_ptr": "*bf16", "RULE": "even"}),
    "fake_backward": (
        fake_quantize.backward_kernel,
        FAKE | {"grad_ptr": "*bf16", "grad_x_ptr": "*bf16", "grad_low_ptr": "*fp32", "grad_high_ptr": "*fp32"},
    ),
    "pack": (quantize.quantize_kernel, PACK | {"W": 128, "low_ptr": None, "high_ptr": None}),
    "pack_nvfp4": (quantize.quantize_kernel, PACK | {"W": 128, "F": NVFP4, "B": 16, "RULE": "absmax", "outer_ptr": "*fp32"}),
    "transform": (quantize.quantize_kernel, PACK | {"matrix_ptr": "*fp32"}),
    "transform_128": (quantize.quantize_kernel, PACK | {"matrix_ptr": "*fp32", "W": 128, "M": 16}),
    "transform_fake": (quantize.quantize_kernel, FAKE_TRANSFORMED),
    "transform_bf16x3": (quantize.quantize_kernel, PACK | {"matrix_ptr": "*fp32", "W": 64, "M": 64, "PRECISION": "bf16x3"}),
    "unpack": (
        quantize.dequantize_kernel, WEIGHT | {"y_ptr": "*bf16", "M": 64, "W": 128, "B": 32, "F": MXFP4}
    ),
    "matvec": (
        matvec.matvec_kernel,
        WEIGHT | {"x_ptr": "*bf16", "y_ptr": "*bf16", "TOKENS": 1, "R": 8, "W": 512, "B": 32, "F": MXFP4},
    ),
    "matmul": (matmul.matmul_kernel, WEIGHT | TILE | {"x_ptr": "*bf16", "FX": None, "F": MXFP4, "OPERAND": tl.bfloat16}),
    "fold": (
        folding.fold_kernel,
        WEIGHT | {"value_ptr": "*u8", "exponent_ptr": "*i32", "exact_ptr": "*i32", "R": 4, "W": 1024, "F": MXFP4,
                  "E4M3": E4M3, "HEADROOM": 6},
    ),
    "folded_matmul": (
        folding.folded_matmul_kernel,
        TILE | {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "BK": 128}
        | dict.fromkeys(("x_exponent_ptr", "x_exact_ptr", "exponent_ptr", "exact_ptr"), "*i32"),
    ),
    "scaled_mxfp4": (matmul.scaled_matmul_kernel, SCALED),
    "scaled_w4a8": (matmul.scaled_matmul_kernel, SCALED | {"FX": MXFP8_E4M3, "X": "e4m3"}),
    "scaled_nvfp4": (matmul.scaled_matmul_kernel, SCALED | {"FX": NVFP4, "F": NVFP4}),
    "gptq": (
        gptq.gptq_kernel,
        {"work_ptr": "*fp32", "factor_ptr": "*fp32", "code_ptr": "*u8", "scale_ptr": "*fp32", "error_ptr": "*fp32",
         "C": 128, "B": 32, "R": 16, "F": MXFP4, "RULE": "even"},
    ),
}  # fmt: skip
# The same kernels for other formats, and with what is optional.
CASES |= {
    "fake_mse": (fake_quantize.forward_kernel, FAKE | {"y_ptr": "*fp32", "RULE": "mse"}),
    "fake_row": (
        fake_quantize.forward_kernel,
        FAKE | {"y_ptr": "*fp32", "F": INT8_ROW, "RULE": "absmax", "B": 3000, "L": 4096, "R": 1},
    ),
    "pack_mxfp6": (quantize.quantize_kernel, PACK | {"W": 128, "F": MXFP6_E3M2, "RULE": "mse"}),
    "pack_int4": (quantize.quantize_kernel, PACK | {"W": 128, "F": INT4_GROUP, "RULE": "absmax", "scale_ptr": "*bf16"}),
    "pack_row": (
        quantize.quantize_kernel,
        PACK | {"W": 4096, "B": 4096, "M": 2, "F": INT8_ROW, "RULE": "absmax", "scale_ptr": "*fp32"},
    ),
    "amax": (
        quantize.amax_kernel,
        {"x_ptr": "*bf16", "matrix_ptr": "*fp32", "low_ptr": "*fp32", "high_ptr": "*fp32", "amax_ptr": "*i32", "M": 64,
         "W": 32, "B": 16, "PRECISION": "ieee"},
    ),
    "matvec_nvfp4": (matvec.matvec_kernel, CASES["matvec"][1] | {"F": NVFP4, "B": 16, "outer_ptr": "*fp32", "TOKENS": 8, "R": 1}),
    "matvec_row": (matvec.matvec_kernel, CASES["matvec"][1] | {"F": INT8_ROW, "scale_ptr": "*fp32"}),
    "matmul_float32": (
        matmul.matmul_kernel,
        WEIGHT | TILE | matmul.FLOAT32_TILE | {"x_ptr": "*fp32", "FX": None, "F": MXFP4, "OPERAND": tl.float32},
    ),
    "matmul_w4a8": (
        matmul.matmul_kernel,
        SCALED | {"BK": 64, "FX": MXFP8_E4M3, "F": INT4_GROUP, "scale_ptr": "*bf16", "OPERAND": tl.bfloat16},
    ),
    "fallback": (
        matmul.matmul_kernel,
        SCALED | {"BK": 64, "OPERAND": tl.bfloat16, "x_done_ptr": "*i32", "done_ptr": "*i32"},
    ),
    "gptq_row": (
        gptq.gptq_kernel,
        CASES["gptq"][1] | {"F": INT8_ROW, "RULE": "absmax", "B": 128, "row_scale_ptr": "*fp32", "scale_ptr": "*fp32"},
    ),
}  # fmt: skip


def compile_case(name: str, target: str) -> str:
    kernel, given = CASES[name]
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        value = given.get(argument, None if argument.endswith("_ptr") else "i32")
        if isinstance(value, str) and (value.startswith("*") or value == "i32"):
            signature[argument] = value
            if value.startswith("*") or argument in ("K", "N", "code_row", "x_row"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument], constants[(index,)] = "constexpr", value
    options = {**EXACT, "num_warps": given.get("num_warps", 4)}
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=TARGETS[target], options=options
    ).asm
    if "cubin" not in made:
        return made["amdgcn"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return made["ptx"] + subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(folder: str, *wanted: str) -> None:
    for name in wanted:
        Path(folder, name).write_text(compile_case(*name.split(".")))


if __name__ == "__main__":
    main(*sys.argv[1:])
