"""vLLM serves microbat folders as they are: ``vllm serve DIR``, where microbat is installed beside it.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. A folder's
config.json says ``quant_method: microbat``; for its linear layers vLLM then asks :class:`MicrobatConfig`. vLLM places the
tensors that are no codes; afterwards each of its modules, which hold several of our layers, gets those from the block's shard
(:mod:`microbat.runtime.fused`). Transforms, clips and the formats of activations run online, in microbat's own kernels.

A quantized cache: keys (after their position encoding) and values are quantized before vLLM stores them in its own cache.

Experts: vLLM's router deals out tokens, microbat's :class:`~microbat.experts.Experts` compute, from their bits where they have
codes. To torch.compile a layer, or a block's experts, is one operator, known by its name, as vLLM's own attention is.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
    is_quantized_kv_cache,
)

from microbat.export.folder import INDEX, OTHER_SHARD, block_shard, check_shards
from microbat.export.schema import QUANT_METHOD, check_contract
from microbat.export.shard import StoredBlock, given_biases, quantized_layers, read_block, read_shard
from microbat.formats.block import BlockFormat
from microbat.formats.scales import sees_tensor
from microbat.models.base import family_of
from microbat.models.checkpoint import Checkpoint, resolve
from microbat.registry import instances
from microbat.runtime.fused import TokenCache, experts, fuse, locate, not_floats

logger = init_logger("vllm.microbat")


def register() -> None:
    """Tell vLLM about microbat folders; called by vLLM in each of its processes, any number of times."""
    if not hasattr(torch.ops.vllm, "microbat_linear"):
        direct_register_custom_op("microbat_linear", _linear, fake_impl=_linear_shape)
        direct_register_custom_op("microbat_experts", _experts, fake_impl=_experts_shape)
        direct_register_custom_op("microbat_cache", _cache, fake_impl=_cache_shapes)
    register_quantization_config(QUANT_METHOD)(MicrobatConfig)


class MicrobatConfig(QuantizationConfig):
    """``quantization_config`` of a microbat folder, as vLLM asks for it; it finds the folder's shards itself."""

    def __init__(self, contract: dict[str, Any]):
        super().__init__()
        check_contract(contract, "quantization_config of config.json")
        self.contract = contract
        self.folder, self.blocks = Path(), ""
        self.layers: list[frozenset[str]] = []  # of each block, the paths of those whose codes it holds
        self._mine: set[str] = set()
        self._experts: set[str] = set()
        self._waiting: Counter[int] = Counter()
        self._read: dict[int, StoredBlock] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MicrobatConfig":
        return cls(config)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bfloat16

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        if revision is not None:
            raise ValueError(f"--revision {revision} of {model_name}: download it and serve the folder")
        self.folder = resolve(model_name)
        family = family_of(hf_config.model_type)
        if family.towers:
            raise ValueError(f"{family.name} folders were not tried in vLLM; AutoModelForImageTextToText loads them")
        if outside := quantized_layers(self.folder / OTHER_SHARD):
            raise ValueError(
                f"{self.folder}: vLLM was not tried with quantized layers outside the blocks ({', '.join(outside)})"
            )
        self.family, self.blocks = family, family.blocks
        count = range(hf_config.num_hidden_layers)
        check_shards(Checkpoint(self.folder, index=INDEX), [f"{family.blocks}.{index}" for index in count])
        self.layers = [frozenset(quantized_layers(self.folder / block_shard(index))) for index in count]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._check_config()
        found = locate(prefix, self.blocks, self.packed_modules_mapping)
        if isinstance(layer, Attention) and found and self.contract.get("kv_cache"):
            return CacheMethod(self, found[0])
        if isinstance(layer, RoutedExperts) and found:
            self._check_experts()
            self._experts.add(f"{self.blocks}.{found[0]}.{self.family.experts}")
            return ExpertMethod(layer.moe_config, self, found[0])
        if not isinstance(layer, LinearBase):
            return None
        if found is None or self.layers[found[0]].isdisjoint(found[1]):
            return UnquantizedLinearMethod()
        index, paths = found
        self._mine.update(f"{self.blocks}.{index}.{path}" for path in paths)
        return LinearMethod(self, index, paths)

    def _check_config(self) -> None:
        """Raise ValueError, before anything is read, where vLLM would compute something else."""
        config = get_current_vllm_config()
        if (size := config.parallel_config.tensor_parallel_size) > 1:
            raise ValueError(
                f"microbat folders are served with --tensor-parallel-size 1, not {size}: transforms, scales and clips belong "
                "to whole rows of a weight"
            )
        activations = self.contract["activations"]
        formats = instances("microbat.formats", BlockFormat)
        if activations and sees_tensor(formats[activations["format"]], activations["scale_rule"]):
            if config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
                raise ValueError(
                    f"{activations['format']} activations are scaled by the largest magnitude of a call, and CUDA graphs add "
                    "rows of their own to it: serve with --enforce-eager"
                )
            logger.warning_once(
                "%s activations are scaled by the largest magnitude of a call: an answer depends on the requests that "
                "are computed with it",
                activations["format"],
            )

    def _check_experts(self) -> None:
        """The same for a model with experts."""
        config = get_current_vllm_config()
        if config.parallel_config.enable_expert_parallel:
            raise ValueError(
                "microbat folders are served without --enable-expert-parallel: a layer's experts stay together"
            )
        if config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            raise ValueError(
                "which experts have work is looked up on the host, not in CUDA graphs: serve with --enforce-eager"
            )

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """What vLLM's loader is not to place: all that is not a float tensor of a module of its own; what it calls otherwise."""
        read_shard(self.folder / OTHER_SHARD)  # an altered tensor shows here; those of blocks when they are read
        biased = [
            f"{self.blocks}.{index}.{path}"
            for index in range(len(self.layers))
            for path in given_biases(self.folder / block_shard(index))
        ]
        ours = re.compile(not_floats(self.blocks, self._mine, biased, self._experts))
        renamed = {layout.held: layout.stored for layout in self.family.layouts if "*" not in layout.stored}
        return WeightsMapper(orig_to_new_regex={ours: None}, orig_to_new_substr=renamed)

    def expect(self, index: int) -> None:
        """A module will ask for block ``index``."""
        self._waiting[index] += 1

    def block(self, index: int) -> StoredBlock:
        """The block, read and checked for the first of the modules that wait for it, forgotten after the last."""
        if index not in self._read:
            self._read[index] = read_block(self.folder / block_shard(index))
        self._waiting[index] -= 1
        return self._read[index] if self._waiting[index] > 0 else self._read.pop(index)


