"""Losses that are convex in the model's outputs.

The Gauss-Newton matrix `J' H J` is positive semi-definite exactly when the loss is convex in the model's outputs (`H >=
0`). Keras' cross-entropies are convex in the logits, which they read if the model ends in a softmax or sigmoid. Those
of other probabilities, which Keras divides by their sum, are not convex; `probabilities.py` warns of them. Keras' other
losses are convex in the outputs, except those listed here. A custom loss counts as convex unless it has an attribute
`convex_in_outputs = False`.
"""

import keras

# Keras' losses that are not convex in the predictions, by the name of class and function.
NOT_CONVEX = {
    "CosineSimilarity", "cosine_similarity",
    "BinaryFocalCrossentropy", "binary_focal_crossentropy",
    "CategoricalFocalCrossentropy", "categorical_focal_crossentropy",
    "CategoricalGeneralizedCrossEntropy", "categorical_generalized_cross_entropy",
    "MeanSquaredLogarithmicError", "mean_squared_logarithmic_error", "msle", "MSLE",
    "Dice", "dice", "Tversky", "tversky", "Circle", "circle", "CTC", "ctc",
}  # fmt: skip


def is_convex(loss):
    """Whether one loss (a name, function or `keras.losses.Loss`) is convex in the model's outputs."""
    declared = getattr(loss, "convex_in_outputs", None)
    if declared is not None:
        return bool(declared)
    return name_of(loss) not in NOT_CONVEX


def not_convex(model):
    """Names of the compiled losses of `model` that are not convex in its outputs, a list."""
    if type(model).compute_loss is not keras.Model.compute_loss:
        return []  # a model's own `compute_loss` counts as a custom loss
    losses = [loss for loss in keras.tree.flatten(getattr(model, "loss", None)) if loss is not None]
    return [name_of(loss) for loss in losses if not is_convex(loss)]


def name_of(loss):
    """The name of a loss, as Keras knows it."""
    if isinstance(loss, str):
        return loss
    return getattr(loss, "__name__", type(loss).__name__)
