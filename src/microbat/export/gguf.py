"""GGUF, the file of llama.cpp, with MXFP4 weights: a microbat folder's codes and scales, moved, never rounded.

A block of 32 weights is 17 bytes: the E8M0 byte, then 16 bytes with element j in the low nibble and element j + 16 in the
high one. Everything that is no code is float32, or as wide as it is stored. llama.cpp turns the lanes of a head in pairs
(2i, 2i + 1) for models called ``llama``, where transformers turns (i, i + half): their query and key rows change places.

The container, the names of tensors and of metadata come from the package ``gguf``.
"""

# Shapes: N out, K in, H heads, D lanes of a head.

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microbat.documents import read_json
from microbat.export import folder as folders
from microbat.export.folder import read_checkpoint, read_contract
from microbat.export.shard import read_block
from microbat.export.targets import reasons_against, target_of
from microbat.formats.block import QTensor
from microbat.formats.element import E8M0
from microbat.models.checkpoint import Checkpoint

BLOCK = 32
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {QWEN2: "qwen2", QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe"}


def export(folder: str | Path, out: str | Path, *, target: str) -> Path:
    """Write the microbat folder ``folder`` as the GGUF file ``out``; return ``out``.

    Raises ValueError, before anything is written, where llama.cpp would compute something else than calibrated, and for
    a tokenizer or a position encoding that has no known name there; ImportError without the package gguf.
    """
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install gguf") from error
    folder, out = Path(folder), Path(out)
    engine = target_of(target, "gguf")
    contract, checkpoint = read_contract(folder), read_checkpoint(folder)
    if out.exists():
        raise ValueError(f"output file {out} exists; choose another or remove it")
    shards = [folder / folders.block_shard(index) for index in range(len(checkpoint.blocks))]
    family = checkpoint.family
    other = read_block(folder / folders.OTHER_SHARD)
    if reasons := reasons_against(engine, contract, family, map(read_block, shards), other.quantized):
        raise ValueError(
            f"{folder} cannot be served by {engine.title} as it was calibrated:\n- " + "\n- ".join(reasons)
        )
    partial = out.with_name(out.name + ".partial")
    writer = GGUFWriter(partial, family.name)
    _describe(writer, checkpoint)
    _tokenizer(writer, folder, checkpoint.config)
    for index, shard in enumerate(shards):
        name, stored = f"{family.blocks}.{index}", read_block(shard)
        for path, q in stored.quantized.weights.items():
            rows = _row_order(f"{path}.weight", q.shape[0], checkpoint)
            _add(writer, checkpoint, f"{name}.{path}.weight", mxfp4_bytes(q)[rows], "MXFP4")
        for key, tensor in stored.floats.items():
            _add(
                writer,
                checkpoint,
                f"{name}.{key}",
                tensor.to(torch.float32)[_row_order(key, tensor.shape[0], checkpoint)],
            )
    for key, tensor in other.floats.items():
        _add(writer, checkpoint, key, tensor.to(torch.float32) if tensor.dim() == 1 else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.rename(partial, out)
    return out


def mxfp4_bytes(q: QTensor) -> Tensor:
    """``q`` [N, K] in MXFP4 as ggml stores it: uint8 [N, 17 K/32]."""
    low, high = q.codes.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    return torch.cat([E8M0.encode(q.scales)[..., None], low | high << 4], dim=-1).flatten(-2)


def _row_order(key: str, rows: int, checkpoint: Checkpoint) -> Tensor:
    """Where each row [N] of llama.cpp's tensor is in ours."""
    module = key.rsplit(".", 1)[0].rsplit(".", 1)[-1]
    if checkpoint.family.name != "llama" or module not in ("q_proj", "k_proj"):
        return torch.arange(rows)
    return torch.arange(rows).unflatten(0, (-1, 2, checkpoint.head_dim // 2)).transpose(1, 2).flatten()


def _add(writer: Any, checkpoint: Checkpoint, name: str, tensor: Tensor, kind: str = "") -> None:
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    architecture = next(arch for arch, text in MODEL_ARCH_NAMES.items() if text == checkpoint.family.name)
    theirs = get_tensor_name_map(architecture, checkpoint.num_blocks).get_name(name, try_suffixes=(".weight", ".bias"))
    if theirs is None:
        raise ValueError(f"tensor {name} has no place in llama.cpp's {checkpoint.family.name} models")
    kind = kind or {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
    if kind != "F32":
        tensor = tensor.contiguous().view(torch.uint8)
    writer.add_tensor(theirs, tensor.contiguous().numpy(), raw_dtype=GGMLQuantizationType[kind])


def _describe(writer: Any, checkpoint: Checkpoint) -> None:
    config, heads = checkpoint.config, checkpoint.head_dim
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{checkpoint.path}: position encoding {rope['rope_type']!r} is not written to GGUF, only the default"
        )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(checkpoint.num_blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(heads)
    writer.add_value_length(heads)
    writer.add_rope_dimension_count(heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)


def _tokenizer(writer: Any, folder: Path, config: Any) -> None:
    """Byte-pair tokenizers whose way of splitting text llama.cpp has under a name."""
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which a GGUF file needs")
    content = read_json(file)
    if content["model"]["type"] != "BPE":
        raise ValueError(f"{file}: a {content['model']['type']} tokenizer is not written to GGUF, only BPE")
    tokens = {index: (token, NORMAL) for token, index in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    listed = [tokens.get(index, (f"[PAD{index}]", UNUSED)) for index in range(config.vocab_size)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(content["pre_tokenizer"], file))
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    empty = tokenizer("").input_ids
    writer.add_add_bos_token(bool(empty) and empty[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _split_name(splitter: dict[str, Any], file: Path) -> str:
    """llama.cpp's name for the way a tokenizer splits text before merging."""
    match splitter:
        case {"type": "ByteLevel", "use_regex": True}:
            return "gpt-2"
        case {
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]
        }:
            return "smollm"
        case {"pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel"}]} if (
            regex in SPLITS
        ):
            return SPLITS[regex]
    raise ValueError(f"{file}: this way of splitting text has no name known here in llama.cpp: {json.dumps(splitter)}")
