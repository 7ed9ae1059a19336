"""Damaged and foreign folders: every error names the file and the tensor."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import microbat
from microbat.export import folder as folders

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
LAYER = "model.layers.1.mlp.up_proj"
SHARD = folders.block_shard(1)


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "q"
    return microbat.quantize(tiny(), out=out, method="rtn", scheme="W4A8", calibration=str(text_file), **FAST)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "q")


def rewrite(folder, change, *, shard=SHARD, described=None):
    """Change the tensors of one shard (and its description) behind microbat's back."""
    file = folder / shard
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        description = json.loads(opened.metadata()["microbat"])
    change(tensors)
    if described is not None:
        described(description)
    save_file(tensors, file, {"microbat": json.dumps(description)})


def refused(folder, *parts):
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        microbat.load(folder)
    for part in parts:
        assert part in str(error.value), error.value


def no_digests(description):
    del description["sha256"]


def test_a_whole_folder_loads(copy):
    microbat.load(copy)


def test_a_folder_from_before_digests_loads(copy):
    rewrite(copy, lambda tensors: None, described=no_digests)
    microbat.load(copy)


def test_altered_bit(copy):
    rewrite(copy, lambda tensors: tensors[f"{LAYER}.weight_packed"][3, 5].bitwise_xor_(1))
    refused(copy, SHARD, f"{LAYER}.weight_packed", "altered")


def test_altered_outside_the_blocks(copy):
    rewrite(copy, lambda tensors: tensors["model.norm.weight"][3].add_(1), shard=folders.OTHER_SHARD)
    refused(copy, folders.OTHER_SHARD, "model.norm.weight", "altered")


def test_missing_tensor(copy):
    rewrite(copy, lambda tensors: tensors.pop(f"{LAYER}.weight_scale"))
    refused(copy, SHARD, f"{LAYER}.weight_scale", "lacks")


def test_missing_tensor_without_digests(copy):
    rewrite(copy, lambda tensors: tensors.pop(f"{LAYER}.weight_scale"), described=no_digests)
    refused(copy, SHARD, LAYER, "weight_scale")


def test_foreign_tensor(copy):
    rewrite(copy, lambda tensors: tensors.update(extra=torch.zeros(1)))
    refused(copy, SHARD, "extra", "not written")


def test_scale_that_is_no_number(copy):
    rewrite(copy, lambda tensors: tensors[f"{LAYER}.weight_scale"][2, 0].fill_(255), described=no_digests)
    refused(copy, SHARD, LAYER, "scale is negative, infinite or not a number")


def test_code_out_of_range(tiny, text_file, tmp_path):
    out = microbat.quantize(
        tiny(), out=tmp_path / "q", method="rtn", scheme="W8A8:int8", calibration=str(text_file), **FAST
    )
    rewrite(out, lambda tensors: tensors[f"{LAYER}.weight"][2, 0].fill_(-128), described=no_digests)
    refused(out, SHARD, LAYER, "code 128 is out of range")


def test_shape_that_is_not_the_configs(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    refused(copy, "mlp.gate_proj", "(96, 64)", "config.json makes it (128, 64)")


def test_floats_that_are_no_numbers(copy):
    name = "model.layers.1.input_layernorm.weight"
    rewrite(copy, lambda tensors: tensors[name][0].fill_(float("nan")), described=no_digests)
    refused(copy, SHARD, "input_layernorm.weight holds NaN or Inf")


@pytest.mark.parametrize("key", ["sites", "name"])
def test_description_that_lacks_something(copy, key):
    rewrite(copy, lambda tensors: None, described=lambda description: description.pop(key))
    refused(copy, SHARD, "cannot be read", key)


def test_truncated_shard_and_missing_shard(copy):
    shard = copy / folders.block_shard(0)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(copy, shard.name, "truncated")
    shard.unlink()
    refused(copy, shard.name)


@pytest.mark.parametrize("entry", [{"schema": 2}, {"schema": None}, {"rounding": "up"}])
def test_another_schema_or_convention(copy, entry):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= entry
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "config.json", *entry)


def test_config_that_is_no_json(copy):
    (copy / "config.json").write_text("{")
    refused(copy, "config.json", "not JSON")
