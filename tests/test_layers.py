"""Who may import whom, and that importing microbat has no effect."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_layers_hold():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_microbat_has_no_effect():
    code = (
        "import sys, microbat\n"
        "heavy = {'torch', 'transformers', 'plotly', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert sorted(microbat.__all__) == microbat.__all__\n"
        "for name in microbat.__all__: assert getattr(microbat, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_vllm_loads_its_plugin():
    plugins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = plugins["microbat"].partition(":")
    source = (ROOT / "src" / (module.replace(".", "/") + ".py")).read_text()
    assert f"def {function}(" in source
    code = (
        "import sys\n"
        "from microbat import cli, pipeline, verify\n"
        "from microbat.engines.base import engines\n"
        "assert 'vllm' in engines()\n"
        f"assert not {{'vllm', {module!r}}} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_importing_the_pipeline_leaves_torch_as_it_was():
    code = (
        "import torch\n"
        "before = (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled())\n"
        "from microbat import pipeline, cli\n"
        "after = (torch.get_default_dtype(), torch.get_num_threads(), torch.initial_seed(), torch.is_grad_enabled())\n"
        "assert before == after\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
