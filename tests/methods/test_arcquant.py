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
from microbat.quantizers.residual import Residual, effective
from microbat.recipe import Recipe
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


def test_mxfp4_goes_the_same_way(tiny, text_file, tmp_path):
    out = microbat.quantize(
        tiny(), out=tmp_path / "q", method="arcquant", solver="rtn", calibration=str(text_file), **FAST
    )
    assert verify(out).passed
