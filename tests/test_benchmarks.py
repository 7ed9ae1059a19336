"""The benchmarks run at a small size and return finite ratios; how good the ratios are is for a quiet machine to say."""

import importlib
import json
import math
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from microbat.bench import Bench, Side

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark("name")``: the module; the number of threads is put back afterwards."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_fake_quantize(benchmark, capsys):
    ratios = benchmark("fake_quantize").main(size=1024, rounds=5)
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    assert ratios["fake"] < 50  # an eager chain takes 90 and more
    assert "times the copy" in capsys.readouterr().out


def test_scale_search(benchmark, capsys):
    """A quarter of a 4096 x 4096 weight's width and rows, in a sixteenth of the minute that the whole may take."""
    found = benchmark("scale_search").main(size=1024, rows=32, threads=1)
    assert found["seconds"] < 60 / 16
    assert found["ratio"] > 1
    assert "and find the same" in capsys.readouterr().out


def test_packed_product(benchmark, capsys):
    ratios = benchmark("packed_product").main(rows=64, width=128, rounds=2)
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    printed = capsys.readouterr().out
    assert "times as fast as torch BF16" in printed
    assert f"microbat {version('microbat')}, torch {version('torch')}" in printed
    assert ("times as fast as llama.cpp MXFP4" in printed) == ("xllamacpp" in printed)


def test_whole_model(benchmark, monkeypatch, capsys):
    whole_model = benchmark("whole_model")
    sizes = {"online": 20_000, "checkpoint": 500_000, "libraries": 1_000_000, "loading": 4_000_000}
    packed = Side(speed=30, weights=180_000, decoding=2_000_000, **sizes)
    bf16 = Side(speed=20, weights=780_000, decoding=5_000_000, **sizes)
    given = Bench(packed=packed, bf16=bf16, setting="microbat 0.1.0")
    monkeypatch.setattr(whole_model, "bench", lambda folder, **options: given)
    assert list(whole_model.main(Path("folder")).values()) == [1.5, 4, 1, 2.5, 4, 1]
    assert "linear layers, with transforms and clips: packed 0.2 MB, BF16 0.8 MB, 4.00 times smaller" in (
        capsys.readouterr().out
    )


def test_calibration_step(benchmark, capsys):
    ratios = benchmark("calibration_step").main(size=128, rounds=1)
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    assert "times the float step" in capsys.readouterr().out


def test_the_eager_reference_computes_what_microbat_does(benchmark):
    step = benchmark("calibration_step")
    block, _ = step.llama_block(8, "cpu")
    for site in step.make_plan(block, torch.device("cpu")).sites:
        for module, reference in ((site.transform, step.EagerGPK), (site.activation, step.EagerClip)):
            gradients, outputs = [], []
            for mathematics in (module, reference(module)):
                x = torch.randn(6, site.transform.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
                apply = mathematics if isinstance(module, type(site.transform)) else mathematics.fake
                y = apply(x)
                (y * torch.linspace(-1, 1, 6)[:, None]).sum().backward()
                outputs.append(y.detach())
                gradients.append([x.grad, *(p.grad.clone() for p in module.parameters())])
                module.zero_grad()
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.fixture
def without_peers(benchmark, monkeypatch):
    """The benchmark against peers where none is installed."""
    peers = benchmark("peers")
    monkeypatch.setattr(benchmark("peer_quantizers").Peer, "version", None)
    return peers


def small(tiny, text_file, out: Path) -> dict:
    sizes = {"samples": 4, "length": 32, "window": 64, "windows": 2}
    return {"model": str(tiny()), "text": str(text_file), "calibration": str(text_file), "out": out, **sizes}


def test_peers_without_any_installed(without_peers, tiny, text_file, tmp_path, monkeypatch, capsys):
    options = small(tiny, text_file, tmp_path) | {"rows": "GPTQ", "schemes": "W4A4KV16"}
    content = without_peers.main(**options)
    printed = capsys.readouterr().out
    assert [row["method"] for row in content["rows"]] == ["GPTQ", "block-Hadamard + GPTQ", "BATQuant + GPTQ"]
    assert all(row["layers_in_4_bits"] == 14 and row["perplexity"] > 1 for row in content["rows"])
    assert "skipped llm-compressor GPTQ: not installed; pip install" in printed
    assert "| BATQuant + GPTQ |" in printed
    assert str(tmp_path.parent) not in json.dumps(content)

    monkeypatch.setattr(without_peers.pipeline, "run", None)  # what is there already is not made again
    assert without_peers.main(**options) == content
    with pytest.raises(ValueError, match="other settings"):
        without_peers.main(**options | {"windows": 1})


def test_a_ratio_is_to_the_same_method_or_the_best_peer(without_peers):
    def entry(tool: str, method: str, nll: list[float]) -> dict:
        return {"tool": tool, "method": method, "window_nll": nll, "perplexity": math.exp(sum(nll) / len(nll))}

    entries = [entry("one", "GPTQ", [2.2, 2.2]), entry("two", "other", [2.0, 2.0]), entry("microbat", "GPTQ", [1, 1])]
    same = without_peers.against(entry("microbat", "GPTQ", [2.1, 2.1]), entries)
    assert (same["tool"], same["ratio"], same["ratio_stderr"]) == ("one", pytest.approx(math.exp(-0.1)), 0)
    best = without_peers.against(entry("microbat", "BATQuant", [1.8, 2.0]), entries)
    assert (best["tool"], best["ratio"]) == ("two", pytest.approx(math.exp(-0.1)))
    assert best["ratio_stderr"] == pytest.approx(math.exp(-0.1) * 0.1)
    assert without_peers.against(entry("microbat", "GPTQ", [2.1, 2.1]), entries[2:]) is None


def test_a_model_that_does_not_compute_in_4_bits_is_not_measured(without_peers, tiny):
    model = without_peers.pipeline.load(tiny())
    with pytest.raises(ValueError, match="0 of 14 products"):
        without_peers.check_products(model, model, torch.arange(24), 32)


GPU = {
    "gpu_transform_quantize": lambda module: module.contenders(5, 64, "cpu")[0],
    "gpu_layer": lambda module: module.contenders(5, 64, 48, "cpu"),
    "gpu_decode": lambda module: module.contenders(1, ((48, 64), (32, 96)), "cpu"),
    "gpu_prefill": lambda module: module.contenders(5, 48, 64, "cpu"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", GPU)
def test_gpu_benchmarks_refuse_a_machine_without_one(benchmark, name):
    with pytest.raises(SystemExit, match="measures a GPU, and torch sees none"):
        benchmark(name).main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", GPU)
def test_what_gpu_benchmarks_time_runs_in_tritons_interpreter(benchmark, name):
    pytest.importorskip("triton")
    for what, function in GPU[name](benchmark(name)).items():
        if "3 x bfloat16" not in what and what != "torch._scaled_mm, FP8":  # for GPUs alone
            function()
