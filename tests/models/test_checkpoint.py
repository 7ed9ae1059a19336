"""A folder of safetensors from anywhere: nothing outside it is opened, no pickle is read, errors name the file."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import microbat
from microbat.models.checkpoint import WEIGHTS_INDEX, Checkpoint

NORM = "model.norm.weight"


@pytest.fixture
def sharded(tiny, tmp_path):
    """A float model whose tensors lie in one file, which an index names."""
    folder = shutil.copytree(tiny(), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "part.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    write_index(folder, dict.fromkeys(tensors, "part.safetensors"))
    return folder


def write_index(folder, weight_map):
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_in_order(sharded):
    assert Checkpoint(sharded).tensor(NORM).shape == (64,)


@pytest.mark.parametrize("place", ["../outside.safetensors", "{}/outside.safetensors"])
def test_an_index_that_leaves_the_folder(sharded, place):
    shutil.copy(sharded / "part.safetensors", sharded.parent / "outside.safetensors")
    weight_map = dict.fromkeys(load_file(sharded / "part.safetensors"), "part.safetensors")
    write_index(sharded, {**weight_map, NORM: place.format(sharded.parent)})
    with pytest.raises(ValueError, match=rf"{WEIGHTS_INDEX} says that {NORM} is in .*outside"):
        microbat.load(sharded)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(sharded, content):
    (sharded / WEIGHTS_INDEX).write_text(content)
    with pytest.raises(ValueError, match=WEIGHTS_INDEX):
        microbat.load(sharded)


def test_a_folder_of_pickles(tiny, tmp_path):
    """A pickle runs what it says when it is read; this one would leave a file."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny() / "config.json", folder)
    torch.save({NORM: Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"safetensors are needed, and a pickle \(pytorch_model.bin\) is never read"):
        microbat.load(folder)
    with pytest.raises(ValueError, match="safetensors are needed"):
        microbat.quantize(folder, out=tmp_path / "q", method="rtn")
    assert not (tmp_path / "sprung").exists()


def test_no_module_reads_pickles():
    package = Path(microbat.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & set(imported), file
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{file}:{node.lineno}"
