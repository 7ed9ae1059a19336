"""Calibration: data, statistics, and the engine that walks a model block by block."""
