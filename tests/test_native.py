"""The native kernels give the bits of the torch code, on every format, rule, shape and odd value."""

import subprocess
import sys

import pytest
import torch

from microbat import native
from microbat.formats.packing import pack
from microbat.formats.scales import rules_for
from microbat.quantizers import base
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.scheme import formats
from microbat.transforms.hadamard import BlockHadamard
from microbat.transforms.kronecker import GPK, FullBlocks, NaiveKronecker

pytestmark = pytest.mark.skipif(native.shared_object() is None, reason="microbat was installed without a C++ compiler")
CASES = [(f, rule) for f in formats().values() for rule in rules_for(f) if native.knows(f, rule)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def numbers(rows, width, *, odd):
    """Rows of many magnitudes; ``odd``: with NaN and Inf too."""
    x = torch.randn(rows, width, generator=generator(0))
    x *= torch.exp2(torch.randint(-30, 30, (rows, 1), generator=generator(1)).float())
    x[3], x[7] = 0, 1e-42
    x[8] *= 1e-38
    if odd:
        x[5, 7], x[6, 8] = float("nan"), float("inf")
    return x


@pytest.mark.parametrize(("format", "rule"), CASES, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("width", [96, 80, 576])
def test_fake_quantization_bit_for_bit(format, rule, width, monkeypatch):
    x = numbers(37, width, odd=not format.has_tensor_scale)
    groups = -(-width // format.block_of(width))
    quantizer = AbsMax(format=format, rule=rule)
    shares = torch.rand(37, groups, 2, generator=generator(2)) / 2 + 0.5
    for quantize in (quantizer, *(Clip(quantizer, s) for s in (shares[0], shares, shares[0, :1], shares[:, :1]))):
        ours = quantize.fake(x), quantize.fake(x.to(torch.bfloat16))
        with monkeypatch.context() as patch:
            patch.setattr(base.native, "available", lambda *tensors: False)
            wanted = quantize.fake(x), quantize.fake(x.to(torch.bfloat16))
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("format", "rule"), CASES, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("width", [96, 80])
def test_pack_and_dequantize_bit_for_bit(format, rule, width):
    x = numbers(37, width, odd=False)
    quantizer = AbsMax(format=format, rule=rule)
    wanted = quantizer.quantize(x)
    codes, scales = native.quantize(x, None, wanted.tensor_scale, format=format, rule=rule)
    parts = pack(wanted)
    assert torch.equal(codes, parts.get("weight_packed", parts.get("weight")).view(torch.uint8))
    assert torch.equal(scales.view(torch.uint8), parts["weight_scale"].view(torch.uint8))
    outer = 1.0 if wanted.tensor_scale is None else wanted.tensor_scale.item()
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(37, width, dtype=dtype)
        native.dequantize(codes, scales, outer, out, format=format)
        assert torch.equal(out, wanted.dequantize().to(dtype))


@pytest.mark.parametrize(
    "transform",
    [
        *(GPK(width=192, block=g, g1=8, init="orthogonal", generator=generator(3)) for g in (16, 32, 64)),
        GPK(width=192, block=48, g1=6, init="orthogonal", generator=generator(3)),
        NaiveKronecker(width=192, block=32, g1=8, init="orthogonal", generator=generator(3)),
        *(FullBlocks(width=192, block=g, init="orthogonal", generator=generator(3)) for g in (16, 32, 64)),
        BlockHadamard(width=192, block=32),
    ],
    ids=lambda t: f"{t.name}-{t.block}",
)
def test_maps(transform):
    """A map of float32 numbers onto a grid so fine that it shows the map's own rounding."""
    format = formats()["mxint8"]
    x = torch.randn(21, 192, generator=generator(4))
    out = torch.empty_like(x)
    native.fake_quantize(x, None, None, out, format=format, rule="rceil", map=native.Map(*transform.factors()))
    wanted = AbsMax(format=format, rule="rceil").fake(transform(x).detach())
    step = wanted.abs().unflatten(-1, (-1, 32)).amax(-1) / 63
    different = (out - wanted).abs().unflatten(-1, (-1, 32))
    assert (different <= step[..., None]).all()
    assert (different > 0).float().mean() < 1e-3  # only next to a tie


def test_threads_change_nothing():
    """Slices of rows by a pool of threads; a forked process gets a pool of its own."""
    code = (
        "import os, torch\n"
        "from microbat import native\n"
        "from microbat.formats.microscaling import MXFP4\n"
        "x = torch.randn(3000, 512, generator=torch.Generator().manual_seed(0))\n"
        "def work(threads):\n"
        "    torch.set_num_threads(threads)\n"
        "    codes, scales = native.quantize(x, None, None, format=MXFP4, rule='even')\n"
        "    y = native.product(x[:3], codes, scales, 1.0, format=MXFP4)\n"
        "    out = torch.empty_like(x)\n"
        "    native.dequantize(codes, scales, 1.0, out, format=MXFP4)\n"
        "    return [tensor.numpy().tobytes() for tensor in (codes, scales, y, out)]\n"  # torch's threads hang in a fork
        "one = work(1)\n"
        "def same(): return all(work(3) == one for _ in range(20))\n"
        "assert same()\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if same() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_what_the_kernels_do_not_take():
    x = torch.randn(4, 64)
    assert not native.available(x.T)
    assert not native.available(x.double())
    assert not native.available(x[:0])
    assert not native.knows(formats()["mxfp4"], "mse")
    assert not native.knows(formats()["hif8"], "floor")
    assert not native.knows(formats()["hif4"])
    out = torch.empty(4, 64, dtype=torch.float16)
    quantizer = AbsMax(format=formats()["mxfp4"])
    assert torch.equal(quantizer.fake(x, out=out), quantizer.fake(x).to(torch.float16))
