"""What a GPU runs, in Triton's interpreter: products of packed layers, sites, fake quantization, GPTQ, a whole model."""

import pytest
import torch
from typer.testing import CliRunner

import microbat
from microbat.cli import app
from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP6_E2M3, MXFP8_E4M3, NVFP4
from microbat.linear import SiteInput
from microbat.methods.base import Statistics
from microbat.methods.gptq import GPTQ
from microbat.quantizers import kernel
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.quantizers.residual import Residual
from microbat.runtime import gpu, reference
from microbat.runtime.load import load_dequantized
from microbat.runtime.packed import PackedLinear
from microbat.transforms.hadamard import BlockHadamard
from microbat.transforms.kronecker import Kronecker
from microbat.transforms.permutation import Permutation

N, K = 42, 96


def outliers(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(torch.randn(shape[-1], generator=g))


def values(packed):
    from microbat.kernels.quantize import dequantize

    form = {"format": packed.format, "width": K, "outer": packed.tensor_scale}
    return dequantize(packed.codes, packed.scales, **form)


@pytest.mark.parametrize(
    ("format", "activation", "tokens", "cores", "kind"),
    [(MXFP4, None, 3, "", "matvec"),
     (NVFP4, MXFP8_E4M3, 3, "scaled", "matvec"),
     (INT8_ROW, INT8_ROW, 16, "", "matvec"),
     (MXFP4, None, 20, "scaled", "matmul"),
     (NVFP4, NVFP4, 20, "fp8", "matmul"),
     (INT4_GROUP, INT8_ROW, 20, "", "matmul"),
     (MXFP4, MXFP8_E4M3, 20, "scaled", "scaled_matmul"),
     (MXFP4, MXFP4, 20, "fp8", "matmul"),
     (MXFP4, MXFP4, 130, "fp8", "folded_matmul")],
)  # fmt: skip
def test_each_product_is_the_exact_one_but_for_the_sums(
    on_triton, monkeypatch, format, activation, tokens, cores, kind
):
    from microbat.kernels import folding, matmul, matvec

    ran = []
    for module in (matvec, matmul, folding):
        for name in ("matvec", "matmul", "scaled_matmul", "folded_matmul"):
            if function := getattr(module, name, None):
                watch = lambda *a, name=name, function=function, **k: ran.append(name) or function(*a, **k)  # noqa: E731
                monkeypatch.setattr(module, name, watch)
    monkeypatch.setattr(gpu, "tensor_cores", lambda device: cores)
    quantizer = AbsMax(format=activation) if activation else None
    weight = AbsMax(format=format).quantize(outliers(N, K, seed=1))
    linear = PackedLinear(SiteInput(None, quantizer), weight, torch.ones(N), dtype=torch.float32)
    x = outliers(1, tokens, K)
    seen = quantizer.quantize(x) if quantizer else x
    y = linear(x)
    assert ran == [kind]
    assert linear.backend == "triton"
    assert y.shape == (1, tokens, N)
    assert ((y - 1 - reference.product(seen, weight)).abs() <= reference.bound(seen, weight) + 2e-6 * y.abs()).all()


@pytest.mark.parametrize(("tokens", "cores"), [(3, ""), (20, "fp8")])
def test_residual_channels_are_an_ordinary_product(on_triton, monkeypatch, tokens, cores):
    """Codes and scales of K + S channels, made once for all layers that share them."""
    monkeypatch.setattr(gpu, "tensor_cores", lambda device: cores)
    quantizer = Residual(inner=AbsMax(format=NVFP4), channels=32)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(4))
    site = SiteInput(Permutation(width=K, order=order), quantizer, num_consumers=2)
    x, weight = outliers(2, tokens, K), AbsMax(format=NVFP4).quantize(outliers(N, K, seed=1))
    layers = [PackedLinear(site, quantizer.facing(weight), None, dtype=torch.float32) for _ in range(2)]
    seen, wide = quantizer.quantize(x[..., order]), quantizer.facing(weight)
    for layer in layers:
        assert layer.backend == "triton"
        assert ((layer(x) - reference.product(seen, wide)).abs() <= reference.bound(seen, wide)).all()


def test_which_product_for_which_hardware(monkeypatch):
    pytest.importorskip("triton")
    for cores, expected in {
        "": ["decoded"] * 4,
        "fp8": ["folded", "decoded", "decoded", "folded"],
        "scaled": ["scaled", "scaled", "scaled", "decoded"],
    }.items():
        monkeypatch.setattr(gpu, "tensor_cores", lambda device, cores=cores: cores)
        pairs = [(MXFP4, MXFP4), (MXFP4, MXFP8_E4M3), (NVFP4, NVFP4), (MXFP6_E2M3, MXFP4)]
        assert [gpu.many(*pair, torch.device("cuda")) for pair in pairs] == expected
        assert gpu.many(MXFP4, None, torch.device("cuda")) == "decoded"


