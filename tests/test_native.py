"""The native kernels give the bits of the torch code, on every format, rule, shape and odd value."""

import subprocess
import sys

import pytest
import torch

from microbat import native
from microbat.formats.packing import pack
from microbat.formats.scales import rules_for
from microbat.quantizers import base, kernel
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.runtime import reference
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
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_the_torch_code_s_but_for_the_order_of_sums(format, rule, clips, dtype):
    """Through autograd, several blocks a row of the kernel."""
    x = numbers(40, 96, odd=False).to(dtype)
    x = (x if format.block else x[:, :80]).reshape(-1, format.block_of(96) if format.block else 80)
    low, high = torch.rand(2, len(x), generator=generator(2)) / 2 + 0.5 if clips else (None, None)
    grad = torch.randn(x.shape, generator=generator(4)).to(dtype)
    quantizer = AbsMax(format=format, rule=rule)
    outer = quantizer._tensor_scale(x, low, high)
    scale = kernel.forward(x, low, high, outer, torch.empty(x.shape), format=format, rule=rule)
    wanted = kernel.backward(grad, x, low, high, scale, format=format, rule=rule)
    leaves = [t.clone().requires_grad_() for t in (x, low, high) if t is not None]
    shares = leaves[1:] or (None, None)
    y = kernel.fake_quantize(leaves[0], *shares, outer, torch.empty(x.shape, dtype=dtype), format=format, rule=rule)
    assert type(y.grad_fn).__name__ == "_NativeFakeQuantizeBackward"
    found = torch.autograd.grad(y, leaves, grad)
    noise = 1e-6 * x.shape[1] * grad.float().abs().amax(-1)  # of a sum of so many terms in float32
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    for ours, exact, unit in zip(
        found, wanted, (1.0, x.float().abs().amax(-1), x.float().abs().amax(-1)), strict=False
    ):
        bound = (noise * unit).view(-1, *[1] * (ours.dim() - 1))
        assert ((ours - exact).abs() <= bound + ulp * exact.abs()).all()
        assert exact.abs().amax() > 0


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


@pytest.mark.parametrize("most", native.LEVELS)
@pytest.mark.parametrize("format", [f for f in formats().values() if native.knows(f)], ids=lambda f: f.name)
@pytest.mark.parametrize(("rows", "width"), [(3, 16), (9, 33), (21, 291), (5, 4160)])
def test_products_on_every_path(format, rows, width, most):
    w, x = torch.randn(rows, width, generator=generator(6)), torch.randn(8, width, generator=generator(5))
    w = AbsMax(format=format).quantize(w)
    codes, scales = pack_parts(w)
    outer = 1.0 if w.tensor_scale is None else w.tensor_scale.item()
    exact, bound = reference.product(x, w), reference.bound(x, w)
    for tokens in range(1, 9):
        y = native.product(x[:tokens], codes, scales, outer, format=format, most=most)
        assert ((y - exact[:tokens]).abs() <= bound[:tokens]).all()


