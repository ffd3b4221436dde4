"""Layers as matrices: the inputs and slopes of single layers, and their weights."""
