"""The quantized cache of keys and values: what calibration trains and the runtime stores.

Keys and values are quantized token by token along each head's lanes. A transform P acts on keys after their position
encoding, with its inverse transpose on queries, so that q k^T stays as it was (BATQuant, section 3.2; FlatQuant).
"""

# Shapes: S sequences, H heads, L tokens, D lanes of a head.

import weakref

import torch
from torch import Tensor, nn

from microbat.formats.block import QTensor
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.transforms.base import Transform


class KVQuantizer(nn.Module):
    """Quantize keys and values [S, H, L, D] on their way into attention, or keep their codes for the tokens to come."""

    def __init__(self, key: AbsMax | Clip, value: AbsMax | Clip, transform: Transform | None = None):
        super().__init__()
        self.key, self.value, self.transform = key, value, transform
        self._restored: weakref.ref[Tensor] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as attention multiplies them; keys that come out of :meth:`restore` are left alone."""
        dtype = query.dtype
        if self.transform is not None:
            with torch.autocast(query.device.type, enabled=False):
                query = self.transform.inverse_t(query.to(torch.float32)).to(dtype)
        if self._restored is not None and self._restored() is key:
            return query, key, value
        return query, self.key.fake(self._mapped(key)).to(dtype), self.value.fake(value).to(dtype)

    def store(self, key: Tensor, value: Tensor) -> tuple[QTensor, QTensor]:
        """The codes and scales of new tokens."""
        return self.key.quantize(self._mapped(key)), self.value.quantize(value.to(torch.float32))

    def restore(self, key: QTensor, value: QTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys, transformed, and values of all stored tokens."""
        restored = key.dequantize().to(dtype)
        self._restored = weakref.ref(restored)
        return restored, value.dequantize().to(dtype)

    def _mapped(self, key: Tensor) -> Tensor:
        if self.transform is None:
            return key.to(torch.float32)
        with torch.autocast(key.device.type, enabled=False):
            return self.transform(key.to(torch.float32))
