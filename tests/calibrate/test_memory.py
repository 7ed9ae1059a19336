"""Where activations lie: by what is free, read from a machine's own files, written by hand here; the same bytes anywhere."""

import hashlib
import math
from pathlib import Path

import pytest
import torch

import microbat
from microbat.calibrate import engine, memory
from microbat.calibrate.memory import allocate, free_memory, total_memory
from microbat.calibrate.stream import Activations
from microbat.models.checkpoint import Checkpoint

CPU = torch.device("cpu")
SHAPE = (6, 5, 7)
BYTES = 4 * math.prod(SHAPE)


def files_of(process: str = "/proc/self/maps") -> int:
    """Mapped files of this process that have lost their name."""
    return sum("(deleted)" in line for line in Path(process).read_text().splitlines())


def test_streams_go_to_a_nameless_file_where_three_take_more_than_a_quarter_of_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 12 * BYTES)
    before = files_of()
    inside = allocate(SHAPE, CPU, tmp_path)
    assert files_of() == before
    monkeypatch.setattr(memory, "free_memory", lambda device: 12 * BYTES - 1)
    mapped = allocate(SHAPE, CPU, tmp_path)
    assert files_of() == before + 1
    assert not list(tmp_path.iterdir())
    for values in (inside, mapped):
        values.copy_(torch.arange(math.prod(SHAPE)).view(SHAPE))
    assert torch.equal(inside, mapped)
    del mapped, values
    assert files_of() == before


def test_a_disk_without_room_is_an_error_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: memory.shutil._ntuple_diskusage(1, 1, 3 * BYTES - 1))
    with pytest.raises(
        ValueError, match=r"activations of 30 calibration tokens .* too much for memory, and .* GB free"
    ):
        allocate(SHAPE, CPU, tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_the_control_group_leaves(tmp_path, monkeypatch, version):
    """A process in a/b, limited to 5000 in a and 9000 in b; a uses 4000, of which 1000 are cached files."""
    names = memory.CGROUP_FILES[2 - version]
    root = tmp_path / "memory" if version == 1 else tmp_path
    for path, limit, used in (("a", "5000", "4000"), ("a/b", "9000", "3900")):
        group = root / path
        group.mkdir(parents=True)
        for name, content in zip(names[:2], (limit, used), strict=True):
            (group / name).write_text(content + "\n")
        (group / "memory.stat").write_text(f"anon 1\n{names[2][0]} 600\n{names[2][1]} 400\n")
    own = tmp_path / "cgroup"
    own.write_text("7:cpu:/elsewhere\n4:memory:/a/b\n" if version == 1 else "0::/a/b\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)
    assert free_memory(CPU) == 2000
    assert total_memory(CPU) == 5000


@pytest.mark.parametrize("lengths", [(), (3, 1, 2)])
def test_a_stream_gives_and_takes_samples(lengths):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(*((6, 5) if lengths else (3, 4, 5)), generator=generator)
    parts = list(values.split(lengths)) if lengths else list(values)
    x = Activations(values.clone(), lengths, CPU)
    assert len(x) == 3
    picked = [parts[2], parts[0]]
    assert torch.equal(x[torch.tensor([2, 0])], torch.cat(picked) if lengths else torch.stack(picked))
    x.write(torch.tensor([1, 2]), -x[torch.tensor([1, 2])])
    assert torch.equal(x[torch.tensor([0])].flatten(0, -2), parts[0])
    assert torch.equal(x[torch.tensor([2])].flatten(0, -2), -parts[2])
    assert [rows.tolist() for rows in x.batches(2)] == [[0, 1], [2]]


def test_streams_in_files_and_in_memory_give_the_same_bytes_and_one_block_is_loaded_at_a_time(
    tiny, text_file, tmp_path, monkeypatch
):
    def quantized(name: str) -> dict[str, str]:
        out = microbat.quantize(
            tiny("qwen3", head_dim=32, num_hidden_layers=3),
            out=tmp_path / name,
            method="batquant",
            settings={"epochs": 1, "distill_epochs": 0},
            calibration=str(text_file),
            num_calibration_samples=6,
            max_seq_length=24,
            precision="float32",
        )
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.glob("*.safetensors")}

    inside = quantized("inside")
    loaded, most = set(), [0]
    load = engine._load

    def counted(job, model, name):
        import gc
        import weakref

        gc.collect()
        block = load(job, model, name)
        loaded.add(weakref.ref(block))
        most[0] = max(most[0], sum(ref() is not None for ref in loaded))
        return block

    monkeypatch.setattr(engine, "_load", counted)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert quantized("mapped") == inside
    assert most[0] == 1


def test_a_model_larger_than_memory_needs_a_text_and_blocks(tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(microbat.pipeline, "total_memory", lambda device: 100_000)

    def refused(match: str, **options) -> None:
        with pytest.raises(ValueError, match=match):
            microbat.quantize(tiny(), out=tmp_path / "q", num_calibration_samples=2, max_seq_length=16, **options)
        assert not list(tmp_path.iterdir())

    text = str(text_file)
    refused("calibration 'self' is text that the model writes .* cpu has 0.0 GB", method="rtn")
    refused("method 'spinquant' learns its rotations end to end .*quarot", method="spinquant", calibration=text)
    refused(r"method 'brq' learns .*\(steps=0", method="brq", settings={"steps": 3}, calibration=text)
    refused(r"method 'batquant' distills .*distill_epochs=0", method="batquant", calibration=text)
    blockwise = {"method": "brq", "calibration": text, "num_calibration_samples": 2, "max_seq_length": 16}
    microbat.quantize(tiny(), out=tmp_path / "q", **blockwise)


def test_numbers_are_counted_from_the_headers(tiny):
    checkpoint = Checkpoint(tiny())
    assert checkpoint.num_parameters == sum(checkpoint.tensor(name).numel() for name in checkpoint.names)
