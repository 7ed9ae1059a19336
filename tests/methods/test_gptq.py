"""GPTQ: equals RTN where it must, beats it where it can, an independent float64 solve agrees, damping is raised and told."""

import pytest
import torch

from microbat.formats.block import QTensor
from microbat.formats.hifloat import HIF4, HIF8, S1P2
from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, NVFP4
from microbat.methods.base import Solution, Statistics
from microbat.methods.gptaq import GPTAQ
from microbat.methods.gptq import GPTQ, inverse_cholesky
from microbat.methods.rtn import RTN
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip

FORMATS = [MXFP4, NVFP4, INT4_GROUP, INT8_ROW, HIF4, HIF8]


def problem(N=24, K=96, T=500, seed=0):
    """A weight and correlated inputs with outlier channels."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(K, K, generator=g) / K**0.5 + 0.5 * torch.eye(K)
    x = torch.randn(T, K, generator=g) @ mixing
    x[:, ::13] *= 8
    return torch.randn(N, K, generator=g), x


def hessian(x):
    return (x.T @ x / len(x)).to(torch.float64)


def loss(solution, weight, x):
    return ((solution.weight.dequantize() - weight) @ x.T).square().sum().item()


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_diagonal_hessian_gives_rtn(format):
    weight, _ = problem()
    quantizer = AbsMax(format=format)
    diagonal = Statistics(hessian=torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(1)).double() + 0.5))
    gptq = GPTQ().solve(weight, quantizer, diagonal).weight
    rtn = RTN().solve(weight, quantizer, None).weight
    assert torch.equal(gptq.dequantize(), rtn.dequantize())


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_beats_rtn_on_correlated_inputs(format):
    weight, x = problem()
    quantizer = AbsMax(format=format)
    rtn = loss(RTN().solve(weight, quantizer, None), weight, x)
    gptq = loss(GPTQ().solve(weight, quantizer, Statistics(hessian=hessian(x))), weight, x)
    assert gptq < 0.8 * rtn


@pytest.mark.parametrize(
    "quantizer",
    [*(AbsMax(format=format) for format in FORMATS if format is not NVFP4), AbsMax(format=HIF8, rule="pts")],
    ids=lambda q: f"{q.format.name}-{q.rule}",
)
@pytest.mark.parametrize("solver", [GPTQ(), GPTAQ()], ids=lambda s: s.name)
def test_weights_of_one_activation_are_what_each_is_alone(solver, quantizer):
    """One factor serves them all. NVFP4 shares its tensor scale besides (test_tensor_scale.py)."""
    weight, x = problem(N=56)
    weights = dict(zip("qkv", weight.split((32, 16, 8)), strict=True))
    weights["v"] = weights["v"] * 5
    clips = {path: Clip(quantizer, torch.full((1, 1, 2), 0.8), whole=True) for path in weights}
    found = Statistics(hessian=hessian(x), deviation=hessian(x) * 0.1)
    for quantizers in (dict.fromkeys(weights, quantizer), clips):
        for path, solution in solver.solve_site(weights, quantizers, found).items():
            alone = solver.solve(weights[path], quantizers[path], found)
            assert torch.equal(solution.weight.codes, alone.weight.codes)
            assert torch.equal(solution.weight.dequantize(), alone.weight.dequantize())
            assert solution.notes == alone.notes


def test_columns_follow_the_textbook_recursion():
    """Independent float64 route: after each column, the rest moves by -e H^-1[j, rest] / H^-1[j, j] of the remaining problem."""
    weight, x = problem(N=5, K=64)
    quantizer = AbsMax(format=MXFP4, rule="floor")
    h = hessian(x)
    h += 0.01 * h.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    w, expected = weight.double().clone(), torch.zeros(5, 64, dtype=torch.float64)
    for j in range(64):
        if j % 32 == 0:
            scale = quantizer.scales(w[:, j : j + 32].float()).block.double()
        q = MXFP4.element.round((w[:, j : j + 1] / scale).float()).double() * scale
        expected[:, j] = q[:, 0]
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= (w[:, j : j + 1] - q) / inverse[0, 0] * inverse[0]
    got = GPTQ(order="natural").solve(weight, quantizer, Statistics(hessian=hessian(x))).weight.dequantize()
    # Ties aside, float32 updates and float64 ones round alike.
    assert (got.double() == expected).double().mean() > 0.99


def test_a_unit_s_scales_are_fixed_when_its_first_column_is_reached():
    """HiF4: scale and flags from the weights as updated by then; its columns one by one, each under its own product of scales."""
    weight, x = problem(N=5, K=128)
    quantizer = AbsMax(format=HIF4)
    h = hessian(x)
    h += 0.01 * h.diagonal().mean() * torch.eye(128, dtype=torch.float64)
    w, expected = weight.double().clone(), torch.zeros(5, 128, dtype=torch.float64)
    units = []
    for j in range(128):
        if j % 64 == 0:
            scales = quantizer.scales(w[:, j : j + 64].float())
            units.append(scales.inner)
            lane = HIF4.factors(scales.inner)[:, 0].double() * scales.block.double()
            reciprocal = (1 / scales.block).to(torch.bfloat16).double() * scales.block.double() / lane
        t = (w[:, j : j + 1] * reciprocal[:, j % 64, None]).float()
        q = S1P2.round(t).double() * lane[:, j % 64, None]
        expected[:, j] = q[:, 0]
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= (w[:, j : j + 1] - q) / inverse[0, 0] * inverse[0]
    got = GPTQ().solve(weight, quantizer, Statistics(hessian=hessian(x))).weight
    assert (got.inner == torch.cat(units, dim=1)).float().mean() > 0.99
    assert (got.dequantize().double() == expected).double().mean() > 0.99


def test_columns_of_a_unit_beat_the_unit_at_once():
    """The authors' hook and AMCT quantize 64 columns at once, then hand on the error of each over the diagonal of U."""
    weight, x = problem(N=24, K=256, T=900)
    quantizer, h = AbsMax(format=HIF4), hessian(x)
    factor = inverse_cholesky(h, 0.01, torch.zeros(256, dtype=torch.bool))[0].float()
    w, parts = weight.clone(), []
    for start in range(0, 256, 64):
        stop = start + 64
        parts.append(quantizer.quantize(w[:, start:stop]))
        error = (w[:, start:stop] - parts[-1].dequantize()) / factor.diagonal()[start:stop]
        w[:, stop:] -= error @ factor[start:stop, stop:]
    codes, scales, inner = (torch.cat([getattr(q, k) for q in parts], dim=1) for k in ("codes", "scales", "inner"))
    at_once = QTensor(format=HIF4, codes=codes, scales=scales, inner=inner)
    by_column = GPTQ().solve(weight, quantizer, Statistics(hessian=h))
    direct = loss(RTN().solve(weight, quantizer, None), weight, x)
    assert loss(by_column, weight, x) < 0.7 * loss(Solution(weight=at_once), weight, x) < 0.7 * direct


