"""SOAR: the sheet's golden ratios, monotone rounds, closed forms, the theorem on decoupling, the sweep against all values."""

import pytest
import torch

from microbat.formats.block import QTensor, split_blocks
from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP6_E2M3, MXFP8_E4M3, NVFP4
from microbat.formats.packing import pack
from microbat.methods.base import Statistics
from microbat.methods.gptq import GPTQ
from microbat.methods.soar import SOAR, _blocks_of, _Fit
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.quantizers.kernel import round_blocks
from microbat.recipe import Recipe

NV = AbsMax(format=NVFP4)


def draw(kind, N, K, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        return torch.randn(N, K, generator=g)
    if kind == "laplace":
        u = torch.rand(N, K, generator=g) - 0.5
        return -u.sign() * torch.log1p(-2 * u.abs())
    return torch.randn(N, K, generator=g) / torch.randn(5, N, K, generator=g).square().mean(0).sqrt()


def hessian(K, T=400, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, generator=g) @ (torch.randn(K, K, generator=g) / K**0.5 + 0.5 * torch.eye(K))
    x[:, ::13] *= 6
    return Statistics(hessian=(x.T @ x / T).to(torch.float64))


def loss(solution, weight, statistics=None):
    error = (solution.weight.dequantize() - weight).to(torch.float64)
    mapped = error if statistics is None else error @ statistics.hessian
    return (mapped * error).sum().item()


@pytest.mark.parametrize(
    ("kind", "closed_form", "nearest", "soar", "sweep"),
    [("gaussian", 9.09e-3, 0.903, 0.839, 0.735), ("laplace", 8.60e-3, 0.912, 0.870, 0.794), ("t5", 8.48e-3, 0.916, 0.869, 0.792)],
)  # fmt: skip
def test_error_relative_to_rtn_is_the_sheets(kind, closed_form, nearest, soar, sweep):
    weight = draw(kind, 256, 512)
    rtn = (NV.quantize(weight).dequantize() - weight).square().sum().item()
    assert rtn / weight.square().sum().item() == pytest.approx(closed_form, rel=0.02)
    for settings, expected in (
        ({"search": "nearest"}, nearest),
        ({}, soar),
        ({"search": "sweep", "closed_form": False, "rounds": 1}, sweep),
    ):
        assert loss(SOAR(**settings).solve(weight, NV, None), weight) / rtn == pytest.approx(expected, rel=0.015)


def test_no_round_is_rtn():
    weight = draw("laplace", 24, 80)
    got = SOAR(rounds=0).solve(weight, NV, None).weight
    expected = NV.quantize(weight)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.tensor_scale, expected.tensor_scale)


@pytest.mark.parametrize("format", [NVFP4, MXFP4, MXFP6_E2M3], ids=lambda f: f.name)
@pytest.mark.parametrize(
    "settings", [{}, {"search": "sweep"}, {"search": "nearest"}, {"metric": "hessian", "betas": 11}]
)
def test_no_round_makes_it_worse(format, settings):
    weight, statistics = draw("t5", 24, 96) * 0.02, hessian(96)
    metric = statistics if "metric" in settings else None
    # What is minimised is H's diagonal blocks, damped.
    blocks = _blocks_of(statistics, format, 0.01)
    within = None if metric is None else Statistics(hessian=torch.block_diag(*blocks).to(torch.float64))
    losses = [
        loss(SOAR(**settings, rounds=rounds, tolerance=0).solve(weight, AbsMax(format=format), metric), weight, within)
        for rounds in range(6)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in zip(losses, losses[1:], strict=False)), losses
    if settings.get("search") != "nearest" or format == NVFP4:  # D* rarely lies nearer to another power of two
        assert losses[-1] < losses[0]


