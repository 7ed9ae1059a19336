"""What learns from the model as a whole: the logits of the quantized model are pulled towards the float model's; rotations are
learned end to end.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from microbat.methods.base import ModelData, Student
from microbat.methods.learn import descend, learnable
from microbat.models.rotation import RotatedCheckpoint, Rotation
from microbat.transforms.base import Transform


def distill(
    model: ModelData, student: Student, *, epochs: int, batch: int, lr: float, clip_lr: float, floor: float = 1e-3
) -> list[float]:
    """Train what ``student`` has in floats against KL(float model || student) of each token's logits; loss per step.

    That is the transforms of its activations and keys, the gains of its norms and its biases, at ``lr``, and its clips, at
    ``clip_lr``. Codes and scales of the weights stay. Both models are in memory, and the activations of one batch.
    """
    teacher = model.checkpoint.load().to(model.device)
    family = model.checkpoint.family
    blocks = [student.network.get_submodule(stack.blocks) for stack in family.stacks]
    floats = [p for own in blocks for p in own.parameters() if p.dim() == 1]
    maps = [parameter for transform in student.transforms for parameter in transform.parameters()]
    clips = learnable(student.quantizers)
    for parameter in (*floats, *maps, *clips):
        parameter.requires_grad_()
    generator = torch.Generator().manual_seed(model.seed)
    draws = (torch.randperm(len(model.pairs) or len(model.tokens), generator=generator) for _ in range(epochs))
    batches = [rows for draw in draws for rows in draw.split(batch)]

    def divergence(sample: dict[str, Tensor]) -> Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in sample.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bfloat16"):
            with torch.no_grad():
                target = teacher(**inputs, use_cache=False).logits
            output = student.network(**inputs, use_cache=False).logits
        target, output = (_said(logits, inputs).to(torch.float32).log_softmax(-1) for logits in (target, output))
        return nn.functional.kl_div(output, target, reduction="batchmean", log_target=True)

    def loss(rows: Tensor) -> Tensor:
        return torch.stack([divergence(sample) for sample in _samples(model, rows)]).mean()

    groups = [(maps, lr), (floats, lr), (clips, clip_lr)]
    losses = descend(groups, batches, loss, floor, model.progress, "distillation")
    student.network.requires_grad_(False)
    return losses


def learn_rotation(
    model: ModelData,
    start: Rotation,
    online: Callable[[int], Transform],
    *,
    steps: int,
    batch: int,
    lr: float,
) -> Rotation:
    """Cayley SGD on ``start`` against the next token's cross-entropy with quantized activations and float weights.

    Entries that are zero in ``start`` stay zero: a block-diagonal start keeps its blocks. ``online(width)`` is the fixed
    rotation of what neither matrix reaches. The gains of the norms go into the weights
    first; then each activation is rotated, quantized and rotated back, which costs far less than rotating every weight
    and computes the same.
    """
    quantizer = model.scheme.activation
    if quantizer is None:
        return start  # nothing that a rotation could be learned from
    family, head_dim = model.checkpoint.family, model.checkpoint.head_dim
    identity = Rotation(stream=torch.eye(start.stream.shape[0]))
    network = RotatedCheckpoint(model.checkpoint, identity).load().to(model.device)
    stream = start.stream.to(model.device).requires_grad_()
    assert start.heads is not None
    heads = [head.to(model.device).requires_grad_() for head in start.heads]

    def quantized(x: Tensor, matrix: Tensor) -> Tensor:
        return quantizer.fake(x @ matrix) @ matrix.T

    for head, block in zip(heads, network.get_submodule(family.blocks), strict=True):
        for site in family.sites_in(block):
            consumer = block.get_submodule(site.consumers[0])
            if site.normed and site.readers:  # which see it in floats
                for path in site.consumers:
                    before = lambda m, i: (quantized(i[0], stream), *i[1:])  # noqa: E731
                    block.get_submodule(path).register_forward_pre_hook(before)
            elif site.normed:
                block.get_submodule(site.producer).register_forward_hook(lambda m, i, out: quantized(out, stream))
            elif site.headed:

                def by_head(module: nn.Module, inputs: tuple, head: Tensor = head) -> tuple:
                    lanes = inputs[0].unflatten(-1, (-1, head_dim)) @ head
                    return ((quantizer.fake(lanes.flatten(-2)).unflatten(-1, (-1, head_dim)) @ head.T).flatten(-2),)

                consumer.register_forward_pre_hook(by_head)
            else:
                fixed = online(consumer.in_features).to(model.device)
                consumer.weight.copy_(fixed.inverse_t(consumer.weight))
                consumer.register_forward_pre_hook(lambda m, i, fixed=fixed: (quantizer.fake(fixed(i[0])), *i[1:]))
    generator = torch.Generator().manual_seed(model.seed)
    num = len(model.pairs) or len(model.tokens)
    rows = torch.cat([torch.randperm(num, generator=generator) for _ in range(1 + steps * batch // num)])
    for step in range(steps):
        losses = [
            _next_token_loss(network, sample, model)
            for sample in _samples(model, rows[step * batch : (step + 1) * batch])
        ]
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the rotations' loss is {loss.item()} after {step} steps")
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        for matrix, gradient in zip((stream, *heads), torch.autograd.grad(loss, (stream, *heads)), strict=True):
            with torch.no_grad():
                matrix.copy_(cayley_step(matrix, gradient * (matrix != 0), rate))
        model.progress((step + 1) / steps, loss.item())
    return Rotation(stream=stream.detach().cpu(), heads=torch.stack([head.detach().cpu() for head in heads]))


def _samples(model: ModelData, rows: Tensor) -> list[dict[str, Tensor]]:
    """What the model is called with for sequences ``rows``: once for all of them where they are text alone."""
    return [model.pairs[row] for row in rows.tolist()] if model.pairs else [{"input_ids": model.tokens[rows]}]


def _said(values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Of ``values`` [S, L, ...] those at tokens that say something about the next one: all, or all but those before an image's
    tokens, which nobody predicts."""
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        return values.flatten(0, 1)
    return values[nn.functional.pad(kinds[:, 1:], (0, 1))[:, : values.shape[1]] == 0]


def _next_token_loss(network: nn.Module, sample: dict[str, Tensor], model: ModelData) -> Tensor:
    """Cross-entropy of the next token."""
    inputs = {name: tensor.to(model.device) for name, tensor in sample.items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.precision == "bfloat16"):
        logits = network(**inputs, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(_said(logits, inputs).float(), _said(inputs["input_ids"][:, 1:], inputs))


def cayley_step(x: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """One step of Cayley SGD (Li, Fuxin, Todorovic, 2020, arXiv 2002.01113) from an orthogonal ``x`` [n, n]."""
    v = -gradient.mT
    a = v @ x - 0.5 * x.mT @ (x @ v @ x)
    w = a - a.mT
    rate = min(lr, 1 / (w.abs().sum(-2).max().item() + 1e-8))
    y = x.mT + rate * (w @ x.mT)
    for _ in range(5):
        y = x.mT + rate * 0.5 * (w @ (x.mT + y))
    q, r = torch.linalg.qr(y.mT.to(torch.float64))  # five steps leave it nearly orthogonal
    return (q * r.diagonal().sign()).to(x.dtype)
