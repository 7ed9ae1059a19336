"""The command line end to end: verbs, listings, errors on one line with exit code 2."""

import dataclasses
import json
import shutil

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from microbat.cli import app
from microbat.evaluation.generation import Served
from microbat.formats.microscaling import MXFP4
from microbat.recipe import Recipe
from microbat.runtime.packed import best

FAST = ["--num-calibration-samples", "8", "--max-seq-length", "32", "--precision", "float32"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
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


def test_generate_continues_a_text(folder):
    text = run("generate", folder, "--prompt", "w1 w2", "--max-new-tokens", "5")
    assert text.endswith("\n")
    assert text == run("generate", folder, "--prompt", "w1 w2", "--max-new-tokens", "5")
    long = "w" * 300
    assert "the prompt has 300 tokens; the model's context of 256" in run("generate", folder, "--prompt", long, code=2)
    assert "the prompt is empty" in run("generate", folder, "--prompt", "", code=2)


def test_inspect_tells_bits_transforms_and_parameters(folder):
    output = run("inspect", folder)
    assert best(MXFP4, "cpu") in output
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


def gsm8k(folder):
    (folder / "gsm8k").mkdir(parents=True)
    rows = [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(1, 5)]
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_eval_of_answers_in_the_models_own_words(folder, tmp_path):
    command = ["eval", f"mine={folder}", "--tasks", "gsm8k", "--data", gsm8k(tmp_path / "data"), "--limit", "3"]
    command += ["--set", "max_new_tokens=6", "--set", "samples=2", "--answers", tmp_path / "answers"]
    output = run(*command, "--json", tmp_path / "n.json")
    result = json.loads((tmp_path / "n.json").read_text())
    assert list(result["models"]) == ["float", "mine"]
    for name, row in result["models"].items():
        score = row["tasks"]["gsm8k"]
        assert (score["n"], score["samples"]) == (3, 2)
        assert 3 < score["truncated"] <= 6  # of a random model, one may end by itself
        assert f"{score['unparsed']} unparsed" in output
        assert len((tmp_path / "answers" / name / "gsm8k.jsonl").read_text().splitlines()) == 1 + 6
        assert row["recovery"] is None  # random weights are never right
        assert row["flips"] == 0
    run(*command, "--json", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == result
    assert "top_k: 20, now 5" in run(*command, "--set", "top_k=5", code=2)


def test_eval_of_a_served_model(tmp_path, monkeypatch):
    def ask(self, path, body=None):
        prompt = body and body["messages"][0]["content"]
        served = {"data": [{"id": "tiny"}]}
        wise = prompt and (self.url.endswith("float") or "How many is 3?" not in prompt)
        text = f"\\boxed{{{prompt[12] if wise else '?'}}}" if prompt else ""
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]} if body else served

    monkeypatch.setattr(Served, "_ask", ask)
    command = ["--tasks", "gsm8k", "--data", gsm8k(tmp_path / "data"), "--answers", tmp_path / "answers"]
    output = run("eval", "float=http://float", "w4=http://w4", *command, "--json", tmp_path / "n.json")
    models = json.loads((tmp_path / "n.json").read_text())["models"]
    assert [row["tasks"]["gsm8k"]["score"] for row in models.values()] == [1.0, 0.75]
    assert [row["recovery"] for row in models.values()] == [100.0, 75.0]
    assert [row["flips"] for row in models.values()] == [0.0, 25.0]
    assert [row["recovery_stderr"] for row in models.values()] == [None, pytest.approx(25.0)]
    assert models["w4"]["tasks"]["gsm8k"]["stderr"] == pytest.approx(0.25)
    assert "0.750 ± 0.250 (1 unparsed of 4)" in output
    run("eval", "alone=http://w4", *command, "--json", tmp_path / "n.json")
    assert json.loads((tmp_path / "n.json").read_text())["models"]["alone"]["recovery"] is None