class LinearMethod(LinearMethodBase):
    """A linear module of vLLM: our layers at ``paths`` of block ``index``, side by side."""

    def __init__(self, config: MicrobatConfig, index: int, paths: tuple[str, ...]):
        self.config, self.index, self.paths = config, index, paths

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        self.shapes = [(size, input_size) for size in output_partition_sizes]
        self.width, self.dtype, self.device = output_size, params_dtype, torch.get_default_device()
        self.config.expect(self.index)
        get_current_vllm_config().compilation_config.static_forward_context[layer.prefix] = layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        stored = self.config.block(self.index)
        for path, shape in zip(self.paths, self.shapes, strict=True):
            packed = path in stored.quantized.weights
            found = stored.quantized.shape(path) if packed else tuple(stored.floats[f"{path}.weight"].shape)
            if found != shape:
                shard = self.config.folder / block_shard(self.index)
                raise ValueError(f"shard {shard}: {path} is {found}; config.json makes it {shape}")
        layer.microbat = fuse(stored, self.paths, dtype=self.dtype, biases=not layer.skip_bias_add).to(self.device)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The bias, which vLLM holds too, is added to sums that are not rounded yet, where microbat.load adds it.
        return torch.ops.vllm.microbat_linear(x, self.width, _encode_layer_name(layer.prefix))


class ExpertMethod(FusedMoEMethodBase):
    """The experts of block ``index``, quantized or in float: vLLM's router deals tokens to :class:`microbat.experts.Experts`."""

    def __init__(self, moe: FusedMoEConfig, config: MicrobatConfig, index: int):
        super().__init__(moe)
        self.config, self.index = config, index

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        if layer.activation != MoEActivation.SILU:
            raise ValueError(
                f"{layer.layer_name}: microbat has no experts with {layer.activation.value} for vLLM, silu alone"
            )
        self.shape = (num_experts, hidden_size, intermediate_size_per_partition)
        self.dtype, self.device = params_dtype, torch.get_default_device()
        self.config.expect(self.index)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        path = self.config.family.experts
        own = experts(self.config.block(self.index), path, nn.SiLU(), self.moe.experts_per_token, dtype=self.dtype)
        found = (own.num_experts, own.down_proj.out_features, own.down_proj.in_features)
        if found != self.shape:
            shard = self.config.folder / block_shard(self.index)
            raise ValueError(f"shard {shard}: {path}.down_proj is {found}; config.json makes it {self.shape}")
        layer.microbat = own.to(self.device)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        return torch.ops.vllm.microbat_experts(x, topk_ids, topk_weights, _encode_layer_name(layer.layer_name))


class CacheMethod(BaseKVCacheMethod):
    """Attention whose keys and values are quantized before they are stored."""

    def __init__(self, config: MicrobatConfig, index: int):
        super().__init__(config)
        self.index = index

    def create_weights(self, layer: nn.Module) -> None:
        if is_quantized_kv_cache(layer.kv_cache_dtype):
            raise ValueError(
                f"--kv-cache-dtype {layer.kv_cache_dtype}: the folder quantizes the cache to "
                f"{self.quant_config.contract['kv_cache']['format']} itself; leave it at auto"
            )
        super().create_weights(layer)
        self.device = torch.get_default_device()
        self.quant_config.expect(self.index)
        layer.register_forward_pre_hook(_quantize_cache)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        super().process_weights_after_loading(layer)
        kv = self.quant_config.block(self.index).quantized.kv
        assert kv is not None
        layer.microbat = TokenCache(kv, layer.head_size).to(self.device)
        logger.info_once(
            "keys and values are rounded to %s as calibrated and stored in vLLM's own cache (%s), which does not shrink",
            kv.key.format.name,
            layer.kv_cache_torch_dtype,
        )


def _quantize_cache(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    query, key, value, *others = inputs
    return *torch.ops.vllm.microbat_cache(query, key, value, _encode_layer_name(layer.layer_name)), *others


def _linear(x: Tensor, width: int, layer_name: LayerNameType) -> Tensor:
    return _module(layer_name)(x.contiguous())


def _linear_shape(x: Tensor, width: int, layer_name: LayerNameType) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def _experts(x: Tensor, index: Tensor, weights: Tensor, layer_name: LayerNameType) -> Tensor:
    runner = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return runner.routed_experts.microbat(x.contiguous(), index, weights)


def _experts_shape(x: Tensor, index: Tensor, weights: Tensor, layer_name: LayerNameType) -> Tensor:
    return torch.empty_like(x)


def _cache(query: Tensor, key: Tensor, value: Tensor, layer_name: LayerNameType) -> tuple[Tensor, Tensor, Tensor]:
    return _module(layer_name)(query, key, value)


def _cache_shapes(
    query: Tensor, key: Tensor, value: Tensor, layer_name: LayerNameType
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _module(layer_name: LayerNameType) -> nn.Module:
    return get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)].microbat
