"""The compressed-tensors export: byte for byte against the installed package and what three versions of it wrote, loaded by
transformers, refused with reasons."""

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import microbat
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.export.compressed_tensors import (
    codes_digest,
    export,
    from_tensors,
    quantization_config,
    read_blocks,
    read_exported,
    to_tensors,
)
from microbat.export.targets import TARGETS
from microbat.formats.block import BlockFormat
from microbat.quantizers.base import AbsMax
from microbat.registry import instances
from microbat.verify import verify

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
FORMATS = instances("microbat.formats", BlockFormat)
PAIRS = [
    ("mxfp4", None),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp6_e2m3", None),
    ("mxfp8_e4m3", None),
    ("mxfp8_e4m3", "mxfp8_e4m3"),
    ("nvfp4", None),
    ("int4", None),
    ("int4_row", None),
    ("int4_row", "int8"),
    ("int8", None),
    ("int8", "int8"),
]
# Version -> weights and activations -> digest of what that version of the package writes for `example`; the test that runs
# the installed version checks its own row.
WRITTEN = json.loads(Path(__file__).with_name("compressed_tensors.json").read_text())
needs_theirs = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


def scheme_of(weights, activations):
    """Our configuration as their package reads it, and its compressor for it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = quantization_config(FORMATS[weights], activations and FORMATS[activations], ["lm_head"])
    known = {key: config[key] for key in QuantizationConfig.model_fields if key in config}
    parsed = QuantizationConfig.model_validate(known)
    scheme = parsed.config_groups["group_0"]
    return scheme, BaseCompressor.get_value_from_registry(config["format"])


def has_mxfp6():
    from compressed_tensors.config import CompressionFormat

    return hasattr(CompressionFormat, "mxfp6_pack_quantized")


def example(weights):
    """A weight of integers times powers of two, the same on every machine."""
    integers = torch.randint(-999, 1000, (24, 96), generator=torch.Generator().manual_seed(1))
    return AbsMax(format=FORMATS[weights]).quantize(integers * 2.0 ** (torch.arange(96) // 8 - 6))


def digest_of(tensors):
    """Of names, types, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize("version", WRITTEN)
def test_bytes_are_those_that_each_version_wrote(version):
    ours = {}
    for weights, activations in PAIRS:
        tensors = to_tensors(example(weights), quantized_inputs=activations is not None)
        ours[f"{weights} {activations}"] = digest_of(tensors)
    assert {name: ours[name] for name in WRITTEN[version]} == WRITTEN[version]
    assert set(ours) - set(WRITTEN[version]) <= {"mxfp6_e2m3 None"}  # which the package has from 0.20


@needs_theirs
@pytest.mark.parametrize(("weights", "activations"), PAIRS)
def test_bytes_are_those_of_compressed_tensors(weights, activations):
    if weights == "mxfp6_e2m3" and not has_mxfp6():
        pytest.skip("compressed-tensors has MXFP6 from 0.20")
    q = example(weights)
    scheme, compressor = scheme_of(weights, activations)
    assert compressor.can_compress(nn.Linear, scheme)
    state = {"weight": q.dequantize(), "weight_scale": q.scales}
    if q.tensor_scale is not None:
        state["weight_global_scale"] = q.tensor_scale.reciprocal().reshape(1)
    if weights == "int4":
        state["weight_scale"] = q.scales.to(torch.bfloat16)
    theirs = compressor.compress(state, scheme)
    written = WRITTEN.get(importlib.metadata.version("compressed-tensors"), {})
    assert written.get(f"{weights} {activations}", digest_of(theirs)) == digest_of(theirs)
    ours = to_tensors(q, quantized_inputs=activations is not None)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].flatten().view(torch.uint8), tensor.flatten().contiguous().view(torch.uint8)), (
            name
        )


