"""SOAR: the sheet's golden ratios, monotone rounds, closed forms, the theorem on decoupling, the sweep against all values."""

import functools
from dataclasses import replace

import pytest
import torch

from microbat.formats.block import QTensor, split_blocks
from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP6_E2M3, MXFP8_E4M3, NVFP4
from microbat.formats.packing import pack, unpack
from microbat.methods.base import Statistics
from microbat.methods.gptq import GPTQ
from microbat.methods.soar import SOAR, _blocks_of, _Fit
from microbat.quantizers.base import AbsMax, Scales
from microbat.quantizers.clip import Clip
from microbat.quantizers.kernel import round_blocks
from microbat.recipe import Recipe

NV = AbsMax(format=NVFP4)
KINDS = ("gaussian", "laplace", "t5")


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


@functools.cache
def sample(kind):
    """2^20 weights, and the squared error of each block rounded to nearest. Ratios of 8192 blocks, as many as the sheet has,
    differ by up to 1 % from draw to draw."""
    weight = draw(kind, 2048, 512)
    return weight, errors(NV.quantize(weight).dequantize(), weight)


def errors(values, weight):
    return (values - weight).double().square().unflatten(-1, (-1, 16)).sum(-1)


def ratio(kind, dequantized):
    weight, rtn = sample(kind)
    return (errors(dequantized, weight).sum() / rtn.sum()).item()


@pytest.mark.parametrize(("kind", "expected"), [("gaussian", 9.09e-3), ("laplace", 8.60e-3), ("t5", 8.48e-3)])
def test_error_of_rtn_is_the_sheets(kind, expected):
    weight, rtn = sample(kind)
    assert (rtn.sum() / weight.double().square().sum()).item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "rounds", "expected"),
    [({"search": "nearest"}, range(3, 7), (0.903, 0.912, 0.916)),
     ({}, range(3, 7), (0.839, 0.870, 0.869)),
     ({"search": "sweep", "closed_form": False, "rounds": 1}, range(1, 2), (0.735, 0.794, 0.792))],
    ids=["closed form alone", "soar", "sweep"],
)  # fmt: skip
def test_error_relative_to_rtn_is_the_sheets(settings, rounds, expected, kind):
    solution = SOAR(**settings).solve(sample(kind)[0], NV, None)
    assert ratio(kind, solution.weight.dequantize()) == pytest.approx(expected[KINDS.index(kind)], rel=0.01)
    assert solution.notes["scale_rounds"] in rounds


@pytest.mark.parametrize(("kind", "expected"), [("gaussian", 1.053), ("laplace", 1.048), ("t5", 1.051)])
def test_codes_of_the_unrounded_scale_are_the_sheets_worse(kind, expected):
    """So much lower is RTN's error than if codes came from the scale as it was before it was stored."""
    weight = sample(kind)[0]
    scales = NV.scales(weight)
    unrounded = weight.unflatten(-1, (-1, 16)).abs().amax(-1) / (6 * scales.tensor)
    codes = NV.encode(weight, replace(scales, block=unrounded))
    assert ratio(kind, replace(codes, scales=scales.block).dequantize()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("kind", "expected"), [("gaussian", 0.838), ("laplace", 0.888), ("t5", 0.885)])
def test_four_over_six_is_the_sheets(kind, expected):
    got = AbsMax(format=NVFP4, rule="four_over_six").quantize(sample(kind)[0])
    assert ratio(kind, got.dequantize()) == pytest.approx(expected, rel=0.01)


E2M1_GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3_GRID = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def walked(kind, steps, rounds):
    """Error relative to RTN of blocks whose scale takes, in rounds, the best of ``steps`` on the grid that gains: an oracle in
    float64 from torch's own E4M3."""
    weight, rtn = sample(kind)
    scales, blocks = NV.scales(weight), weight.double().abs().view(-1, 16)

    def error(scale):
        nearest = E2M1_GRID[torch.bucketize(blocks / scale[:, None], (E2M1_GRID[1:] + E2M1_GRID[:-1]) / 2)]
        return (nearest * scale[:, None] - blocks).square().sum(-1)

    index = torch.searchsorted(E4M3_GRID, scales.block.flatten().double())
    least = error(E4M3_GRID[index] * scales.tensor)
    for _ in range(rounds):
        for tried in [(index + step).clamp(0, len(E4M3_GRID) - 1) for step in steps]:
            found = error(E4M3_GRID[tried] * scales.tensor)
            index, least = torch.where(found < least, tried, index), torch.minimum(found, least)
    return (least.sum() / rtn.sum()).item()


