"""Experts in calibration: tokens are counted, statistics are each expert's own, few tokens are filled up and none is an error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import microbat
from microbat.calibrate import experts as calibration
from microbat.calibrate.experts import counted, expert_hessians, solve_experts
from microbat.experts import ExpertLinear, Experts
from microbat.formats.block import QTensor
from microbat.formats.microscaling import MXFP4, NVFP4
from microbat.linear import SiteInput
from microbat.methods.base import Statistics
from microbat.methods.gptq import GPTQ
from microbat.methods.rtn import RTN
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
E, N, K, T, CHOSEN = 4, 96, 64, 50, 2
NEVER = 2  # the expert that the router avoids


@pytest.fixture
def module():
    generator = torch.Generator().manual_seed(1)
    experts = Experts(E, CHOSEN, K, N, nn.SiLU())
    for name, shape in (("gate_proj", (E, N, K)), ("up_proj", (E, N, K)), ("down_proj", (E, K, N))):
        setattr(experts, name, ExpertLinear.of(torch.randn(shape, generator=generator) / K**0.5))
    return experts


@pytest.fixture
def batches():
    """Two batches of tokens and where they go; expert 0 gets one of them, NEVER none."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for part in range(2):
        scores = torch.rand(T, E, generator=generator)
        scores[:, [0, NEVER]] = -1
        scores[3, 0] = 2.0 * (part == 0) - 1
        weights, index = scores.topk(CHOSEN)
        made.append((torch.randn(T, K, generator=generator), index, weights))
    return made


def hessians(module, batches, path, *, floor, experts=tuple(range(E))):
    layer = module.get_submodule(path)

    def run(see):
        handle = layer.register_forward_pre_hook(lambda _, inputs: see(*inputs))
        for batch in batches:
            module(*batch)
        handle.remove()

    width = layer.in_features
    return expert_hessians(
        module, run, SiteInput(), width, list(experts), floor=floor, name="model.layers.7.mlp.experts"
    )


def inputs_of(module, x, expert, path):
    """What ``expert`` makes of tokens on their way to the layer at ``path``."""
    if path != "down_proj":
        return x
    gate, up = (layer.weight[expert] for layer in (module.gate_proj, module.up_proj))
    return nn.functional.silu(x @ gate.T) * (x @ up.T)


def test_tokens_are_counted(module, batches):
    with counted(nn.Sequential(module)) as counts:
        for batch in batches:
            module(*batch)
    expected = [sum(int((index == expert).sum()) for _, index, _ in batches) for expert in range(E)]
    assert counts == expected
    assert counts[0] == 1
    assert counts[NEVER] == 0
    with counted(nn.Linear(2, 2)) as counts:
        pass
    assert counts == []


@pytest.mark.parametrize("path", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("floor", [1, 20, 10_000])
def test_statistics_by_brute_force(module, batches, path, floor):
    everything = torch.cat([x for x, _, _ in batches])
    for expert, hessian in enumerate(hessians(module, batches, path, floor=floor)):
        own = torch.cat([x[(index == expert).any(1)] for x, index, _ in batches])
        tokens, mine, all_of_them = (
            len(own),
            inputs_of(module, own, expert, path),
            inputs_of(module, everything, expert, path),
        )
        expected = mine.T @ mine
        if tokens < floor:
            expected += (floor - tokens) * all_of_them.T @ all_of_them / len(everything)
        torch.testing.assert_close(hessian, (expected / max(tokens, floor)).double(), rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_is_an_error_where_nothing_fills_it_up(module, batches):
    with pytest.raises(
        ValueError, match=rf"model.layers.7.mlp.experts: no calibration token reached expert {NEVER}, .*min_expert"
    ):
        hessians(module, batches, "gate_proj", floor=0)
    assert len(hessians(module, batches, "gate_proj", floor=0, experts=(0, 1, 3))) == 3


@pytest.mark.parametrize("format", [MXFP4, NVFP4])
def test_solving_a_stack_is_solving_each(format, module, batches, monkeypatch):
    weights = {path: module.get_submodule(path).weight.detach() for path in ("gate_proj", "up_proj")}
    stack = AbsMax(format=format, stacked=True)
    ratios = torch.rand(E, N, K // format.block, 2, generator=torch.Generator().manual_seed(3)) / 2 + 0.5
    quantizers = {"gate_proj": stack, "up_proj": Clip(stack, ratios)}
    every = hessians(module, batches, "gate_proj", floor=30)
    asked = []
    monkeypatch.setattr(calibration, "HESSIAN_BYTES", 3 * 8 * K * K)

    def of(experts):
        asked.append(experts)
        return [every[expert] for expert in experts]

    solutions = solve_experts(GPTQ(), weights, quantizers, of)
    assert asked == [[0, 1, 2], [3]]
    for expert, hessian in enumerate(every):
        own = {"gate_proj": AbsMax(format=format), "up_proj": Clip(AbsMax(format=format), ratios[expert])}
        alone = GPTQ().solve_site({p: w[expert] for p, w in weights.items()}, own, Statistics(hessian=hessian))
        for path, solution in solutions.items():
            result, expected = solution.weight.unstack()[expert], alone[path].weight
            assert isinstance(expected, QTensor)
            assert torch.equal(result.codes, expected.codes)
            assert torch.equal(result.dequantize(), expected.dequantize())


def test_round_to_nearest_takes_the_stack_as_it_is(module):
    stack = AbsMax(format=MXFP4, stacked=True)
    weight = module.gate_proj.weight.detach()
    [solution] = solve_experts(
        RTN(), {"gate_proj": weight}, {"gate_proj": stack}, lambda experts: pytest.fail("asked for statistics")
    ).values()
    assert torch.equal(solution.weight.dequantize(), torch.stack([AbsMax(format=MXFP4).fake(w) for w in weight]))


@pytest.fixture(scope="module")
def avoided(tiny, tmp_path_factory):
    """A Qwen3-MoE of 5 experts whose router never sends a token to the first."""
    folder = tmp_path_factory.mktemp("avoided") / "m"
    shutil.copytree(tiny("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    for index in range(2):
        gate = tensors[f"model.layers.{index}.mlp.gate.weight"]
        direction = gate[1].clone()
        gate[:] = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0])[:, None] * direction  # two are always above the first
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_the_report_says(avoided, text_file, tmp_path):
    options = {"method": "gptq", "calibration": str(text_file), **FAST}
    out = microbat.quantize(avoided, out=tmp_path / "q", **options)
    report = json.loads((out / "report.json").read_text())
    for block in report["blocks"]:
        assert block["expert_floor"] == 4 * 64
        assert block["expert_tokens"][0] == 0
        assert sum(block["expert_tokens"]) == 8 * 32 * 2
    page = microbat.write_report(out).read_text()
    low = sum(tokens < 4 * 64 for block in report["blocks"] for tokens in block["expert_tokens"])
    assert low >= 2
    assert f"for the {low} of 10 that saw fewer than 256 tokens, average tokens of the block" in page
    assert torch.isfinite(microbat.load(out)(torch.arange(20)[None]).logits).all()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: no calibration token reached expert 0, "):
        microbat.quantize(avoided, out=tmp_path / "none", min_expert_tokens=0, **options)
    microbat.quantize(avoided, out=tmp_path / "rtn", min_expert_tokens=0, **{**options, "method": "rtn"})


def test_a_floor_below_nothing(tiny):
    with pytest.raises(ValueError, match="min_expert_tokens=-1 must be 0 or more"):
        microbat.Recipe(model="m", min_expert_tokens=-1)
