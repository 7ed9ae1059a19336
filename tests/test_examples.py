"""The demo's model: converted once, never taken for whole when it is half."""

from pathlib import Path

import pytest
from examples import smollm2 as example


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(example, "_download", lambda scratch: scratch / "model.gguf")
    return tmp_path / "microbat"


def convert(gguf: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_the_model_is_converted_once(cache, monkeypatch):
    monkeypatch.setattr(example, "_convert", convert)
    folder = example.smollm2()
    assert [f.name for f in folder.iterdir()] == ["config.json"]
    monkeypatch.setattr(example, "_convert", None)
    assert example.smollm2() == folder
    assert list(cache.iterdir()) == [folder]


def test_a_failed_conversion_leaves_nothing(cache, monkeypatch):
    def fail(gguf: Path, folder: Path) -> Path:
        convert(gguf, folder)
        raise OSError("no space left on device")

    monkeypatch.setattr(example, "_convert", fail)
    with pytest.raises(OSError, match="no space left"):
        example.smollm2()
    assert list(cache.iterdir()) == []


def test_a_faster_neighbour_is_accepted(cache, monkeypatch):
    def slow(gguf: Path, folder: Path) -> Path:
        convert(gguf, cache / "SmolLM2-135M-Instruct")
        return convert(gguf, folder)

    monkeypatch.setattr(example, "_convert", slow)
    assert [f.name for f in example.smollm2().iterdir()] == ["config.json"]
    assert [f.name for f in cache.iterdir()] == ["SmolLM2-135M-Instruct"]
