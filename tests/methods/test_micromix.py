"""MicroMix: thresholds by name, groups and order, laws of the composite tensor, GPTQ over formats, the folder, refusals."""

import json

import pytest
import torch
from tests.methods.test_arcquant import Activations
from typer.testing import CliRunner

import microbat
from microbat import pipeline
from microbat.cli import app
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.export.compressed_tensors import export
from microbat.formats.composite import Composite, format_name, pack_parts, unpack_parts
from microbat.formats.microscaling import MXFP4, MXFP6_E3M2, MXFP8_E4M3, NVFP4
from microbat.linear import SiteInput
from microbat.methods.base import Plan, SitePlan, Statistics
from microbat.methods.gptq import GPTQ
from microbat.methods.micromix import FORMATS, MicroMix, Sizes, thresholds
from microbat.methods.rtn import RTN
from microbat.models.base import DECODER_SITES
from microbat.quantizers.base import AbsMax
from microbat.quantizers.mixed import Mixed
from microbat.recipe import Recipe
from microbat.runtime import reference
from microbat.runtime.composite import CompositeLinear
from microbat.verify import verify

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
N, K = 24, 224
MIXED = Mixed(parts=tuple(AbsMax(format=f, rule="rceil") for f in FORMATS), widths=(128, 64, 32))


