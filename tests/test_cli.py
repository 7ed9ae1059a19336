"""The command line end to end: verbs, listings, errors on one line with exit code 2."""

import dataclasses
import json

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from microbat.cli import app
from microbat.recipe import Recipe

FAST = ["--num-calibration-samples", "8", "--max-seq-length", "32", "--precision", "float32"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tiny, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "q"
    settings = ["--set", "epochs=1", "--set", "gptq.damping=0.02"]
    run("quantize", tiny(), "--out", out, "--solver", "gptq", "--calibration", text_file, *settings, *FAST)
    return out


def test_quantize_writes_everything(folder):
    names = {f.name for f in folder.iterdir()}
    assert {"config.json", "recipe.json", "report.json", "report.html", "microbat-other.safetensors"} <= names
    assert {"microbat.safetensors.index.json", "tokenizer.json"} <= names
    made = json.loads((folder / "recipe.json").read_text())
    assert made["recipe"]["settings"] == {"epochs": 1, "gptq.damping": 0.02}
    assert made["methods"][1]["damping"] == 0.02
    assert made["methods"][0]["epochs"] == 1
    contract = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert contract["quant_method"] == "microbat"
    assert contract["weights"] == {"format": "mxfp4", "scale_rule": "even"}


def test_recipe_file_reproduces(folder, tmp_path):
    run("quantize", "--recipe", folder / "recipe.json", "--out", tmp_path / "again")
    for shard in folder.glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_inspect_tells_bits_transforms_and_parameters(folder):
    output = run("inspect", folder)
    assert "mxfp4, scale rule even" in output
    assert "bits per quantized weight" in output
    assert "model.layers.1.mlp.down_proj" in output


def test_eval_prints_rows_and_renews_the_report(folder, text_file, tmp_path):
    numbers = tmp_path / "n.json"
    output = run("eval", f"mine={folder}", "--text", text_file, "--window", "64", "--windows", "2", "--json", numbers)
    assert "mine" in output
    assert "float" in output
    assert json.loads(numbers.read_text())["rows"][1]["name"] == "mine"
    assert "evaluation" in json.loads((folder / "report.json").read_text())


def test_eval_tasks_from_local_copies(folder, tmp_path):
    data = tmp_path / "data" / "piqa"
    data.mkdir(parents=True)
    rows = [{"goal": f"w{i}", "sol1": "w1 w2", "sol2": "w3", "label": i % 2} for i in range(4)]
    (data / "validation.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    output = run("eval", f"mine={folder}", "--tasks", "piqa", "--data", tmp_path / "data", "--limit", "2")
    assert "recovery" in output
    assert "piqa" in output


def test_lists():
    assert "mxfp6_e3m2" in run("list", "formats")
    methods = run("list", "methods")
    assert "batquant" in methods
    assert "--set damping=0.01" in methods
    assert "qwen3" in run("list", "families")
    assert "W4A4KV16" in run("list", "schemes")


def test_errors_are_one_line(tiny, tmp_path):
    output = run("quantize", tiny(), "--out", tmp_path / "x", "--method", "batqant", code=2)
    assert "did you mean 'batquant'" in output
    assert "Traceback" not in output
    output = run("quantize", tiny(), "--out", tmp_path / "x", "--set", "epochs", code=2)
    assert "setting 'epochs' is not key=value" in output
    assert "not a finished microbat folder" in run("inspect", tmp_path, code=2)
    assert "give a MODEL" in run("quantize", "--out", tmp_path / "x", code=2)


def test_help_teaches():
    assert "Example:" in run("quantize", "--help")
    assert "Example:" in run("eval", "--help")


def test_defaults_of_the_command_are_those_of_the_recipe():
    defaults = {p.name: p.default for p in get_command(app).commands["quantize"].params}
    for field in dataclasses.fields(Recipe):
        if field.name not in ("model", "settings", "ignore"):
            assert defaults[field.name] == field.default, field.name
