"""The whole way: quantize, load, evaluate, report; the Q-law on the real folder; interrupted runs; bad input."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import microbat
from microbat import account, pipeline
from microbat.export import folder as folders
from microbat.models.checkpoint import Checkpoint
from microbat.models.llama import LLAMA
from microbat.unfinished import FolderKeeper

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}


def shard_hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ("rtn", ""),
        ("gptq", ""),
        ("batquant", "gptq"),
        ("batquant", "learned"),
        ("quarot", "gptq"),
        ("brq", "rtn"),
        ("smoothquant", "rtn"),
        ("flatquant", "gptq"),
        ("soar", ""),
        ("arcquant", "gptq"),
    ],
)
def test_reloaded_folder_computes_what_calibration_saw(tiny, text_file, tmp_path, family, method, solver, monkeypatch):
    """Q-law on the folder: the outputs of every block during calibration equal those of the reloaded model."""
    seen = []
    original = pipeline.calibrate

    def spy(*arguments):
        for record in original(*arguments):
            seen.append(record)
            yield record

    captured = {}
    save = FolderKeeper.save

    def keep(self, index, block, module, record):
        captured[index] = {k: v.clone() for k, v in module.state_dict().items()}
        captured[index, "weights"] = {p: q.dequantize() for p, q in block.weights.items()}
        save(self, index, block, module, record)

    monkeypatch.setattr(pipeline, "calibrate", spy)
    monkeypatch.setattr(FolderKeeper, "save", keep)
    settings = {"batquant": {"epochs": 1, "distill_epochs": 0}, "flatquant": {"epochs": 1}}.get(method, {})
    out = microbat.quantize(
        tiny(family),
        out=tmp_path / "q",
        method=method,
        solver=solver,
        calibration=str(text_file),
        settings=settings,
        **FAST,
    )
    model = microbat.load(out)
    for index, block in enumerate(model.model.layers):
        for path, weight in captured[index, "weights"].items():
            assert torch.equal(block.get_submodule(path).dequantize(), weight)
        for key, value in block.state_dict().items():
            assert torch.equal(value, captured[index][key]), key
    assert len(seen) == 2


def test_two_runs_give_equal_bytes_and_a_killed_one_resumes_to_them(tiny, text_file, tmp_path):
    """SIGKILL after the first block's shard is there; the resumed run's shards equal an uninterrupted run's."""
    options = {"method": "batquant", "calibration": str(text_file), "settings": {"epochs": 2}, **FAST}
    one = microbat.quantize(tiny(), out=tmp_path / "one", **options)
    assert len({file.stat().st_mode for file in one.iterdir()}) == 1  # whoever reads one file reads all
    two = microbat.quantize(tiny(), out=tmp_path / "two", **options)
    assert shard_hashes(one) == shard_hashes(two)

    script = (
        "import microbat, time; from microbat.unfinished import FolderKeeper\n"
        "save = FolderKeeper.save\n"
        "def slow(self, index, *rest):\n"
        "    save(self, index, *rest)\n"
        "    time.sleep(60)\n"
        "FolderKeeper.save = slow\n"
        f"microbat.quantize({str(tiny())!r}, out={str(tmp_path / 'three')!r}, **{options!r})\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    partial = tmp_path / "three.partial"
    deadline = time.time() + 120
    while not (partial / folders.block_shard(0)).exists():
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(ValueError, match="not a finished microbat folder|no config.json"):
        microbat.load(partial)
    three = microbat.quantize(tiny(), out=tmp_path / "three", **options)
    assert shard_hashes(three) == shard_hashes(one)
    assert not partial.exists()


def test_recipe_reproduces_a_run(tiny, text_file, tmp_path):
    one = microbat.quantize(
        tiny(), out=tmp_path / "one", method="gptq", calibration=str(text_file), settings={"damping": 0.05}, **FAST
    )
    recipe = microbat.Recipe.read(one / "recipe.json")
    assert recipe.settings == {"damping": 0.05}
    two = microbat.run(recipe, tmp_path / "two")
    assert shard_hashes(one) == shard_hashes(two)


def test_self_calibration_is_seeded(tiny, tmp_path):
    runs = [microbat.quantize(tiny(), out=tmp_path / str(i), method="rtn", seed=i // 2, **FAST) for i in range(3)]
    prints = [json.loads((r / "recipe.json").read_text())["calibration_fingerprint"] for r in runs]
    assert prints[0] == prints[1] != prints[2]


def test_evaluate_and_report(tiny, text_file, tmp_path):
    out = microbat.quantize(tiny(), out=tmp_path / "q", method="rtn", calibration=str(text_file), **FAST)
    result = microbat.evaluate({"rtn": out}, text=str(text_file), window=64, windows=3)
    assert [row["name"] for row in result["rows"]] == ["float", "rtn"]
    assert result["rows"][0]["kl"] == 0
    assert result["rows"][1]["kl"] > 0
    page = microbat.write_report(out, result)
    assert "rtn" in page.read_text()


def test_size_is_close_to_the_formats_bits(tiny, text_file, tmp_path):
    out = microbat.quantize(
        tiny(), out=tmp_path / "q", method="batquant", calibration=str(text_file), settings={"epochs": 1}, **FAST
    )
    content = json.loads((out / "report.json").read_text())
    stored = sum((out / folders.block_shard(i)).stat().st_size for i in range(2))
    assert all(layer["bits"] == 4.25 for layer in content["layers"])
    assert stored < content["bytes"]["quantized_layers"] + content["bytes"]["transforms"] + 20_000  # norms and headers


@pytest.mark.parametrize(("method", "stage"), [("spinquant", "rotation"), ("batquant", "distillation")])
def test_the_time_of_calibration_has_what_was_done_to_the_whole_model(tiny, text_file, tmp_path, method, stage):
    settings = {"steps": 2} if method == "spinquant" else {"epochs": 1, "distill_epochs": 1}
    out = microbat.quantize(
        tiny(), out=tmp_path / "q", method=method, calibration=str(text_file), settings=settings, **FAST
    )
    report = account.read_report(out)
    blocks = sum(block["seconds"] for block in report["blocks"])
    assert report[stage]["seconds"] > 0
    assert account.calibration_seconds(report) == pytest.approx(blocks + report[stage]["seconds"])
    assert account.calibration_seconds(report) < report["seconds"]
    assert report["machine"] == account.machine(torch.device("cpu"))
    assert report["machine"] in microbat.write_report(out).read_text()


class TestBadInput:
    def fails(self, match: str, tiny, tmp_path, **options):
        with pytest.raises(ValueError, match=match):
            microbat.quantize(
                options.pop("model", None) or tiny(), out=options.pop("out", tmp_path / "q"), **{**FAST, **options}
            )
        assert not (tmp_path / "q").exists()

    def test_unknown_names_suggest_the_nearest(self, tiny, tmp_path):
        self.fails("unknown method 'batquent'; did you mean 'batquant'", tiny, tmp_path, method="batquent")
        self.fails("unknown solver 'gptk'; did you mean 'gptq'", tiny, tmp_path, solver="gptk")
        self.fails("unknown format 'mxpf4'; did you mean 'mxfp4'", tiny, tmp_path, scheme="W4A4:mxpf4")
        self.fails("unknown setting 'epoch'; did you mean 'epochs'", tiny, tmp_path, settings={"epoch": 3})
        self.fails(
            "unknown calibration source 'wikitext-2'; did you mean 'wikitext-2-raw'",
            tiny,
            tmp_path,
            calibration="wikitext-2",
        )

    def test_wrong_types_and_schemes(self, tiny, tmp_path):
        self.fails("setting epochs='many' of batquant", tiny, tmp_path, settings={"epochs": "many"})
        self.fails("is not W<bits>A<bits>", tiny, tmp_path, scheme="4bit")
        self.fails("nvfp4 scales a whole tensor, and a cache grows", tiny, tmp_path, scheme="W4A4KV4:nvfp4")
        self.fails("no format of 5 bits for the KV cache", tiny, tmp_path, scheme="W4A4KV5")
        self.fails("no format of 5 bits", tiny, tmp_path, scheme="W5A4")
        self.fails("does not fit format 'nvfp4'", tiny, tmp_path, scheme="W4A4:nvfp4", scale_rule="floor")
        self.fails("leaves weights in 16 bits", tiny, tmp_path, scheme="W16A4")

    def test_learned_rounding_needs_something_that_trains(self, tiny, tmp_path):
        self.fails("'learned' needs a method that trains", tiny, tmp_path, method="learned")

    def test_output_exists(self, tiny, tmp_path):
        (tmp_path / "there").mkdir()
        self.fails("exists", tiny, tmp_path, out=tmp_path / "there")

    def test_unfinished_run_of_another_recipe(self, tiny, tmp_path):
        (tmp_path / "q.partial").mkdir()
        (tmp_path / "q.partial" / "run.json").write_text("{}")
        self.fails("unfinished run of another recipe", tiny, tmp_path)

    def test_missing_model(self, tiny, tmp_path):
        self.fails("neither a folder nor the name of a model", tiny, tmp_path, model="nowhere")

    def test_short_calibration_text(self, tiny, tmp_path):
        file = tmp_path / "short.txt"
        file.write_text("w1 w2 w3")
        self.fails(r"has \d+ tokens; 8 sequences of 32 need 256", tiny, tmp_path, calibration=str(file))

    def test_width_that_does_not_fit_names_layer_and_way_out(self, tmp_path, tiny):
        from tests.conftest import save_model

        odd = save_model(tmp_path / "odd", "llama", intermediate_size=80)
        self.fails(
            r"mlp.down_proj': K=80 is not a multiple of mxfp4's block of 32.*--ignore", tiny, tmp_path, model=odd
        )
        out = microbat.quantize(odd, out=tmp_path / "ok", method="rtn", ignore=("re:down_proj$",), **FAST)
        microbat.load(out)

    @pytest.mark.parametrize("method", ["quarot", "spinquant", "brq", "smoothquant"])
    def test_a_family_without_the_sites_of_a_method(self, tiny, tmp_path, monkeypatch, method):
        sites = tuple(dataclasses.replace(site, normed=False) for site in LLAMA.sites)
        monkeypatch.setattr(Checkpoint, "family", dataclasses.replace(LLAMA, sites=sites))
        message = f"method '{method}' cannot act on family 'llama': none of its sites is normed"
        self.fails(message, tiny, tmp_path, method=method)

    def test_truncated_checkpoint(self, tiny, tmp_path):
        broken = tmp_path / "broken"
        shutil.copytree(tiny(), broken)
        file = broken / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        self.fails("model.safetensors cannot be read", tiny, tmp_path, model=broken)

    def test_an_index_that_names_what_is_not_there(self, tiny, tmp_path):
        from safetensors.torch import load_file, save_file

        broken = tmp_path / "sharded"
        shutil.copytree(tiny(), broken)
        (broken / "model.safetensors").unlink()
        tensors = load_file(tiny() / "model.safetensors")
        halves = {"one.safetensors": {}, "two.safetensors": {}}
        for name, tensor in tensors.items():
            halves["two.safetensors" if "layers.1." in name else "one.safetensors"][name] = tensor
        for file, half in halves.items():
            save_file(half, broken / file, {"format": "pt"})
        weight_map = {name: file for file, half in halves.items() for name in half}
        index = broken / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert len(list(Checkpoint(broken).names)) == len(tensors)
        lost = "model.layers.1.mlp.up_proj.weight"
        index.write_text(json.dumps({"weight_map": {**weight_map, lost: "one.safetensors"}}))
        self.fails(rf"one.safetensors lacks tensor {lost}, which .*index.json says", tiny, tmp_path, model=broken)
        index.write_text(json.dumps({"weight_map": weight_map}))
        two = broken / "two.safetensors"
        two.write_bytes(two.read_bytes()[:-10])
        self.fails("two.safetensors cannot be read", tiny, tmp_path, model=broken)
        two.unlink()
        self.fails("index.json names two.safetensors, which is not there", tiny, tmp_path, model=broken)

    def test_nan_weights_name_the_layer(self, tiny, tmp_path, text_file):
        from safetensors.torch import load_file, save_file

        broken = tmp_path / "nan"
        shutil.copytree(tiny(), broken)
        tensors = load_file(broken / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        self.fails(
            r"model.layers.1.mlp.up_proj.weight in .* holds NaN or Inf",
            tiny,
            tmp_path,
            model=broken,
            method="rtn",
            calibration=str(text_file),
        )

    def test_unknown_family_says_how_to_add_it(self, tiny, tmp_path):
        strange = tmp_path / "strange"
        shutil.copytree(tiny(), strange)
        config = json.loads((strange / "config.json").read_text())
        (strange / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
        self.fails("model_type 'gpt2' has no family .*To add it", tiny, tmp_path, model=strange)

    def test_quantized_input(self, tiny, tmp_path, text_file):
        done = microbat.quantize(tiny(), out=tmp_path / "done", method="rtn", calibration=str(text_file), **FAST)
        self.fails("no config.json|quantized already|neither model.safetensors", tiny, tmp_path, model=done)

    def test_no_disk_space(self, tiny, tmp_path, monkeypatch):
        import collections

        usage = collections.namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
        self.fails("GB free", tiny, tmp_path)

    def test_truncated_shard_of_ours(self, tiny, tmp_path, text_file):
        out = microbat.quantize(tiny(), out=tmp_path / "done", method="rtn", calibration=str(text_file), **FAST)
        shard = out / folders.block_shard(1)
        shard.write_bytes(shard.read_bytes()[:-500])
        with pytest.raises(ValueError, match="cannot be read"):
            microbat.load(out)
