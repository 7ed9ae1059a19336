"""``AutoModelForCausalLM.from_pretrained(folder)`` for microbat folders, transforms included: a quantizer of transformers.

transformers has no entry points for quantizers; it learns of this one when it first needs its registry, once microbat has
been imported (:mod:`microbat`). Without it ``from_pretrained`` raises: a folder's weights have an index of their own name,
which transformers does not look for, so that it never takes codes for floats or fills the gaps with random numbers; where
config.json may name another, a folder's says what to import (``WITHOUT_US``).

transformers places the tensors that are no codes; afterwards each block gets its quantized layers as in
:mod:`microbat.runtime.load`, on the device that transformers chose for the block.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from microbat.experts import ExpertLinear
from microbat.export.folder import INDEX, OTHER_SHARD, block_shard, check_shards
from microbat.export.schema import QUANT_METHOD, check_contract
from microbat.export.shard import StoredBlock, check_fit, given_biases, quantized_layers, read_block
from microbat.linear import install
from microbat.models.attention import attention_function
from microbat.models.base import block_names, family_of, hold_experts
from microbat.models.checkpoint import Checkpoint
from microbat.runtime.composite import packed_linear


@register_quantization_config(QUANT_METHOD)
class MicrobatConfig(QuantizationConfigMixin):
    """``quantization_config`` of a microbat folder, as it is written there."""

    def __init__(self, **contract: Any):
        check_contract(contract, "quantization_config of config.json")
        self.__dict__.update(contract)


@register_quantizer(QUANT_METHOD)
class MicrobatQuantizer(HfQuantizer):
    """Loads microbat folders; such a model cannot be trained or saved: the folder is its own saved form."""

    requires_calibration = True
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def update_attn_implementation(self, config: Any) -> Any:
        config.transformers_weights = INDEX
        if (folder := Path(config._name_or_path)).joinpath(INDEX).is_file():
            Checkpoint(folder, index=INDEX)  # transformers opens whatever an index names
        if self.quantization_config.to_dict().get("kv_cache"):
            config._attn_implementation = attention_function()
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str], **kwargs: Any
    ) -> None:
        self.folder = Path(checkpoint_files[0]).parent
        family = family_of(model.config.model_type)
        hold_experts(model, family)
        self.blocks = block_names(family, model)
        check_shards(Checkpoint(self.folder, index=INDEX), self.blocks)
        ours = [self._await(model, layer, layer) for layer in quantized_layers(self.folder / OTHER_SHARD)]
        for index, name in enumerate(self.blocks):
            block = model.get_submodule(name)
            ours.append(re.escape(name) + r"\.(sites|kv)\.")
            experts = [path for path, module in block.named_modules() if isinstance(module, ExpertLinear)]
            for path in {*quantized_layers(self.folder / block_shard(index)), *experts}:
                ours.append(self._await(block, path, f"{name}.{path}"))
            if experts:  # transformers joins what it takes for floats of experts
                ours.append(re.escape(f"{name}.{family.experts}."))
            for path in given_biases(self.folder / block_shard(index)):
                ours.append(re.escape(f"{name}.{path}.bias"))
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ours}

    @staticmethod
    def _await(module: nn.Module, path: str, name: str) -> str:
        """Make a place for the layer at ``path`` of ``module``; what its tensors are called, of which transformers has none."""
        module.set_submodule(path, _Awaited(module.get_submodule(path)))
        return re.escape(f"{name}.") + r"(\d+\.)?weight"

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for index, name in enumerate(self.blocks):
            block = model.get_submodule(name)
            shard = self.folder / block_shard(index)
            stored = read_block(shard)
            check_fit(block, stored, shard)
            place = next(block.parameters())
            install(block, stored.quantized, partial(packed_linear, dtype=place.dtype))
            for path in [path for path, module in block.named_modules() if isinstance(module, _Awaited)]:
                block.set_submodule(path, ExpertLinear.of(stored.floats[f"{path}.weight"].to(place.dtype)))
            block.to(place.device)
        shard = self.folder / OTHER_SHARD
        if quantized_layers(shard):
            outside = read_block(shard).quantized
            check_fit(model, StoredBlock(quantized=outside, floats={}), shard)
            install(model, outside, partial(packed_linear, dtype=place.dtype, device=place.device))
        return model.requires_grad_(False)


class _Awaited(nn.Module):
    """The place of a linear layer, or of experts, whose weights come when transformers has placed everything else."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.weight = linear.weight.detach().to("meta")  # no parameter: of its shape alone
        self.bias = linear.bias
