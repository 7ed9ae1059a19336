"""D2Quant: columns fold into up and change nothing, shifts cancel what attention lost, biases travel with the folder."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import microbat
from microbat.calibrate.inputs import correction
from microbat.export.compressed_tensors import export
from microbat.export.folder import block_shard
from microbat.export.shard import read_block
from microbat.formats.integer import INT2
from microbat.formats.ternary import DUAL2
from microbat.methods.base import SitePlan
from microbat.methods.d2quant import D2Quant
from microbat.models.base import DECODER_SITES
from microbat.models.checkpoint import Checkpoint
from microbat.models.llama import LLAMA
from microbat.quantizers import sums
from microbat.quantizers.base import AbsMax
from microbat.quantizers.dual import DualScale
from microbat.recipe import Recipe
from microbat.runtime.fused import fuse, not_floats
from microbat.runtime.load import load_dequantized
from microbat.verify import verify

FAST = {"num_calibration_samples": 6, "max_seq_length": 48, "precision": "float32"}
SIZE = {"hidden_size": 128, "intermediate_size": 192}
NORMED = next(site for site in DECODER_SITES if site.name == "up")
TOKENS = torch.arange(2, 40)[None]


def quantized(model, out, text, scheme="W2A16:int2_g64", **fields):
    return microbat.quantize(model, out=out, method="d2quant", scheme=scheme, calibration=text, **{**FAST, **fields})


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    """A folder without rotation, so that its float model is the one on disk."""
    out = tmp_path_factory.mktemp("made") / "q"
    settings = {"rotate": False}
    return quantized(tiny("llama", **SIZE), out, str(text_file), solver="gptq", settings=settings)


@pytest.mark.parametrize(
    ("kind", "start", "end", "uniform"),
    [("gaussian", 0.129, 0.1136, 0.138), ("t", 0.255, 0.181, 0.214), ("columns", 0.100, 0.063, 0.224)],
)
def test_errors_of_the_sheet(kind, start, end, uniform):
    """On the numbers of its own run, which NumPy draws: with log-normal columns a few of them are the error, and another draw's
    end is anywhere from 0.06 to 0.10."""
    g = np.random.default_rng(0)
    drawn = {"gaussian": g.standard_normal((512, 128)), "t": g.standard_t(4, (512, 128))}
    drawn["columns"] = g.standard_normal((512, 128)) * np.exp(g.standard_normal(128))
    x = torch.from_numpy(drawn[kind]).float()
    relative = lambda y: ((y - x).square().sum() / x.square().sum()).item()  # noqa: E731
    columns = x.abs().mean(0, keepdim=True)
    numbers, codes = sums.start(x[:, None], DUAL2, columns)
    started = sums.chosen(codes, sums.values_of(numbers, DUAL2)) * columns
    assert relative(started[:, 0]) == pytest.approx(start, abs=6e-4)
    assert relative(DualScale(format=DUAL2).quantize(x).dequantize()) == pytest.approx(end, abs=6e-4)
    assert relative(AbsMax(format=INT2, rule="mse").quantize(x).dequantize()) == pytest.approx(uniform, abs=1e-3)


def test_columns_and_codes_follow_a_scale_of_each_column_and_rows_do_not():
    """The columns' step and the codes' are each column's own. The rows' sums weigh a column by the square of its factor, so that
    the fit as a whole, other than the sheet has it, is another one."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(96, 1, 128, generator=g), torch.exp2(torch.randint(-2, 3, (1, 128), generator=g).float())
    columns = x.abs().mean(0)
    numbers, codes = sums.start(x, DUAL2, columns)
    values = sums.values_of(numbers, DUAL2)
    found = sums.solve_columns(x, sums.chosen(codes, values), columns)
    assert torch.equal(sums.solve_columns(t * x, sums.chosen(codes, values), t * columns), t * found)
    assert torch.equal(sums.nearest(t * x / (t * found), values), sums.nearest(x / found, values))
    rows = sums.solve(x, codes, numbers, DUAL2, columns), sums.solve(t * x, codes, numbers, DUAL2, t * columns)
    assert (rows[1] / rows[0] - 1).abs().mean() > 0.01


class Stub:
    """A site's stream with given batches."""

    def __init__(self, teacher, quantized):
        self.plan = SitePlan(site=NORMED, transform=None, activation=None, weights={})
        self.teacher, self.quantized = (lambda t=t: iter(t.split(2)) for t in (teacher, quantized))


def test_a_shift_leaves_no_mean_and_takes_its_square_off_the_error():
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 7, 24, generator=g)
    student = teacher + 0.3 * torch.randn(24, generator=g) + 0.1 * torch.randn(5, 7, 24, generator=g)
    shift = correction(Stub(teacher, student), (D2Quant(),))
    left = (teacher - student - shift).flatten(0, 1)
    assert left.mean(0).abs().max() < 1e-6
    before = (teacher - student).flatten(0, 1).double().square().mean(0)
    torch.testing.assert_close(before - left.double().square().mean(0), shift.double().square(), rtol=1e-4, atol=1e-7)


