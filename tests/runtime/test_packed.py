"""Packed layers against the oracle: every format, every backend, few tokens and many."""

import importlib.util

import pytest
import torch
from torch import nn

from microbat import kernels, native
from microbat.linear import SiteInput
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.runtime import packed, reference
from microbat.runtime.packed import Head, PackedLinear
from microbat.scheme import formats
from microbat.transforms.hadamard import BlockHadamard, Hadamard

N, K = 42, 288  # no multiple of a kernel's chunk
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(native.shared_object() is None, reason="no compiler")),
]


def layer(format, backend, *, dtype=torch.float32, activation=None, bias=False):
    weight = AbsMax(format=format).quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(1)))
    site = SiteInput(None, activation)
    b = torch.linspace(-1, 1, N) if bias else None
    return weight, PackedLinear(site, weight, b, dtype=dtype, backend=backend)


def inputs(tokens):
    return torch.randn(2, tokens, K, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("activation", [None, "mxfp8_e4m3", "mxfp4", "nvfp4", "int8", "hif4", "hif8"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(formats()))
def test_product_is_the_exact_one_but_for_the_sums(name, backend, activation, tokens):
    if not packed.BACKENDS[backend].fits(formats()[name], "cpu"):
        pytest.skip(f"{backend} does not run {name}")
    quantizer = AbsMax(format=formats()[activation]) if activation else None
    weight, linear = layer(formats()[name], backend, activation=quantizer)
    x = inputs(tokens)
    seen = quantizer.quantize(x) if quantizer else x
    error = (linear(x) - reference.product(seen, weight)).abs()
    assert (error <= reference.bound(seen, weight)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_kept_and_biases_added(backend):
    weight, linear = layer(formats()["nvfp4"], backend, bias=True)
    assert torch.equal(linear.dequantize(), weight.dequantize())
    assert linear.nbytes == N * K // 2 + N * K // 16
    assert torch.equal(linear.to(torch.bfloat16).dequantize(), weight.dequantize())  # scales stay as they are
    linear = linear.to(torch.float32)
    assert f"backend={backend}" in repr(linear)
    without = PackedLinear(linear.site, weight, None, dtype=torch.float32, backend=backend)
    torch.testing.assert_close(linear(inputs(3)), without(inputs(3)) + linear.bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [2, 40])
def test_bfloat16_rounds_the_output_once(backend, tokens, bias):
    weight, linear = layer(formats()["mxfp4"], backend, dtype=torch.bfloat16, bias=bias)
    linear = linear.to(torch.bfloat16)  # codes and scales stay
    x = inputs(tokens).to(torch.bfloat16)
    y = linear(x)
    assert y.dtype == torch.bfloat16
    exact = reference.product(x, weight) + (linear.bias.double() if bias else 0)
    assert ((y - exact).abs() <= 2.0**-8 * exact.abs() + reference.bound(x, weight)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_layers_run_tile_by_tile(backend, monkeypatch):
    monkeypatch.setattr(packed, "TILE_BYTES", 5 * K * 4)  # 42 rows: eight tiles of five, one of two
    weight, linear = layer(formats()["mxfp8_e4m3"], backend)
    x = inputs(40)
    assert ((linear(x) - reference.product(x, weight)).abs() <= reference.bound(x, weight)).all()


def test_a_compiled_decoder_gives_the_same_bits():
    format = formats()["mxfp4"]
    weight = AbsMax(format=format).quantize(torch.randn(600, K))
    linear = PackedLinear(SiteInput(), weight, None, dtype=torch.float32, backend="torch")
    tile = torch.empty(600, K)
    packed._decode(linear, 0, tile)
    assert torch.equal(tile, weight.dequantize())


@pytest.mark.skipif(native.shared_object() is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4_row"])
def test_integers_are_added_as_integers(name, dtype):
    """Through a map, a clip and a bias too; a layer that shares its site with another reads the same codes."""
    format, per_token = formats()[name], formats()["int8"]
    weight = AbsMax(format=format).quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(1)))
    bias, x = torch.linspace(-1, 1, N), inputs(3).to(dtype)
    clip = Clip(AbsMax(format=per_token, rule="full_range"), torch.tensor([[0.9, 0.8]]))
    whole = Clip(clip.inner, clip.ratios, whole=True)
    for map, quantizer in (
        (None, clip.inner),
        (BlockHadamard(width=K, block=32), clip),
        (Hadamard(width=K), clip),
        (Hadamard(width=K), whole),
    ):
        site = SiteInput(map, quantizer, num_consumers=2)
        linears = [PackedLinear(site, weight, bias, dtype=dtype, backend="native") for _ in range(2)]
        assert all(linear.adds_integers for linear in linears)
        seen = quantizer.quantize(x.float() if map is None else map(x.float()))
        exact = reference.integer_product(seen, weight) + bias
        y = linears[0](x)
        assert y.dtype == dtype
        assert torch.equal(y, linears[1](x))
        if map is None:
            assert torch.equal(y, exact.to(dtype))
        else:  # a map sums in an order of its own, and a value next to a tie may fall on its other side
            step = (seen.scales * weight.dequantize().abs().amax(-1)).expand_as(exact)
            assert ((y.float() - exact).abs() > 2.0**-8 * exact.abs() + 3 * step).float().mean() == 0
    layer = PackedLinear(SiteInput(), weight, None, dtype=dtype)
    assert not layer.adds_integers  # activations stay in floats
    assert packed.described(format, per_token, torch.device("cpu")) == "native, sums of int32"
    assert packed.described(format, None, torch.device("cpu")) == "native"


def test_a_token_of_zeros_gives_the_bias():
    weight, linear = layer(formats()["int8"], "auto", activation=AbsMax(format=formats()["int8"]), bias=True)
    assert torch.equal(linear(torch.zeros(1, 2, K)), linear.bias.expand(1, 2, -1))


def test_backends_by_name():
    with pytest.raises(ValueError, match="unknown backend 'nativ'; did you mean 'native'"):
        layer(formats()["mxfp4"], "nativ")
    with pytest.raises(ValueError, match="backend 'native' does not run mxfp4 on 'cuda'"):
        packed.check("native", formats()["mxfp4"], "cuda")
    installed = importlib.util.find_spec("triton") is not None
    assert packed.best(formats()["mxfp4"], "cuda") == ("triton" if installed else "torch")
    with pytest.raises(ValueError, match="backend 'triton' does not run mxfp4 on 'cpu' here"):
        layer(formats()["mxfp4"], "triton")


@pytest.mark.parametrize("name", ["hif8", "hif4", "hif4_amct", "hif4_ascend"])
def test_hifloat_runs_from_its_bits_by_torch_alone(name, monkeypatch):
    format = formats()[name]
    for backend in ("native", "triton"):
        with pytest.raises(ValueError, match=f"backend '{backend}' does not run {name} on 'cpu' here"):
            layer(format, backend)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")  # as if there were a GPU with Triton
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    assert not packed.BACKENDS["triton"].fits(format, "cpu")
    assert packed.best(format, "cpu") == "torch"
    assert SiteInput(None, AbsMax(format=format)).packed(inputs(3)) is None  # what Triton does not know stays in floats
    weight, linear = layer(format, "auto")
    assert torch.equal(linear.dequantize(), weight.dequantize())
    assert linear.nbytes == weight.nbytes or format.block  # K has a tail here, that 64 does not divide
    assert torch.equal(linear.to(torch.bfloat16).dequantize(), weight.dequantize())


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_computes_what_it_did(dtype, tokens):
    linear = nn.Linear(K - 5, N, bias=False).to(dtype).requires_grad_(False)
    x = torch.randn(1, tokens, K - 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = Head(linear)(x)
    exact, size = (f(x.double()) @ f(linear.weight.double()).T for f in (torch.clone, torch.abs))
    assert y.dtype == dtype
    assert ((y - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + K * 2.0**-24 * size).all()
