"""How much the model's prediction depends on each direction of a block's output: the Fisher information, block by block.

With g_t the gradient of the loss -log p(y_t) with respect to the output h_t of a block, y_t drawn from the model itself,

    G = E_t[ |h_t|^2 g_t g_t^T ]   [K, K]

The factor |h_t|^2 undoes the 1/|h_t| of the norms that follow, so that the few tokens with massive activations count like
the others; an error e_t then costs e_t^T G e_t / |h_t|^2. The gradients travel backwards through the float model one
block at a time: no more than one block's weights are in memory, and the inputs of every block for a few sequences.
"""

# Shapes: S sequences, L tokens, K width, V vocabulary.

from collections.abc import Callable

import torch
from torch import Tensor, nn

from microbat.models.base import Checkpoint

SEQUENCES = 8  # 4,096 tokens of 512: enough for the leading directions of a few hundred to a few thousand
DAMPING = 0.3  # of the mean diagonal: every direction counts a little, LOG.md


def importance_roots(
    checkpoint: Checkpoint,
    inputs: Tensor,
    run_block: Callable[[nn.Module, Tensor], Tensor],
    generator: torch.Generator,
    progress: Callable[[float], None],
) -> list[Tensor]:
    """For each block, a root R [K, K] with R R^T = G, damped and scaled to a mean diagonal of 1: e^T G e = |e R|^2.

    ``inputs`` [S, L, K] are the first block's; ``run_block`` runs a float block, differentiably.
    """
    family, model = checkpoint.family, checkpoint.skeleton()
    blocks = model.get_submodule(family.blocks)
    num, stream = len(blocks), [inputs[:SEQUENCES]]

    def load(index: int) -> nn.Module:
        block = checkpoint.load_into(blocks[index], f"{family.blocks}.{index}")
        return block.to(inputs.device)

    for index in range(num):
        with torch.no_grad():
            stream.append(torch.cat([run_block(load(index), row) for row in stream[-1].split(1)]))
        blocks[index].to("meta")  # its memory goes; it comes back for the way back
        progress((index + 1) / (2 * num))
    checkpoint.load_head(model)
    norm, head = (model.get_submodule(path).to(inputs.device) for path in (family.norm, family.head))
    gradient = torch.cat([_loss_gradient(norm, head, row, generator) for row in stream[-1].split(1)])
    roots: list[Tensor] = []
    for index in reversed(range(num)):
        roots.append(_root(stream.pop(), gradient))
        block = load(index)
        gradient = torch.cat(
            [_backward(run_block, block, row, g) for row, g in zip(stream[-1].split(1), gradient.split(1), strict=True)]
        )
        blocks[index] = nn.Identity()
        progress(1 - index / (2 * num))
    return roots[::-1]


def _loss_gradient(norm: nn.Module, head: nn.Module, h_SLK: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient [S, L, K] of -log p(y), y drawn from the model's own distribution, at the last block's output."""
    h = h_SLK.detach().requires_grad_()
    logits_TV = head(norm(h)).flatten(0, 1)
    uniform = torch.rand(logits_TV.shape, generator=generator).to(logits_TV.device)
    drawn = (logits_TV.detach() - torch.log(-torch.log(uniform))).argmax(-1)  # Gumbel: a sample of the softmax
    torch.nn.functional.cross_entropy(logits_TV, drawn, reduction="sum").backward()
    return h.grad


def _backward(run_block: Callable, block: nn.Module, x_SLK: Tensor, gradient: Tensor) -> Tensor:
    x = x_SLK.detach().requires_grad_()
    run_block(block, x).backward(gradient)
    return x.grad


def _root(output_SLK: Tensor, gradient: Tensor) -> Tensor:
    scaled = (gradient * output_SLK.norm(dim=-1, keepdim=True)).flatten(0, -2).to(torch.float64)
    fisher = scaled.T @ scaled
    fisher /= fisher.diagonal().mean()
    fisher += DAMPING * torch.eye(fisher.shape[0], dtype=fisher.dtype, device=fisher.device)
    return torch.linalg.cholesky(fisher / (1 + DAMPING)).to(torch.float32)
