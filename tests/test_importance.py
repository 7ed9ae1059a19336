"""Importance: gradients that travel block by block equal autograd's through the whole model."""

import torch

from microbat import pipeline
from microbat.calibrate import importance
from microbat.calibrate.engine import Job, measure_importance
from microbat.methods.rtn import RTN
from microbat.models.base import Checkpoint
from microbat.scheme import Scheme


def test_block_by_block_equals_the_whole_model(tiny, monkeypatch):
    checkpoint = Checkpoint(tiny("qwen3"))
    tokens = torch.randint(2, 90, (3, 16), generator=torch.Generator().manual_seed(0))
    job = Job(
        checkpoint=checkpoint,
        scheme=Scheme.parse("W4A4"),
        preparers=(),
        solver=RTN(),
        tokens=tokens,
        seed=4,
        precision="float32",
        device=torch.device("cpu"),
    )
    roots = measure_importance(job, lambda share: None)

    model = pipeline.load(checkpoint.path)
    generator = torch.Generator().manual_seed(4)
    outputs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
    fisher = [0, 0]
    for row in tokens.split(1):
        outputs.clear()
        embedded = model.model.embed_tokens(row).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
        uniform = torch.rand(logits.shape, generator=generator)
        drawn = (logits.detach() - torch.log(-torch.log(uniform))).argmax(-1)
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for i, output in enumerate(outputs):
            scaled = (output.grad * output.detach().norm(dim=-1, keepdim=True)).flatten(0, 1).double()
            fisher[i] = fisher[i] + scaled.T @ scaled
    for root, expected in zip(roots, fisher, strict=True):
        expected = expected / expected.diagonal().mean()
        expected = (expected + importance.DAMPING * torch.eye(64).double()) / (1 + importance.DAMPING)
        torch.testing.assert_close((root @ root.T).double(), expected, rtol=1e-3, atol=1e-3)