@pytest.mark.parametrize("most", native.LEVELS)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "int8"])
def test_products_know_every_code(name, most):
    """Each code alone, at each place of a row: a row's sum is the code's value, NaN and Inf too."""
    format = formats()[name]
    values = format.element.table
    for at in range(0, 64, 5):
        x = torch.zeros(2, 64)
        x[:, at] = torch.tensor([1.0, -3.0])
        codes = torch.zeros(len(values), 64, dtype=torch.uint8)
        codes[:, at] = torch.arange(len(values))
        if format.element.bits == 4:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        one = AbsMax(format=format).quantize(torch.full((1, 64), format.element.max))  # its scales are 1, or near it
        scales = pack_parts(one)[1].expand(len(values), -1).contiguous()
        outer = 1.0 if one.tensor_scale is None else one.tensor_scale.item()
        scale = (one.dequantize() / format.element.max)[0, at]
        y = native.product(x, codes, scales, outer, format=format, most=most)
        torch.testing.assert_close(y, x[:, at, None] * values * scale, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("most", native.LEVELS[1:])
@pytest.mark.parametrize(("name", "one"), [("mxfp4", 0x22), ("nvfp4", 0x22), ("int4", 0x11), ("mxfp8_e4m3", 0x38)])
def test_products_know_every_scale(name, one, most):
    """As without vectors: rows of ones, nine blocks whose scale is the row's; NaN and the smallest too."""
    format = formats()[name]
    count, dtype = {"nvfp4": (128, torch.uint8), "int4": (1 << 16, torch.uint16)}.get(name, (256, torch.uint8))
    width = format.block * 9
    scales = torch.arange(count).to(dtype)[:, None].expand(-1, 9).contiguous()
    codes = torch.full((count, width * format.element.bits // 8), one, dtype=torch.uint8)
    for group in (0, 5, 8):
        x = torch.zeros(1, width)
        x[0, group * format.block + 3] = 0.5
        ours, wanted = (
            native.product(x, codes, scales, 1.0, format=format, most=level) for level in (most, "portable")
        )
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)
        assert ours.isfinite().any()


@pytest.mark.parametrize("most", native.LEVELS[1:])
@pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 7, 64), (3, 42, 283), (8, 5, 4160)])
def test_products_of_bfloat16(tokens, rows, width, most):
    x, w = torch.randn(tokens, width, generator=generator(5)), torch.randn(rows, width, generator=generator(6))
    w = w.to(torch.bfloat16)
    if not native.has_bfloat16_product():
        pytest.skip("this processor has no instructions for it")
    y = native.bfloat16_product(x, w, most=most)
    assert ((y - x.double() @ w.double().T).abs() <= width * 2.0**-24 * (x.double().abs() @ w.double().abs().T)).all()


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("activation", ["int8", "int4_row"])
@pytest.mark.parametrize("name", ["int8", "int4_row"])
@pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 7, 64), (3, 42, 576), (39, 21, 291), (6, 5, 4160)])
def test_sums_of_integers_bit_for_bit(name, activation, tokens, rows, width, portable):
    """Extreme codes among them: 127 x 127 at every place is where int16 would saturate."""
    x, w = torch.randn(tokens, width, generator=generator(5)), torch.randn(rows, width, generator=generator(6))
    x[0], w[-1], w[0] = 3.0, -0.25, torch.linspace(-1, 1, width)
    x[-1] *= 0 if tokens > 1 else 1
    x, w = AbsMax(format=formats()[activation]).quantize(x), AbsMax(format=formats()[name]).quantize(w)
    y = integers(x, w, portable)
    assert torch.equal(y, reference.integer_product(x, w))
    assert ((y - reference.product(x, w)).abs() <= reference.bound(x, w)).all()  # of values that are rounded to float32


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "width"), [(1, 7, 64), (3, 42, 576), (39, 21, 291)])
def test_sums_of_integers_in_groups(tokens, rows, width, portable):
    x, w = torch.randn(tokens, width, generator=generator(5)), torch.randn(rows, width, generator=generator(6))
    x, w = AbsMax(format=formats()["int8"]).quantize(x), AbsMax(format=formats()["int4"]).quantize(w)
    error = (integers(x, w, portable) - reference.product(x, w)).abs()
    assert (error <= reference.bound(x, w) * (2 * width // 32 + 2) / width).all()  # only sums over groups are rounded


def integers(x, w, portable):
    (x_codes, x_scales), (codes, scales) = (pack_parts(q) for q in (x, w))
    assert native.multiplies(w.format, x.format, x.shape[-1])
    return native.integer_product(
        x_codes, x_scales, codes, scales,
        width=x.shape[-1], activations=x.format, format=w.format, portable=portable,
    )  # fmt: skip


def pack_parts(q):
    parts = pack(q)
    return parts.get("weight_packed", parts.get("weight")).view(torch.uint8), parts["weight_scale"]


def test_which_integers_are_multiplied():
    known = formats()
    assert native.multiplies(known["int8"], known["int8"], 4096)
    assert not native.multiplies(known["int8"], known["int8"], 1 << 17)  # a sum may not fit int32
    for weight, activation in (("int8", "int4"), ("mxint8", "int8"), ("int8", "mxint8"), ("hif8", "int8")):
        assert not native.multiplies(known[weight], known[activation], 64)
    mx = AbsMax(format=known["mxint8"]).quantize(torch.ones(2, 64))
    with pytest.raises(ValueError, match="mxint8 is not integers with one scale a row"):
        reference.integer_product(mx, mx)


def test_threads_change_nothing():
    """Slices of rows by a pool of threads; a forked process gets a pool of its own."""
    code = (
        "import os, torch\n"
        "from microbat import native\n"
        "from microbat.formats.integer import INT8_ROW\n"
        "from microbat.formats.microscaling import MXFP4\n"
        "x = torch.randn(3000, 512, generator=torch.Generator().manual_seed(0))\n"
        "def work(threads):\n"
        "    torch.set_num_threads(threads)\n"
        "    codes, scales = native.quantize(x, None, None, format=MXFP4, rule='even')\n"
        "    y = native.product(x[:3], codes, scales, 1.0, format=MXFP4)\n"
        "    whole = native.quantize(x, None, None, format=INT8_ROW, rule='absmax')\n"
        "    form = dict(width=512, activations=INT8_ROW, format=INT8_ROW)\n"
        "    z = native.integer_product(whole[0][:3], whole[1][:3], *whole, **form)\n"
        "    out = torch.empty_like(x)\n"
        "    native.dequantize(codes, scales, 1.0, out, format=MXFP4)\n"
        "    return [tensor.numpy().tobytes() for tensor in (codes, scales, y, z, out)]\n"  # torch's threads hang in a fork
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
