"""Schemes: which format each role is stored in, as people write it: ``W4A4KV16``, ``W4A8``, ``W4A4KV16:nvfp4``.

Bits name the default format of that width; names after a colon replace it for the roles of the same width. A ternary code
counts as 2 bits here (``W2A16:ternary``), though five of them are packed in 8.
"""

import re
from dataclasses import dataclass

from microbat.formats.block import BlockFormat
from microbat.formats.scales import rules_for, sees_tensor
from microbat.quantizers.base import AbsMax
from microbat.registry import instances, unknown

DEFAULT_FORMATS = {2: "int2", 3: "int3", 4: "mxfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"}
PATTERN = re.compile(r"W(?P<w>\d+)A(?P<a>\d+)(KV(?P<kv>\d+))?(:(?P<formats>[\w,]+))?", re.IGNORECASE)
EXAMPLES = (
    "W4A4KV16",
    "W4A8KV16",
    "W4A8KV8",
    "W4A8KV4",
    "W4A16",
    "W8A8",
    "W4A4KV16:nvfp4",
    "W4A8:int4,int8",
    "W4A4KV8:hif4,hif8",
    "W2A16",
    "W3A16KV8:int3_g64,mxfp8_e4m3",
    "W2A16:ternary",
)


def formats() -> dict[str, BlockFormat]:
    """Every number format by name."""
    return instances("microbat.formats", BlockFormat)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A quantizer for weights, one for activations, one for the cache; None leaves that role in 16 bits.

    ``ignore``: regular expressions (``re:``) or exact names of linear layers to leave in float; ``also``: of those outside all
    blocks, which are left alone otherwise, to quantize.
    """

    text: str
    weight: AbsMax | None
    activation: AbsMax | None
    cache: AbsMax | None = None
    ignore: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        scale_rule: str = "",
        preferred_rule: str = "",
        ignore: tuple[str, ...] = (),
        also: tuple[str, ...] = (),
    ) -> "Scheme":
        """Read ``W<bits>A<bits>[KV<bits>][:format,...]``; ``scale_rule`` replaces each format's default rule, and in its absence
        ``preferred_rule`` that of the formats which know it."""
        match = PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(
                f"scheme {text!r} is not W<bits>A<bits>[KV<bits>][:format,...], as in {', '.join(EXAMPLES)}"
            )
        known = formats()
        named = {}
        for name in (match["formats"] or "").lower().split(","):
            if name and name not in known:
                raise unknown("format", name, known)
            if name:
                named[known[name].element.bits] = known[name]
        quantizers = [
            cls._quantizer(text, role, int(match[key] or 16), named, known, scale_rule, preferred_rule)
            for role, key in ROLES
        ]
        cache = quantizers[2]
        if cache is not None and sees_tensor(cache.format, cache.rule):
            scaled = (
                cache.format.name if cache.format.has_tensor_scale else f"{cache.format.name} under rule {cache.rule!r}"
            )
            raise ValueError(
                f"scheme {text!r}: {scaled} scales a whole tensor, and a cache grows token by token; "
                "choose mxfp4, mxfp8_e4m3 or another format or rule without such a scale for KV"
            )
        unused = {f.name: f.element.bits for f in named.values() if all(q is None or q.format != f for q in quantizers)}
        for name, bits in unused.items():
            asked = sorted({q.format.element.bits for q in quantizers if q})
            fitting = "; ".join(
                f"of {width} bits there are {', '.join(n for n, f in known.items() if f.element.bits == width)}"
                for width in asked
            )
            raise ValueError(
                f"scheme {text!r}: {name} has {bits} bits, and no role asks for as many ({fitting or 'all stay in floats'})"
            )
        weight, activation, _ = quantizers
        return cls(text=text, weight=weight, activation=activation, cache=cache, ignore=ignore, also=also)

    @staticmethod
    def _quantizer(
        text: str,
        role: str,
        bits: int,
        named: dict[int, BlockFormat],
        known: dict[str, BlockFormat],
        rule: str,
        preferred: str,
    ) -> AbsMax | None:
        if bits == 16:
            return None
        if bits not in named and bits not in DEFAULT_FORMATS:
            allowed = ", ".join(map(str, (*DEFAULT_FORMATS, 16)))
            raise ValueError(f"scheme {text!r}: no format of {bits} bits for {role} (allowed: {allowed})")
        format = named.get(bits) or known[DEFAULT_FORMATS[bits]]
        if format.terms and role != "weights":
            raise ValueError(
                f"scheme {text!r}: {format.name} is for weights alone, its blocks are fitted; "
                f"choose 4 bits or more for {role}"
            )
        return AbsMax(format=format, rule=rule or (preferred if preferred in rules_for(format) else ""))

    @property
    def block(self) -> int | None:
        """The block size that transforms align with: the activation's, or the weight's where activations are float."""
        quantizer = self.activation or self.weight
        return quantizer.format.block if quantizer else None

    def ignores(self, name: str) -> bool:
        """Whether the linear layer of this full name stays in float."""
        return any(matches(pattern, name) for pattern in self.ignore)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern``, a full name or ``re:`` and a regular expression, is of the layer ``name``."""
    return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


ROLES = (("weights", "w"), ("activations", "a"), ("the KV cache", "kv"))