def test_dead_inputs_are_stored_as_zero():
    weight, x = problem()
    x[:, 7] = 0
    solution = GPTQ().solve(weight, AbsMax(format=MXFP4), Statistics(hessian=hessian(x)))
    assert solution.notes["dead_columns"] == 1
    assert (solution.weight.dequantize()[:, 7] == 0).all()


def test_singular_hessian_raises_the_damping_and_says_so():
    weight, _ = problem()
    direction = torch.randn(1, 96, generator=torch.Generator().manual_seed(2)).double()
    singular = direction.T @ direction - 1e-2 * torch.eye(96, dtype=torch.float64)
    solution = GPTQ().solve(weight, AbsMax(format=MXFP4), Statistics(hessian=singular))
    assert solution.notes["damping"] > 0.01
    with pytest.raises(ValueError, match="stays singular"):
        inverse_cholesky(
            singular - 1e9 * torch.diag(torch.arange(96).double() - 90), 1e-9, torch.zeros(96, dtype=torch.bool)
        )


def test_hessian_with_nan_is_an_error():
    weight, x = problem()
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        GPTQ().solve(weight, AbsMax(format=MXFP4), Statistics(hessian=hessian(x)))


def test_clipped_weight_is_the_target():
    weight, x = problem()
    clip = Clip(AbsMax(format=MXFP4), torch.full((24, 3, 2), 0.8))
    inner = GPTQ().solve(clip.clip(weight), clip.inner, Statistics(hessian=hessian(x))).weight
    outer = GPTQ().solve(weight, clip, Statistics(hessian=hessian(x))).weight
    assert torch.equal(inner.codes, outer.codes)


def test_inputs_are_left_alone():
    weight, x = problem()
    kept, h = weight.clone(), hessian(x)
    GPTQ().solve(weight, AbsMax(format=MXFP4), Statistics(hessian=h))
    assert torch.equal(weight, kept)
    assert torch.equal(h, hessian(x))