def test_bad_requests_for_answers_are_refused_before_any_model_is_loaded(tmp_path):
    eval_ = ["eval", "mine=no/such/model", "--data", tmp_path]
    assert "math500/test.jsonl" in run(*eval_, "--tasks", "math500", code=2)
    assert "did you mean 'gsm8k'" in run(*eval_, "--tasks", "gsm9k", code=2)
    assert "did you mean 'top_k'" in run(*eval_, "--tasks", "gsm8k", "--set", "topk=3", code=2)
    assert "piqa need a model's likelihoods" in run("eval", "mine=http://here", "--tasks", "piqa,gsm8k", code=2)


def test_lists():
    assert "mxfp6_e3m2" in run("list", "formats")
    methods = run("list", "methods")
    assert "--set clip_scope=block    block | global" in methods
    assert "batquant" in methods
    assert "--set damping=0.01" in methods
    assert "qwen3" in run("list", "families")
    benchmarks = run("list", "benchmarks")
    assert "Avg@16" in benchmarks
    assert "gpqa/gpqa_diamond.jsonl" in benchmarks
    assert "held-out/test.jsonl" in benchmarks
    assert "arc_challenge" in benchmarks
    assert "W4A4KV16" in run("list", "schemes")
    everything = run("list")
    assert all(part in everything for part in ("mxfp6_e3m2", "--set damping=0.01", "qwen3", "W4A4KV16", "Avg@16"))


def test_errors_are_one_line(tiny, tmp_path):
    output = run("quantize", tiny(), "--out", tmp_path / "x", "--method", "batqant", code=2)
    assert "did you mean 'batquant'" in output
    assert "Traceback" not in output
    output = run("quantize", tiny(), "--out", tmp_path / "x", "--set", "epochs", code=2)
    assert "setting 'epochs' is not key=value" in output
    assert "not a finished microbat folder" in run("inspect", tmp_path, code=2)
    assert "give a MODEL" in run("quantize", "--out", tmp_path / "x", code=2)


def test_a_report_that_is_no_json(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "q")
    (copy / "report.json").write_text("{")
    assert f"{copy / 'report.json'} is not JSON" in run("inspect", copy, code=2)
    (copy / "report.json").write_text("{}")
    assert f"{copy / 'report.json'}: entry 'model' is missing" in run("inspect", copy, code=2)


@pytest.mark.parametrize(
    ("command", "where", "advice"),
    [
        (("generate", "--prompt", "w1"), "microbat.pipeline.continuation", ("shorter --prompt", "--max-new-tokens")),
        (("bench",), "microbat.bench.read_contract", ("fewer --prompt and --tokens",)),
        (("eval",), "microbat.measure.evaluate", ("smaller --window",)),
        (("quantize", "--out", "OUT"), "microbat.pipeline.coverage", ("lower --max-seq-length",)),
        (("verify",), "microbat.verify._logits", ()),
    ],
)
def test_out_of_memory(folder, tmp_path, monkeypatch, command, where, advice):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(where, full)
    name, *options = [str(tmp_path / "q") if part == "OUT" else part for part in command]
    said = run(name, folder, *options, code=2)
    for part in (f"error: {name} does not fit the device's memory", "Tried to allocate 2.00 GiB", *advice):
        assert part in said
    if name != "verify":
        assert "--device cpu" in said
        assert "--device cpu" not in run(name, folder, *options, "--device", "cpu", code=2)


def test_out_of_memory_of_a_comparison(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("microbat.comparison.compare", full)
    said = run("compare", "--suite", tmp_path / "suite.yaml", code=2)
    assert "error: compare does not fit the device's memory; try --quick" in said


def test_help_teaches():
    assert "Example:" in run("quantize", "--help")
    assert "Example:" in run("eval", "--help")


def test_defaults_of_the_command_are_those_of_the_recipe():
    defaults = {p.name: p.default for p in get_command(app).commands["quantize"].params}
    for field in dataclasses.fields(Recipe):
        if field.name not in ("model", "settings", "ignore", "also"):
            assert defaults[field.name] == field.default, field.name
