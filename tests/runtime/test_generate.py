"""Streaming generation, from packed weights and from a packed cache."""

import pytest

import microbat
from microbat import pipeline
from microbat.runtime.generate import generate

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


def test_the_context_ends_it(tiny):
    model, tokenizer = microbat.load(tiny("llama")), pipeline.tokenizer_of(tiny("llama"))
    model.generation_config.eos_token_id = None
    text = generate(model, tokenizer, "w" * 250, max_new_tokens=20)
    assert 1 <= len(tokenizer(text).input_ids) <= 6 * 3  # six tokens; a byte that is no character becomes three
    with pytest.raises(ValueError, match="the prompt has 256 tokens; the model's context of 256 has no room"):
        generate(model, tokenizer, "w" * 256, max_new_tokens=20)
