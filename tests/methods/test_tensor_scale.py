"""One tensor scale for the weights that read one activation: from what is rounded, at no cost, so that engines can fuse them."""

import pytest
import torch

import microbat
from microbat.calibrate.experts import solve_experts
from microbat.calibrate.fake import FakeWeights
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.export.compressed_tensors import export
from microbat.formats.microscaling import MXFP4, NVFP4
from microbat.methods.base import SitePlan, Statistics
from microbat.methods.gptaq import GPTAQ
from microbat.methods.gptq import GPTQ
from microbat.methods.learned import Learned
from microbat.methods.rtn import RTN
from microbat.methods.soar import SOAR
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.transforms.hadamard import BlockHadamard
from microbat.verify import verify

NV = AbsMax(format=NVFP4)
K = 64
SIZES = {"q": 96, "k": 48, "v": 32}
SOLVERS = [RTN(), GPTQ(), GPTQ(order="group"), GPTAQ(), Learned(), SOAR(), SOAR(rounding="gptq")]


def draw(seed=0, lead=()):
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.randn(*lead, rows, K, generator=generator) * rows / 48 for path, rows in SIZES.items()}


def statistics(seed=9):
    x = torch.randn(300, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, ::7] *= 5
    return Statistics(hessian=x.T @ x / 300, deviation=0.01 * torch.ones(K, K, dtype=torch.float64))


def loss(solved, weights, hessian):
    errors = {path: (solved[path].weight.dequantize() - w).to(torch.float64) for path, w in weights.items()}
    return sum(((error @ hessian) * error).sum().item() for error in errors.values())


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{s.name}-{getattr(s, 'rounding', getattr(s, 'order', ''))}")
def test_it_is_that_of_all_rows_and_costs_nothing(solver):
    """Rounded as one weight of more rows: the largest magnitude becomes 6 times 448; the summed error by H is that of a scale
    each, to a fiftieth."""
    weights, found = draw(), statistics()
    shared = solver.solve_site(weights, dict.fromkeys(weights, NV), found)
    scales = [solution.weight.tensor_scale for solution in shared.values()]
    assert all(torch.equal(scale, scales[0]) for scale in scales)
    if solver.name != "soar":  # which fits it
        largest = max(weight.abs().max().item() for weight in weights.values())
        assert scales[0].item() == pytest.approx(largest / (6 * 448), rel=1e-6)
    together = solver.solve(torch.cat(list(weights.values())), NV, found).weight.dequantize()
    parts = torch.cat([solution.weight.dequantize() for solution in shared.values()])
    torch.testing.assert_close(parts, together, rtol=0, atol=0)
    assert len({solution.weight.scales.untyped_storage().data_ptr() for solution in shared.values()}) == 3
    apart = {path: solver.solve(weight, NV, found) for path, weight in weights.items()}
    assert len({solution.weight.tensor_scale.item() for solution in apart.values()}) == 3
    assert loss(shared, weights, found.hessian) == pytest.approx(loss(apart, weights, found.hessian), rel=0.02)


