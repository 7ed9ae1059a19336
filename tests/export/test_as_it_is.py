"""A folder for microbat's plugin is the folder; damaged ones and other layouts are refused."""

import filecmp

import pytest
from typer.testing import CliRunner

import microbat
from microbat.cli import app
from microbat.export.as_it_is import export


@pytest.fixture(scope="module")
def folder(tiny, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("as-it-is") / "q"
    calibration = {"calibration": str(text_file), "num_calibration_samples": 8, "max_seq_length": 32}
    return microbat.quantize(tiny(), out=out, method="batquant", settings={"epochs": 1}, **calibration)


def test_the_files_are_the_same(folder, tmp_path):
    arguments = ["export", str(folder), "--target", "vllm-plugin", "--out", str(tmp_path / "q")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "microbat for vllm-plugin" in result.output
    names = sorted(file.name for file in folder.iterdir())
    assert sorted(file.name for file in (tmp_path / "q").iterdir()) == names
    assert filecmp.cmpfiles(folder, tmp_path / "q", names, shallow=False)[0] == names


def test_wrong_requests(folder, tiny, tmp_path):
    with pytest.raises(ValueError, match="--format compressed-tensors"):
        export(folder, tmp_path / "q", target="vllm")
    with pytest.raises(ValueError, match="not a microbat folder"):
        export(tiny(), tmp_path / "q", target="vllm-plugin")
    with pytest.raises(ValueError, match="exists"):
        export(folder, folder, target="vllm-plugin")
    copy = export(folder, tmp_path / "copy", target="vllm-plugin")
    shard = copy / "microbat-other.safetensors"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"microbat-other.safetensors: tensor .* was altered"):
        export(copy, tmp_path / "q", target="vllm-plugin")
    assert not (tmp_path / "q").exists()
