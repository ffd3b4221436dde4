"""Checks of the arguments that every optimizer passes on to Keras, which takes most values without a word."""

import numbers

import keras

from keras_curvature.component import check

AMOUNTS = ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm")


def check_keras_arguments(owner, learning_rate, arguments):
    """Refuse a model or a negative number as the learning rate, negative amounts, gradients of several batches."""
    if isinstance(learning_rate, keras.layers.Layer):
        raise ValueError(
            f"`{type(owner).__name__}`: the first argument is the learning rate, not the model; the optimizer gets its "
            f"model from `model.compile(optimizer=...)`. Received: learning_rate={learning_rate!r}"
        )
    amounts = {name: arguments[name] for name in AMOUNTS if arguments.get(name) is not None}
    if isinstance(learning_rate, float):
        amounts["learning_rate"] = learning_rate
    for name, value in amounts.items():
        valid = isinstance(value, numbers.Real) and 0 <= value < float("inf")
        check(owner, name, value, valid, "a number in [0, inf)")
    if owner.gradient_accumulation_steps and not owner.needs.only_gradients:
        raise ValueError(
            f"`{type(owner).__name__}` needs the curvature of the batch, so gradients cannot accumulate. Received: "
            f"gradient_accumulation_steps={owner.gradient_accumulation_steps}. Use a larger batch; "
            "`keras_curvature.curved(model, micro_batches=...)` computes it in slices."
        )
