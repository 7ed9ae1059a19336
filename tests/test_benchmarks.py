"""The benchmarks run at a small size and return finite ratios; how good the ratios are is for a quiet machine to say."""

import importlib
import math
from pathlib import Path

import pytest
import torch

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


def test_packed_product(benchmark, capsys):
    ratios = benchmark("packed_product").main(rows=64, width=128, rounds=2)
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    assert "times as fast as torch BF16" in capsys.readouterr().out


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
