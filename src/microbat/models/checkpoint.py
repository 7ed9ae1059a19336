"""A model folder of safetensors, read lazily: the skeleton on the meta device, then one module's weights at a time."""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microbat.documents import read_json
from microbat.models.attention import attention_function
from microbat.models.base import Family, Stack, families, family_of, hold_experts
from microbat.models.layout import Source, sources

WEIGHTS_INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


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
            files = {name: self.path / _inside(index, name, file) for name, file in _weight_map(index).items()}
        elif (self.path / SINGLE_FILE).is_file():
            with _open(self.path / SINGLE_FILE) as tensors:
                files = dict.fromkeys(tensors.keys(), self.path / SINGLE_FILE)
        else:
            raise ValueError(
                f"{self.path} has neither {SINGLE_FILE} nor {self._index}: safetensors are needed, and a pickle "
                "(pytorch_model.bin) is never read"
            )
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise ValueError(f"{index} names {file.name}, which is not there: the download is not complete")
            with _open(file) as tensors:  # a truncated shard shows here, before any work
                there = set(tensors.keys())
            missing = [name for name, holder in files.items() if holder == file and name not in there]
            if missing:
                more = f" and {len(missing) - 1} more" * (len(missing) > 1)
                raise ValueError(
                    f"checkpoint file {file} lacks tensor {missing[0]}{more}, which {index.name} says it has"
                )
        return files

    @cached_property
    def _stored_entries(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @property
    def entries(self) -> dict[str, Any]:
        """config.json, in words that transformers knows without code of the hub."""
        family = families().get(self._stored_entries.get("model_type", ""))
        return self._stored_entries if family is None else family.told(self._stored_entries)

    @cached_property
    def config(self) -> Any:
        from transformers import CONFIG_MAPPING, AutoConfig

        entries = self.entries
        if entries is self._stored_entries:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
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
        return self._stored_entries.get("quantization_config", {}).get("quant_method")

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        if (self.path / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.path)
        return GenerationConfig.from_model_config(self.config)

    def config_of(self, stack: Stack) -> Any:
        """The part of the config that describes ``stack``."""
        return getattr(self.config, stack.config) if stack.config else self.config

    def lanes(self, stack: Stack) -> int:
        """Lanes of one attention head; not always the hidden size divided by the number of heads."""
        config = self.config_of(stack)
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Lanes of one attention head of the language model."""
        return self.lanes(self.family)

    @property
    def width(self) -> int:
        """Channels of the language model's residual stream."""
        return self.config_of(self.family).hidden_size

    @property
    def files(self) -> set[Path]:
        """All shards."""
        return set(self._files.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def num_parameters(self) -> int:
        """Numbers in all stored tensors; only their shapes are read."""
        total = 0
        for file in self.files:
            with _open(file) as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        return total

    @cached_property
    def family(self) -> Family:
        return family_of(self._stored_entries.get("model_type", ""))

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors as the model holds them."""
        return self._sources.keys()

    @cached_property
    def _stored(self) -> dict[str, str]:
        """The names in the files, by the names that the modules have."""
        stands = {
            name: next((p for p in self.family.stored if name.startswith(p[0])), ("", "")) for name in self._files
        }
        return {after + name.removeprefix(before): name for name, (before, after) in stands.items()}

    @cached_property
    def _sources(self) -> Mapping[str, Source]:
        """What each tensor is made of, by the names of ``_stored``."""
        layouts = self.family.layouts if self._index == WEIGHTS_INDEX else ()  # other indices: folders as we hold them
        return sources(self._stored, self.family.blocks, layouts)

    def in_block(self, name: str) -> bool:
        """Whether the stored tensor ``name`` belongs to one of the blocks."""
        return name.startswith(tuple(f"{stack.blocks}." for stack in self.family.stacks))

    @cached_property
    def num_blocks(self) -> int:
        """Blocks of the language model."""
        inside = f"{self.family.blocks}."
        return 1 + max(int(n.removeprefix(inside).split(".")[0]) for n in self.names if n.startswith(inside))

    @cached_property
    def blocks(self) -> tuple[tuple[Stack, str], ...]:
        """Every block as config.json asks for it: its stack and its name, in the order of execution."""
        return tuple(
            (stack, f"{stack.blocks}.{index}")
            for stack in self.family.stacks
            for index in range(self.config_of(stack).num_hidden_layers)
        )

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor ``name``, or the first part of it."""
        return self._files[self._stored[self._sources[name].names[0]]]

    def tensor(self, name: str) -> Tensor:
        """One tensor as the model holds it, in its stored dtype; ValueError, naming file and tensor, where a file lacks it."""
        source, read = self._sources[name], {}
        parts = [self._stored[part] for part in source.names]
        for file in dict.fromkeys(self._files[part] for part in parts):
            read |= self._read_from(file, [part for part in parts if self._files[part] == file])
        tensors = [read[part] for part in parts]
        return tensors[0] if source.layout is None else source.layout.held_form(tensors, self.config_of(self.family))

    @staticmethod
    def _read_from(file: Path, names: list[str]) -> dict[str, Tensor]:
        from safetensors import SafetensorError

        with _open(file) as tensors:
            read = {}
            for name in names:
                try:
                    read[name] = tensors.get_tensor(name)
                except SafetensorError as error:
                    raise ValueError(f"checkpoint file {file} lacks tensor {name} ({error})") from error
            return read

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All stored tensors under a module path, by their names below it."""
        names = [n for n in self.names if n.startswith(prefix + ".")]
        return {n[len(prefix) + 1 :]: self.tensor(n) for n in names}

    def pretrained(self, dtype: torch.dtype) -> nn.Module:
        """The model as transformers loads it, quantized by others or not; no code of the hub is run."""
        told = {} if self.entries is self._stored_entries else {"config": self.config}
        return self.auto.from_pretrained(self.path, dtype=dtype, trust_remote_code=False, **told)

    def skeleton(self) -> nn.Module:
        """The model on the meta device, its rotary tables real: no weight is read."""
        name = attention_function()
        with torch.device("meta"):
            model = self.auto.from_config(self.config, dtype=torch.float32, attn_implementation=name)
        for stack in self.family.stacks:
            rotary = model.get_submodule(stack.rotary)
            model.set_submodule(stack.rotary, type(rotary)(config=self.config_of(stack)))
        hold_experts(model, self.family)
        return model.eval().requires_grad_(False)

    @property
    def auto(self) -> Any:
        """The class of transformers that makes such a model."""
        return auto_class(self.path)

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
        for _, name in self.blocks:
            self.load_into(model.get_submodule(name), name, dtype)
        self.load_entry(model, dtype)
        self.load_head(model, dtype)
        return model

    def load_entry(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Fill what is before the language model's blocks, and outside of all: the embedding, and the family's ``others``."""
        for path in (self.family.embedding, *self.family.others):
            self.load_into(model.get_submodule(path), path, dtype)

    def load_head(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        """Fill the final norm and the output head of ``model``, after its entry: where the checkpoint ties it to the embedding
        it is the embedding's tensor, once in memory."""
        family = self.family
        self.load_into(model.get_submodule(family.norm), family.norm, dtype)
        head = model.get_submodule(family.head)
        if isinstance(head, nn.Linear):  # else it has its codes already
            if f"{family.head}.weight" in self.names:
                self.load_into(head, family.head, dtype)
            else:
                head.weight = model.get_submodule(family.embedding).weight


def auto_class(folder: Path) -> Any:
    """The class of transformers that makes the model in ``folder``, of a known family or not."""
    import transformers

    known = families().get(_model_type(folder))
    return getattr(transformers, Family.auto if known is None else known.auto)


def _model_type(folder: Path) -> str:
    return read_json(folder / "config.json").get("model_type", "")


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map, tensor by tensor the file that holds it")
    return weight_map


def _inside(index: Path, name: str, file: Any) -> str:
    """``file``, where ``index`` says that the tensor ``name`` is; ValueError for what is outside its folder."""
    if not isinstance(file, str) or Path(file).anchor or ".." in Path(file).parts:
        raise ValueError(f"{index} says that {name} is in {file!r}; it has to be a file of this folder")
    return file


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint file {file} cannot be read ({error}); is it truncated?") from error
