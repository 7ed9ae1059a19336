"""Our experts compute what transformers' do, for any routing, forwards and backwards."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from microbat.experts import ExpertLinear, Experts, Routed, linear

E, N, K, T, CHOSEN = 5, 24, 16, 13, 2


def theirs(family):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = SimpleNamespace(
        num_experts=E,
        num_local_experts=E,
        num_experts_per_tok=CHOSEN,
        hidden_size=K,
        moe_intermediate_size=N,
        intermediate_size=N,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    module = {"qwen3_moe": Qwen3MoeExperts, "mixtral": MixtralExperts}[family](config)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / K**0.5
    return module


def filled(module):
    ours = Experts.like(module)
    gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
    for layer, weight in ((ours.gate_proj, gate), (ours.up_proj, up), (ours.down_proj, module.down_proj.detach())):
        layer.weight = nn.Parameter(weight.clone())
    return ours


def routing(*, without: int | None = None):
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(T, E, generator=generator)
    if without is not None:
        scores[:, without] = -1
    weights, index = scores.topk(CHOSEN)
    return torch.randn(T, K, generator=generator), index, weights


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("without", [None, 0, 4])
def test_as_transformers(family, without):
    module = theirs(family)
    ours, (x, index, weights) = filled(module), routing(without=without)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    expected, result = module(one, index, weights), ours(two, index, weights)
    torch.testing.assert_close(result, expected)
    (expected.square().sum() + result.square().sum()).backward()
    torch.testing.assert_close(two.grad, one.grad)
    torch.testing.assert_close(ours.down_proj.weight.grad, module.down_proj.grad)
    both = torch.cat([ours.gate_proj.weight.grad, ours.up_proj.weight.grad], dim=1)
    torch.testing.assert_close(both, module.gate_up_proj.grad)


def test_rows_of_each_expert():
    x, index, _ = routing(without=1)
    expert, order = index.flatten().sort(stable=True)
    counts = torch.bincount(expert, minlength=E)
    routed = Routed(counts=counts, rows=order // CHOSEN)
    for number, rows in enumerate(routed.each(x, range(E))):
        assert torch.equal(rows, x[(index == number).any(1)])
    gathered = routed.gathered(x)
    for one, two in zip(routed.each(x, range(E)), Routed(counts=counts).each(gathered, range(E)), strict=True):
        assert torch.equal(one, two)


def test_products_follow_autocast():
    x, layer = torch.randn(7, K), ExpertLinear.of(torch.randn(2, N, K))
    routed = Routed(counts=torch.tensor([3, 4]))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, routed)
    expected = torch.cat(
        [x[:3].bfloat16() @ layer.weight[0].bfloat16().T, x[3:].bfloat16() @ layer.weight[1].bfloat16().T]
    )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_biases_of_experts():
    weight, bias = torch.randn(2, N, K), torch.randn(2, N)
    x = torch.randn(5, K)
    y = linear(x, weight, bias, Routed(counts=torch.tensor([1, 4])))
    torch.testing.assert_close(y[:1], x[:1] @ weight[0].T + bias[0])
    torch.testing.assert_close(y[1:], x[1:] @ weight[1].T + bias[1])


@pytest.mark.parametrize("change", [{"has_bias": True}, {"is_transposed": True}, {"has_gate": False}])
def test_experts_of_another_kind_are_refused(change):
    module = theirs("mixtral")
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(ValueError, match=f"kind MixtralExperts .*{next(iter(change))}"):
        Experts.like(module)