@pytest.mark.parametrize("solver", [RTN(), GPTQ()], ids=lambda s: s.name)
def test_clips_come_before_it(solver):
    weights = draw(1)
    clips = {path: Clip(NV, torch.full((rows, K // 16, 2), 0.5 + rows / 400)) for path, rows in SIZES.items()}
    solved = solver.solve_site(weights, clips, statistics())
    largest = max(clips[path].clip(weight).abs().max().item() for path, weight in weights.items())
    assert largest < max(weight.abs().max().item() for weight in weights.values())
    for solution in solved.values():
        assert solution.weight.tensor_scale.item() == pytest.approx(largest / (6 * 448), rel=1e-6)


@pytest.mark.parametrize("solver", [RTN(), GPTQ()], ids=lambda s: s.name)
def test_each_expert_has_its_own(solver):
    weights = draw(2, lead=(3,))
    stacked = AbsMax(format=NVFP4, stacked=True)
    found = solve_experts(
        solver, weights, dict.fromkeys(weights, stacked), lambda numbers: [statistics().hessian for _ in numbers]
    )
    for path, solution in found.items():
        assert tuple(solution.weight.shape) == (3, SIZES[path], K)
        for expert, q in enumerate(solution.weight.unstack()):
            largest = max(weight[expert].abs().max().item() for weight in weights.values())
            assert q.tensor_scale.item() == pytest.approx(largest / (6 * 448), rel=1e-6)
            error = (q.dequantize() - weights[path][expert]).square().mean().sqrt()
            assert error < 0.2 * weights[path][expert].square().mean().sqrt()


def test_formats_without_one_are_rounded_one_by_one():
    weights, mx = draw(3), AbsMax(format=MXFP4)
    for path, solution in RTN().solve_site(weights, dict.fromkeys(weights, mx), None).items():
        assert torch.equal(solution.weight.codes, mx.quantize(weights[path]).codes)
        assert solution.weight.tensor_scale is None


@pytest.mark.parametrize(
    ("method", "options", "served"),
    [
        ("rtn", {}, True),
        ("gptq", {}, True),
        ("smoothquant", {}, True),
        ("soar", {"settings": {"rounding": "gptq"}}, True),
        ("batquant", {"settings": {"epochs": 1}}, False),
        ("batquant", {"settings": {"epochs": 1}, "solver": "learned"}, False),
    ],
)
def test_a_folder_s_layers_share_it_and_stock_vllm_is_not_refused_for_it(
    tiny, text_file, tmp_path, method, options, served
):
    sizes = {"num_calibration_samples": 4, "max_seq_length": 16, "precision": "float32"}
    folder = microbat.quantize(
        tiny(), out=tmp_path / "q", scheme="W4A16:nvfp4", method=method, calibration=str(text_file), **options, **sizes
    )
    block = shards.read_block(folder / folders.block_shard(1)).quantized
    for site in block.sites:
        assert len({block.weights[path].tensor_scale.item() for path in site.consumers}) == 1
    assert len({q.tensor_scale.item() for q in block.weights.values()}) == len(block.sites)
    assert verify(folder).passed
    if served:
        export(folder, tmp_path / "ct", target="vllm")
    else:
        with pytest.raises(ValueError, match="runs online") as refused:
            export(folder, tmp_path / "ct", target="vllm")
        assert "tensor scale" not in str(refused.value)


@pytest.mark.parametrize("clip", [False, True])
def test_training_sees_what_is_rounded(clip):
    """With a transform, and clips that learn: bit for bit what round to nearest stores, gradients for each weight and clip."""
    weights = {path: torch.nn.Parameter(weight) for path, weight in draw(4).items()}
    maps = BlockHadamard(width=K, block=16)
    quantizers = {path: Clip(NV, shape=(rows, K // 16)) if clip else NV for path, rows in SIZES.items()}
    plan = SitePlan(site=None, transform=maps, activation=None, weights=quantizers)
    fake = FakeWeights(plan, weights)
    seen = {path: fake(path) for path in SIZES}
    with torch.no_grad():
        mapped = {path: maps.inverse_t(weight) for path, weight in weights.items()}
        stored = RTN().solve_site(mapped, quantizers, None)
    for path, values in seen.items():
        torch.testing.assert_close(values, stored[path].weight.dequantize(), rtol=0, atol=0)
    sum(values.square().sum() for values in seen.values()).backward()
    learnt = [*weights.values(), *(q.logits for q in quantizers.values() if clip)]
    assert all(parameter.grad.abs().sum() > 0 for parameter in learnt)
    with torch.no_grad():
        weights["q"] *= 3.3  # q's magnitude sets the scale of all
    again = {path: fake(path) for path in SIZES}
    assert not torch.equal(again["v"], seen["v"])
