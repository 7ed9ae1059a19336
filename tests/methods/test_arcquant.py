"""ARCQuant: both rules for S, the order, what is gained over round to nearest, the folder, and what is refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

import microbat
from microbat import pipeline
from microbat.cli import app
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.export.compressed_tensors import export
from microbat.formats.microscaling import NVFP4
from microbat.methods.arcquant import ARCQuant, Outliers
from microbat.methods.base import Plan, SitePlan
from microbat.methods.rtn import RTN
from microbat.models.base import DECODER_SITES
from microbat.quantizers.base import AbsMax
from microbat.quantizers.residual import LANES, Residual, channels_for, effective
from microbat.recipe import Recipe
from microbat.runtime import reference
from microbat.unfinished import FolderKeeper
from microbat.verify import verify

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
NV = AbsMax(format=NVFP4)


def outlying(T=300, K=512, seed=0):
    """Channels of log-normal size and a few massive ones, as in the sheet."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, generator=g) * torch.exp(0.3 * torch.randn(K, generator=g))
    x[:, torch.randperm(K, generator=g)[:6]] *= 30
    return x


class Activations:
    """A block's data as far as a preparer that only looks at activations asks for it."""

    def __init__(self, x):
        self.x = x

    def watch(self, seen):
        for see in seen.values():
            for rows in self.x.split(70):
                see(rows[None])


def prepared(x, **settings):
    plan = Plan(sites=[SitePlan(site=DECODER_SITES[3], transform=None, activation=NV, weights={"mlp.down_proj": NV})])
    (site,) = ARCQuant(**settings).prepare(Activations(x), plan, RTN()).sites
    return site


