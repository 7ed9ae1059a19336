"""The output head, quantized on request: what is stored, what runs, who refuses. (Mergers: test_vision.)"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import microbat
from microbat import pipeline
from microbat.cli import app
from microbat.export import as_it_is, compressed_tensors
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.formats.microscaling import MXFP4
from microbat.models.checkpoint import Checkpoint
from microbat.quantizers.base import AbsMax
from microbat.runtime.load import load_dequantized
from microbat.runtime.packed import PackedLinear
from microbat.verify import Altered, verify

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
TOKENS = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tiny, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("head") / "q"
    options = {"settings": {"epochs": 1, "distill_epochs": 1}, "calibration": str(text_file), **FAST}
    return microbat.quantize(tiny(), out=out, also=("lm_head",), **options)


def test_the_head_is_rounded_to_nearest(folder, tiny):
    stored = shards.read_block(folder / folders.OTHER_SHARD)
    assert set(stored.quantized.weights) == {"lm_head"}
    assert set(stored.floats) == {"model.embed_tokens.weight", "model.norm.weight"}
    weight = Checkpoint(tiny()).tensor("lm_head.weight")
    assert torch.equal(load_dequantized(folder).lm_head.weight, AbsMax(format=MXFP4).fake(weight))
    head = microbat.load(folder).lm_head
    assert isinstance(head, PackedLinear)
    assert torch.equal(head.dequantize(), AbsMax(format=MXFP4).fake(weight))
    assert head.site.quantizer.format is MXFP4


def test_what_runs(folder):
    verdict = verify(folder)
    assert verdict.passed, verdict
    assert verdict.layers == 15
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(theirs(TOKENS).logits, microbat.load(folder)(TOKENS).logits)


def test_what_is_said_of_it(folder, tiny, text_file):
    report = json.loads((folder / "report.json").read_text())
    assert report["outside"] == [{"name": "lm_head", "shape": [257, 64], "format": "mxfp4", "bits": 4.25}]
    recipe = microbat.Recipe(model=str(tiny()), also=("lm_head",), calibration=str(text_file))
    (row,) = [row for row in pipeline.coverage(recipe) if row.layer == "lm_head"]
    assert (row.weights, row.activations, row.reason) == ("mxfp4", "mxfp4", "")
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    assert "lm_head" in result.output


def test_an_altered_head_is_named(folder, tmp_path):
    copy = as_it_is.shutil.copytree(folder, tmp_path / "q")
    shard = copy / folders.OTHER_SHARD
    content = bytearray(shard.read_bytes())
    codes = bytes(shards.read_shard(shard)[1]["lm_head.weight_packed"].numpy())
    content[content.index(codes) + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Altered, match=r"microbat-other.safetensors: tensor lm_head.weight_packed was altered"):
        verify(copy)


@pytest.mark.parametrize(
    ("export", "target"), [(compressed_tensors.export, "transformers"), (as_it_is.export, "vllm-plugin")]
)
def test_engines_that_were_not_tried_refuse(folder, tmp_path, export, target):
    with pytest.raises(ValueError, match=r"lm_head: .* was not tried with quantized layers outside the blocks.*--also"):
        export(folder, tmp_path / "x", target=target)


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("qwen3", {"also": ("lm_head",)}, "--also 'lm_head' is this model's embedding too, which stays in float"),
        (
            "llama",
            {"also": ("model.norm",)},
            r"--also 'model.norm' is no linear layer outside the blocks \(there: lm_head\)",
        ),
        ("llama", {"also": ("re:q_proj",)}, "--also 're:q_proj' is no linear layer outside"),
        ("llama", {"also": ("lm_head",), "scheme": "W2A16", "ignore": ("re:layers",)}, "leave it out of --also"),
    ],
)
def test_bad_requests(tiny, text_file, family, fields, said):
    recipe = microbat.Recipe(model=str(tiny(family)), method="rtn", calibration=str(text_file), **fields)
    with pytest.raises(ValueError, match=said):
        pipeline.check(recipe)
