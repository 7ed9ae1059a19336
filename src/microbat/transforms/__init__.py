"""Invertible maps on the last axis, applied to activations online and to weights offline."""
