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


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("entry", [{"schema": 3}, {"schema": None}, {"rounding": "up"}])
def test_another_schema_or_convention(copy, entry):
    edit(copy / "config.json", lambda config: config["quantization_config"].update(entry))
    refused(copy, "config.json", *entry)


def test_the_first_schema_reads_the_same(made, copy):
    edit(copy / "config.json", lambda config: config["quantization_config"].update(schema=1))
    theirs, ours = microbat.load(copy).state_dict(), microbat.load(made).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ((), "name, sites"),
        (("sites", 1), "sites.consumers"),
        (("sites", 1, "activation"), "sites.activation.scale_rule"),
        (("sites", 2, "weights", "mlp.up_proj"), "sites.weights.mlp.up_proj.shape"),
        (("kv",), "kv.attention"),
        (("kv", "key"), "kv.key.format"),
    ],
)
def test_a_key_of_a_newer_microbat_in_a_shard(copy, path, known):
    def add(description):
        description.setdefault("kv", {"attention": "self_attn", "key": {}, "value": {}})
        for key in path:
            description = description[key]
        description["squares_first"] = True

    rewrite(copy, lambda tensors: None, described=add)
    refused(copy, SHARD, "squares_first", known, "newer microbat")


@pytest.mark.parametrize("role", [None, "activations"])
def test_a_key_of_a_newer_microbat_in_the_contract(copy, role):
    def add(config):
        contract = config["quantization_config"]
        (contract[role] if role else contract)["squares_first"] = True

    edit(copy / "config.json", add)
    refused(copy, "config.json", f"{role}.squares_first" if role else "squares_first", "newer microbat")


@pytest.mark.parametrize("name", ["config.json", folders.INDEX])
@pytest.mark.parametrize(("content", "said"), [("{", "not JSON"), ("[1]", "a list, not an object")])
def test_no_json_or_no_object(copy, name, content, said):
    (copy / name).write_text(content)
    refused(copy, name, said)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}'])
def test_an_index_without_a_map(copy, content):
    (copy / folders.INDEX).write_text(content)
    refused(copy, folders.INDEX, "no weight_map")


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "{}/outside.safetensors", "sub/../../outside.safetensors", 3]
)
def test_an_index_that_leaves_the_folder(copy, place):
    """The file is there and holds the tensor: before, it was read."""
    place = place.format(copy.parent) if isinstance(place, str) else place
    (copy / "sub").mkdir()
    shutil.copy(copy / folders.OTHER_SHARD, copy.parent / "outside.safetensors")
    name = "model.norm.weight"
    edit(copy / folders.INDEX, lambda index: index["weight_map"].update({name: place}))
    refused(copy, folders.INDEX, name, repr(place))


@pytest.mark.parametrize("file", ["other.safetensors", "sub/microbat-other.safetensors", "weights.bin"])
def test_a_file_that_is_no_shard_of_ours(copy, file):
    """Nobody would check its digests."""
    (copy / "sub").mkdir()
    shutil.copy(copy / folders.OTHER_SHARD, copy / file)
    edit(copy / folders.INDEX, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    refused(copy, file, "no shard of this folder")


def test_a_file_beside_the_shards(copy):
    """vLLM places the tensors of whatever is there."""
    shutil.copy(copy / folders.OTHER_SHARD, copy / "more.safetensors")
    refused(copy, "more.safetensors", "no shard of this folder")


@pytest.mark.parametrize(("layers", "shard"), [(1, 1), (3, 2)])
def test_another_number_of_blocks(copy, layers, shard):
    edit(copy / "config.json", lambda config: config.update(num_hidden_layers=layers))
    refused(copy, folders.block_shard(shard), f"config.json asks for {layers} blocks")


def test_blocks_that_changed_places(copy):
    first, second = copy / folders.block_shard(0), copy / SHARD
    first.rename(copy / "kept")
    second.rename(first)
    (copy / "kept").rename(second)
    names = {first.name: second.name, second.name: first.name}

    def swap(index):
        index["weight_map"] = {name: names.get(file, file) for name, file in index["weight_map"].items()}

    edit(copy / folders.INDEX, swap)
    refused(copy, first.name, "holds model.layers.1", "config.json makes it model.layers.0")