def test_closed_forms_are_stationary():
    weight = draw("gaussian", 20, 96)
    for metric in (None, _blocks_of(hessian(96), NVFP4, 0.01)):
        fit = _Fit(weight, NV, NV.scales(weight), metric)
        fit.refit_tensor_scale()
        total = lambda block, outer, f=fit: f.error(f.weight.double(), f.values.double(), block * outer, f.metric if f.metric is None else f.metric.double()).sum()  # noqa: E501, E731 # fmt: skip
        outer = fit.outer.double().requires_grad_()
        total(fit.block.double(), outer).backward()
        scale = total(fit.block.double(), fit.outer.double() * 1.01) / fit.outer.double()
        assert abs(outer.grad) < 1e-5 * scale
        block = fit.best_scales().double().requires_grad_()
        total(block, fit.outer.double()).backward()
        assert block.grad.abs().max() < 1e-5 * scale
        for factor in (0.99, 1.01):
            assert total(block * factor, fit.outer.double()) > total(block, fit.outer.double())


def test_the_lattice_is_recovered():
    q = NV.quantize(draw("gaussian", 24, 96))
    exact = q.dequantize()
    for settings in ({}, {"search": "sweep"}):
        got = SOAR(**settings).solve(exact, NV, None).weight
        torch.testing.assert_close(got.dequantize(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "t5"])
def test_decoupling_cannot_help_a_separable_error(kind):
    """Plain and diagonally weighted: at each stored scale, the codes of every b lose to or tie with those of b = 1."""
    weight = draw(kind, 64, 96)
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    for metric in (None, torch.diag_embed(diagonal.view(-1, 16))):
        fit = _Fit(weight, NV, NV.scales(weight), metric)
        candidates = torch.stack((*fit.around(fit.best_scales()), fit.block), -1)
        scale = fit.product(candidates)
        error = lambda b, f=fit, s=scale, m=metric: f.error(f.weight[:, :, None], round_blocks(f.weight[:, :, None], s * b, NVFP4), s, m)  # noqa: E501, E731 # fmt: skip
        plain = error(1.0)
        for b in torch.linspace(0.5, 1.5, 101).tolist():
            assert (error(b) >= plain * (1 - 1e-5)).all(), b


def test_decoupling_helps_where_codes_of_a_block_help_each_other():
    weight, statistics = draw("gaussian", 48, 96), hessian(96)
    blocks = Statistics(hessian=torch.block_diag(*_blocks_of(statistics, NVFP4, 0.01)).to(torch.float64))
    coupled, decoupled = (
        loss(SOAR(metric="hessian", betas=betas).solve(weight, NV, statistics), weight, blocks) for betas in (1, 101)
    )
    assert decoupled < 0.97 * coupled
    assert loss(SOAR().solve(weight, NV, None), weight, blocks) > decoupled


