"""Every layer has a row: quantized, or the reason why not."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from microbat.calibrate.coverage import coverage, summarized
from microbat.cli import app
from microbat.models.checkpoint import Checkpoint
from microbat.scheme import Scheme

DOWN = "model.layers.0.mlp.down_proj"


def test_every_layer_is_there(tiny):
    scheme = Scheme.parse("W4A8", ignore=("re:0.*down_proj$", "lm_head"))
    rows = {row.layer: row for row in coverage(Checkpoint(tiny()), scheme)}
    assert len(rows) == 2 * 7 + 1
    assert (rows[DOWN].weights, rows[DOWN].reason) == (None, "ignored, as asked")
    other = rows["model.layers.1.mlp.down_proj"]
    assert (other.shape, other.weights, other.activations, other.reason) == ((64, 96), "mxfp4", "mxfp8_e4m3", "")
    assert not any(row.surprise for row in rows.values())


def test_rows_of_all_blocks_are_one(tiny):
    rows = summarized(coverage(Checkpoint(tiny()), Scheme.parse("W4A4")))
    assert [(row.layer, count) for row, count in rows[:1]] == [("model.layers.*.self_attn.q_proj", 2)]
    assert rows[-1][0].reason == "the output head stays in float"
    assert len(rows) == 8


def test_surprises(tiny, monkeypatch):
    """A linear layer that the family does not know, experts that are no linear layers, a pattern without effect."""
    original = Checkpoint.skeleton

    def skeleton(self):
        model = original(self)
        model.model.layers[1].router = nn.Linear(64, 4, device="meta")
        model.model.layers[1].experts = nn.Module()
        model.model.layers[1].experts.gate_up_proj = nn.Parameter(torch.empty(4, 64, 32, device="meta"))
        return model

    monkeypatch.setattr(Checkpoint, "skeleton", skeleton)
    rows = [r for r in coverage(Checkpoint(tiny()), Scheme.parse("W4A4", ignore=("re:dwon",))) if r.surprise]
    assert [(row.layer, row.shape) for row in rows] == [
        ("model.layers.1.router", (4, 64)),
        ("model.layers.1.experts.gate_up_proj", (4, 64, 32)),
        ("re:dwon", ()),
    ]
    assert "family 'llama' does not know it" in rows[0].reason


@pytest.mark.parametrize(("strict", "code"), [(["--strict"], 2), ([], 0)])
def test_strict_stops_before_any_work(tiny, text_file, tmp_path, strict, code):
    command = [
        "quantize",
        str(tiny()),
        "--out",
        str(tmp_path / "q"),
        "--method",
        "rtn",
        "--ignore",
        "re:nothing$",
        *strict,
    ]
    command += ["--calibration", str(text_file), "--num-calibration-samples", "8", "--max-seq-length", "32"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code, result.output
    assert "model.layers.*.mlp.down_proj" in result.output
    assert ("--strict: re:nothing$: --ignore matches no layer" in result.output) == bool(strict)
    assert (tmp_path / "q").exists() != bool(strict)