def test_both_rules_count_what_they_say():
    x = outlying()
    outliers = Outliers(0.125)
    for rows in x.split(70):
        outliers.add(rows[None])
    largest = x.abs().amax(0)
    assert torch.equal(outliers.largest, largest)
    share = (x.abs() > x.abs().amax(1, keepdim=True) / 8).double().mean().item()
    assert outliers.channels("elements") == 64 * -(-int(torch.tensor(share * 512).ceil()) // 64)
    assert outliers.channels("channels") == 64 * -(-int((largest > largest.max() / 8).sum()) // 64)


def test_negative_outliers_count():
    x = outlying()
    one, two = prepared(x), prepared(-x.abs())
    assert one.activation == two.activation
    assert torch.equal(one.transform.order, two.transform.order)


def test_outliers_come_last_and_are_quantized_twice():
    x = outlying()
    site = prepared(x, channels=64)
    assert torch.equal(site.transform.order.long(), x.abs().amax(0).argsort(stable=True))
    mapped = site.transform(x)
    error = lambda y: (y - mapped).square().sum().item()  # noqa: E731
    plain = error(NV.fake(mapped))
    assert error(effective(site.activation, site.activation.fake(mapped))) < 0.35 * plain
    nested = [error(effective(q, q.fake(mapped))) for q in (prepared(x, channels=c).activation for c in (16, 64, 256))]
    assert nested == sorted(nested, reverse=True)
    everything = prepared(x, channels=512).activation
    assert error(effective(everything, everything.fake(mapped))) < 0.02 * plain


def test_no_channels_is_round_to_nearest_of_the_permuted():
    site = prepared(outlying(), channels=0)
    assert site.activation is NV
    assert prepared(torch.randn(40, 96), rule="elements").activation == Residual(inner=NV, channels=96)  # held to K


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def oracle(x, outer):
    """NVFP4 in float64 by a search: element values [T, G, 16], block scales as stored and before they were rounded [T, G, 1]."""
    x_TGB = x.double().unflatten(-1, (-1, 16))
    exact = x_TGB.abs().amax(-1, keepdim=True) / (6 * outer)
    scale = exact.float().to(torch.float8_e4m3fn).double().clamp(min=2.0**-9)
    u = x_TGB.abs() / (scale * outer)
    distance = (u[..., None] - E2M1).abs()
    # Of two at one distance the one at an even place, whose mantissa is even.
    place = (2 * distance - 1e-9 * (torch.arange(8) % 2 == 0)).argmin(-1)
    return E2M1[place].copysign(x_TGB), scale, exact


def a_power_of_two_scales(x):
    """``x`` with one number that makes its tensor scale 1 / 16, so that float32 and float64 divide alike."""
    x = 100 * x / x.abs().max()
    x[3, x.abs().amax(0).argmax()] = 2688 / 16
    return x


def test_no_channels_in_order_is_round_to_nearest_bit_for_bit():
    x = a_power_of_two_scales(outlying())
    x = x[:, x.abs().amax(0).argsort()]
    site = prepared(x, channels=0)
    assert site.transform.order.tolist() == list(range(512))
    got = site.activation.quantize(site.transform(x))
    values, scale, _ = oracle(x, 1 / 16)
    assert got.tensor_scale == 1 / 16
    assert torch.equal(got.scales.double(), scale[..., 0])
    assert torch.equal(NVFP4.element.decode(got.codes).double(), values.flatten(1))
    # Out of order it is round to nearest of the permuted, whose blocks hold other channels.
    shuffled = x[:, torch.randperm(512, generator=torch.Generator().manual_seed(1))]
    moved = prepared(shuffled, channels=0)
    assert torch.equal(moved.activation.fake(moved.transform(shuffled)), got.dequantize())
    assert not torch.equal(moved.activation.fake(shuffled)[:, moved.transform.order.long()], got.dequantize())


def test_residuals_are_of_what_the_stored_scale_decodes_to():
    """The authors' kernels for Qwen2.5-7B's widths take them of the block scale before E4M3 rounds it: what that rounding did
    then stays in the error, ten times of it."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    outer = x.abs().max().double() / 2688
    values, scale, exact = oracle(x, outer)
    relative = lambda y: ((y - x).square().sum() / x.double().square().sum()).item()  # noqa: E731

    def twice(taken):
        again, rescale, _ = oracle((x.unflatten(-1, (-1, 16)) - values * taken * outer).flatten(1), outer)
        return relative(((values * scale + again * rescale) * outer).flatten(1))

    site = Residual(inner=NV, channels=512)
    ours = relative(effective(site, site.quantize(x).dequantize()))
    assert twice(exact) == pytest.approx(7.56e-4, rel=0.02)
    assert ours == pytest.approx(7.5e-5, rel=0.02)
    assert ours == pytest.approx(twice(scale), rel=1e-4)


def test_the_bound_is_void_for_tokens_that_are_tiny_in_their_batch():
    """A residual's block scale below 2^-6 is subnormal, a whole number of steps of 2^-9: the error is held in those steps, half
    the widest gap of E2M1 or what the scale, rounded down by half a step, cuts off of 6; not by the block's largest."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    x[32:] *= 0.01
    x[0, 0] = 3000
    site = Residual(inner=NV, channels=512)
    q = site.quantize(x)
    second = q.scales.unflatten(-1, (-1, 2))[..., 1]
    error = (effective(site, q.dequantize()) - x).unflatten(-1, (-1, 16)).abs().amax(-1)
    share = error / x.unflatten(-1, (-1, 16)).abs().amax(-1)
    tiny, bound = second < 2.0**-6, (1.0625 / 6) ** 2
    assert tiny[32:].all()
    assert share[~tiny].max() <= bound
    assert (share[tiny] > bound).float().mean() > 0.1
    assert share[tiny].max() > 1.5 * bound
    steps = q.tensor_scale * second.clamp(min=3 * 2.0**-9)
    assert (error <= steps)[tiny].all()
    assert ((second * 2**9).frac()[tiny] == 0).all()  # real subnormals, where the authors' fake path has finer ones
    assert torch.equal(site.fake(x), q.dequantize())


@pytest.mark.parametrize("power", [-40, 3, 11])
def test_powers_of_two_change_only_the_tensor_s_scale(power):
    """Not the order nor the number of channels either."""
    x = outlying()
    one, two = prepared(x), prepared(x * 2.0**power)
    assert torch.equal(one.transform.order, two.transform.order)
    assert one.activation == two.activation
    q, scaled = one.activation.quantize(one.transform(x)), two.activation.quantize(two.transform(x * 2.0**power))
    assert torch.equal(q.codes, scaled.codes)
    assert torch.equal(q.scales, scaled.scales)
    assert scaled.tensor_scale == q.tensor_scale * 2.0**power


def test_a_tensor_whose_largest_number_is_negative():
    """The authors' scale is of max W, which clips this one's blocks; ours of max |W|."""
    x = outlying(T=40)
    x[:, :] = torch.where(x.abs() > 2, -x.abs(), x)
    site = prepared(x, channels=64)
    q, mirrored = (site.activation.quantize(site.transform(y)) for y in (x, -x))
    assert x.max() < 0.1 * -x.min()
    assert q.tensor_scale == -x.min() / 2688
    assert torch.equal(q.scales, mirrored.scales)
    assert torch.equal(q.dequantize(), -mirrored.dequantize())


def test_nothing_left_leaves_codes_of_zero_and_the_product_as_it_was():
    """x of numbers that NVFP4 holds, a 6 in each block: for S = 96 of 160 channels and for none the same bits."""
    g = torch.Generator().manual_seed(0)
    values = E2M1[torch.randint(8, (7, 10, 16), generator=g)].float() * (
        2 * torch.randint(2, (7, 10, 16), generator=g) - 1
    )
    values[..., 5] = -6
    scale = torch.exp2(torch.randint(-5, 8, (7, 10, 1), generator=g).float()) * 1.125
    scale[2, 7] = 448
    values[4, 9, 15] = 1
    x = (values * scale / 16).flatten(1)
    site, w = Residual(inner=NV, channels=96), NV.quantize(torch.randn(5, 160, generator=g))
    q = site.quantize(x)
    primary, again = q.codes[:, 64:].unflatten(-1, (6, 2, 16)).unbind(-2)
    assert (again == 0).all()
    assert torch.equal(primary.flatten(1), NV.quantize(x).codes[:, 64:])
    assert torch.equal(effective(site, q.dequantize()), x)
    assert torch.equal(reference.product(q, site.facing(w)), reference.product(NV.quantize(x), w))
    x[4, 159] *= 1.2  # and one that is not on the grid is the only one with a residual
    changed = site.quantize(x).codes[:, 64:].unflatten(-1, (6, 2, 16))[..., 1, :].flatten(1)
    assert changed.nonzero().tolist() == [[4, 95]]


def test_copies_are_what_quantizing_the_last_columns_anew_gives():
    w = NV.quantize(outlying(T=24, K=160))
    wide = Residual(inner=NV, channels=96).facing(w)
    last = outlying(T=24, K=160)[:, 64:]
    anew = NV.encode(last, NV.scales_within(last, w.tensor_scale))
    assert torch.equal(wide.codes[:, 64:].unflatten(-1, (6, 2, 16))[..., 1, :].flatten(1), anew.codes)
    assert torch.equal(wide.scales[:, 4:].unflatten(-1, (6, 2))[..., 1], anew.scales)


@pytest.mark.parametrize("solver", ["gptq", "soar"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_folder_computes_what_calibration_saw(tiny, text_file, tmp_path, family, solver, monkeypatch):
    captured = {}
    save = FolderKeeper.save

    def keep(self, index, block, module, record):
        captured[index] = {path: (q.codes, q.scales) for path, q in block.weights.items()}
        save(self, index, block, module, record)

    monkeypatch.setattr(FolderKeeper, "save", keep)
    out = microbat.quantize(
        tiny(family),
        out=tmp_path / "q",
        method="arcquant",
        solver=solver,
        scheme="W4A4KV16:nvfp4",
        calibration=str(text_file),
        **FAST,
    )
    blocks = [shards.read_block(out / folders.block_shard(i)).quantized for i in range(2)]
    for index, block in enumerate(blocks):
        for site in block.sites:
            assert site.transform.name == "permutation"
            assert isinstance(site.quantizer, Residual)
            for path in site.consumers:
                q = block.weights[path]
                assert torch.equal(q.codes, captured[index][path][0])
                assert torch.equal(q.scales, captured[index][path][1])
                assert q.shape[1] - site.quantizer.channels == block.shape(path)[1]
                # Both copies of a column are the same, whoever rounded it.
                original = site.quantizer.original(q.dequantize())
                assert torch.equal(site.quantizer.facing(original), q.dequantize())
    verdict = verify(out)
    assert verdict.passed
    assert verdict.layers == 14
    assert verdict.error < 1e-6  # every packed layer, K + S wide, against the one of calibration


def test_a_quantized_cache_and_inspect(tiny, text_file, tmp_path):
    """KV8 (the format without a tensor scale) beside residual channels; bits per weight count them."""
    out = microbat.quantize(
        tiny("qwen3"), out=tmp_path / "q", method="arcquant", scheme="W4A4KV8:nvfp4", calibration=str(text_file), **FAST
    )
    model = microbat.load(out)
    ids = torch.arange(2, 12)[None]
    made = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=microbat.QuantizedCache(model))
    assert made.shape == (1, 14)
    assert verify(out).passed
    report = json.loads((out / "report.json").read_text())
    for layer in report["layers"]:
        (_, width), extra = layer["shape"], layer["residual_channels"]
        assert width in (64, 96, 128)
        assert layer["bits"] == pytest.approx(4.5 * (width + extra) / width, abs=0.02)
    output = CliRunner().invoke(app, ["inspect", str(out)]).output
    assert "nvfp4 + 64 channels" in output
    assert "permutation" in output
    for target in ("transformers", "vllm"):
        with pytest.raises(ValueError, match="residual channels of the activation") as error:
            export(out, tmp_path / "out", target=target)
        assert "vllm-plugin" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "scheme", "message"),
    [
        ({"threshold": 1.5}, "W4A4:nvfp4", r"arcquant\.threshold=1\.5"),
        ({"channels": -16}, "W4A4:nvfp4", r"arcquant\.channels=-16"),
        ({"channels": 24}, "W4A4:nvfp4", "not a multiple of a block of 16"),
        ({}, "W4A16:nvfp4", "W4A16:nvfp4 has none"),
        ({}, "W4A8:nvfp4", "nvfp4 weights have 16, mxfp8_e4m3 activations 32"),
        ({}, "W8A8:int8", "int8 activations a row"),
    ],
)
def test_bad_requests_are_refused_by_the_recipe(settings, scheme, message):
    with pytest.raises(ValueError, match=message):
        Recipe(model="m", method="arcquant", scheme=scheme, settings=settings).methods()


def test_more_channels_than_a_layer_has(tiny):
    recipe = Recipe(model=str(tiny()), method="arcquant", scheme="W4A4:nvfp4", settings={"channels": 80})
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn.q_proj': arcquant.channels=80 is more than"):
        pipeline.check(recipe)


def test_widths_are_what_products_take(tiny):
    recipe = Recipe(model=str(tiny()), method="arcquant", scheme="W4A4:nvfp4", settings={"channels": 16})
    with pytest.raises(
        ValueError, match=r"q_proj': K=64 and arcquant.channels=16 .* of 32 together, .* --set channels=32"
    ):
        pipeline.check(recipe)
    for width, wanted, block, channels in ((576, 72, 16, 96), (1536, 192, 16, 192), (112, 14, 16, 16), (96, 90, 16, 96),
                                           (48, 40, 16, 48), (576, 72, 32, 96), (576, 0, 16, 0)):  # fmt: skip
        assert channels_for(width, wanted, block) == channels
        assert not channels or (width + channels) % LANES == 0


def test_mxfp4_goes_the_same_way(tiny, text_file, tmp_path):
    out = microbat.quantize(
        tiny(), out=tmp_path / "q", method="arcquant", solver="rtn", calibration=str(text_file), **FAST
    )
    assert verify(out).passed
