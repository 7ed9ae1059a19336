"""Checkpoints that store tensors otherwise than models hold them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from microbat.models.base import families
from microbat.models.checkpoint import WEIGHTS_INDEX, Checkpoint
from microbat.models.layout import Layout, sources, stored_form
from microbat.models.mixtral import MIXTRAL

TOKENS = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_float_model_is_transformers(tiny, family):
    model, theirs = Checkpoint(tiny(family)).load(), AutoModelForCausalLM.from_pretrained(tiny(family))
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits)


def test_experts_that_the_hub_stores_fused_and_transposed(tiny, pairs):
    folder = tiny("qwen3_vl_moe")
    block = "model.language_model.layers.2.mlp.experts"
    stored, checkpoint = load_file(folder / "model.safetensors"), Checkpoint(folder)
    assert stored[f"{block}.gate_up_proj"].shape == (5, 128, 2 * 96)
    assert checkpoint.tensor(f"{block}.up_proj.weight").shape == (5, 96, 128)
    assert checkpoint.tensor(f"{block}.down_proj.weight").shape == (5, 128, 96)
    model, theirs = checkpoint.load(), AutoModelForImageTextToText.from_pretrained(folder)
    for sample in pairs:
        torch.testing.assert_close(model(**sample).logits, theirs(**sample).logits)


def test_blocks_without_experts(tiny):
    folder = tiny("qwen3_moe", decoder_sparse_step=2)
    checkpoint = Checkpoint(folder)
    model = checkpoint.load()
    names = [[site.name for site in checkpoint.family.sites_in(block)] for block in model.model.layers]
    assert names == [["qkv", "o", "up", "down"], ["qkv", "o", "experts_up", "experts_down"]]
    torch.testing.assert_close(model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits)


def test_experts_of_a_block_in_several_files(tiny, tmp_path):
    whole = load_file(tiny("mixtral") / "model.safetensors")
    folder = shutil.copytree(tiny("mixtral"), tmp_path / "m", ignore=shutil.ignore_patterns("model.safetensors"))
    files = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(sorted(whole))}
    for file in set(files.values()):
        save_file({name: whole[name] for name, its in files.items() if its == file}, folder / file)
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": files}))
    one, two = Checkpoint(tiny("mixtral")), Checkpoint(folder)
    assert set(one.names) == set(two.names)
    for name in one.names:
        assert torch.equal(one.tensor(name), two.tensor(name)), name
    assert one.tensor("model.layers.1.mlp.experts.down_proj.weight").shape == (3, 64, 96)


def test_an_expert_that_is_missing_is_named(tiny, tmp_path):
    tensors = load_file(tiny("mixtral") / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    folder = shutil.copytree(tiny("mixtral"), tmp_path / "m", ignore=shutil.ignore_patterns("model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks expert 1 of model\.layers\.1\.mlp\.experts\.up_proj\.weight .*w3"):
        Checkpoint(folder).num_blocks  # noqa: B018


@pytest.mark.parametrize("transposed", [True, False])
def test_fused_experts(transposed):
    """As Qwen3-VL-MoE stores them: gate before up, [E, K, 2 N] on the hub, [E, 2 N, K] as transformers saves them."""
    layouts = (
        Layout(held="e.gate.weight", stored="e.both", inputs="hidden_size", half=0),
        Layout(held="e.up.weight", stored="e.both", inputs="hidden_size", half=1),
        Layout(held="e.down.weight", stored="e.down", inputs="moe_intermediate_size"),
    )
    config = SimpleNamespace(hidden_size=4, moe_intermediate_size=6)
    found = sources(["b.0.e.both", "b.0.e.down", "b.0.norm", "head"], "b", layouts)
    assert set(found) == {"b.0.e.gate.weight", "b.0.e.up.weight", "b.0.e.down.weight", "b.0.norm", "head"}
    gate, up = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    stored = torch.cat([gate, up], dim=1)
    stored = stored.mT.contiguous() if transposed else stored
    for name, expected in (("b.0.e.gate.weight", gate), ("b.0.e.up.weight", up)):
        assert found[name].names == ("b.0.e.both",)
        assert torch.equal(found[name].layout.held_form([stored], config), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_vl_moe"])
def test_stored_form_is_what_a_checkpoint_holds(family):
    """Quantized experts too: whatever is stored for a weight is one tensor of each."""
    layouts = families()[family].layouts
    held = {f"mlp.experts.{name}.weight": torch.randn(3, *shape) for name, shape in SHAPES.items()}
    held |= {"mlp.gate.weight": torch.randn(3, 4), "input_layernorm.weight": torch.randn(4)}
    if family != "qwen3_vl_moe":
        held["mlp.experts.up_proj.weight_scale"] = torch.randn(3, 6, 2)
    stored = stored_form(held, layouts)
    assert set(stored) == {
        "qwen3_moe": {*each("mlp.experts", ("gate_proj", "up_proj", "down_proj"), "up_proj"), "mlp.gate.weight"},
        "mixtral": {*each("block_sparse_moe.experts", ("w1", "w3", "w2"), "w3"), "block_sparse_moe.gate.weight"},
        "qwen3_vl_moe": {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"},
    }[family] | {"input_layernorm.weight"}
    config = SimpleNamespace(hidden_size=4, moe_intermediate_size=6)
    found = sources([f"b.0.{name}" for name in stored], "b", layouts)
    assert {name.removeprefix("b.0.") for name in found} == set(held)
    for name, tensor in held.items():
        source = found[f"b.0.{name}"]
        parts = [stored[part.removeprefix("b.0.")] for part in source.names]
        assert torch.equal(parts[0] if source.layout is None else source.layout.held_form(parts, config), tensor), name


SHAPES = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}


def each(path, layers, scaled):
    names = [f"{path}.{expert}.{layer}.weight" for expert in range(3) for layer in layers]
    return [*names, *(f"{path}.{expert}.{scaled}.weight_scale" for expert in range(3))]


def test_names_that_no_layout_has_stay():
    found = sources(
        ["model.layers.0.mlp.gate.weight", "x.block_sparse_moe.gate.weight"], "model.layers", MIXTRAL.layouts
    )
    assert {name: source.names for name, source in found.items()} == {
        "model.layers.0.mlp.gate.weight": ("model.layers.0.mlp.gate.weight",),
        "x.block_sparse_moe.gate.weight": ("x.block_sparse_moe.gate.weight",),
    }