def outlying(T=320, width=K, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x[:, torch.randperm(width, generator=g)[:5]] *= 20
    return x


def prepared(x, rule="rceil", **settings):
    mx = AbsMax(format=MXFP4, rule=rule)
    plan = Plan(sites=[SitePlan(site=DECODER_SITES[3], transform=None, activation=mx, weights={"mlp.down_proj": mx})])
    return MicroMix(unit=32, **settings).prepare(Activations(x), plan, RTN()).sites[0]


@pytest.mark.parametrize(
    ("revision", "lam", "four", "six"),
    [("iclr", 1, 0.01050, 0.03600), ("release", 1, 0.02100, 0.07199), ("fp8", 1, 0.07292, 0.25), ("fp8", 0.5, 0.03646, 0.125)],
)  # fmt: skip
def test_thresholds_of_the_sheet(revision, lam, four, six):
    assert thresholds(revision, lam) == pytest.approx((four, six), abs=5e-6)


def test_groups_are_the_shares_rounded_up():
    x = outlying()
    sizes = Sizes(thresholds("iclr"))
    for rows in x.split(64):
        sizes.add(rows[None])
    assert torch.equal(sizes.mean, torch.stack([rows.abs().mean(0) for rows in x.split(64)]).amax(0))
    share = x.abs() / x.abs().amax(1, keepdim=True)
    n8 = 32 * -(-int((share >= thresholds("iclr")[1]).sum()) * K // (share.numel() * 32))
    n6 = 32 * -(
        -int(((share >= thresholds("iclr")[0]) & (share < thresholds("iclr")[1])).sum()) * K // (share.numel() * 32)
    )
    assert sizes.groups(32) == (K - n6 - n8, n6, n8)
    assert sum(sizes.groups(32)) == K
    assert sizes.groups(224) == (0, 0, 224)  # no room for three: never fewer than none in MXFP4, n6 gives way
    assert sizes.groups(96) == (K - 192, 96, 96)


def test_revisions_are_nested():
    x = outlying()
    sizes = [prepared(x, **s).activation.quantize(x).nbytes for s in ({}, {"revision": "release"}, {"revision": "fp8"})]
    assert sizes == sorted(sizes, reverse=True)
    more = [prepared(x, revision="fp8", lam=lam).activation for lam in (0.0, 0.3, 1.0)]
    assert more[0].parts == (AbsMax(format=MXFP8_E4M3, rule="rceil"),)
    assert [q.quantize(x).nbytes for q in more] == sorted((q.quantize(x).nbytes for q in more), reverse=True)
    shares = [dict(zip((part.format for part in q.parts), q.widths, strict=True)) for q in more]
    for format, order in ((MXFP4, 1), (MXFP8_E4M3, -1)):  # more of lam takes from MXFP8 and gives to MXFP4
        widths = [order * share.get(format, 0) for share in shares]
        assert widths == sorted(widths)
    mixes = [prepared(x, revision=revision).activation for revision in ("fp8", "release", "iclr")]
    x = prepared(x).transform(x)
    ladder = [AbsMax(format=MXFP4, rule="rceil"), *mixes, AbsMax(format=MXFP8_E4M3)]
    errors = [(q.fake(x) - x).square().sum().item() for q in ladder]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("rule", ["rceil", "floor", "even", "ceil", "mse"])
def test_all_groups_follow_the_schemes_rule(rule):
    site = prepared(outlying(), rule=rule)
    assert [part.rule for part in site.activation.parts] == [rule] * len(site.activation.parts)
    assert site.weights["mlp.down_proj"] == site.activation
    for asked, expected in (("", "rceil"), (rule, rule)):
        assert (
            Recipe(model="m", method="micromix", scheme="W4A4", scale_rule=asked).parsed_scheme().weight.rule
            == expected
        )


@pytest.mark.parametrize(
    ("revision", "format", "rceil", "floor"),
    [("iclr", MXFP4, 0.0021, 0.0026), ("iclr", MXFP6_E3M2, 0.0040, 0.0045),
     ("release", MXFP4, 0.0042, 0.0052), ("release", MXFP6_E3M2, 0.0079, 0.0089)],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_the_worst_error_below_a_threshold_is_the_sheets(revision, format, rceil, floor):
    """Of blocks with no entry above T(n) M, however T(n) M lies between powers of two, in shares of M. INT8's is 1/254: MXFP4 of
    revision iclr alone is within it."""
    limit = thresholds(revision)[FORMATS.index(format)]
    worst = dict.fromkeys(("rceil", "floor"), 0.0)
    for M in torch.logspace(0, 1, 97, base=2).tolist():
        x = torch.linspace(-1, 1, 31 * 2000).view(-1, 31) * limit * M
        x = torch.nn.functional.pad(x, (0, 1), value=limit * M)  # each block's largest is the threshold
        for rule in worst:
            worst[rule] = max(worst[rule], (AbsMax(format=format, rule=rule).fake(x) - x).abs().max().item() / M)
    assert worst == pytest.approx({"rceil": rceil, "floor": floor}, abs=1e-4)
    assert (worst["floor"] <= 1 / 254) == (revision == "iclr" and format == MXFP4)


def test_no_value_saturates_and_powers_of_two_move_the_scales_alone():
    x = outlying() * torch.linspace(1, 1.999, 320)[:, None]
    q, shifted = MIXED.quantize(x), MIXED.quantize(x * 2.0**-7)
    for part, own, group in zip(q.parts, shifted.parts, x.split(MIXED.widths, dim=-1), strict=True):
        blocks = group.unflatten(-1, (-1, 32)).abs().amax(-1)
        assert (blocks <= part.format.element.max * part.scales).all()
        assert torch.equal(part.codes, own.codes)
        assert torch.equal(part.scales, own.scales * 2.0**7)


def test_q_law_and_bits():
    x = outlying()
    q = MIXED.quantize(x)
    assert torch.equal(q.dequantize(), MIXED.fake(x))
    again = unpack_parts(pack_parts(q), [(part.format, part.shape[-1]) for part in q.parts])
    assert torch.equal(again.dequantize(), MIXED.fake(x))
    assert q.shape == x.shape
    assert 8 * q.nbytes / x.numel() == pytest.approx((4 * 128 + 6 * 64 + 8 * 32) / K + 0.25)
    assert format_name(q) == "mxfp4 x 128, mxfp6_e3m2 x 64, mxfp8_e4m3 x 32"


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_one_group_is_round_to_nearest_in_its_format(format):
    x, inner = outlying(), AbsMax(format=format, rule="rceil")
    assert torch.equal(Mixed(parts=(inner,), widths=(K,)).fake(x), inner.fake(x))


def test_the_product_is_that_of_the_groups_and_reordering_fuses():
    x, w = outlying(9), outlying(N, seed=1)
    site = prepared(outlying())
    mixed = site.activation
    seen, weight = mixed.quantize(site.transform(x)), mixed.quantize(site.transform(w))
    fused = reference.reorder_quantize(x, site.transform.order, mixed)
    for part, own in zip(seen.parts, fused.parts, strict=True):
        assert torch.equal(part.codes, own.codes)
        assert torch.equal(part.scales, own.scales)
    parts = sum(reference.product(a, b) for a, b in zip(seen.parts, weight.parts, strict=True))
    torch.testing.assert_close(reference.product(seen, weight), parts, rtol=1e-12, atol=1e-12)
    bias = torch.linspace(-1, 1, N)
    for backend in ("torch", "auto"):
        layer = CompositeLinear(SiteInput(site.transform, mixed), weight, bias, dtype=torch.float32, backend=backend)
        error = (layer(x) - bias - reference.product(seen, weight)).abs()
        assert (error <= reference.bound(seen, weight) + 1e-5).all()
        assert torch.equal(layer.dequantize(), weight.dequantize())


def test_gptq_carries_errors_over_the_formats():
    x, weight = outlying(500), torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(3)
    x = x @ (torch.randn(K, K, generator=g) / K**0.5 + 0.5 * torch.eye(K))
    statistics = Statistics(hessian=(x.T @ x / len(x)).double())
    gptq, rtn = (s.solve(weight, MIXED, statistics).weight for s in (GPTQ(), RTN()))
    assert isinstance(gptq, Composite)
    loss = lambda q: ((q.dequantize() - weight) @ x.T).square().sum()  # noqa: E731
    assert loss(gptq) < 0.7 * loss(rtn)
    # One format in two groups is that format.
    inner = AbsMax(format=MXFP4, rule="rceil")
    whole = GPTQ(order="natural").solve(weight, inner, statistics).weight.dequantize()
    halves = GPTQ().solve(weight, Mixed(parts=(inner, inner), widths=(96, 128)), statistics).weight.dequantize()
    assert (whole == halves).double().mean() > 0.99


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_the_folder_computes_what_calibration_saw(tiny, text_file, tmp_path, solver):
    out = microbat.quantize(
        tiny("qwen2", hidden_size=128, intermediate_size=192),
        out=tmp_path / "q",
        method="micromix",
        solver=solver,
        scheme="W4A4KV8",
        settings={"unit": 32, "revision": "fp8"},
        calibration=str(text_file),
        **FAST,
    )
    verdict = verify(out)
    assert verdict.passed
    assert verdict.layers == 14
    assert verdict.error < 1e-6
    block = shards.read_block(out / folders.block_shard(0)).quantized
    assert all(isinstance(q, Composite) for q in block.weights.values())
    assert len({q.widths for q in block.weights.values()}) > 1
    report = json.loads((out / "report.json").read_text())
    assert 4.25 < report["bits_per_weight"] < 8.5
    output = CliRunner().invoke(app, ["inspect", str(out)]).output
    assert "mxfp4 x " in output
    assert "mxfp8_e4m3 x " in output
    with pytest.raises(ValueError, match="hold several formats side by side"):
        export(out, tmp_path / "out", target="transformers")


@pytest.mark.parametrize(
    ("settings", "scheme", "solver", "message"),
    [
        ({"lam": 2}, "W4A4", "", r"micromix\.lam=2"),
        ({"lam": 0.5}, "W4A4", "", "is for revision=fp8"),
        ({"unit": 48}, "W4A4", "", r"micromix\.unit=48"),
        ({"revision": "third"}, "W4A4", "", "revision"),
        ({}, "W4A8", "", "replace W4A8 by W4A4"),
        ({}, "W4A4:nvfp4", "", "not from nvfp4 and nvfp4"),
        ({}, "W4A4", "soar", "solver 'soar' does not know the weights of 'micromix'; it goes with rtn and gptq"),
    ],
)
def test_bad_requests_are_refused_by_the_recipe(settings, scheme, solver, message):
    with pytest.raises(ValueError, match=message):
        Recipe(model="m", method="micromix", scheme=scheme, settings=settings, solver=solver).methods()


def test_widths_that_are_no_multiple_of_the_unit(tiny):
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj': K=64 is not .* --set unit=64 fits"):
        pipeline.check(Recipe(model=str(tiny()), method="micromix"))


def test_groups_that_are_none():
    for widths in ((128, 96), (100, 60, 64), (224, 0, 0)):
        with pytest.raises(ValueError, match="group"):
            Mixed(parts=MIXED.parts, widths=widths)
    with pytest.raises(ValueError, match="tensor scale"):
        Mixed(parts=(AbsMax(format=NVFP4),), widths=(224,))
    with pytest.raises(ValueError, match="for a width of 96"):
        MIXED.fake(torch.zeros(2, 96))
    assert MXFP6_E3M2 in FORMATS
