"""Blocks prepared by workers of a local Ray cluster: the same bytes as one process, with a worker killed on the way, and with
one that runs out of memory."""

import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import microbat
from microbat import pipeline
from microbat.calibrate.workers import Workers
from microbat.methods.batquant import BATQuant
from microbat.methods.flatquant import FlatQuant
from microbat.recipe import Recipe, methods

OPTIONS = {"num_calibration_samples": 6, "max_seq_length": 24, "precision": "float32"}
FLOAT = {"epochs": 1, "inputs": "float", "distill_epochs": 0}


@dataclass(frozen=True, kw_only=True)
class Dying(BATQuant):
    """BATQuant that ends its own process at block 1, once, and leaves a mark."""

    name: ClassVar[str] = "dying"
    mark: str = ""

    def prepare(self, data, plan, solver):
        if data.index == 1 and not Path(self.mark).exists():
            Path(self.mark).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(data, plan, solver)


@dataclass(frozen=True, kw_only=True)
class Hungry(BATQuant):
    """BATQuant that wants more at block 1 than any machine has."""

    name: ClassVar[str] = "hungry"

    def prepare(self, data, plan, solver):
        return torch.empty(1 << 46) if data.index == 1 else super().prepare(data, plan, solver)


HEAD = """
import ray
print(ray.init(address="local", num_cpus=2, include_dashboard=False).address_info["gcs_address"], flush=True)
input()
"""


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster on this machine, which has room for two workers of one thread and belongs to another process."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",
    }  # a busy machine starts it slowly
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **settings}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with subprocess.Popen([sys.executable, "-c", HEAD], env=environment, **pipes) as head:
        yield head.stdout.readline().strip()
        head.communicate("\n")
    torch.set_num_threads(threads)


def shards(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


def test_bytes_of_one_process_though_a_worker_is_killed_and_one_runs_out_of_memory(
    tiny, text_file, tmp_path, monkeypatch, cluster
):
    """Folds (the map of the values) and training after the codes cross processes as well: KV4 and GPTQ, with refining."""
    model = tiny("qwen3", head_dim=32, num_hidden_layers=3)
    recipe = Recipe(
        model=str(model), solver="gptq", scheme="W4A4KV4", settings=FLOAT, calibration=str(text_file), **OPTIONS
    )
    assert not pipeline.in_order(recipe)
    alone = shards(pipeline.run(recipe, tmp_path / "alone"))
    _, solver = recipe.methods()
    mark = tmp_path / "mark"
    monkeypatch.setattr(Recipe, "methods", lambda self: ((Dying(mark=str(mark), **FLOAT),), solver))
    assert shards(pipeline.run(recipe, tmp_path / "spread", workers=2, address=cluster)) == alone
    assert int(mark.read_text()) != os.getpid()

    monkeypatch.setattr(Recipe, "methods", lambda self: ((Hungry(**FLOAT),), solver))
    with pytest.raises(ValueError, match=r"model.layers.1: its worker ran out of memory \(.*alloc.*goes on after them"):
        pipeline.run(recipe, tmp_path / "resumed", workers=2, address=cluster)
    first = tmp_path / "resumed.partial" / "microbat-block-000.safetensors"
    written = first.stat().st_mtime_ns
    monkeypatch.undo()
    assert shards(pipeline.run(recipe, tmp_path / "resumed")) == alone
    assert (tmp_path / "resumed" / first.name).stat().st_mtime_ns == written


def test_what_a_method_says_of_its_inputs_decides():
    said = "trains each block on what the quantized blocks before it make (inputs=mixed; inputs=float does not)"
    assert BATQuant().in_order == said
    assert "inputs=mixed" in BATQuant(inputs="mixed").in_order
    assert not BATQuant(inputs="float").in_order
    assert not FlatQuant().in_order
    apart = {name for name, method in methods().items() if not getattr(method(), "in_order", "solver")}
    assert apart == {"batquant-paper", "flatquant"}


def test_methods_that_prepare_in_any_order_see_no_quantized_inputs(tiny, text_file, tmp_path, monkeypatch):
    """Else their bytes could differ between one process and many, and nobody would notice."""
    monkeypatch.setattr(BATQuant, "in_order", "")
    with pytest.raises(AttributeError, match="inputs"):
        microbat.quantize(
            tiny(),
            out=tmp_path / "q",
            settings={"epochs": 1, "distill_epochs": 0},
            calibration=str(text_file),
            **OPTIONS,
        )


def test_workers_are_counted_and_need_ray(monkeypatch):
    assert Workers.of(1) is None
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        Workers.of(0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'microbat\[ray\]'"):
        Workers.of(2)
