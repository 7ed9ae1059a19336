"""verify: passes what is whole, fails what was altered, and tells an engine that computes something else."""

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import microbat
from microbat.cli import app
from microbat.engines import transformers as engine
from microbat.engines import vllm
from microbat.engines.base import Run, watched
from microbat.export import compressed_tensors
from microbat.export import folder as folders
from microbat.linear import SiteInput
from microbat.quantizers.base import AbsMax
from microbat.runtime.load import load
from microbat.runtime.packed import PackedLinear
from microbat.scheme import formats
from microbat.verify import Altered, verify

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
needs_theirs = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    """Folders by method, made once."""

    def get(method, **options):
        out = tmp_path_factory.mktemp(method) / "q"
        options = {"calibration": str(text_file), **FAST, **options}
        return microbat.quantize(tiny("qwen3"), out=out, method=method, **options)

    return {
        "gptq": get("gptq"),
        "batquant": get("batquant", settings={"epochs": 1}, scheme="W4A4KV4"),
        "W4A16": get("gptq", scheme="W4A16"),
    }


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_activations_with_one_scale_a_call(tiny, text_file, tmp_path):
    """Calibration computed them beside other sequences, under another scale: its outputs are no reference."""
    options = {"calibration": str(text_file), **FAST}
    out = microbat.quantize(tiny(), out=tmp_path / "q", method="rtn", scheme="W4A4:nvfp4", **options)
    assert verify(out).divergence < 1e-6


@pytest.mark.parametrize("method", ["gptq", "batquant"])
@pytest.mark.parametrize("engine", ["microbat", "transformers"])
def test_a_microbat_folder(made, method, engine):
    verdict = verify(made[method], engine=engine)
    assert verdict.passed
    assert (verdict.layers, verdict.engine, verdict.error) == (14, engine, 0)
    assert verdict.divergence < 1e-6


@pytest.mark.parametrize("engine", ["microbat", "transformers"])
def test_both_multiply_from_the_packed_bits(made, monkeypatch, engine):
    """With 16-bit activations sums round, and so show that they ran in another order than calibration's."""
    products = []
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda layer, x: products.append(layer) or forward(layer, x))
    verdict = verify(made["W4A16"], engine=engine)
    assert len(set(products)) == verdict.layers == 14
    assert verdict.passed


def test_the_proof_is_what_calibration_computed(made):
    sample, outputs = folders.read_proof(made["batquant"])
    model = microbat.load(made["batquant"])
    hidden = model.model(**sample, output_hidden_states=True)
    assert outputs.shape == (1, 32, 64)
    torch.testing.assert_close(model.model.norm(outputs), hidden.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_folder_from_before_proofs(made, tmp_path):
    copy = shutil.copytree(made["gptq"], tmp_path / "q")
    (copy / folders.PROOF).unlink()
    assert verify(copy).passed


@pytest.mark.parametrize("name", sorted(formats()))
def test_every_format(tiny, text_file, tmp_path, name):
    """Of weights; activations stay in 16 bits, which every format of weights can meet."""
    model = tiny("llama", hidden_size=128, intermediate_size=256)
    settings = {"method": "rtn", "calibration": str(text_file), **FAST, "num_calibration_samples": 2}
    out = microbat.quantize(model, out=tmp_path / "q", scheme=f"W{formats()[name].element.bits}A16:{name}", **settings)
    assert json.loads((out / "report.json").read_text())["layers"][0]["format"] == name
    verdict = verify(out)
    assert verdict.passed, verdict
    assert verdict.layers == 14


@needs_theirs
@pytest.mark.filterwarnings("ignore")
def test_an_export(made, tmp_path):
    out = compressed_tensors.export(made["gptq"], tmp_path / "ct", target="transformers")
    assert verify(out) == verify(out, engine="transformers")
    output = run("verify", out)
    assert "codes of 14 linear layers: equal, bit for bit" in output
    assert "passed" in output


def alter(file, name, change):
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight_packed", 17),
        ("model.layers.1.mlp.up_proj.weight_scale", 3),
        ("model.layers.1.input_layernorm.weight", 1.5),
    ],
)
def test_an_altered_export_fails(made, tmp_path, name, value):
    out = compressed_tensors.export(made["gptq"], tmp_path / "ct", target="transformers")
    file = "model-00002-of-00003.safetensors"
    alter(out / file, name, lambda tensor: tensor.flatten()[2:3].fill_(value))
    output = run("verify", out, code=1)
    assert file in output
    assert name in output


def test_an_export_of_other_codes_fails(made, tmp_path):
    out = compressed_tensors.export(made["gptq"], tmp_path / "ct", target="transformers")
    said = json.loads((out / "microbat.json").read_text())
    said["codes"]["model.layers.0.mlp.down_proj"] = "0" * 16
    (out / "microbat.json").write_text(json.dumps(said))
    with pytest.raises(Altered, match=r"layers.0.mlp.down_proj does not decode to the codes"):
        verify(out)