def test_shifts_are_held_to_ten():
    assert D2Quant().shift(torch.tensor([-11.0, 3.0, 40.0])).tolist() == [-10, 3, 10]


def test_only_norms_are_corrected_and_only_when_asked():
    assert [site.name for site in DECODER_SITES if D2Quant().corrects(site)] == ["qkv", "up"]
    assert not any(D2Quant(correct=False).corrects(site) for site in DECODER_SITES)
    assert correction(Stub(torch.ones(2, 3, 4), torch.zeros(2, 3, 4)), (D2Quant(correct=False),)) is None


def test_the_folder_holds_plain_formats_and_biases(made):
    for index in range(2):
        block = read_block(made / block_shard(index)).quantized
        formats = {path: q.format.name for path, q in block.weights.items()}
        assert formats.pop("mlp.down_proj") == "dual2_g64"
        assert set(formats.values()) == {"int2_g64"}
        assert all(q.columns is None for q in block.weights.values())
        assert sorted(block.biases) == ["mlp.gate_proj", "mlp.up_proj"]
    assert verify(made).passed
    report = json.loads((made / "report.json").read_text())
    assert report["bits_per_weight"] == pytest.approx(2.5)  # 2, and two numbers of 16 bits a group of 64


def test_biases_are_the_shift_through_the_rounded_weights(tiny, text_file, tmp_path, monkeypatch):
    """One shift of the norm's output explains both biases; up's rows have taken the columns' factors since."""
    shifts = []
    own = D2Quant.shift
    monkeypatch.setattr(D2Quant, "shift", lambda self, deviation: shifts.append(own(self, deviation)) or shifts[-1])
    out = quantized(tiny("llama", **SIZE), tmp_path / "q", str(text_file), solver="rtn", settings={"rotate": False})
    block = read_block(out / block_shard(0)).quantized
    for path in ("mlp.gate_proj", "mlp.up_proj"):
        expected = block.weights[path].dequantize() @ shifts[0]
        scale = expected.abs().max().item()
        torch.testing.assert_close(block.biases[path], expected, rtol=2e-2, atol=1e-2 * scale)
    assert shifts[0].abs().max() > 1e-3


def test_nothing_is_shifted_where_attention_is_in_float(tiny, text_file, tmp_path):
    out = quantized(
        tiny("llama", **SIZE),
        tmp_path / "q",
        str(text_file),
        solver="rtn",
        ignore=("re:self_attn",),
        settings={"rotate": False},
    )
    assert read_block(out / block_shard(0)).quantized.biases == {}
    assert verify(out).passed


@pytest.mark.parametrize("kept", [(), ("re:up_proj$",)], ids=["up packed", "up in float"])
def test_folding_leaves_the_function_as_it_was(tiny, text_file, tmp_path, monkeypatch, kept):
    """The block with columns folded against the one with them in down: scales of up are rounded once more, nothing else."""
    from microbat.calibrate import block as calibration

    seen = []
    own = calibration._folded

    def watched(block, plans, solved):
        unfolded = {path: q.dequantize() for path, q in solved.codes.items()}
        up = unfolded.get("mlp.up_proj", block.mlp.up_proj.weight.clone())
        codes, biases = own(block, plans, solved)
        seen.append((unfolded["mlp.down_proj"], up, solved.codes, codes, block.mlp.up_proj.weight))
        return codes, biases

    monkeypatch.setattr(calibration, "_folded", watched)
    quantized(
        tiny("llama", **SIZE), tmp_path / "q", str(text_file), solver="gptq", ignore=kept, settings={"rotate": False}
    )
    down, up, before, after, stored = seen[0]
    gate, x = torch.randn(5, 192), torch.randn(5, 128)
    expected = (gate * (x @ up.T)) @ down.T
    folded = after["mlp.up_proj"].dequantize() if not kept else stored
    got = (gate * (x @ folded.T)) @ after["mlp.down_proj"].dequantize().T
    assert (got - expected).norm() < (1e-6 if kept else 4e-3) * expected.norm()
    if not kept:
        assert torch.equal(before["mlp.up_proj"].codes, after["mlp.up_proj"].codes)


