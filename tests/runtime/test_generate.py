"""Streaming generation, from packed weights and from a packed cache."""

import pytest
import torch
from typer.testing import CliRunner

import microbat
from microbat import native, pipeline
from microbat.cli import app
from microbat.quantizers import kernel
from microbat.runtime import packed
from microbat.runtime.generate import generate
from microbat.runtime.packed import PackedLinear

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32", "method": "rtn"}


@pytest.mark.parametrize("scheme", ["W4A8KV16", "W4A8KV4"])
def test_pieces_make_the_text_of_plain_generation(tiny, text_file, tmp_path, scheme):
    out = microbat.quantize(tiny("qwen3"), out=tmp_path / "q", scheme=scheme, calibration=str(text_file), **FAST)
    pieces = []
    text = pipeline.generate(out, "w1 w2", max_new_tokens=9, device="cpu", show=pieces.append)
    assert "".join(pieces) == text
    model, tokenizer = microbat.load(out), pipeline.tokenizer_of(out)
    tokens = tokenizer("w1 w2", return_tensors="pt")
    whole = model.generate(**tokens, max_new_tokens=9, do_sample=False)[0, tokens.input_ids.shape[1] :]
    assert text == tokenizer.decode(whole, skip_special_tokens=True)


def test_the_verb_passes_on_how_to_load(tiny, text_file, tmp_path, monkeypatch):
    out = microbat.quantize(tiny(), out=tmp_path / "q", scheme="W4A16", calibration=str(text_file), **FAST)
    made = []
    load = pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda *given, **options: made.append(load(*given, **options)) or made[-1])

    def run(*options):
        arguments = ["generate", str(out), "--prompt", "w1", "--max-new-tokens", "2", "--device", "cpu", *options]
        result = CliRunner().invoke(app, arguments)
        layers = [module.backend for model in made for module in model.modules() if isinstance(module, PackedLinear)]
        return result.exit_code, result.output, [model.dtype for model in made], set(layers)

    assert run("--dtype", "bfloat16", "--backend", "torch")[::2] == (0, [torch.bfloat16])
    assert run("--dtype", "bfloat16", "--backend", "torch")[3] == {"torch"}
    made.clear()
    assert run()[::2] == (0, [torch.float32])
    code, output, *_ = run("--backend", "triton")
    assert (code, "backend 'triton' does not run mxfp4 on 'cpu'" in output) == (2, True)


def test_without_a_compiler(tiny, text_file, tmp_path, monkeypatch):
    """Nothing native and no torch.compile: the same bytes, and a model that runs from them."""
    options = {"scheme": "W4A8KV4", "calibration": str(text_file), **FAST}
    tokens = torch.randint(257, (1, 24), generator=torch.Generator().manual_seed(0))
    out = microbat.quantize(tiny("qwen3"), out=tmp_path / "with", **options)
    expected = microbat.load(out)(tokens).logits

    def fails(function):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(native, "shared_object", lambda: None)
    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(kernel, "EAGER_BELOW", 0)
    caches = (packed.best, packed._compiled_decode, kernel.can_compile)
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="quantizers run eagerly"):
            bare = microbat.quantize(tiny("qwen3"), out=tmp_path / "without", **options)
        for shard in sorted(out.glob("microbat-*.safetensors")):
            assert shard.read_bytes() == (bare / shard.name).read_bytes()
        model = microbat.load(bare)
        assert {m.backend for m in model.modules() if isinstance(m, PackedLinear)} == {"torch"}
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert generate(model, pipeline.tokenizer_of(bare), "w1 w2", max_new_tokens=5)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_the_context_ends_it(tiny):
    model, tokenizer = microbat.load(tiny("llama")), pipeline.tokenizer_of(tiny("llama"))
    model.generation_config.eos_token_id = None
    text = generate(model, tokenizer, "w" * 250, max_new_tokens=20)
    assert 1 <= len(tokenizer(text).input_ids) <= 6 * 3  # six tokens; a byte that is no character becomes three
    with pytest.raises(ValueError, match="the prompt has 256 tokens; the model's context of 256 has no room"):
        generate(model, tokenizer, "w" * 256, max_new_tokens=20)
