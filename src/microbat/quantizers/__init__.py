"""Quantizers: how a tensor gets its bits. ``AbsMax(format, rule)``, wrapped by ``Clip`` where thresholds are learned."""
