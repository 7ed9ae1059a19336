"""Integers: which of their schemes an engine computes as calibration did, and the way out of the others."""

import pytest

from microbat.export.targets import TARGETS, format_reasons


def reasons(target, weights, rule="absmax"):
    contract = {
        "weights": {"format": weights, "scale_rule": rule},
        "activations": {"format": "int8", "scale_rule": rule},
    }
    return format_reasons(TARGETS[target], contract)


@pytest.mark.parametrize("target", ["vllm", "vllm-hopper", "vllm-blackwell", "vllm-cpu"])
def test_w8a8_is_served_under_absmax_alone(target):
    assert reasons(target, "int8") == []
    (reason,) = reasons(target, "int8", "full_range")
    assert "computes 'absmax'; quantize with --scale-rule absmax" in reason


@pytest.mark.parametrize("weights", ["int4", "int4_row"])
@pytest.mark.parametrize("target", ["transformers", "vllm", "vllm-cpu"])
def test_w4a8_is_not_served(target, weights):
    (reason,) = reasons(target, weights)
    assert reason.startswith(f"{weights} weights with int8 activations: the engine has ")
