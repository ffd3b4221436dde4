"""Layers as matrices: inputs and slopes of single layers, and which weights they belong to."""
