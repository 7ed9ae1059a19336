"""GGUF: the package gguf decodes what we wrote to the same weights; llama.cpp generates the same tokens from it."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import microbat
from microbat.cli import app
from microbat.export.folder import block_shard
from microbat.export.gguf import export
from microbat.export.shard import read_block
from microbat.formats.block import BlockFormat, Level
from microbat.formats.element import FP32, INT8
from microbat.linear import SiteInput
from microbat.quantizers.base import AbsMax
from microbat.verify import verify

gguf = pytest.importorskip("gguf")
TOKENS = 12
FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    """``made("llama")``: a W4A16 folder without outlier channels, in which 8-bit activations would be far from 16-bit ones,
    and whose tokenizer has a merge, which llama.cpp wants."""
    folders = {}

    def get(family, **options):
        if family not in folders or options:
            place = tmp_path_factory.mktemp(family)
            model = shutil.copytree(tiny(family, vocab_size=258), place / "model")
            tokenizer = json.loads((model / "tokenizer.json").read_text())
            tokenizer["model"]["vocab"]["w1"] = 257
            tokenizer["model"]["merges"] = [["w", "1"]]
            (model / "tokenizer.json").write_text(json.dumps(tokenizer))
            tensors = load_file(model / "model.safetensors")
            calm = {name: torch.ones_like(t) if "norm" in name else t for name, t in tensors.items()}
            save_file(calm, model / "model.safetensors", {"format": "pt"})
            options = {"method": "gptq", "scheme": "W4A16", "calibration": str(text_file), **FAST, **options}
            folders[family] = microbat.quantize(model, out=place / "q", **options)
        return folders[family]

    return get


def pairs(weight, heads):
    """Rows [N, K] as llama.cpp orders them for models called llama: lanes i and i + D/2 of a head side by side."""
    order = [h * 16 + lane for h in range(heads) for pair in range(8) for lane in (pair, pair + 8)]
    return weight[order]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_their_reader_decodes_our_weights(made, tmp_path, family):
    folder = made(family)
    out = export(folder, tmp_path / "m.gguf", target="llama.cpp")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for index in range(2):
        block = read_block(folder / block_shard(index))
        for path, q in block.quantized.weights.items():
            theirs = stored.pop(f"blk.{index}.{names[path]}.weight")
            assert theirs.tensor_type == gguf.GGMLQuantizationType.MXFP4
            expected = q.dequantize()
            if family == "llama" and path.endswith(("q_proj", "k_proj")):
                expected = pairs(expected, 4 if path.endswith("q_proj") else 2)
            decoded = torch.from_numpy(gguf.quants.dequantize(theirs.data, theirs.tensor_type))
            assert torch.equal(decoded, expected), path
    norm = torch.from_numpy(stored["blk.1.attn_norm.weight"].data.copy())
    assert torch.equal(norm, block.floats["input_layernorm.weight"])
    if family == "qwen2":
        assert torch.equal(
            torch.from_numpy(stored["blk.1.attn_q.bias"].data.copy()), block.floats["self_attn.q_proj.bias"]
        )
    assert "token_embd.weight" in stored
    assert ("output.weight" in stored) == (family == "llama")


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_generates_the_same_tokens(made, tmp_path, family):
    """Greedily, of the tokens that are letters, digits or signs (its server keeps silent about parts of characters), and their
    probabilities among all, with activations as llama.cpp's products round them: 8 bits in blocks of 32 (Q8_0)."""
    folder = made(family)
    out = export(folder, tmp_path / "m.gguf", target="llama.cpp")
    starts = torch.randint(1, 257, (4, 12), generator=torch.Generator().manual_seed(4)).tolist()
    letters = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    allowed = [index for token, index in letters.items() if token.isascii() and token.isprintable() and len(token) == 1]
    banned = [[index, False] for index in range(258) if index not in allowed]
    model = microbat.load(folder)
    q8_0 = BlockFormat(name="q8_0", element=INT8, levels=(Level(group=32, element=FP32),))
    for module in model.modules():
        if isinstance(module, SiteInput):
            module.quantizer = AbsMax(format=q8_0)
    script = (
        "import json, xllamacpp\n"
        "params = xllamacpp.CommonParams()\n"
        f"params.model.path = {str(out)!r}\n"
        "params.n_ctx, params.verbosity, params.cpuparams.n_threads = 256, 0, 1\n"
        "params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32\n"
        "params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED\n"
        "server = xllamacpp.Server(params)\n"
        f"body = {{'n_predict': {TOKENS}, 'temperature': 0, 'n_probs': 1, 'logit_bias': {banned}}}\n"
        f"answers = [server.handle_completions({{**body, 'prompt': start}}) for start in {starts}]\n"
        "print('ANSWERS', json.dumps(answers))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "ANSWERS" in result.stdout, result.stderr[-2000:]
    same = 0
    for start, answer in zip(starts, json.loads(result.stdout.split("ANSWERS ")[1]), strict=True):
        theirs = answer["choices"][0]["logprobs"]["content"]
        chosen = [token["id"] for token in theirs]
        assert len(chosen) == TOKENS
        ours = model(torch.tensor([start + chosen])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        for token, row in zip(theirs, ours, strict=True):
            assert token["logprob"] == pytest.approx(row[token["id"]].item(), abs=0.03)
            assert row[token["id"]] > row[allowed].max() - 0.06  # a tie may go either way
            same += token["id"] == allowed[row[allowed].argmax()]
    assert same >= 0.9 * TOKENS * len(starts)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_verify_asks_llama_cpp(made):
    verdict = verify(made("llama"), engine="llama.cpp")
    assert verdict.passed, verdict
    assert (verdict.error, verdict.tokens) == (None, 8)


def test_what_llama_cpp_does_not_compute_is_refused(made, tmp_path):
    for options, reason in (
        ({"scheme": "W4A4"}, "quantize with A16"),
        ({"scheme": "W8A16"}, "mxfp8_e4m3 weights"),
        ({"method": "batquant", "settings": {"epochs": 1}}, "runs online"),
    ):
        with pytest.raises(ValueError, match=reason):
            export(made("llama", **options), tmp_path / "m.gguf", target="llama.cpp")
    with pytest.raises(ValueError, match="--format compressed-tensors"):
        export(made("qwen2"), tmp_path / "m.gguf", target="transformers")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_a_name_there_is_refused(made, tmp_path):
    copy = shutil.copytree(made("qwen3"), tmp_path / "q")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer.json: this way of splitting text has no name"):
        export(copy, tmp_path / "m.gguf", target="llama.cpp")


def test_from_the_command_line(made, tmp_path):
    command = [
        "export",
        str(made("qwen3")),
        "--format",
        "gguf",
        "--target",
        "llama.cpp",
        "--out",
        str(tmp_path / "m.gguf"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m.gguf").is_file()
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, "exists" in result.output) == (2, True)
