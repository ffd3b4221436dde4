"""Callbacks that a training needs."""