@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("clips", [False, True])
def test_a_site_in_one_pass(on_triton, format, clips):
    """Hadamard blocks of 16 are quarters of integers: sums are exact in any order."""
    transform, inner = BlockHadamard(width=K, block=16), AbsMax(format=format)
    ratios = torch.rand(K // format.block, 2, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5
    quantizer = Clip(inner, ratios) if clips else inner
    site = SiteInput(transform, quantizer, num_consumers=2)
    x = torch.randint(-40, 41, (2, 5, K), generator=torch.Generator().manual_seed(2)).to(torch.float32)
    expected = quantizer.quantize(transform(x)).dequantize()
    assert torch.equal(site(x), expected)
    packed = site.packed(x)
    assert site.packed(x) is packed
    assert packed.codes.shape == (2, 5, K // 2)
    assert torch.equal(values(packed), expected)


def test_what_the_kernel_does_not_transform_is_transformed_before(on_triton):
    generator = torch.Generator().manual_seed(1)
    transform = Kronecker(width=K, left=8, init="orthogonal", generator=generator)
    site = SiteInput(transform, Clip(AbsMax(format=MXFP4), torch.full((1, 2), 0.8), whole=True))
    x = outliers(7, K)
    with torch.no_grad():
        assert torch.equal(values(site.packed(x)), site(x))
    assert SiteInput(transform, None).packed(x) is None


def test_fake_quantization_and_its_gradient(on_triton):
    x, ratios = outliers(6, K).requires_grad_(), torch.full((6, K // 32, 2), 0.7, requires_grad=True)
    quantizer = AbsMax(format=MXFP4)
    y = quantizer.fake(x, ratios[..., 0], ratios[..., 1])
    grad = outliers(6, K, seed=3)
    y.backward(grad)
    blocks, low, high = x.detach().view(-1, 32), *(r.reshape(-1) for r in ratios.detach().unbind(-1))
    out = torch.empty_like(blocks)
    form = {"format": MXFP4, "rule": "even"}
    scale = kernel.forward(blocks, low, high, None, out, **form)
    expected = kernel.backward(grad.view(-1, 32), blocks, low, high, scale, **form)
    assert torch.equal(y.detach(), out.view(6, K))
    got = (x.grad.view(-1, 32), *(r.reshape(-1) for r in ratios.grad.unbind(-1)))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", [NVFP4, INT8_ROW], ids=lambda f: f.name)
def test_gptq_rounds_a_block_of_columns_at_a_time(on_triton, monkeypatch, format):
    from microbat import kernels

    inputs = outliers(400, K) @ torch.randn(K, K, generator=torch.Generator().manual_seed(5))
    hessian, weight, quantizer = inputs.T @ inputs, outliers(13, K, seed=4), AbsMax(format=format)
    loss = lambda q: (((q.dequantize() - weight) @ hessian) * (q.dequantize() - weight)).sum().item()  # noqa: E731
    solve = lambda: GPTQ().solve(weight, quantizer, Statistics(hessian=hessian)).weight  # noqa: E731
    fused = solve()
    monkeypatch.setattr(kernels, "DEVICE", "cuda")
    assert loss(fused) == pytest.approx(loss(solve()), rel=0.01)
    assert loss(fused) < 0.8 * loss(quantizer.quantize(weight))


@pytest.fixture(scope="module")
def folder(tiny, text_file, tmp_path_factory):
    """With Hadamard blocks online; calibrated without the interpreter."""
    options = {"calibration": str(text_file), "num_calibration_samples": 4, "max_seq_length": 16}
    out = tmp_path_factory.mktemp("brq") / "q"
    return microbat.quantize(tiny("qwen3"), out=out, method="brq", precision="float32", **options)


def test_a_whole_model(folder, on_triton):
    model, tokens = microbat.load(folder), torch.arange(3, 23)[None]
    with torch.no_grad():
        expected, got = load_dequantized(folder)(tokens).logits, model(tokens).logits
        few = model(tokens[:, :4]).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(few, expected[:, :4], rtol=1e-3, atol=1e-3)
    assert {m.backend for m in model.modules() if isinstance(m, PackedLinear)} == {"triton"}
    output = CliRunner().invoke(app, ["inspect", str(folder)]).output
    assert "triton, decoded" in output