@pytest.mark.parametrize(("weights", "activations"), PAIRS)
@pytest.mark.parametrize("width", [96, 160])
def test_what_is_written_is_read_back(weights, activations, width):
    q = AbsMax(format=FORMATS[weights]).quantize(torch.randn(7, width, generator=torch.Generator().manual_seed(2)))
    ours = to_tensors(q, quantized_inputs=activations is not None)
    back = from_tensors(ours, q.format, quantized_inputs=activations is not None)
    torch.testing.assert_close(q.format.element.decode(back.codes), q.format.element.decode(q.codes), rtol=0, atol=0)
    assert torch.equal(back.scales, q.scales)
    assert codes_digest(back) == codes_digest(q)
    torch.testing.assert_close(back.dequantize(), q.dequantize(), rtol=3e-7, atol=0)


def quantized(tiny, text_file, out, scheme, family="llama", **options):
    options = {"method": "rtn", **options}
    return microbat.quantize(tiny(family), out=out, scheme=scheme, calibration=str(text_file), **{**options, **FAST})


@needs_theirs
@pytest.mark.parametrize(
    ("family", "scheme", "method", "bound"),
    [
        ("llama", "W4A4", "gptq", 1e-5),
        ("qwen2", "W4A8", "smoothquant", 1e-5),
        ("qwen3", "W8A8", "rtn", 1e-5),
        ("llama", "W4A16", "rtn", 1e-5),
        ("llama", "W4A16:nvfp4", "rtn", 1e-2),  # dividing by the stored reciprocal may round another way
        ("llama", "W4A16:int4", "rtn", 1e-5),
        ("qwen3", "W4A16:int4_row", "gptq", 1e-5),
        ("llama", "W8A16:int8", "rtn", 1e-5),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_what_microbat_does(tiny, text_file, tmp_path, family, scheme, method, bound):
    from transformers import AutoModelForCausalLM

    folder = quantized(tiny, text_file, tmp_path / "q", scheme, family, method=method)
    out = export(folder, tmp_path / "ct", target="transformers")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(5))
    expected = microbat.load(folder, dtype=theirs.dtype)(tokens).logits.float()
    assert (theirs(tokens).logits.float() - expected).norm() / expected.norm() < bound


EXPERTS = {
    "qwen3_moe": ("mlp.experts", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}),
    "mixtral": ("block_sparse_moe.experts", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
}


@needs_theirs
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("qwen3_moe", "W4A16"),
        ("mixtral", "W4A16:int4"),
        ("qwen3_moe", "W8A16:int8"),
        ("mixtral", "W4A16:int4_row"),
        ("mixtral", "W6A16"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_experts_are_stored_one_by_one_and_run(tiny, text_file, tmp_path, family, scheme):
    """Byte for byte what the package writes for each expert's weight, under the names of the family's own checkpoints."""
    if scheme == "W6A16" and not has_mxfp6():
        pytest.skip("compressed-tensors has MXFP6 from 0.20")
    folder = quantized(tiny, text_file, tmp_path / "q", scheme, family)
    out = export(folder, tmp_path / "ct", target="transformers")
    stored = shards.read_block(folder / folders.block_shard(1)).quantized.weights
    place, names = EXPERTS[family]
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    file = load_file(out / index[f"model.layers.1.{place}.2.{names['up_proj']}.weight_packed"])
    for held, theirs in names.items():
        for expert, q in enumerate(stored[f"mlp.experts.{held}"].unstack()):
            their_scheme, compressor = scheme_of(q.format.name, None)
            scale = q.scales.to(torch.bfloat16) if q.format.name == "int4" else q.scales
            written = compressor.compress({"weight": q.dequantize(), "weight_scale": scale}, their_scheme)
            for key, tensor in written.items():
                own = file.pop(f"model.layers.1.{place}.{expert}.{theirs}.{key}")
                assert own.dtype == tensor.dtype
                assert torch.equal(own.flatten().view(torch.uint8), tensor.flatten().contiguous().view(torch.uint8))
    assert not [name for name in file if "experts" in name]
    verdict = verify(out)
    assert verdict.passed, verdict
    assert (verdict.layers, verdict.error) == (14, 0)


@needs_theirs
@pytest.mark.filterwarnings("ignore")
def test_experts_that_are_decoded_wrong_are_found(tiny, text_file, tmp_path, monkeypatch):
    """The check above can fail: transformers drops the tensor scales of experts in NVFP4."""
    folder = quantized(tiny, text_file, tmp_path / "q", "W4A16:nvfp4", "qwen3_moe")
    with pytest.raises(ValueError, match="decodes experts in NVFP4 without their tensor scale"):
        export(folder, tmp_path / "ct", target="transformers")
    monkeypatch.setitem(TARGETS["transformers"].experts, ("nvfp4", None), ())
    verdict = verify(export(folder, tmp_path / "ct", target="transformers"))
    assert not verdict.passed
    assert verdict.worst.endswith(".mlp.experts")


def test_an_altered_expert_of_an_export_is_named(tiny, text_file, tmp_path):
    out = export(quantized(tiny, text_file, tmp_path / "q", "W4A16", "mixtral"), tmp_path / "ct", target="transformers")
    assert [len(block.quantized.weights) for block in read_blocks(out)] == [7, 7]
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight_scale"
    file = out / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.experts.up_proj.weight_scale is not the one"):
        list(read_blocks(out))


def test_the_export_says_where_it_comes_from(tiny, text_file, tmp_path):
    folder = quantized(tiny, text_file, tmp_path / "q", "W4A4", ignore=("re:1.mlp.down_proj$",))
    out = export(folder, tmp_path / "ct", target="transformers")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    said = read_exported(out)
    assert said.source == json.loads((folder / "recipe.json").read_text())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == said.tensors.keys()
    assert {name for file in set(index.values()) for name in load_file(out / file)} == index.keys()
    assert len(said.codes) == 13
    assert {f.name for f in out.iterdir()} >= {"tokenizer.json", "generation_config.json"}
    with pytest.raises(ValueError, match="exists"):
        export(folder, out, target="transformers")


@pytest.mark.parametrize(
    ("target", "options", "reasons"),
    [
        ("vllm", {"scheme": "W4A4"}, ["name it, --target vllm-hopper"]),
        ("vllm-hopper", {"scheme": "W4A4"}, ["16-bit activations"]),
        ("vllm-blackwell", {"scheme": "W4A4"}, ["scale rule 'even'", "--scale-rule rceil"]),
        ("vllm-blackwell", {"scheme": "W4A16"}, ["vllm#56770"]),
        ("transformers", {"scheme": "W4A4", "scale_rule": "floor"}, ["scale rule 'floor'", "--scale-rule even"]),
        ("transformers", {"scheme": "W4A4KV8", "family": "qwen3"}, ["the cache in mxfp8_e4m3", "KV16"]),
        ("transformers", {"scheme": "W8A8:int8"}, ["127.5", "--target vllm"]),
        ("transformers", {"scheme": "W4A8:int4_row,int8"}, ["127.5", "--target vllm", "W4A16:int4_row"]),
        ("vllm", {"scheme": "W4A8:int4,int8"}, ["groups of 32", "W4A8:int4_row,int8"]),
        ("transformers", {"scheme": "W4A4:nvfp4"}, ["W4A16:nvfp4"]),
        ("transformers", {"scheme": "W8A16:mxint8"}, ["mxint8 weights", "the engine has"]),
        ("vllm-cpu", {"scheme": "W8A16:int8"}, ["no kernel for it on CPUs", "W8A8:int8"]),
        (
            "transformers",
            {"scheme": "W4A4", "family": "qwen3_moe"},
            ["leaves their activations in 16 bits", "(2 blocks)"],
        ),
        (
            "transformers",
            {"scheme": "W8A16", "family": "mixtral"},
            ["does not load experts in MXFP8", "W4A16 or W6A16"],
        ),
        (
            "transformers",
            {"scheme": "W4A16", "family": "mixtral", "ignore": ("re:experts",)},
            ["experts are in float: transformers does not load"],
        ),
        (
            "vllm",
            {"scheme": "W4A16:int4", "family": "mixtral", "ignore": ("re:experts.up_proj",)},
            [
                "mlp.experts.up_proj are in float, mlp.experts.gate_proj, mlp.experts.down_proj are not: engines take all"
            ],
        ),
        ("vllm", {"scheme": "W8A8:int8", "family": "qwen3_moe"}, ["vLLM on every GPU has not been verified"]),
        ("vllm-cpu", {"scheme": "W4A16:int4", "family": "qwen3_moe"}, ["by activations of 8 bits, where there is AMX"]),
        ("vllm-cpu", {"scheme": "W4A4"}, ["no kernel for it on CPUs", "--target vllm-plugin"]),
        ("vllm-cpu", {"scheme": "W4A8"}, ["mxfp4 weights with mxfp8_e4m3", "int4_row and int8, int8 and int8"]),
        (
            "vllm",
            {"scheme": "W4A16:int4", "ignore": ("re:0.*k_proj$",)},
            ["self_attn.k_proj is in float", "(1 blocks)"],
        ),
        (
            "transformers",
            {"scheme": "W4A4", "method": "batquant", "settings": {"epochs": 1}},
            ["runs online", "clip of the activation", "(2 blocks)"],
        ),
        ("nowhere", {"scheme": "W4A4"}, ["unknown target 'nowhere'", "vllm-blackwell"]),
    ],
)
def test_what_an_engine_would_not_compute_is_refused(tiny, text_file, tmp_path, target, options, reasons):
    folder = quantized(tiny, text_file, tmp_path / "q", **{"family": "llama", **options})
    with pytest.raises(ValueError, match="cannot be served|unknown target") as error:
        export(folder, tmp_path / "ct", target=target)
    for reason in reasons:
        assert reason in str(error.value), error.value
    assert not list(tmp_path.glob("ct*"))


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("vllm", {"scheme": "W4A16:nvfp4"}),
        ("vllm", {"scheme": "W4A16:int4"}),
        ("vllm", {"scheme": "W8A8:int8"}),
        ("vllm-hopper", {"scheme": "W4A16"}),
        ("vllm-blackwell", {"scheme": "W4A4", "scale_rule": "rceil"}),
        ("vllm-cpu", {"scheme": "W8A8:int8"}),
        ("vllm-cpu", {"scheme": "W4A8:int4_row,int8"}),
        ("vllm", {"scheme": "W4A16:int4", "family": "mixtral"}),
        ("vllm-hopper", {"scheme": "W8A16:int8", "family": "qwen3_moe"}),
    ],
)
def test_what_vllm_computes_is_exported(tiny, text_file, tmp_path, target, options):
    folder = quantized(tiny, text_file, tmp_path / "q", **options)
    assert read_exported(export(folder, tmp_path / "ct", target=target)).target == target


def test_layers_that_share_no_tensor_scale_are_not_fused(tiny, text_file, tmp_path, monkeypatch):
    """Folders of earlier versions."""
    monkeypatch.setattr("microbat.methods.base.together", lambda quantizers, by_row: None)
    folder = quantized(tiny, text_file, tmp_path / "q", "W4A16:nvfp4")
    with pytest.raises(ValueError, match=r"q_proj, .* have a tensor scale each, .*quantize again"):
        export(folder, tmp_path / "ct", target="vllm")
    assert export(folder, tmp_path / "ct", target="transformers").is_dir()


def test_only_our_folders_are_exported(tiny, tmp_path):
    with pytest.raises(ValueError, match="not a microbat folder"):
        export(tiny(), tmp_path / "ct", target="transformers")
    assert folders.is_microbat_folder(tiny()) is False
