"""Mixtures of experts as linear layers: a weight [E, N, K] whose matrices each get the tokens that the router sends there.

transformers keeps a block's experts as one module with three-dimensional parameters, whose products nobody outside can see.
:class:`Experts` stands in its place with the same interface and three layers of its own (gate, up and down), so that calibration,
folders and the runtime meet experts as they meet linear layers: by path, one input, one weight. Tokens are sorted by expert and
multiplied by grouped products, without a loop over experts.
"""

# Shapes: E experts, N out, K in, T tokens, k experts a token, R rows = T k: tokens in the order of their experts.

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Which rows of a layer's input each expert gets: ``rows`` int64 [R] of it in the order of the experts (None: as they stand),
    ``counts`` int64 [E] of them each."""

    counts: Tensor
    rows: Tensor | None = None

    def gathered(self, x: Tensor) -> Tensor:
        """The rows [R, K] of ``x`` [T, K], expert by expert."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def each(self, x: Tensor, experts: Iterable[int]) -> Iterator[Tensor]:
        """The rows of ``x`` [T, K] that each of ``experts`` gets."""
        ends = [0, *self.counts.cumsum(0).tolist()]
        for own in (slice(ends[expert], ends[expert + 1]) for expert in experts):
            yield x[own] if self.rows is None else x.index_select(0, self.rows[own])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, routed: Routed | None = None) -> Tensor:
    """``x`` times ``weight`` transposed: [N, K] for all of x, or [E, N, K], each matrix for the rows ``routed`` to it, [R, N]."""
    if routed is None:
        return nn.functional.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):  # which grouped products do not know
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    ends = routed.counts.cumsum(0).to(torch.int32)
    y = nn.functional.grouped_mm(routed.gathered(x), weight.mT, offs=ends)
    return y if bias is None else y + bias.repeat_interleave(routed.counts, dim=0)


class ExpertLinear(nn.Module):
    """``weight`` [E, N, K] as a float layer; what calibration and the runtime swap for quantized ones."""

    bias = None

    def __init__(self, num_experts: int, out_features: int, in_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    @classmethod
    def of(cls, weight: Tensor) -> "ExpertLinear":
        """The layer with this ``weight`` [E, N, K], which trains no more."""
        with torch.device("meta"):
            layer = cls(*weight.shape)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def forward(self, x: Tensor, routed: Routed) -> Tensor:
        return linear(x, self.weight, None, routed)


class Experts(nn.Module):
    """A block's experts: ``down(act(gate(x)) * up(x))`` by each of a token's experts, summed with the router's weights.

    ``num_chosen``: experts a token; ``width``: of the widest input of the three layers.
    """

    def __init__(self, num_experts: int, num_chosen: int, hidden: int, inner: int, act_fn: nn.Module):
        super().__init__()
        self.num_experts, self.num_chosen, self.width = num_experts, num_chosen, max(hidden, inner)
        self.gate_proj = ExpertLinear(num_experts, inner, hidden)
        self.up_proj = ExpertLinear(num_experts, inner, hidden)
        self.down_proj = ExpertLinear(num_experts, hidden, inner)
        self.act_fn = act_fn

    @classmethod
    def like(cls, module: nn.Module) -> "Experts":
        """The same experts without their weights, on the meta device; ``module`` is transformers'.

        ValueError for experts of another kind: with biases, without a gate, or stored in another order.
        """
        expected = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
        wrong = [name for name, value in expected.items() if getattr(module, name, None) is not value]
        if wrong or not hasattr(module, "gate_up_proj"):
            raise ValueError(
                f"experts of kind {type(module).__name__} are not gate_up_proj [E, 2 N, K] and down_proj [E, K, N] without "
                f"biases ({', '.join(wrong) or 'gate_up_proj is missing'}); microbat has no layers for them"
            )
        num_experts, hidden, inner = module.down_proj.shape
        with torch.device("meta"):
            return cls(num_experts, module.config.num_experts_per_tok, hidden, inner, module.act_fn)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` [T, K]; ``top_k_index`` int64 and ``top_k_weights`` [T, k], the experts of each token; [T, K]."""
        expert, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)
        to_each = Routed(counts=counts, rows=order // top_k_index.shape[1])
        inner = self.act_fn(self.gate_proj(hidden_states, to_each)) * self.up_proj(hidden_states, to_each)
        y = self.down_proj(inner, Routed(counts=counts)) * top_k_weights.flatten()[order][:, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return y.index_select(0, back).unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)