def test_a_bias_is_carried_by_every_way_of_loading(made):
    """microbat.load, transformers, the layers of the vLLM plugin: the same logits, other than without the biases."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = load_dequantized(made)(TOKENS).logits
        packed = microbat.load(made)
        torch.testing.assert_close(packed(TOKENS).logits, expected, rtol=1e-3, atol=1e-3)
        theirs = AutoModelForCausalLM.from_pretrained(made)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-3, atol=1e-3)
        for block in packed.model.layers:
            block.mlp.up_proj.bias.zero_()
        assert (packed(TOKENS).logits - expected).abs().max() > 1e-2
    stored = read_block(made / block_shard(0))
    x = torch.randn(3, 128)
    fused = fuse(stored, ["mlp.gate_proj", "mlp.up_proj"], dtype=torch.float32, biases=False)(x)
    layer = load_dequantized(made).model.layers[0].mlp
    torch.testing.assert_close(fused, torch.cat([layer.gate_proj(x), layer.up_proj(x)], dim=-1), rtol=1e-4, atol=1e-4)
    import re

    left = re.compile(not_floats("model.layers", ["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]))
    assert left.match("model.layers.0.mlp.up_proj.bias")
    assert not left.match("model.layers.0.mlp.gate_proj.bias")


def test_exports_refuse_the_bias(made, tmp_path):
    with pytest.raises(
        ValueError, match=r"mlp.gate_proj, mlp.up_proj were given a bias, .*--set correct=false.* \(2 blocks\)"
    ):
        export(made, tmp_path / "e", target="transformers")


def test_a_bias_of_another_size_is_refused(made, tmp_path):
    from microbat.export.shard import check_fit

    shard = made / block_shard(0)
    stored = read_block(shard)
    wrong = dataclasses.replace(stored.quantized, biases={"mlp.up_proj": torch.zeros(5)})
    block = Checkpoint(made, index="microbat.safetensors.index.json").skeleton().model.layers[0]
    with pytest.raises(ValueError, match="mlp.up_proj.bias is .5,., not one number a row"):
        check_fit(block, dataclasses.replace(stored, quantized=wrong), shard)


def test_a_layer_that_had_a_bias_keeps_one_of_its_own(tiny, text_file, tmp_path):
    """Llama with mlp_bias: what calibration adds goes on top, and both are in the folder once."""
    out = quantized(
        tiny("llama", mlp_bias=True, **SIZE), tmp_path / "q", str(text_file), solver="rtn", settings={"rotate": False}
    )
    assert verify(out).passed
    with safe_open(out / block_shard(0), framework="pt") as file:
        assert [k for k in file.keys() if "up_proj.bias" in k] == ["model.layers.0.mlp.up_proj.bias"]  # noqa: SIM118


@pytest.mark.parametrize(("scheme", "solver"), [("W3A16KV8:int3_g64,mxfp8_e4m3", "gptaq"), ("W2A16:int2_g64", "")])
def test_rotated_from_model_to_folder_and_back(tiny, text_file, tmp_path, scheme, solver):
    out = quantized(tiny("qwen3", **SIZE), tmp_path / "q", str(text_file), scheme, solver=solver)
    assert verify(out).passed
    assert json.loads((out / "recipe.json").read_text())["methods"][1]["name"] == "gptaq"


def test_an_interrupted_run_goes_on(tiny, text_file, tmp_path, monkeypatch, made):
    """The first block, read back with its bias, gives the second the same inputs."""
    from microbat.unfinished import FolderKeeper

    own = FolderKeeper.save

    def stop(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        own(self, index, *rest)

    monkeypatch.setattr(FolderKeeper, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        quantized(tiny("llama", **SIZE), tmp_path / "q", str(text_file), solver="gptq", settings={"rotate": False})
    monkeypatch.setattr(FolderKeeper, "save", own)
    out = quantized(tiny("llama", **SIZE), tmp_path / "q", str(text_file), solver="gptq", settings={"rotate": False})
    for index in range(2):
        assert (out / block_shard(index)).read_bytes() == (made / block_shard(index)).read_bytes()


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        ("W4A16", {}, "d2quant is for weights of 2 and 3 bits .int2, int2_g64, int3, int3_g64., not for mxfp4"),
        ("W2A16:ternary", {}, "not for ternary"),
        ("W2A8", {}, "keeps activations in 16 bits, and scheme W2A8 quantizes them to mxfp8_e4m3; choose W2A16"),
        ("W2A16", {"rounds": 0}, "d2quant.rounds=0 must be at least 1"),
    ],
)
def test_what_means_nothing_is_refused(scheme, settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(model="m", method="d2quant", scheme=scheme, settings=settings).methods()


def test_other_solvers_and_families_are_refused(tiny, tmp_path, monkeypatch, text_file):
    with pytest.raises(ValueError, match="solver 'learned' does not know the weights of 'd2quant'"):
        Recipe(model="m", method="d2quant", solver="learned", scheme="W2A16").methods()
    sites = tuple(dataclasses.replace(site, gated=False) for site in LLAMA.sites)
    monkeypatch.setattr("microbat.models.llama.LLAMA", dataclasses.replace(LLAMA, sites=sites))
    recipe = {"method": "d2quant", "scheme": "W2A16", "calibration": str(text_file)}
    with pytest.raises(ValueError, match="'d2quant' cannot act on family 'llama': none of its sites is gated"):
        microbat.quantize(tiny("llama", **SIZE), out=tmp_path / "q", **recipe)


def test_a_width_that_does_not_split_is_refused_with_the_layer(tiny, tmp_path, text_file):
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.0.mlp.down_proj': K=192 is not a multiple of int2's block of 128"
    ):
        quantized(tiny("llama", **SIZE), tmp_path / "q", str(text_file), "W2A16")
