"""Trains a Qwen3-VL of 2.4 million parameters on generated pictures, so that vision-language quantization can be proved
on real answers without a download.

    python scripts/train_tiny_vlm.py DIR

writes DIR/model (a transformers folder with tokenizer and image processor, BF16), DIR/calibration and DIR/held-out (pictures
and a jsonl each). Interrupted, the same command goes on from the last checkpoint. The pictures are those of blind_scenes.py,
new ones in every step; those of calibration and of the held-out set are drawn from seeds of their own. At the end some
channels are made to stand out as in large models, without a change of the function (outlier_channels.py): as trained, 4 bits
cost the model nothing.
"""

# Shapes: B pictures of a step, T tokens of the longest conversation.

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from blind_scenes import SIZE, TASKS, Scene, scene
from outlier_channels import grow
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH, MERGE = 8, 2
PICTURES = {"calibration": 40, "held-out": 200}  # of each task
CHECKPOINT_STEPS = 500
IMAGE_TOKENS = (SIZE // PATCH // MERGE) ** 2
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows the words of the questions; any other text, and the letters in pictures, byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = {"user", "assistant"}
    for task in sorted(TASKS):
        for number in range(200):
            for question, answer in scene("words", number, task).questions:
                texts |= {question} if task == "words" else {question, answer}
    trainer = trainers.BpeTrainer(  # stops where every word is one token
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def make_image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": SIZE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    """Random weights, by torch's global seed."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 192,
            "initializer_range": 0.06,  # about 1 / sqrt(width); the 0.02 of large models starts learning much later
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 4,
            "initializer_range": 0.08,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "num_position_embeddings": (SIZE // PATCH) ** 2,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    stops = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**stops, do_sample=False)
    return model


class Conversations:
    """Scenes to the model's inputs: each picture with all its questions, a turn each, loss on the answers alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_processor: Qwen2VLImageProcessorPil) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.turns: dict[tuple[str, bool], list[int]] = {}

    def __call__(self, scenes: list[Scene]) -> dict[str, Tensor]:
        rows = [self._tokens(scene) for scene in scenes]
        longest = max(len(tokens) for tokens, _ in rows)
        input_ids_BT = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels_BT = torch.full((len(rows), longest), -100)
        for row, (tokens, labels) in enumerate(rows):
            input_ids_BT[row, : len(tokens)] = torch.tensor(tokens)
            labels_BT[row, : len(labels)] = torch.tensor(labels)
        pixels = self.image_processor([scene.image for scene in scenes], return_tensors="pt")
        return {
            "input_ids": input_ids_BT,
            "labels": labels_BT,
            "mm_token_type_ids": (input_ids_BT == self.image_token).int(),
            **pixels,
        }

    def _tokens(self, scene: Scene) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        labels: list[int] = []
        for number, (question, answer) in enumerate(scene.questions):
            turn = self._turn(question, first=number == 0)
            said = self.tokenizer(f"{answer}<|im_end|>").input_ids
            end = self.tokenizer("\n").input_ids
            tokens += turn + said + end
            labels += [-100] * len(turn) + said + [-100] * len(end)
        return tokens, labels

    def _turn(self, question: str, *, first: bool) -> list[int]:
        """As the chat template has it, with the picture before the first question, its token once per merged patch."""
        if (question, first) not in self.turns:
            content: list[dict[str, str]] = [{"type": "text", "text": question}]
            messages = [{"role": "user", "content": [{"type": "image"}, *content] if first else content}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            text = text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
            self.turns[question, first] = self.tokenizer(text).input_ids
        return self.turns[question, first]


class Batches(IterableDataset[dict[str, Tensor]]):
    """One per step, from ``start`` on; the same pictures for a step whatever ran before."""

    def __init__(self, conversations: Conversations, seed: int, size: int, start: int, stop: int) -> None:
        self.conversations = conversations
        self.seed, self.size, self.start, self.stop = seed, size, start, stop

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        for step in range(self.start, self.stop):
            numbers = range(step * self.size, (step + 1) * self.size)
            yield self.conversations([scene(f"train {self.seed}", number) for number in numbers])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine to a fiftieth."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(arguments: argparse.Namespace) -> tuple[Qwen3VLForConditionalGeneration, Conversations]:
    """The trained model, from its last checkpoint on."""
    torch.manual_seed(arguments.seed)
    tokenizer, image_processor = make_tokenizer(), make_image_processor()
    model = make_model(tokenizer).to(arguments.device)
    model.set_attn_implementation("eager")
    conversations = Conversations(tokenizer, image_processor)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95))
    checkpoint, start = arguments.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=arguments.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, step {start}", flush=True
    )

    batches = Batches(conversations, arguments.seed, arguments.batch, start, arguments.steps)
    began, losses = time.monotonic(), []
    for step, batch in enumerate(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4), start=start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        with torch.autocast(arguments.device.partition(":")[0], torch.bfloat16):
            loss = model(**{name: tensor.to(arguments.device) for name, tensor in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            pace = (step + 1 - start) / (time.monotonic() - began)
            print(f"step {step + 1}  loss {sum(losses) / len(losses):.4f}  {pace:.2f} steps/s", flush=True)
            losses.clear()
        if (step + 1) % CHECKPOINT_STEPS == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            print(accuracies(model, conversations, "validation", 40), flush=True)
    return model, conversations


def accuracies(model: Any, conversations: Conversations, seed: str, number: int) -> dict[str, float]:
    """The share of first questions answered without a wrong token, by task, each token given those before it."""
    found = {}
    for task in TASKS:
        batch = conversations([scene(seed, n, task) for n in range(number)])
        with torch.no_grad():
            guesses = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits.argmax(-1).cpu()
        labels_BT = batch["labels"][:, 1:]
        wrong_BT = (labels_BT != -100) & (guesses[:, :-1] != labels_BT)
        found[task] = 1 - wrong_BT.any(-1).float().mean().item()
    return {task: round(share, 3) for task, share in found.items()}


def write_model(folder: Path, model: Any, conversations: Conversations, seed: int) -> None:
    """A folder that transformers loads. Its channels stand out as those of large models do; see outlier_channels.py."""
    grow(model, seed)
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(folder)
    conversations.tokenizer.save_pretrained(folder)
    conversations.image_processor.save_pretrained(folder)


def write_pictures(file: Path, seed: str, number: int) -> None:
    """That many pictures of each task, with the first question about each: a jsonl beside a folder of PNGs."""
    (file.parent / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        for task in TASKS:
            drawn, name = scene(seed, index, task), f"images/{task}_{index:03d}.png"
            drawn.image.save(file.parent / name)
            question, answer = drawn.questions[0]
            rows.append({"image": name, "task": task, "question": question, "answer": answer})
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32, help="pictures in a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_pictures(arguments.out / "calibration" / "pairs.jsonl", "calibration", PICTURES["calibration"])
    write_pictures(arguments.out / "held-out" / "test.jsonl", "held-out", PICTURES["held-out"])
    model, conversations = train(arguments)
    write_model(arguments.out / "model", model, conversations, arguments.seed)


if __name__ == "__main__":
    main()