@pytest.mark.parametrize("format", [NVFP4, MXFP4, MXFP6_E2M3, MXFP8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("outer", [1.0, 3e-4, 40.0])
def test_the_window_holds_the_best_of_all_values(format, outer):
    """Against every value that the scale can be stored as, also for scales at both ends of their range."""
    g = torch.Generator().manual_seed(4)
    weight = torch.cat(
        [draw("gaussian", 30, 96), draw("t5", 30, 96) ** 3, torch.randint(-6, 7, (30, 96), generator=g) * 0.9]
    )
    weight = weight * torch.exp(1.5 * torch.randn(90, 1, generator=g))
    weight[3, :32] = 0
    quantizer = AbsMax(format=format)
    fit = _Fit(weight, quantizer, quantizer.scales(weight))
    if format.has_tensor_scale:
        fit.outer = fit.outer * outer
        fit.errors = fit.error(fit.weight, fit.values, fit.product(fit.block), None)
    everything = torch.full_like(fit.errors, float("inf"))
    grid = fit.grid if format.has_tensor_scale else fit.grid[96:160]  # 2^-31 ... 2^32
    for value in grid:
        scale = fit.product(torch.full_like(fit.block, value))
        everything = torch.minimum(
            everything, fit.error(fit.weight, round_blocks(fit.weight, scale, format), scale, None)
        )
    fit.choose(fit.window(), None)
    torch.testing.assert_close(torch.minimum(fit.errors, everything), everything, rtol=0, atol=0)
    assert (fit.errors <= everything).all()


def test_powers_of_two_shift_the_scales_and_nothing_else():
    weight = draw("laplace", 24, 96)
    one, two = (SOAR().solve(weight * factor, NV, None).weight for factor in (1, 8))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)
    assert torch.equal(one.tensor_scale * 8, two.tensor_scale)


def test_what_is_stored_is_an_ordinary_tensor():
    weight = draw("gaussian", 24, 96)
    weight[2, 16:48] = 0
    got, rtn = SOAR(search="sweep").solve(weight, NV, None).weight, NV.quantize(weight)
    for key, tensor in pack(rtn).items():
        assert (pack(got)[key].shape, pack(got)[key].dtype) == (tensor.shape, tensor.dtype)
    assert torch.isin(got.scales, NVFP4.scale_element.grid[1:]).all()
    assert got.tensor_scale > 0
    assert (got.dequantize()[2, 16:48] == 0).all()
    assert (SOAR().solve(torch.zeros(4, 32), NV, None).weight.dequantize() == 0).all()


def test_projections_of_one_activation_share_the_tensor_scale():
    weights = {"q": draw("gaussian", 24, 96), "k": draw("laplace", 8, 96, 1) * 3}
    quantizers = dict.fromkeys(weights, NV)
    shared = SOAR().solve_site(weights, quantizers, None)
    assert torch.equal(shared["q"].weight.tensor_scale, shared["k"].weight.tensor_scale)
    together = SOAR().solve(torch.cat(list(weights.values())), NV, None).weight
    assert torch.equal(torch.cat([shared[p].weight.dequantize() for p in weights]), together.dequantize())


def test_gptq_with_scales_in_turn():
    weight, statistics = draw("gaussian", 24, 96), hessian(96)
    plain = loss(GPTQ().solve(weight, NV, statistics), weight, statistics)
    solved = {
        (rounding, search): SOAR(rounding=rounding, search=search).solve(weight, NV, statistics)
        for rounding in ("gptq", "gptq-fixed")
        for search in ("neighbours", "sweep")
    }
    losses = {key: loss(solution, weight, statistics) / plain for key, solution in solved.items()}
    assert losses["gptq", "sweep"] < 0.5
    assert losses["gptq", "sweep"] < losses["gptq", "neighbours"] < 0.9
    assert losses["gptq-fixed", "sweep"] < 0.95
    found = SOAR(search="sweep").solve(weight, NV, None).weight.scales
    assert torch.equal(solved["gptq-fixed", "sweep"].weight.scales, found)
    mx = AbsMax(format=MXFP4)
    swept = loss(SOAR(rounding="gptq", search="sweep").solve(weight, mx, statistics), weight, statistics)
    natural, ordered = (GPTQ(order=order).solve(weight, mx, statistics) for order in ("natural", "auto"))
    assert swept < 0.95 * loss(natural, weight, statistics)
    assert swept < 0.99 * loss(ordered, weight, statistics)


def test_a_clipped_weight_is_the_target():
    weight = draw("gaussian", 24, 96)
    clip = Clip(NV, torch.full((24, 6, 2), 0.8))
    inner, outer = SOAR().solve(clip.clip(weight), NV, None).weight, SOAR().solve(weight, clip, None).weight
    assert torch.equal(inner.dequantize(), outer.dequantize())
    site = SOAR().solve_site({"a": weight}, {"a": clip}, None)["a"].weight
    assert isinstance(site, QTensor)
    assert torch.equal(site.dequantize(), outer.dequantize())


def test_inputs_are_left_alone():
    weight = draw("gaussian", 24, 96)
    kept = weight.clone()
    SOAR(search="sweep").solve(weight, NV, None)
    assert torch.equal(weight, kept)
    assert split_blocks(weight, 16).shape == (24, 6, 16)


@pytest.mark.parametrize("settings", [{"rounds": -1}, {"betas": 4}, {"tolerance": 1.0}, {"damping": 0.0}])
def test_bad_settings_name_the_field(settings):
    with pytest.raises(ValueError, match=rf"soar\.{next(iter(settings))}="):
        SOAR(**settings)


@pytest.mark.parametrize("format", [INT4_GROUP, INT8_ROW], ids=lambda f: f.name)
def test_formats_without_8_bit_scales_are_refused(format):
    with pytest.raises(ValueError, match=f"{format.name} has none"):
        SOAR().solve(draw("gaussian", 8, 64), AbsMax(format=format), None)
    with pytest.raises(ValueError, match=f"{format.name} has none"):
        Recipe(model="m", method="soar", scheme=f"W{format.element.bits}A16:{format.name}").methods()
