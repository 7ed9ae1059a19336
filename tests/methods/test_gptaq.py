"""GPTAQ and group-aware order: no deviation is GPTQ, a plain float64 recursion agrees, deviations are made up for."""

import pytest
import torch

from microbat.formats.hifloat import HIF4
from microbat.formats.integer import INT2_G64, INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4
from microbat.formats.ternary import DUAL2_G64, TERNARY_G64
from microbat.methods.base import Statistics
from microbat.methods.gptaq import GPTAQ
from microbat.methods.gptq import GPTQ, group_order
from microbat.quantizers.base import AbsMax
from microbat.quantizers.dual import DualScale
from microbat.recipe import Recipe

QUANTIZERS = [AbsMax(format=f) for f in (MXFP4, INT2_G64, TERNARY_G64, INT8_ROW)] + [DualScale(format=DUAL2_G64)]
NAMES = lambda q: f"{type(q).__name__}-{q.format.name}"  # noqa: E731


def problem(N=20, K=192, T=600, seed=0):
    """A weight, the float model's inputs, and those that the layers before it changed."""
    g = torch.Generator().manual_seed(seed)
    exact = torch.randn(T, K, generator=g) @ (torch.randn(K, K, generator=g) / K**0.5 + 0.5 * torch.eye(K))
    exact[:, ::13] *= 6
    seen = exact @ (torch.eye(K) + 0.05 * torch.randn(K, K, generator=g) / K**0.5) * 0.9
    return torch.randn(N, K, generator=g), exact, seen


def statistics(exact, seen):
    exact, seen = exact.double(), seen.double()
    return Statistics(hessian=seen.T @ seen / len(seen), deviation=(exact - seen).T @ seen / len(seen))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=NAMES)
@pytest.mark.parametrize("order", ["natural", "group"])
def test_inputs_without_deviation_give_gptq(quantizer, order):
    weight, _, seen = problem()
    found = statistics(seen, seen)
    gptaq, gptq = (s.solve(weight, quantizer, found).weight for s in (GPTAQ(order=order), GPTQ(order=order)))
    assert torch.equal(gptaq.dequantize(), gptq.dequantize())


def test_columns_follow_the_released_recursion():
    """Independent float64 route, all updates at once over the whole row, no lazy blocks."""
    weight, exact, seen = problem(N=5, K=96)
    quantizer, found = AbsMax(format=MXFP4, rule="floor"), statistics(exact, seen)
    h = found.hessian + 0.01 * found.hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    p = 0.25 * (found.deviation @ u.T).triu(1) @ u
    w, expected = weight.double().clone(), torch.zeros(5, 96, dtype=torch.float64)
    for j in range(96):
        if j % 32 == 0:
            scale = quantizer.scales(w[:, j : j + 32].float()).block.double()
        before = w[:, j : j + 1].clone()
        q = MXFP4.element.round((before / scale).float()).double() * scale
        expected[:, j] = q[:, 0]
        w[:, j:] -= (before - q) / u[j, j] * u[j, j:] - before * p[j, j:]
    got = GPTAQ(order="natural").solve(weight, quantizer, found).weight.dequantize()
    assert (got.double() == expected).double().mean() > 0.99  # ties aside


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=NAMES)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_outputs_are_nearer_to_the_float_models(quantizer, alpha):
    weight, exact, seen = problem()
    seen = 0.8 * seen
    found = statistics(exact, seen)

    def loss(solution):
        return (solution.weight.dequantize() @ seen.T - weight @ exact.T).square().sum().item()

    gptq = loss(GPTQ(order="group").solve(weight, quantizer, found))
    assert loss(GPTAQ(alpha=alpha).solve(weight, quantizer, found)) < 0.97 * gptq


def test_groups_go_by_their_largest_and_columns_by_their_own():
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 8.0, 0.0, 6.0, 7.0, 6.5])
    assert group_order(diagonal, 3).tolist() == [3, 4, 5, 7, 8, 6, 1, 2, 0]


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, AbsMax(format=INT4_GROUP)], ids=NAMES)
def test_group_order_is_the_natural_order_of_the_channels_so_ordered(quantizer):
    """Scales, terms and columns' factors come home with their columns."""
    weight, exact, seen = problem(seed=3)
    found = statistics(exact, seen)
    order = group_order(found.hessian.diagonal(), quantizer.format.block or weight.shape[1])
    moved = Statistics(hessian=found.hessian[order][:, order], deviation=found.deviation[order][:, order])
    by_hand = GPTAQ(order="natural").solve(weight[:, order], quantizer, moved).weight.dequantize()[:, order.argsort()]
    assert torch.equal(GPTAQ(order="group").solve(weight, quantizer, found).weight.dequantize(), by_hand)


def test_group_order_gains_at_two_bits():
    weight, _, seen = problem()
    found = statistics(seen, seen)
    for quantizer in QUANTIZERS[1:3]:
        natural, grouped = (GPTQ(order=order).solve(weight, quantizer, found).weight for order in ("natural", "group"))
        loss = [((q.dequantize() - weight) @ seen.T).square().sum().item() for q in (natural, grouped)]
        assert loss[1] < 0.98 * loss[0]


def test_a_channel_that_is_always_zero_stays_out_of_the_others():
    weight, exact, seen = problem()
    seen[:, 5] = exact[:, 5] = 0
    q = GPTAQ().solve(weight, AbsMax(format=INT2_G64), statistics(exact, seen)).weight
    assert torch.isfinite(q.dequantize()).all()
    assert q.dequantize()[:, 5].abs().max() < 0.02


def test_units_with_scales_inside_have_no_group_order():
    assert HIF4.inner
    refusal = "hif4 has scales for parts of one; leave it at auto or natural"
    for method in ("gptq", "gptaq"):
        with pytest.raises(ValueError, match=f"{method}.order=group.*{refusal}"):
            Recipe(model="m", method=method, scheme="W4A16:hif4", settings={"order": "group"}).methods()
        Recipe(model="m", method=method, scheme="W4A16:hif4").methods()
    weight, _, seen = problem()
    auto, natural = (
        GPTQ(order=o).solve(weight, AbsMax(format=HIF4), statistics(seen, seen)).weight for o in ("auto", "natural")
    )
    assert torch.equal(auto.codes, natural.codes)


def test_order_is_by_group_where_groups_have_one_scale():
    weight, _, seen = problem()
    auto, group = (
        GPTQ(order=o).solve(weight, AbsMax(format=MXFP4), statistics(seen, seen)).weight for o in ("auto", "group")
    )
    assert torch.equal(auto.codes, group.codes)


@pytest.mark.parametrize(("field", "value"), [("alpha", 0), ("alpha", 1.5), ("damping", 0)])
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"gptaq.{field}={value}"):
        GPTAQ(**{field: value})
