"""The bridge to `fit`: curved models and callbacks that a training needs."""
