"""openPangu-Embedded without the hub's code: a tiny one is a Llama with biases whose config.json is in openPangu's words."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from microbat import comparison, measure, pipeline
from microbat.methods.base import ModelData
from microbat.methods.quarot import QuaRot
from microbat.models.base import family_of
from microbat.models.checkpoint import Checkpoint
from microbat.models.rotation import RotatedCheckpoint
from microbat.recipe import Recipe
from microbat.scheme import Scheme

TOKENS = torch.randint(2, 90, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pangu(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pangu") / "model"
    shutil.copytree(tiny("llama", attention_bias=True, rope_theta=16e6), folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("attention_bias", "mlp_bias", "rope_parameters", "architectures", "dtype"):
        config.pop(name, None)
    code = "configuration_openpangu_dense.PanguEmbeddedConfig"
    ours = {"model_type": "PanguEmbedded", "bias": True, "rope_theta": 16e6, "auto_map": {"AutoConfig": code}}
    (folder / "config.json").write_text(json.dumps({**config, **ours}))
    return folder


@torch.no_grad()
def test_it_computes_what_llama_does(pangu, tiny):
    from transformers import AutoModelForCausalLM

    float_model = pipeline.load(pangu)
    llama = AutoModelForCausalLM.from_pretrained(tiny("llama", attention_bias=True, rope_theta=16e6))
    assert type(float_model) is type(llama)
    assert float_model.model.layers[1].self_attn.o_proj.bias.abs().max() > 0
    torch.testing.assert_close(float_model(TOKENS).logits, llama(TOKENS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rotations_take_the_biases_along(pangu):
    original = Checkpoint(pangu)
    data = ModelData(
        checkpoint=original, tokens=TOKENS, scheme=Scheme.parse("W8A8:int8"), seed=1,
        device=torch.device("cpu"), precision="float32", progress=print,
    )  # fmt: skip
    rotated = RotatedCheckpoint(original, QuaRot().rotation(data))
    name = "model.layers.0.self_attn.o_proj.bias"
    assert (rotated.tensor(name) - original.tensor(name)).abs().max() > 0.01
    torch.testing.assert_close(rotated.load()(TOKENS).logits, original.load()(TOKENS).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_its_folder_is_a_llamas(pangu, text_file, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = Recipe(
        model=str(pangu), method="rtn", scheme="W8A8:int8", calibration=str(text_file),
        num_calibration_samples=2, max_seq_length=32, precision="float32",
    )  # fmt: skip
    pipeline.run(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["attention_bias"] is True
    assert "auto_map" not in config
    biases = {key for key in load_file(tmp_path / "out" / "microbat-block-000.safetensors") if key.endswith("bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    ours = pipeline.load(tmp_path / "out")(TOKENS).logits
    assert (
        ours - pipeline.load(pangu)(TOKENS).logits
    ).std() < 0.2 * ours.std()  # a token has outliers twelve times as large
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)


def test_modes_of_thinking(pangu, tiny):
    assert measure.thinking(pangu, ()) is None
    assert measure.thinking(tiny("llama"), ("no_think",)) is None
    assert measure.thinking(pangu, ("slow_think", "no_think")).modes == (("slow_think", ""), ("no_think", " /no_think"))
    assert list(dict(family_of("PanguEmbedded").thinking.modes)) == ["no_think", "auto_think", "slow_think"]
    with pytest.raises(ValueError, match="unknown mode of thinking 'quick_think'"):
        measure.thinking(pangu, ("quick_think",))


def test_a_suite_asks_in_each_of_its_modes(pangu, text_file, tmp_path):
    (tmp_path / "humaneval").mkdir()
    row = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1"}
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(row))
    suite = {
        "model": str(pangu),
        "calibration": {"source": str(text_file), "samples": 2, "length": 16},
        "evaluation": {
            "text": str(text_file), "window": 16, "windows": 2, "data": str(tmp_path), "tasks": ["humaneval"],
            "modes": ["no_think", "slow_think"], "sampling": {"temperature": 0, "max_new_tokens": 2},
        },
        "schemes": ["W8A8:int8"],
        "rows": [{"label": "RTN", "method": "rtn"}],
    }  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    content = comparison.compare(tmp_path / "suite.yaml", out=tmp_path / "out")
    assert set(content["tasks"]) == {"humaneval-no_think", "humaneval-slow_think"}
    answers = sorted(file.stem for file in (tmp_path / "out").rglob("humaneval-*.jsonl"))
    assert answers == ["humaneval-no_think"] * 2 + ["humaneval-slow_think"] * 2  # the float model's and the cell's


def test_a_tokenizer_of_its_own_code_is_refused(pangu, tmp_path):
    shutil.copytree(pangu, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    own = {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": own}))
    with pytest.raises(ValueError, match="the tokenizer of .* is code of its own .*tokenizer.json"):
        pipeline.tokenizer_of(tmp_path / "model")
