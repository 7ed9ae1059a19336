"""Bits on disk: against compressed-tensors' documented layout, by hand, and by round trip over all codes."""

import pytest
import torch

from microbat.formats.microscaling import MXFP4, MXFP6_E2M3, MXFP8_E4M3, NVFP4
from microbat.formats.packing import pack, pack_bits, unpack_bits
from microbat.quantizers.base import AbsMax


def test_four_bit_codes_put_the_even_element_in_the_low_nibble():
    assert pack_bits(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


def test_six_bit_codes_are_little_endian_in_three_bytes():
    codes = torch.tensor([[0b000001, 0b000010, 0b100000, 0b111111]], dtype=torch.uint8)
    word = 0b111111_100000_000010_000001
    assert pack_bits(codes, 6).tolist() == [[word & 255, word >> 8 & 255, word >> 16]]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("width", [1, 5, 32, 47])
def test_round_trip(bits, width):
    codes = torch.randint(1 << bits, (3, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, width), codes)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="codes of 5 bits"):
        pack_bits(torch.zeros(1, 4, dtype=torch.uint8), 5)


def test_tensor_names_and_types_are_those_of_compressed_tensors():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    mxfp4 = pack(AbsMax(format=MXFP4).quantize(x))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in mxfp4.items()} == {
        "weight_packed": (torch.uint8, (5, 32)),
        "weight_scale": (torch.uint8, (5, 2)),
    }
    mxfp8 = pack(AbsMax(format=MXFP8_E4M3).quantize(x))
    assert mxfp8["weight"].dtype == torch.float8_e4m3fn
    assert pack(AbsMax(format=MXFP6_E2M3).quantize(x))["weight_packed"].shape == (5, 48)
    nvfp4 = pack(AbsMax(format=NVFP4).quantize(x))
    assert nvfp4["weight_scale"].dtype == torch.float8_e4m3fn
    assert nvfp4["weight_global_scale"].item() == pytest.approx(2688 / x.abs().amax().item(), rel=1e-6)


def test_mxfp4_bytes_decode_by_hand():
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([6.0, -1.5, 0.5])
    stored = pack(AbsMax(format=MXFP4, rule="floor").quantize(x))
    assert stored["weight_scale"].item() == 127
    assert stored["weight_packed"][0, :2].tolist() == [0xB7, 0x01]
