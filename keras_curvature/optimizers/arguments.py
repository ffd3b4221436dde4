"""Checks of the arguments that every optimizer passes on to Keras, which takes most values without a word."""

import numbers

import keras

from keras_curvature.component import check, check_count
from keras_curvature.linearization.needs import Needs

AMOUNTS = ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "ema_momentum", "loss_scale_factor")
COUNTS = {"ema_overwrite_frequency": 1, "gradient_accumulation_steps": 2}  # the least of each


def check_for_keras(owner, learning_rate, needs, arguments):
    """Refuse what is no number, no flag and no count where Keras takes one, before Keras computes with it."""
    if isinstance(learning_rate, keras.layers.Layer):
        raise ValueError(
            f"`{type(owner).__name__}`: the first argument is the learning rate, not the model; the optimizer gets its "
            f"model from `model.compile(optimizer=...)`. Received: learning_rate={learning_rate!r}"
        )
    check(owner, "needs", needs, needs is None or isinstance(needs, Needs), "a `Needs`, or None")
    amounts = {name: arguments[name] for name in AMOUNTS if arguments.get(name) is not None}
    if isinstance(learning_rate, float):
        amounts["learning_rate"] = learning_rate
    for name, value in amounts.items():
        positive, share = name == "loss_scale_factor", name == "ema_momentum"
        valid = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= value < float("inf")
        valid = valid and not (positive and value == 0) and not (share and value > 1)
        expected = "(0, inf)" if positive else "[0, 1]" if share else "[0, inf)"
        check(owner, name, value, valid, f"a number in {expected}")
    for name, least in COUNTS.items():
        check_count(owner, name, arguments.get(name), least, or_none=True)
    use_ema = arguments.get("use_ema")
    check(owner, "use_ema", use_ema, use_ema is None or isinstance(use_ema, bool), "True or False")


def with_needs(arguments, needs):
    """The `arguments` with the `needs` of a method that finds them from its options, unless the user gave others."""
    given = arguments.get("needs")
    return {**arguments, "needs": needs if given is None else given}


def check_accumulation(owner):
    """Refuse gradients of several batches for a method that looks at each batch."""
    if owner.gradient_accumulation_steps and not owner.needs.only_gradients:
        raise ValueError(
            f"`{type(owner).__name__}` needs the curvature of the batch, so gradients cannot accumulate. Received: "
            f"gradient_accumulation_steps={owner.gradient_accumulation_steps}. Use a larger batch; "
            "`keras_curvature.curved(model, micro_batches=...)` computes it in slices."
        )
