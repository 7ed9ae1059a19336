"""What a model looks like to a method: a :class:`Family` of blocks, each with the :class:`Site` s of its activations.

``Checkpoint`` reads a Hugging Face folder lazily: the skeleton on the meta device, then one module's weights at a time.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microbat.models.attention import attention_function
from microbat.registry import instances

WEIGHTS_INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One activation inside a block: the module that produces it and the linear layers that consume it, as paths.

    ``normed``: the producer is an RMSNorm of the residual stream. ``headed``: the producer's output, the values, is mixed
    over tokens on its way here, head by head; its lanes are heads times the head's size. ``gated``: the producer's output is
    multiplied by another activation on its way here, and nothing else, so that its rows' factors are the channels'.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    normed: bool = False
    headed: bool = False
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where things are in every model whose config says ``model_type == name``."""

    name: str
    sites: tuple[Site, ...]
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")  # linear layers that add to the residual stream
    attention: str = "self_attn"  # the module that mixes tokens, inside a block
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    norm: str = "model.norm"
    head: str = "lm_head"


DECODER_SITES = (
    Site(
        name="qkv",
        producer="input_layernorm",
        consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        normed=True,
    ),
    Site(name="o", producer="self_attn.v_proj", consumers=("self_attn.o_proj",), headed=True),
    Site(name="up", producer="post_attention_layernorm", consumers=("mlp.gate_proj", "mlp.up_proj"), normed=True),
    Site(name="down", producer="mlp.up_proj", consumers=("mlp.down_proj",), gated=True),
)


def families() -> dict[str, Family]:
    """Every known family by its ``model_type``."""
    return instances("microbat.models", Family)


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``; an unknown one raises with the way to add it."""
    known = families()
    if model_type not in known:
        raise ValueError(
            f"model_type {model_type!r} has no family (known: {', '.join(known)}). To add it, put a file into "
            "microbat/models/ with a Family(name=..., sites=...) that says where its linear layers are; "
            "models/llama.py is the example."
        )
    return known[model_type]


def resolve(model: str | Path) -> Path:
    """A local folder for ``model``: itself when it is one, otherwise the hub's snapshot of that name."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"model {str(model)!r} is neither a folder nor the name of a model on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )
    except Exception as error:  # the hub raises a dozen types: offline, gated, missing
        raise ValueError(f"model {str(model)!r} is no local folder and could not be downloaded: {error}") from error


class Checkpoint:
    """A folder of safetensors in the manner of Hugging Face, read tensor by tensor; ``index`` names its index file."""

    def __init__(self, path: Path, *, index: str = WEIGHTS_INDEX):
        self.path, self._index = path, index
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: it is not a model folder")
        self._files = self._tensor_files()

    def _tensor_files(self) -> dict[str, Path]:
        index = self.path / self._index
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {name: self.path / file for name, file in weight_map.items()}
        elif (self.path / SINGLE_FILE).is_file():
            with _open(self.path / SINGLE_FILE) as tensors:
                files = dict.fromkeys(tensors.keys(), self.path / SINGLE_FILE)
        else:
            raise ValueError(f"{self.path} has neither {SINGLE_FILE} nor {self._index}; safetensors are needed")
        for file in sorted(set(files.values())):
            with _open(file):  # a missing or truncated shard shows here, before any work
                pass
        return files

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers would look for a quantizer of that name
        return config

    @property
    def config_changes(self) -> dict[str, Any]:
        """Entries of config.json that this checkpoint's tensors need changed."""
        return {}

    @property
    def quant_method(self) -> str | None:
        """Who quantized this checkpoint; None for a float one."""
        return json.loads((self.path / "config.json").read_text()).get("quantization_config", {}).get("quant_method")

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        if (self.path / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.path)
        return GenerationConfig.from_model_config(self.config)

    @property
    def head_dim(self) -> int:
        """Lanes of one attention head; not always the hidden size divided by the number of heads."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.stat().st_size for file in set(self._files.values()))

    @cached_property
    def family(self) -> Family:
        return family_of(json.loads((self.path / "config.json").read_text()).get("model_type", ""))

    @property
    def names(self) -> Iterable[str]:
        return self._files.keys()

    def in_block(self, name: str) -> bool:
        """Whether the stored tensor ``name`` belongs to one of the blocks."""
        return name.startswith(self.family.blocks + ".")

    @cached_property
    def num_blocks(self) -> int:
        return 1 + max(int(n[len(self.family.blocks) + 1 :].split(".")[0]) for n in self.names if self.in_block(n))

    def file_of(self, name: str) -> Path:
        """The file that holds the stored tensor ``name``."""
        return self._files[name]

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, in its stored dtype; ValueError, naming file and tensor, where the file lacks it."""
        from safetensors import SafetensorError

        with _open(self._files[name]) as tensors:
            try:
                return tensors.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"checkpoint file {self._files[name]} lacks tensor {name} ({error})") from error

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All stored tensors under a module path, by their names below it."""
        names = [n for n in self.names if n.startswith(prefix + ".")]
        return {n[len(prefix) + 1 :]: self.tensor(n) for n in names}

    def skeleton(self) -> nn.Module:
        """The causal language model on the meta device, its rotary tables real: no weight is read."""
        from transformers import AutoModelForCausalLM

        name = attention_function()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32, attn_implementation=name)
        rotary = model.get_submodule(self.family.rotary)
        model.set_submodule(self.family.rotary, type(rotary)(config=self.config))
        return model.eval().requires_grad_(False)

    def load_into(self, module: nn.Module, prefix: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Fill ``module``, which sits at path ``prefix`` of the skeleton, with its stored weights."""
        tensors = {name: t.to(dtype) for name, t in self.tensors(prefix).items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{prefix}.{name} in {self.path} holds NaN or Inf")
        missing = module.load_state_dict(tensors, strict=False, assign=True).missing_keys
        if missing:
            raise ValueError(
                f"{self.path} lacks {prefix}.{missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
            )
        return module.requires_grad_(False)

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The whole float model."""
        model = self.skeleton()
        for index, block in enumerate(model.get_submodule(self.family.blocks)):
            self.load_into(block, f"{self.family.blocks}.{index}", dtype)
        self.load_into(model.get_submodule(self.family.embedding), self.family.embedding, dtype)
        self.load_head(model, dtype)
        return model

    def load_head(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Fill the final norm and the output head of ``model``, tied to the embedding where the checkpoint ties them."""
        family = self.family
        self.load_into(model.get_submodule(family.norm), family.norm, dtype)
        head = model.get_submodule(family.head)
        tied = f"{family.head}.weight" not in self.names
        self.load_into(head, family.embedding if tied else family.head, dtype)


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint file {file} cannot be read ({error}); is it truncated?") from error


def linear_layers(family: Family) -> tuple[str, ...]:
    """Paths inside a block of every linear layer that a site feeds."""
    return tuple(path for site in family.sites for path in site.consumers)
