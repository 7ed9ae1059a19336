"""A checkpoint of a large model's width, with random weights, to show that memory does not grow with the number of blocks.

    python benchmarks/large_model.py big-2 --layers 2
    python benchmarks/large_model.py big-5 --layers 5

Qwen3-8B's blocks by default, a small vocabulary, one shard a block, written one after the other: no more than one block is
ever in memory. ``docs/large-models.md`` has the commands that quantize it under a limit.
"""

import json
from pathlib import Path

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

WORDS = 40_000  # of the calibration text beside the model, random ones


def main(
    folder: Path,
    layers: int = 2,
    hidden: int = 4096,
    intermediate: int = 12288,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    seed: int = 0,
) -> None:
    """Write a Qwen3 of ``layers`` blocks in bfloat16 to ``folder``, with a tokenizer and a text, words.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: i + 1 for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns).normal_(std=columns**-0.5, generator=generator).to(torch.bfloat16)

    def gains(width: int) -> Tensor:
        return torch.empty(width).uniform_(0.5, 1.5, generator=generator).to(torch.bfloat16)

    weight_map: dict[str, str] = {}

    def write(tensors: dict[str, Tensor]) -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    write(
        {
            "model.embed_tokens.weight": matrix(len(vocabulary), hidden),
            "model.norm.weight": gains(hidden),
            "lm_head.weight": matrix(len(vocabulary), hidden),
        }
    )
    for index in range(layers):
        block = {
            "input_layernorm": gains(hidden),
            "self_attn.q_proj": matrix(heads * head_dim, hidden),
            "self_attn.k_proj": matrix(kv_heads * head_dim, hidden),
            "self_attn.v_proj": matrix(kv_heads * head_dim, hidden),
            "self_attn.o_proj": matrix(hidden, heads * head_dim),
            "self_attn.q_norm": gains(head_dim),
            "self_attn.k_norm": gains(head_dim),
            "post_attention_layernorm": gains(hidden),
            "mlp.gate_proj": matrix(intermediate, hidden),
            "mlp.up_proj": matrix(intermediate, hidden),
            "mlp.down_proj": matrix(hidden, intermediate),
        }
        write({f"model.layers.{index}.{name}.weight": tensor for name, tensor in block.items()})
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    picks = torch.randint(100, (WORDS,), generator=generator).tolist()
    (folder / "words.txt").write_text(" ".join(f"w{pick}" for pick in picks))
    print(f"{folder}: {layers} blocks, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
