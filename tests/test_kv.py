"""The quantized cache: what is stored is what attention was calibrated with, and generation gives the same tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file

import microbat
from microbat.evaluation.generation import OnTheSpot, Request, Sampling
from microbat.formats.microscaling import MXFP4, MXFP8_E4M3
from microbat.kv import KVQuantizer
from microbat.pipeline import tokenizer_of
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.runtime.cache import new_cache
from microbat.transforms.kronecker import GPK

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_transform_alone_leaves_the_products():
    transform = GPK(width=32, block=32, g1=8, init="orthogonal", generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        transform.A += 0.2 * states(8, 8, seed=2)
    wide = AbsMax(format=MXFP8_E4M3)
    kv = KVQuantizer(wide, wide, transform).requires_grad_(False)
    q, k, v = states(2, 4, 5, 32), states(2, 2, 5, 32, seed=3), states(2, 2, 5, 32, seed=4)
    kv.key = type("Off", (), {"fake": staticmethod(lambda x: x)})()
    mapped_q, mapped_k, _ = kv(q, k, v)
    torch.testing.assert_close(mapped_q[:, :2] @ mapped_k.mT, q[:, :2] @ k.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [MXFP4, MXFP8_E4M3], ids=lambda f: f.name)
def test_stored_tokens_equal_the_calibrated_ones(format):
    clip = Clip(AbsMax(format=format), torch.tensor([[0.9, 0.8]]))
    transform = GPK(width=32, block=32, g1=8)
    kv = KVQuantizer(clip, AbsMax(format=format), transform).requires_grad_(False)
    q, k, v = states(2, 4, 1, 32), states(2, 2, 7, 32, seed=3), states(2, 2, 7, 32, seed=4)
    expected = kv(q, k, v)
    restored = kv.restore(*kv.store(k, v), dtype=torch.float32)
    assert torch.equal(restored[0], expected[1])
    assert torch.equal(restored[1], expected[2])
    again = kv(q, *restored)
    assert torch.equal(again[1], restored[0])  # not quantized twice
    assert torch.equal(again[0], expected[0])


@pytest.mark.parametrize("scheme", ["W4A8KV8", "W4A8KV4"])
@pytest.mark.parametrize("method", ["rtn", "batquant", "quarot", "flatquant"])
def test_generation_from_stored_codes(tiny, text_file, tmp_path, method, scheme):
    settings = {"epochs": 1} if method in ("batquant", "flatquant") else {}
    out = microbat.quantize(
        tiny("qwen3"),
        out=tmp_path / "q",
        method=method,
        solver="" if method == "rtn" else "rtn",
        scheme=scheme,
        calibration=str(text_file),
        settings=settings,
        **FAST,
    )
    assert json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache"]["format"].startswith("mxfp")
    model = microbat.load(out)
    prompt = torch.arange(2, 12)[None].repeat(2, 1)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        plain = model.generate(prompt, **options)
        cache = microbat.QuantizedCache(model)
        stored = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(plain, stored)
    tokens, lanes, heads, blocks = stored.shape[1] - 1, 32, 2, 2
    bits = 4 if scheme.endswith("KV4") else 8
    assert cache.nbytes == 2 * 2 * blocks * heads * tokens * (lanes * bits // 8 + 1)

    caches = []
    requests = [Request(prompt=prompt, seed=1) for prompt in ("Bats", "What do bats eat at night?")]
    answers = [
        dict(OnTheSpot(model=model, tokenizer=tokenizer_of(out), sampling=Sampling(max_new_tokens=6), **more)(requests))
        for more in ({}, {"cache": lambda model: caches.append(new_cache(model)) or caches[-1]})
    ]
    assert answers[0] == answers[1]
    assert [cache.get_seq_length() > 0 for cache in caches] == [True]


def test_a_16_bit_cache_is_refused(tiny):
    with pytest.raises(ValueError, match="leaves the cache in 16 bits"):
        microbat.QuantizedCache(microbat.load(tiny()))
    assert new_cache(microbat.load(tiny())) is None


def test_the_map_of_values_goes_into_the_weights(tiny, text_file, tmp_path):
    model = tiny("qwen2", hidden_size=128)
    options = {
        "method": "batquant",
        "solver": "rtn",
        "calibration": str(text_file),
        "settings": {"epochs": 0, "distill_epochs": 0},
        **FAST,
    }
    bias = {}
    for scheme in ("W4A8KV16", "W4A8KV4"):
        out = microbat.quantize(model, out=tmp_path / scheme, scheme=scheme, **options)
        stored = load_file(out / "microbat-block-000.safetensors")
        assert not any("values" in name for name in stored)
        bias[scheme] = stored["model.layers.0.self_attn.v_proj.bias"]
    mapped = bias["W4A8KV16"].unflatten(-1, (-1, 32)) @ hadamard_32()
    torch.testing.assert_close(bias["W4A8KV4"], mapped.flatten(-2))


def hadamard_32():
    return GPK(width=32, block=32, g1=8).blocks()[0].detach()


def test_heads_that_no_block_divides_are_refused(tiny, text_file, tmp_path):
    with pytest.raises(ValueError, match="a head has 16 lanes, not a multiple of mxfp4's block of 32 .* KV16"):
        microbat.quantize(tiny(), out=tmp_path / "q", scheme="W4A8KV4", calibration=str(text_file), **FAST)
    assert not (tmp_path / "q").exists()