def test_an_altered_folder_fails(made, tmp_path):
    copy = shutil.copytree(made["gptq"], tmp_path / "q")
    shard = copy / folders.block_shard(0)
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in run("verify", copy, code=1)


def drops_activation_format(model):
    for module in model.modules():
        if isinstance(module, SiteInput):
            module.quantizer = None


def takes_another_scale_rule(model):
    for module in model.modules():
        if isinstance(module, SiteInput):
            module.quantizer = AbsMax(format=module.quantizer.format, rule="floor")


@pytest.mark.parametrize("mistake", [drops_activation_format, takes_another_scale_rule])
def test_an_engine_that_computes_something_else_fails(made, monkeypatch, mistake):
    def mistaken(self, folder, tokens, layers, images):
        model = load(folder)
        mistake(model)
        return watched(model, tokens, layers, images)

    monkeypatch.setattr(engine.Transformers, "run", mistaken)
    verdict = verify(made["gptq"], engine="transformers")
    assert not verdict.passed
    assert verdict.error > 100 * verdict.error_bound
    assert "FAILED" in run("verify", made["gptq"], "--engine", "transformers", code=1)


def test_an_engine_that_does_not_show_its_layers(made, monkeypatch):
    def logits_only(self, folder, tokens, layers, images):
        return dataclasses.replace(watched(load(folder), tokens, [], images), layers={})

    monkeypatch.setattr(engine.Transformers, "run", logits_only)
    verdict = verify(made["gptq"], engine="transformers")
    assert verdict.error is None
    assert verdict.passed


def test_wrong_requests(made, tiny, text_file, tmp_path, monkeypatch):
    assert "did you mean 'transformers'" in run("verify", made["gptq"], "--engine", "transformer", code=2)
    assert "not a microbat folder" in run("verify", tiny(), code=2)
    out = compressed_tensors.export(made["gptq"], tmp_path / "ct", target="transformers")
    assert "--engine transformers" in run("verify", out, "--engine", "microbat", code=2)

    for_vllm = microbat.quantize(
        tiny(), out=tmp_path / "q", method="rtn", scheme="W8A8:int8", calibration=str(text_file), **FAST
    )
    served = compressed_tensors.export(for_vllm, tmp_path / "int8", target="vllm")
    assert "was exported for vllm; transformers would compute something else" in run("verify", served, code=2)

    def missing(self, folder, tokens, layers, images):
        raise ImportError("no module of that name")

    monkeypatch.setattr(engine.Transformers, "run", missing)
    assert "pip install transformers compressed-tensors" in run("verify", out, code=2)


def test_a_run_of_another_process_arrives_as_it_was(tmp_path):
    """Layers that read one activation, experts with what was routed to them, an output that is not contiguous."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 3, 5, generator=generator, dtype=torch.bfloat16)
    layers = {
        "model.layers.0.q_proj": ((x,), torch.randn(1, 7, 3, generator=generator).mT),
        "model.layers.0.k_proj": ((x,), x.float()),
        "model.layers.0.mlp.experts": ((x[0], torch.tensor([[2], [0], [1]]), x[0, :, :1]), x[0]),
    }
    sent = Run(logits=torch.randn(3, 11, generator=generator), dtype=torch.bfloat16, layers=layers)
    vllm._write_run(sent, tmp_path / "answer")
    got = vllm._read_run(tmp_path / "answer")
    assert got.dtype == sent.dtype
    assert torch.equal(got.logits, sent.logits)
    assert got.layers.keys() == layers.keys()
    for name, (inputs, output) in layers.items():
        assert len(got.layers[name][0]) == len(inputs)
        for there, here in zip((*got.layers[name][0], got.layers[name][1]), (*inputs, output), strict=True):
            assert there.dtype == here.dtype
            assert torch.equal(there, here)


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("", "it ended without a word"),
        ("INFO loading\nkilled\n", "killed"),
        ("Traceback\n  File x\nValueError: bad\nINFO shutting down\n", "ValueError: bad"),
        (
            "pydantic.ValidationError: 1 error for C\n  Value error, bad\n    See y\n\nINFO\n",
            "1 error for C Value error, bad See y",
        ),
    ],
)
def test_why_vllm_ended(printed, said):
    assert vllm._cause(printed).endswith(said)


def test_an_engine_that_is_not_installed(made, monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    said = run("verify", made["gptq"], "--engine", "vllm", code=2)
    assert "engine 'vllm' is not installed" in said
    assert "pip install 'microbat[vllm]'" in said
