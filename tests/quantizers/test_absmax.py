"""Block quantization: golden cases of the OCP specification and its simulators, laws, the fused kernel, gradients."""

import functools
import pickle

import pytest
import torch

from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.hifloat import HIF4, HIF8
from microbat.formats.integer import INT4_GROUP, INT4_ROW, INT8_ROW
from microbat.formats.microscaling import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
)
from microbat.formats.packing import pack, unpack
from microbat.formats.scales import rules_for
from microbat.quantizers import kernel
from microbat.quantizers.base import AbsMax, Scales
from microbat.quantizers.residual import Residual, effective
from microbat.scheme import formats

MX = [MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8]
ALL = list(formats().values())
WITH_RULES = [(f, r) for f in ALL for r in rules_for(f)]


def name(value) -> str:
    return value.name if isinstance(value, BlockFormat) else str(value)


def fake(format, values, rule="floor", width=32):
    x = torch.zeros(width)
    x[: len(values)] = torch.tensor(values)
    return AbsMax(format=format, rule=rule).fake(x)[: len(values)].tolist()


def spread(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(1.5 * torch.randn(*shape, generator=g))


def test_g1_mxfp4_ties_to_even():
    x = [4, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -5]
    assert fake(MXFP4, x) == [4, 0, 1, 1, 2, 2, 4, 4, -0.0, -1, -1, -4]


@pytest.mark.parametrize(("a", "expected"), [(5, 4), (5.01, 6), (6, 6), (6.9, 6), (7, 6), (7.99, 6), (8, 8)])
def test_g2_mxfp4_saturates_under_floor(a, expected):
    assert fake(MXFP4, [a, 1, 0.26]) == [expected, 1, 0.5 if a < 8 else 0]


@pytest.mark.parametrize(
    ("format", "amax", "expected"),
    [(MXFP4, a, s) for a, s in [
        (4, (1, 1, 1, 1)), (4.5, (1, 1, 1, 2)), (6, (1, 1, 1, 2)), (6.001, (1, 1, 2, 2)),
        (7, (1, 2, 2, 2)), (7.25, (1, 2, 2, 2)), (7.3, (1, 2, 2, 2)), (8, (2, 2, 2, 2))]]
    + [(MXFP8_E4M3, a, s) for a, s in [
        (256, (1, 1, 1, 1)), (448, (1, 1, 1, 2)), (449, (1, 1, 2, 2)), (495, (1, 1, 2, 2)),
        (496, (1, 2, 2, 2)), (512, (2, 2, 2, 2))]],
)  # fmt: skip
def test_g3_g4_scale_of_every_rule(format, amax, expected):
    x = torch.zeros(32)
    x[3] = -amax
    rules = ("floor", "even", "rceil", "ceil")
    got = tuple(AbsMax(format=format, rule=rule).scales(x).block.item() for rule in rules)
    assert got == expected


@pytest.mark.parametrize(("format", "bits"), [(INT8_ROW, 8), (INT4_ROW, 4)])
def test_full_range_is_the_formula_of_openpangu(format, bits):
    """s = 2 max|X| / (2^n - 1), clamp(round(X / s)); but -2^(n-1), as far from -max|X| as its neighbour, stays unused."""
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)).double()
    scale = 2 * x.abs().amax(-1, keepdim=True) / (2**bits - 1)
    codes = torch.clamp(torch.round(x / scale), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    q = AbsMax(format=format, rule="full_range").quantize(x.float())
    torch.testing.assert_close(q.scales.double(), scale, rtol=1e-7, atol=0)
    assert ((format.element.decode(q.codes) - codes).abs() > 0).sum() <= 1  # next to a tie
    plain = AbsMax(format=format).quantize(x.float())
    errors = [(t.dequantize() - x).square().sum() for t in (q, plain)]
    assert errors[0] < errors[1] or bits == 8  # where a step is a 255th wider, chance decides


def test_g5_to_g7_other_elements():
    e4m3 = [448, 460, 464, 480, 511, 300, 1, 0.001, 2**-10]
    assert fake(MXFP8_E4M3, e4m3) == [448] * 5 + [288, 1, 2**-9, 0]
    assert fake(MXFP8_E4M3, [1.75, 1.9, 1, 0.3]) == [1.75, 1.75, 1, 0.3125]
    assert fake(MXFP8_E5M2, [1.75, 1.9, 1, 0.3]) == [1.75, 1.75, 1, 0.3125]
    assert fake(MXFP6_E2M3, [7.5, 7.7, 7.9, 0.06, 0.07, 1.0625, 1.1875]) == [7.5, 7.5, 7.5, 0, 0.125, 1, 1.25]
    assert fake(MXFP6_E3M2, [28, 30, 31, 0.03, 0.04, 1.125, 1.375]) == [28, 28, 28, 0, 0.0625, 1, 1.5]
    mxint8 = [1.99, 1.984375, 1, 1 / 128, 3 / 256, -1.999, -0.5]
    assert fake(MXINT8, mxint8) == [127 / 64, 127 / 64, 1, 0, 1 / 64, -127 / 64, -0.5]


def test_g8_edges():
    assert fake(MXFP4, [0.0]) == [0]
    assert fake(MXFP4, [2.0**-126, 2.0**-127]) == [2.0**-126, 2.0**-127]
    assert fake(MXFP4, [2.0**-130, 2.0**-131]) == [0, 0]
    assert fake(MXFP4, [3e38, 1e38, 1]) == [6 * 2.0**125, 2 * 2.0**125, 0]
    zero = AbsMax(format=MXFP4, rule="floor").quantize(torch.zeros(32))
    assert pack(zero)["weight_scale"].item() == 0
    for bad in (float("inf"), -float("inf"), float("nan")):
        x = torch.ones(2, 32)
        x[0, 5] = bad
        for quantizer in (AbsMax(format=MXFP4, rule=r) for r in ("floor", "even", "mse")):
            y = quantizer.fake(x)
            assert y[0].isnan().all()
            assert torch.equal(y[1], torch.ones(32))
            assert torch.equal(quantizer.quantize(x).dequantize().isnan(), y.isnan())


def test_g9_tail_block_uses_its_real_lanes_alone():
    x = spread(3, 48)
    whole = AbsMax(format=MXFP4)
    assert torch.equal(whole.fake(x)[:, 32:], whole.fake(x[:, 32:]))
    assert whole.quantize(x).scales.shape == (3, 2)


@pytest.mark.parametrize("format", MX, ids=name)
def test_g10_properties(format):
    q, x = AbsMax(format=format, rule="floor"), spread(7, 96)
    y = q.fake(x)
    assert torch.equal(q.fake(y), y)
    assert torch.equal(q.fake(x * 2.0**9), y * 2.0**9)
    assert torch.equal(q.fake(-x), -y)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(q.fake(x[:, :32][:, order]), y[:, :32][:, order])
    rows = x[:, :32].sort(dim=1).values
    assert (q.fake(rows).diff(dim=1) >= 0).all()


def test_nvfp4_golden_block():
    """s_g = 1; E4M3 scale 1.125 from amax 6.6 (sheet of NVFP4, golden block)."""
    x = [0.1, -0.4, 1.3, 2.7, -5.2, 0.6, 3.3, -0.05, 4.9, -1.8, 0.9, 2.2, -3.7, 6.6, -0.3, 1.1]
    q = AbsMax(format=NVFP4)
    scales = q.scales_within(torch.tensor(x), torch.tensor(1.0))
    assert scales.block.item() == 1.125
    codes = [0, -0.5, 1, 2, -4, 0.5, 3, 0, 4, -1.5, 1, 2, -3, 6, -0.5, 1]
    assert q.round(torch.tensor(x), Scales(block=scales.block)).tolist() == codes


@functools.cache
def drawn(kind, seed):
    """2^20 numbers, as many as share a tensor scale in the sheet."""
    g, shape = torch.Generator().manual_seed(seed), (2048, 512)
    if kind == "laplace":
        u = torch.rand(*shape, generator=g) - 0.5
        return -u.sign() * torch.log1p(-2 * u.abs())
    x = torch.randn(*shape, generator=g)
    return x if kind == "gaussian" else x / torch.randn(4, *shape, generator=g).square().mean(0).sqrt()


def relative_error(quantizer, kind):
    """Mean of four draws: by one, cells of Student's t, whose fourth moment is infinite, differ by 2 %."""

    def of(x):
        values = effective(quantizer, quantizer.quantize(x).dequantize())
        return (values - x).double().square().sum() / x.double().square().sum()

    return sum(of(drawn(kind, seed)).item() for seed in range(4)) / 4


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "t4"])
@pytest.mark.parametrize(
    ("format", "rule", "expected"),
    [(NVFP4, "absmax", (9.03e-3, 8.60e-3, 8.44e-3)), (NVFP4, "twice", (7.48e-5, 7.10e-5, 7.15e-5)),
     (MXFP4, "rceil", (1.332e-2, 1.744e-2, 1.939e-2)), (MXFP4, "floor", (1.322e-2, 1.608e-2, 1.734e-2)),
     (MXFP6_E3M2, "rceil", (2.79e-3, 2.78e-3, 2.78e-3)), (MXFP6_E2M3, "rceil", (8.0e-4, 9.5e-4, 1.01e-3)),
     (MXFP8_E4M3, "rceil", (7.03e-4, 7.00e-4, 6.99e-4))],
    ids=["nvfp4", "nvfp4 twice", "mxfp4 ceil", "mxfp4 floor", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3"],
)  # fmt: skip
def test_relative_error_is_the_sheets(format, rule, expected, kind):
    twice = Residual(inner=AbsMax(format=NVFP4), channels=512)  # what the first leaves, under the same tensor scale
    quantizer = twice if rule == "twice" else AbsMax(format=format, rule=rule)
    of_kind = dict(zip(("gaussian", "laplace", "t4"), expected, strict=True))
    assert relative_error(quantizer, kind) == pytest.approx(of_kind[kind], rel=0.02)


@pytest.mark.parametrize(
    ("format", "rule", "expected"),
    [(MXFP4, "even", 1.251e-2), (MXFP4, "ceil", 2.084e-2), (MXFP4, "mse", 1.246e-2),
     (MXFP8_E4M3, "floor", 8.73e-4), (MXFP8_E4M3, "even", 7.60e-4)],
    ids=name,
)  # fmt: skip
def test_relative_error_of_other_rules_on_gaussian_data(format, rule, expected):
    assert relative_error(AbsMax(format=format, rule=rule), "gaussian") == pytest.approx(expected, rel=0.02)


def test_mse_rule_is_the_better_of_two_exponents_in_every_block():
    x = spread(40, 64)

    def error(rule):
        return (AbsMax(format=MXFP4, rule=rule).fake(x) - x).square().unflatten(-1, (-1, 32)).sum(-1)

    floor, mse = error("floor"), error("mse")
    assert (mse <= floor).all()
    assert (mse < floor).any()
    assert (mse <= error("even")).all()


@pytest.mark.parametrize(("format", "rule"), WITH_RULES, ids=name)
def test_q_law(format, rule):
    for x in (spread(5, 96), spread(3, 2, 80), spread(5, 96).to(torch.bfloat16), torch.zeros(2, 32)):
        q = AbsMax(format=format, rule=rule)
        stored = pack(q.quantize(x))
        back = unpack(stored, format, x.shape[-1])
        assert torch.equal(back.dequantize(), q.fake(x))
        assert back.codes.shape == x.shape


@pytest.mark.parametrize("format", ALL, ids=name)
def test_packed_bytes_are_what_bits_per_element_says(format):
    q = AbsMax(format=format).quantize(spread(6, 192))
    stored = sum(t.nbytes for k, t in pack(q).items() if k != "weight_tensor_scale")
    assert stored == q.nbytes == round(format.bits_per_element((6, 192)) * 6 * 192 / 8)


@pytest.mark.parametrize(
    ("format", "rule"),
    [(MXFP4, "even"), (MXFP4, "mse"), (MXFP8_E4M3, "rceil"), (NVFP4, "absmax"), (NVFP4, "four_over_six"),
     (INT4_GROUP, "absmax"), (HIF4, "absmax"), (HIF8, "floor")],
    ids=name,
)  # fmt: skip
def test_fused_kernels_give_the_eager_bits(format, rule):
    block = format.block_of(64)
    x = spread(kernel.EAGER_BELOW // block + 3, block)
    low, high = (torch.rand(len(x), generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    outer = kernel.tensor_scale(x.abs().amax(), format, rule) if format.has_tensor_scale else None
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for ratios in ((low, high), (None, None)):
        fused_y, eager_y = torch.empty_like(x), torch.empty_like(x)
        fused_scale = kernel._run(kernel.forward, (x, *ratios, outer, fused_y), format, rule)
        scale = kernel.forward(x, *ratios, outer, eager_y, format=format, rule=rule)
        assert torch.equal(fused_y, eager_y)
        assert torch.equal(fused_scale, scale)
        fused = kernel._run(kernel.backward, (grad, x, *ratios, scale), format, rule)
        eager = kernel.backward(grad, x, *ratios, scale, format=format, rule=rule)
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("rows", [3, kernel.EAGER_BELOW // 32])
def test_a_given_buffer_receives_the_same_values(rows):
    x = spread(rows, 64).requires_grad_()
    x.data[0, 3] = float("nan")
    x.data[1, 40] = -float("inf")
    q = AbsMax(format=MXFP4)
    for low in (None, torch.tensor(0.8)):
        expected = q.fake(x, low, low)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty_like(x, dtype=dtype, requires_grad=False)
            assert q.fake(x, low, low, out=out) is out
            torch.testing.assert_close(out.to(torch.float32), expected.detach(), rtol=0, atol=0, equal_nan=True)


def test_autocast_rounds_to_its_dtype_as_a_matrix_product_would():
    x = spread(6, 64)
    for format in ALL:
        q = AbsMax(format=format)
        with torch.autocast("cpu", torch.bfloat16):
            got = q.fake(x)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, q.fake(x).to(torch.bfloat16))


def test_bfloat16_input_gives_the_same_as_float32():
    x = spread(4, 64).to(torch.bfloat16)
    for format in ALL:
        assert torch.equal(AbsMax(format=format).fake(x), AbsMax(format=format).fake(x.to(torch.float32)))


def test_gradient_is_one_inside_and_the_scale_s_where_values_saturate():
    x = torch.zeros(32)
    x[:4] = torch.tensor([7.5, 1.0, -3.2, 6.4])
    x.requires_grad_()
    AbsMax(format=MXFP4, rule="floor").fake(x).sum().backward()
    through_the_scale = ((6 + 1 - 3 + 6) - (1 - 3.2)) / 7.5  # sum of dL/dy y - dL/dc c, over amax
    assert x.grad.tolist() == pytest.approx([through_the_scale, 1, 1, 0] + [1] * 28)


def test_a_rule_that_does_not_fit_names_the_allowed_ones():
    with pytest.raises(ValueError, match="scale rule 'floor' does not fit format 'int8' .allowed: absmax"):
        AbsMax(format=INT8_ROW, rule="floor")


@pytest.mark.parametrize("format", ALL, ids=name)
def test_a_format_that_travelled_between_processes_means_the_same(format):
    copy, x = pickle.loads(pickle.dumps(format)), spread(3, 64)
    assert torch.equal(AbsMax(format=copy).fake(x), AbsMax(format=format).fake(x))
    assert AbsMax(format=copy).rule == AbsMax(format=format).rule
    stored = pack(AbsMax(format=copy).quantize(x))
    assert torch.equal(unpack(stored, copy, 64).dequantize(), AbsMax(format=format).fake(x))


@pytest.mark.parametrize(("format", "rule"), WITH_RULES, ids=name)
def test_a_stack_is_its_tensors(format, rule):
    """Scales of a whole tensor too are those of each; pack and unpack give them back."""
    x = spread(3, 10, 128) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    one = AbsMax(format=format, rule=rule)
    stack = AbsMax(format=format, rule=rule, stacked=True)
    alone = [one.quantize(tensor) for tensor in x]
    q = stack.quantize(x)
    assert torch.equal(q.dequantize(), torch.stack([tensor.dequantize() for tensor in alone]))
    assert torch.equal(stack.fake(x), q.dequantize())
    assert q.nbytes == sum(tensor.nbytes for tensor in alone)
    again = QTensor.stack([unpack(pack(tensor), format, 128) for tensor in q.unstack()])
    assert torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=name)
def test_gradients_of_a_stack_are_its_tensors(format):
    x, ratios = spread(2, 10, 64), torch.rand(2, 10, 64 // format.block, 2) / 2 + 0.5
    both = []
    for stacked in (True, False):
        leaf, low, high = x.clone().requires_grad_(), *(r.clone().requires_grad_() for r in ratios.unbind(-1))
        quantizer = AbsMax(format=format, stacked=stacked)
        if stacked:
            y = quantizer.fake(leaf, low, high)
        else:
            y = torch.stack([quantizer.fake(*parts) for parts in zip(leaf, low, high, strict=True)])
        (y * spread(2, 10, 64, seed=1)).sum().backward()
        both.append((y, leaf.grad, low.grad, high.grad))
    for one, two in zip(*both, strict=True):
        assert torch.equal(one, two)
