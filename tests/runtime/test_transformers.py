"""AutoModelForCausalLM.from_pretrained on microbat folders; and that without microbat it raises, never loads something else."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import microbat
from microbat.export import folder as folders

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}


@pytest.fixture(scope="module")
def folder(tiny, text_file, tmp_path_factory):
    """With everything that can be online: transforms, clips, a quantized cache with a transform."""
    out = tmp_path_factory.mktemp("online") / "q"
    settings = {"epochs": 1}
    options = {"method": "batquant", "scheme": "W4A4KV4", "settings": settings, "calibration": str(text_file)}
    return microbat.quantize(tiny("qwen3"), out=out, **options, **FAST)


def script(*lines):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], capture_output=True, text=True)


def test_logits_are_those_of_microbat(folder):
    tokens = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(5))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = microbat.load(folder)
    assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    answers = [m.generate(tokens[:1], max_new_tokens=8, do_sample=False) for m in (theirs, ours)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(("family", "method"), [("llama", "quarot"), ("qwen2", "gptq")])
def test_rotated_models_and_biases(tiny, text_file, tmp_path, family, method):
    out = microbat.quantize(tiny(family), out=tmp_path / "q", method=method, calibration=str(text_file), **FAST)
    tokens = torch.randint(257, (1, 24), generator=torch.Generator().manual_seed(5))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert torch.equal(theirs(tokens).logits, microbat.load(out, dtype=torch.bfloat16)(tokens).logits)


@pytest.mark.parametrize(("method", "scheme"), [("arcquant", "W4A4:nvfp4"), ("micromix", "W4A4")])
def test_wide_and_mixed_weights(tiny, text_file, tmp_path, method, scheme):
    options = {
        "scheme": scheme,
        "calibration": str(text_file),
        "settings": {"unit": 32} if method == "micromix" else {},
    }
    out = microbat.quantize(tiny(), out=tmp_path / "q", method=method, **options, **FAST)
    tokens = torch.randint(257, (1, 24), generator=torch.Generator().manual_seed(5))
    theirs, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(theirs(tokens).logits, microbat.load(out, dtype=torch.bfloat16)(tokens).logits)


def test_nothing_is_reported_missing_or_left_over(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("first", ["microbat", "transformers.quantizers.auto"])
def test_it_takes_no_more_than_importing_microbat(folder, first):
    result = script(
        f"import {first}",
        "import microbat",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        "print(type(model.model.layers[0].mlp.up_proj).__name__)",
    )
    assert result.stdout.strip() == "PackedLinear", result.stderr


def test_a_reader_without_microbat_gets_an_error(folder):
    result = script(
        "from transformers import AutoModelForCausalLM",
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r})",
    )
    assert result.returncode != 0
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .endswith("`import microbat` before from_pretrained (pip install microbat)")
    )


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_an_index_that_leaves_the_folder(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "q")
    shutil.copy(copy / folders.OTHER_SHARD, tmp_path / "outside.safetensors")
    outside = {"model.norm.weight": "../outside.safetensors"}
    edit(copy / folders.INDEX, lambda index: index["weight_map"].update(outside))
    with pytest.raises(ValueError, match=r"index.json says that model.norm.weight is in '../outside.safetensors'"):
        AutoModelForCausalLM.from_pretrained(copy)
    (copy / folders.INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_part_of_the_blocks_is_not_the_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "q")
    edit(copy / "config.json", lambda config: config.update(num_hidden_layers=1, layer_types=["full_attention"]))
    with pytest.raises(ValueError, match=r"block-001.safetensors is no shard of this folder: config.json asks for 1 "):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_key_of_a_newer_microbat_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "q")
    edit(copy / "config.json", lambda config: config["quantization_config"].update(squares_first=True))
    with pytest.raises(ValueError, match=r"config.json says 'squares_first'"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_another_schema_and_an_altered_tensor_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "q")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["schema"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="schema 99"):
        AutoModelForCausalLM.from_pretrained(copy)
    shutil.copy(folder / "config.json", copy)
    shard = copy / "microbat-block-001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"microbat-block-001.safetensors: tensor .* was altered"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_such_a_model_is_not_saved_as_something_else(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="not serializable"), warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "copy")
