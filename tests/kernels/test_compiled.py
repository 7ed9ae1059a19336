"""Kernels compiled for GPUs that are not here: the instructions that they are made for are in their code, and what would
change bits is not. How fast they are is for a GPU to say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# What the code must hold, by kernel and target.
INSTRUCTIONS = {
    "folded_matmul.sm_90": r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3",
    "folded_matmul.sm_100": r"tcgen05\.mma\S*kind::f8f6f4",
    "folded_matmul.gfx950": r"v_mfma_f32_\S*f8f6f4",
    "matmul.sm_90": r"wgmma\.mma_async\S*\.f32\.bf16\.bf16",
    "matmul.sm_100": r"tcgen05\.mma\S*kind::f16",
    "matmul.gfx950": r"v_mfma_f32_\S*bf16",
    "transform.gfx950": r"v_mfma_f32_\S*x2_f32",
    "transform_bf16x3.sm_90": r"wgmma\.mma_async\S*\.f32\.bf16\.bf16",
    "transform_bf16x3.sm_100": r"tcgen05\.mma\S*kind::f16",
    "transform_bf16x3.gfx950": r"v_mfma_f32_\S*bf16",
    "scaled_mxfp4.sm_100": r"tcgen05\.mma\S*kind::mxf4\.block_scale",
    "scaled_w4a8.sm_100": r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale",
    "scaled_nvfp4.sm_100": r"tcgen05\.mma\S*kind::mxf4nvf4\.block_scale",
    "scaled_mxfp4.gfx950": r"v_mfma_scale_f32_\S*f8f6f4",
    "scaled_w4a8.gfx950": r"v_mfma_scale_f32_\S*f8f6f4",
    # packed codes move 16 bytes a thread
    **dict.fromkeys(("pack.sm_90", "pack.sm_100"), r"st\.global\.v4\.b32"),
    **dict.fromkeys(("unpack.sm_90", "unpack.sm_100", "matvec.sm_90", "matvec.sm_100"), r"ld\.global\.v4\.b32"),
    "pack.gfx950": r"global_store_dwordx4",
    "unpack.gfx950": r"global_load_dwordx4",
}
# Kernels whose bits are those of torch: no multiplication may be fused with an addition.
SAME_BITS = tuple(
    f"{name}.{target}"
    for name in ("fake_forward", "fake_backward", "pack", "fold", "gptq")
    for target in ("sm_90", "sm_100", "gfx950")
)
# Kernels that only have to compile: other formats, and what is optional.
OTHERS = (
    "fake_mse",
    "fake_row",
    "pack_mxfp6",
    "pack_int4",
    "pack_row",
    "transform",
    "transform_128",
    "transform_fake",
    "amax",
    "matvec_nvfp4",
    "matvec_row",
    "matmul_float32",
    "matmul_w4a8",
    "fallback",
    "gptq_row",
)
ALL = sorted({*INSTRUCTIONS, *SAME_BITS, "transform.sm_100", "matvec.gfx950", *(f"{name}.sm_90" for name in OTHERS)})


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """``assembly(name)``: the code of one of all kernels named here, compiled in one program without the interpreter."""
    folder = tmp_path_factory.mktemp("assembly")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    program = Path(__file__).with_name("compile_ahead.py")
    result = subprocess.run([sys.executable, program, folder, *ALL], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return lambda name: (folder / name).read_text()


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_instruction_is_there(assembly, name):
    assert re.search(INSTRUCTIONS[name], assembly(name))


@pytest.mark.parametrize("name", ALL)
def test_subnormals_are_numbers(assembly, name):
    """Decoding and E8M0's 2**-127 need them."""
    if name.endswith("gfx950"):
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3", assembly(name))
    else:
        assert ".ftz" not in assembly(name)


@pytest.mark.parametrize("name", SAME_BITS)
def test_nothing_is_fused_that_torch_rounds_twice(assembly, name):
    divisions_aside = re.sub(r".*div\..*", "", assembly(name))
    fused = re.findall(r"\bfma\.rn\.f32|v_fma_f32|v_fmac_f32|v_pk_fma_f32", divisions_aside)
    in_divisions = 5 * len(re.findall(r"v_div_fixup_f32", divisions_aside))  # AMD's exact division is made of them
    assert len(fused) == in_divisions


@pytest.mark.parametrize("name", ALL)
def test_nothing_spills(assembly, name):
    if name.endswith("gfx950"):
        assert re.search(r"\.vgpr_spill_count: +0", assembly(name))
    else:
        stack = int(re.search(r"STACK:(\d+)", assembly(name)).group(1))
        assert stack <= 16  # bytes a thread: the call of a division's rare path may keep a register or two
