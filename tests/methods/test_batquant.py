"""BATQuant on one real block of a tiny model: identities at its corners, and that it beats what it must beat."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import microbat
from microbat.calibrate.engine import calibrate
from microbat.calibrate.fake import FakeWeights, transformed
from microbat.calibrate.job import Job
from microbat.methods.arcquant import ARCQuant
from microbat.methods.batquant import BATQuant
from microbat.methods.gptq import GPTQ
from microbat.methods.learn import drawn
from microbat.methods.learned import Learned
from microbat.methods.rtn import RTN
from microbat.models.checkpoint import Checkpoint
from microbat.quantizers.clip import Clip
from microbat.recipe import Recipe
from microbat.scheme import Scheme
from microbat.transforms.kronecker import Kronecker
from microbat.verify import verify


class Memory:
    def __init__(self):
        self.blocks = {}

    def has(self, index):
        return False

    def save(self, index, block, module, record):
        self.blocks[index] = block

    def finish(self, tokens, outputs):
        pass


def quantize(path, preparers, solver=None, scheme="W4A4", rule="floor"):
    tokens = torch.randint(2, 90, (16, 32), generator=torch.Generator().manual_seed(5))
    memory = Memory()
    job = Job(
        checkpoint=Checkpoint(path),
        scheme=Scheme.parse(scheme, scale_rule=rule),
        preparers=preparers,
        solver=solver or RTN(),
        tokens=tokens,
        seed=0,
        precision="float32",
        device=torch.device("cpu"),
        scratch=Path(),
    )
    records = list(calibrate(job, memory, lambda *a: {}, lambda *a: None))
    return memory.blocks, records


def codes(blocks):
    return [q.codes for b in blocks.values() for q in b.weights.values()]


def test_nothing_on_is_rtn_bit_for_bit(tiny):
    off = BATQuant(transform="none", clip=False, weight_clip=False, epochs=0)
    bat, _ = quantize(tiny(), (off,))
    rtn, _ = quantize(tiny(), ())
    assert all(torch.equal(a, b) for a, b in zip(codes(bat), codes(rtn), strict=True))


def test_hadamard_start_untrained_is_the_fixed_block_hadamard(tiny):
    start, _ = quantize(tiny(), (BATQuant(transform="gpk", clip=False, weight_clip=False, epochs=0),))
    fixed, _ = quantize(tiny(), (BATQuant(transform="hadamard", clip=False, weight_clip=False, epochs=0),))
    same = torch.cat([(a == b).flatten() for a, b in zip(codes(start), codes(fixed), strict=True)])
    assert same.double().mean() > 0.999  # ties may fall otherwise by a float32 ulp


@pytest.mark.parametrize("transform", ["gpk", "naive_kron", "full"])
def test_training_lowers_the_loss_and_beats_rtn_and_the_fixed_hadamard(tiny, transform):
    _, rtn = quantize(tiny(), ())
    _, fixed = quantize(tiny(), (BATQuant(transform="hadamard", clip=False, weight_clip=False, epochs=0),))
    _, bat = quantize(tiny(), (BATQuant(transform=transform, epochs=20, lr=1e-2),))
    assert bat[0].loss[-1] < bat[0].loss[0]
    assert bat[0].error < fixed[0].error
    assert bat[0].error < 0.9 * rtn[0].error


@pytest.mark.parametrize("settings", [{"transform": "global"}, {"clip_scope": "global"}], ids=str)
def test_global_counterparts_of_table_4(tiny, settings):
    blocks, records = quantize(tiny(), (BATQuant(epochs=5, **settings),))
    assert records[0].loss[-1] < records[0].loss[0]
    site = blocks[0].sites[0]
    assert isinstance(site.transform, Kronecker) == ("transform" in settings)
    assert site.quantizer.whole == ("clip_scope" in settings)
    assert site.quantizer.ratios.shape == ((1, 2) if "clip_scope" in settings else (2, 2))


def test_last_steps_improve_on_nearest(tiny):
    preparer = BATQuant(epochs=15)
    _, nearest = quantize(tiny(), (preparer,), RTN())
    _, gptq = quantize(tiny(), (preparer,), GPTQ())
    _, learned = quantize(tiny(), (preparer,), Learned())
    assert gptq[0].error < nearest[0].error
    assert learned[0].error < nearest[0].error


def test_a_balanced_start_is_better_than_the_hadamard_matrix_before_any_training(tiny):
    settings = {"transform": "full", "epochs": 0, "clip": False, "weight_clip": False}
    for scheme in ("W4A4", "W4A4KV4"):
        _, hadamard = quantize(tiny("qwen3"), (BATQuant(**settings),), GPTQ(), scheme)
        _, balanced = quantize(tiny("qwen3"), (BATQuant(**settings, init="balanced"),), GPTQ(), scheme)
        assert balanced[0].error < 0.9 * hadamard[0].error


def test_a_factor_per_channel_takes_back_what_stands_out(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny())
    with torch.no_grad():
        for layer in model.model.layers:  # the function stays, powers of two being exact
            layer.input_layernorm.weight[::7] *= 32
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[:, ::7] /= 32
    model.save_pretrained(tmp_path / "outliers")
    _, without = quantize(tmp_path / "outliers", (BATQuant(epochs=5, channel_scale=0.0),), GPTQ())
    blocks, factors = quantize(tmp_path / "outliers", (BATQuant(epochs=5),), GPTQ())
    assert factors[0].error < 0.7 * without[0].error
    assert all(site.transform.name == "gpk" for site in blocks[0].sites)  # folded: nothing more runs online


def test_residual_channels_alone_are_arcquants(tiny):
    """One layer as wide as the other, so that a share is the same number of channels in each."""
    model = tiny("llama", intermediate_size=64)
    nothing = {"transform": "none", "weight_clip": False, "epochs": 0}
    bat, _ = quantize(model, (BATQuant(**nothing, residual=0.5),), GPTQ(), "W4A4:nvfp4", rule="")
    arc, _ = quantize(model, (ARCQuant(channels=32),), GPTQ(), "W4A4:nvfp4", rule="")
    assert all(torch.equal(a, b) for a, b in zip(codes(bat), codes(arc), strict=True))


@pytest.mark.parametrize("scheme", ["W4A4:nvfp4", "W4A4"])
def test_the_largest_channels_after_the_factors_are_quantized_twice(tiny, scheme):
    settings = {"epochs": 10, "refine_epochs": 0}
    _, without = quantize(tiny(), (BATQuant(**settings),), GPTQ(), scheme, rule="")
    blocks, residual = quantize(tiny(), (BATQuant(**settings, residual=0.5),), GPTQ(), scheme, rule="")
    assert residual[0].error < 0.8 * without[0].error
    for site in blocks[0].sites:
        assert site.transform.name == "ordered"
        assert (
            site.quantizer.channels == -(-site.transform.width // 64) * 32
        )  # NVFP4's too: products take 32 lanes at a time


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_folder_with_residual_channels_runs_as_it_was_calibrated(tiny, text_file, tmp_path, family):
    out = microbat.quantize(
        tiny(family),
        out=tmp_path / "q",
        method="batquant",
        solver="gptq",
        scheme="W4A4KV4",
        calibration=str(text_file),
        settings={"residual": 0.25, "epochs": 1, "refine_epochs": 1, "distill_epochs": 1},
        num_calibration_samples=4,
        max_seq_length=32,
        precision="float32",
    )
    verdict = verify(out)
    assert verdict.passed
    assert verdict.error < 1e-6
    assert all(layer["residual_channels"] for layer in json.loads((out / "report.json").read_text())["layers"])


def test_refining_keeps_the_codes_and_lowers_the_error(tiny):
    settings = {"epochs": 5, "transform": "full"}
    plain, before = quantize(tiny(), (BATQuant(**settings, refine_epochs=0),), GPTQ())
    refined, after = quantize(tiny(), (BATQuant(**settings, refine_epochs=10),), GPTQ())
    assert all(torch.equal(plain[0].weights[path].codes, q.codes) for path, q in refined[0].weights.items())
    assert after[0].error < 0.97 * before[0].error
    assert len(after[0].loss) == 3 * len(before[0].loss)


@pytest.mark.parametrize(
    ("solver", "scheme", "setting", "rounded"),
    [
        (GPTQ(), "W4A4", "auto", False),
        (GPTQ(), "W4A4", "rounded", True),
        (GPTQ(), "W4A8", "auto", True),
        (GPTQ(), "W4A16", "auto", True),
        (RTN(), "W4A4", "auto", True),
    ],
)
def test_weights_train_in_floats_where_the_solver_repairs_their_rounding(
    tiny, monkeypatch, solver, scheme, setting, rounded
):
    exact, clips = set(), set()
    make = FakeWeights._make

    def watched(self):
        weights = make(self)
        exact.update(
            torch.equal(w, transformed(self.weights[path], self.plan.transform)) for path, w in weights.items()
        )
        clips.update(isinstance(quantizer, Clip) for quantizer in self.plan.weights.values())
        return weights

    monkeypatch.setattr(FakeWeights, "_make", watched)
    quantize(tiny(), (BATQuant(epochs=1, training_weights=setting),), solver, scheme)
    assert exact == {not rounded}
    assert clips == {rounded}


@pytest.mark.parametrize("scheme", ["W4A4:nvfp4", "W4A8", "W4A16", "W8A8:int8"])
def test_every_block_format_works(tiny, scheme):
    preparer = BATQuant(epochs=1) if scheme != "W8A8:int8" else BATQuant(epochs=1, g=32)
    blocks, records = quantize(tiny("qwen3"), (preparer,), Learned(), scheme, rule="")
    assert len(blocks) == 2
    assert all(0 <= record.error < 1 for record in records)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match=r"batquant.channel_scale=2.0 must be from 0 to 1"):
        BATQuant(channel_scale=2.0)
    with pytest.raises(ValueError, match="g1=5"):
        BATQuant(g=32, g1=5)
    with pytest.raises(ValueError, match=r"batquant.residual=12 must be from 0 to 1, a share of the channels"):
        BATQuant(residual=12)
    with pytest.raises(
        ValueError, match=r"residual=0.1 goes with transforms within blocks .* not with transform=global"
    ):
        BATQuant(residual=0.1, transform="global")
    for scheme, why in (
        ("W4A8:nvfp4", "nvfp4 weights have 16, mxfp8_e4m3 activations 32"),
        ("W4A16", "scheme W4A16 has none"),
    ):
        with pytest.raises(ValueError, match=f"batquant.residual.* {why}"):
            Recipe(model="m", method="batquant", scheme=scheme, settings={"residual": 0.1}).methods()
    with pytest.raises(ValueError, match="init=balanced .* transform=full alone, not for 'gpk'"):
        BATQuant(init="balanced")


def test_mixed_inputs_take_each_number_from_one_stream_anew_at_every_step():
    data = SimpleNamespace(
        inputs=torch.ones(4, 64, 32), float_inputs=torch.zeros(4, 64, 32), generator=torch.Generator().manual_seed(0)
    )
    rows = torch.tensor([2, 0])
    first, second = drawn(data, rows, "mixed"), drawn(data, rows, "mixed")
    assert first.unique().tolist() == [0, 1]
    assert abs(first.mean() - 0.5) < 0.05
    assert 0.4 < (first != second).double().mean() < 0.6
    assert drawn(data, rows, "quantized").eq(1).all()
    assert drawn(data, rows, "float").eq(0).all()