@pytest.mark.parametrize(("kind", "sheet"), [("gaussian", 0.866), ("laplace", 0.892), ("t5", 0.890)])
def test_neighbours_of_the_scale_as_it_is_are_both(kind, sheet):
    """A walk downwards alone meets the sheet's row "DSS only": a scale that is on the grid lies between itself and the one below.
    Stepping to both sides finds a twentieth more."""
    weight = sample(kind)[0]
    once, often = (
        ratio(kind, SOAR(closed_form=False, rounds=rounds, tolerance=0).solve(weight, NV, None).weight.dequantize())
        for rounds in (1, 3)
    )
    assert once == pytest.approx(walked(kind, (-1, 1), 1), rel=1e-5)
    assert often == pytest.approx(walked(kind, (-1, 1), 3), rel=1e-5)
    assert walked(kind, (-1,), 3) == pytest.approx(sheet, rel=0.01)
    assert often < 0.96 * sheet
    # More than SOAR itself finds: D* points to one side only, and a twelfth of the blocks find a better scale on the other.
    fit = _Fit(weight, NV, NV.scales(weight))
    towards = torch.where(fit.best_scales() < fit.block, *fit.beside(fit.block))
    fit.choose(towards[..., None], None)
    assert once < 0.985 * fit.loss / sample(kind)[1].sum().item()
    assert often < 0.985 * ratio(kind, SOAR().solve(weight, NV, None).weight.dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_loses_while_the_tensor_scale_stays(kind):
    weight, rtn = sample(kind)
    fixed, joint = (SOAR(closed_form=closed).solve(weight, NV, None).weight for closed in (False, True))
    assert torch.equal(fixed.tensor_scale, NV.scales(weight).tensor)
    assert (errors(fixed.dequantize(), weight) <= rtn * (1 + 1e-6)).all()
    assert (errors(joint.dequantize(), weight) > rtn * 1.01).any()  # the sum fell all the same


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_scale_after_the_sweep_adds_nothing(kind):
    """Less than 0.0002 of RTN's error, though the sweep took a quarter of it: every value of the grid was there to choose."""
    weight, rtn = sample(kind)
    fit = _Fit(weight, NV, NV.scales(weight))
    fit.choose(fit.window(), None)
    swept = fit.loss
    fit.refit_tensor_scale()
    fit.choose(fit.window(), None)
    assert 0 <= swept - fit.loss < 2e-4 * rtn.sum().item()


@pytest.mark.parametrize(("deviation", "expected"), [(0.02, 0.887), (1.0, 0.934)])
def test_mxfp4_takes_the_scale_that_reaches_the_largest_or_half(deviation, expected):
    """Powers of two are far apart, so that the gain depends on where in a binade a Gaussian weight's largest values lie: from
    0.884 to 0.946. The sheet names no deviation for its 0.887; one that weights have meets it."""
    weight, quantizer = deviation * sample("gaussian")[0], AbsMax(format=MXFP4, rule="rceil")
    rtn, got = quantizer.quantize(weight), SOAR(search="sweep", rounds=1).solve(weight, quantizer, None).weight
    half = quantizer.encode(weight, Scales(block=rtn.scales / 2))
    rceil, halved, swept = (errors(q.dequantize(), weight).unflatten(-1, (-1, 2)).sum(-1) for q in (rtn, half, got))
    assert (swept.sum() / rceil.sum()).item() == pytest.approx(expected, rel=0.01)
    assert (swept <= torch.minimum(rceil, halved)).all()
    assert (got.scales / rtn.scales).unique().tolist() == [0.5, 1]


def test_half_the_block_scales_under_twice_the_tensor_scale():
    """Bit for bit, in what is stored and in what is searched, as long as the halves are normal numbers of E4M3."""
    weight = draw("laplace", 24, 96)
    scales = NV.scales(weight)
    halves = [replace(scales, block=scales.block / n, tensor=scales.tensor * n) for n in (2, 4)]  # 448 has none above
    one, two = (_Fit(weight, NV, start) for start in halves)
    assert one.block.min() >= two.block.min() >= 2.0**-6
    for fit in (one, two):
        SOAR()._run(fit)
    assert torch.equal(one.errors, two.errors)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.block, two.block * 2)

    weight[5:20] *= 2.0**-14
    q = SOAR().solve(weight, NV, None).weight
    moved = replace(q, scales=q.scales / 2, tensor_scale=q.tensor_scale * 2)
    stored = unpack(pack(replace(moved, scales=NVFP4.scale_element.round(moved.scales))), NVFP4, 96)
    same = (stored.dequantize() == q.dequantize()).unflatten(-1, (-1, 16)).all(-1)
    normal = moved.scales >= 2.0**-6
    assert same[normal].all()
    assert not same[~normal].all()


def test_scales_at_the_end_of_their_range_get_room():
    """Blocks as large as the largest begin at 448, and the search finds nothing above: the sweep then gains a tenth less. A block
    of zeros is no hindrance, one so small that its half is rounded is."""
    weight = draw("gaussian", 64, 256)
    weight /= weight.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, dim=-1)
    weight[5, 16:32] = 0
    start = NV.scales(weight)
    halved = _Fit(weight, NV, replace(start, block=start.block / 2, tensor=start.tensor * 2))
    sweep = SOAR(search="sweep")
    sweep._run(halved)
    got = sweep.solve(weight, NV, None).weight
    assert (got.scales < 448).all()
    assert loss(sweep.solve(weight, NV, None), weight) == pytest.approx(halved.loss, rel=1e-5)
    weight[5, 16:32] = 1e-5
    kept = sweep.solve(weight, NV, None).weight
    assert (kept.scales == 448).float().mean() > 0.3
    assert errors(kept.dequantize(), weight).sum() > 1.1 * errors(got.dequantize(), weight).sum()


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


@pytest.mark.parametrize("kind", KINDS)
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
    with pytest.raises(ValueError, match=f"those of {format.name} are not such"):
        SOAR().solve(draw("gaussian", 8, 64), AbsMax(format=format), None)
    with pytest.raises(ValueError, match=f"those of {format.name} are not such"):
        Recipe(model="m", method="soar", scheme=f"W{format.element.bits}A16:{format.name}").methods()
