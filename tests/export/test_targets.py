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


@pytest.mark.parametrize("target", ["vllm", "vllm-hopper", "vllm-blackwell", "vllm-cpu"])
def test_w4a8_is_served_with_a_scale_for_each_row(target):
    """As W8A8, whose codes hold those of 4 bits."""
    assert reasons(target, "int4_row") == []
    (reason,) = reasons(target, "int4")
    assert "groups of 32" in reason
    assert "--scheme W4A8:int4_row,int8" in reason


@pytest.mark.parametrize("weights", ["int4", "int4_row", "int8"])
def test_transformers_scales_int8_tokens_otherwise(weights):
    (reason,) = reasons("transformers", weights)
    assert "127.5" in reason
