"""Small real things that the tests share: tiny models of each family in Hugging Face folders, with a tokenizer."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at its own import; its kernels then run on the CPU
VISION_START, VISION_END, IMAGE, VIDEO = 257, 258, 259, 260
IMAGE_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = [f"w{i}" for i in range(90)]
SHARED = Path(__file__).resolve().parents[2] / "shared"


def save_tokenizer(folder: Path, *, images: bool = False) -> None:
    """Byte-level BPE without merges: what every family's tokenizer class can hold."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{character: i + 1 for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    images = {"additional_special_tokens": IMAGE_TOKENS, "chat_template": CHAT_TEMPLATE} if images else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **images).save_pretrained(folder)


def save_model(folder: Path, family: str, **overrides: object) -> Path:
    """A tiny random model: 2 layers, GQA, for Qwen3 a head size that is not hidden divided by heads, tied embeddings; 5 experts
    for Qwen3-MoE, 3 for Mixtral, 2 of them a token."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "mixtral": (MixtralConfig, MixtralForCausalLM),
    }
    settings = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": family != "llama",
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    if family in ("qwen3", "qwen3_moe"):
        settings["head_dim"] = 32
    if family == "qwen3_moe":
        settings |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if family == "mixtral":
        settings |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    settings.update(overrides)
    config_class, model_class = kinds[family]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = model_class(config_class(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif "norm" in name:
                    # Outlier channels, as real models have them.
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
                    parameter[::17] *= 12
                else:
                    parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny("qwen3", hidden_size=128)``: the folder of a tiny float model, made once a session."""
    made: dict[tuple, Path] = {}

    def get(family: str = "llama", **overrides: int) -> Path:
        key = (family, *overrides.items())
        if key not in made:
            save = save_vlm if "_vl" in family else save_model
            made[key] = save(tmp_path_factory.mktemp(family) / "model", family, **overrides)
        return made[key]

    return get


def save_vlm(folder: Path, family: str, **overrides: object) -> Path:
    """A tiny random vision-language model: 3 blocks and 3, a tower whose inner width is not a multiple of 32, DeepStack; 5
    experts for Qwen3-VL-MoE, 2 of them a token."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    text = {
        "vocab_size": 264,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family == "qwen3_vl_moe":
        text |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        text |= {"head_dim": 32}
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_interleaved": True}
        vision |= {"intermediate_size": 112, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    else:
        vision |= {"intermediate_size": 108, "fullatt_block_indexes": [1], "window_size": 16}
    config = AutoConfig.for_model(
        family,
        text_config={**text, **overrides},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif "norm" in name or "ln_q" in name:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
                    parameter[::17] *= 4
                else:
                    parameter.normal_(std=0.08)
    model.save_pretrained(folder)
    if family == "qwen3_vl_moe":
        store_as_the_hub_does(folder / "model.safetensors")
    save_tokenizer(folder, images=True)
    Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    ).save_pretrained(folder)
    return folder


def store_as_the_hub_does(file: Path) -> None:
    """Qwen3-VL-MoE's experts, [E, 2 N, K] and [E, K, N] as transformers saves them, as [E, K, 2 N] and [E, N, K]."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in [name for name in tensors if ".mlp.experts." in name]:
        tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(scope="session")
def pairs() -> tuple[dict[str, torch.Tensor], ...]:
    """Four images of as many sizes with questions of as many lengths, for the models of :func:`save_vlm`; a fifth, small one
    beside the last."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(4):
        grids = [[1, 4, 4 + 2 * index]] + [[1, 2, 4]] * (index == 3)
        ids = torch.randint(2, 250, (3 + index,), generator=generator).tolist()
        for _, height, width in grids:
            ids += [VISION_START, *[IMAGE] * (height * width // 4), VISION_END]
        ids += torch.randint(2, 250, (5 + 2 * index,), generator=generator).tolist()
        tokens = torch.tensor([ids])
        patches = sum(height * width for _, height, width in grids)
        made.append(
            {
                "input_ids": tokens,
                "mm_token_type_ids": (tokens == IMAGE).to(torch.int32),
                "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor(grids),
            }
        )
    return tuple(made)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Random words: calibration and evaluation text for the tiny models."""
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(len(WORDS), (6000,), generator=generator)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(WORDS[i] for i in picks))
    return file


@pytest.fixture
def on_triton(monkeypatch):
    """What runs on a GPU, run on the CPU by Triton's interpreter, and nothing native. Compiled kernels have other tests."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and kernels are compiled for it")
    import triton.language as tl

    from microbat import kernels, native
    from microbat.kernels import matmul
    from microbat.runtime import gpu, packed

    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(native, "shared_object", lambda: None)
    monkeypatch.setattr(gpu, "tensor_cores", lambda device: "")
    # The interpreter multiplies bfloat16 numbers as if their bits were integers.
    monkeypatch.setattr(matmul, "OPERANDS", dict.fromkeys(matmul.OPERANDS, tl.float32))
    packed.best.cache_clear()
    yield
    packed.best.cache_clear()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Benchmark data beside the checkout; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("no benchmark data beside the checkout")
    return SHARED
