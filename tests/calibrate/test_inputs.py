"""What solvers are told of a site's input, against hooks on the whole float model and on the finished one."""

import pytest
import torch
from safetensors.torch import load_file

from microbat import pipeline
from microbat.methods.gptaq import GPTAQ
from microbat.models.checkpoint import Checkpoint
from microbat.recipe import Recipe
from microbat.runtime.load import load_dequantized


def inputs(model, path, tokens):
    """What the linear layer at ``path`` sees [T, K], float64."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0].flatten(0, 1).double()


@pytest.fixture(scope="module")
def told(tiny, text_file, tmp_path_factory):
    """Statistics in the order in which GPTAQ was given them, with how many rows it was to round; the float model, the finished
    one and the tokens."""
    folder, seen, own = tmp_path_factory.mktemp("told"), [], GPTAQ.solve
    model = tiny("llama", hidden_size=128, intermediate_size=192)
    recipe = Recipe(
        model=str(model), method="gptaq", scheme="W2A16:int2_g64", calibration=str(text_file),
        num_calibration_samples=6, max_seq_length=32, precision="float32",
    )  # fmt: skip
    pipeline.write_tokens(recipe, folder / "tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPTAQ, "solve", lambda self, w, q, s: seen.append((s, len(w))) or own(self, w, q, s))
        out = pipeline.run(recipe, folder / "q", tokens=folder / "tokens")
    return seen, Checkpoint(model).load(), load_dequantized(out), load_file(folder / "tokens")["tokens"]


def test_the_first_input_has_no_deviation(told):
    seen, model, _, tokens = told
    x = inputs(model, "model.layers.0.self_attn.q_proj", tokens)
    found, rows = seen[0]
    torch.testing.assert_close(found.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found.deviation.abs().max() == 0
    attention = model.model.layers[0].self_attn  # q, k and v read one activation
    assert rows == sum(len(layer.weight) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))


@pytest.mark.parametrize(
    ("call", "path"),
    [
        (1, "model.layers.0.self_attn.o_proj"),
        (3, "model.layers.0.mlp.down_proj"),
        (4, "model.layers.1.self_attn.q_proj"),
        (7, "model.layers.1.mlp.down_proj"),
    ],
)
def test_the_deviation_is_from_the_float_models_own_input(told, call, path):
    seen, model, quantized, tokens = told
    exact, x = inputs(model, path, tokens), inputs(quantized, path, tokens)
    expected, (found, _) = (exact - x).T @ x / len(x), seen[call]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.deviation, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())
