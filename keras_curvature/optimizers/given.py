"""The gradients and variables that Keras, or a training loop of one's own, gives to an optimizer."""

import tensorflow as tf

from keras_curvature import trees


def complete(owner, grads, variables):
    """Dense gradients for all variables, zero where there is none; Keras' error if all are missing."""
    if len(grads) != len(variables):
        raise ValueError(
            f"`{owner}.apply`: `grads` must hold one gradient for each variable, in the same order. Received: "
            f"{len(grads)} gradients for {len(variables)} variables ({names(variables)})"
        )
    if all(g is None for g in grads):
        raise ValueError("No gradients provided for any variable.")
    values = [tf.zeros_like(v) if g is None else tf.convert_to_tensor(g) for g, v in zip(grads, variables)]
    for g, v in zip(values, variables):
        if not g.shape.is_compatible_with(v.shape):
            raise ValueError(
                f"`{owner}.apply`: a gradient must have the shape of its variable. Received: a gradient of shape "
                f"{tuple(g.shape)} for {names([v])} of shape {tuple(v.shape)}"
            )
    return [tf.cast(trees.shaped(g, v.shape), trees.wide(v.dtype)) for g, v in zip(values, variables)]


def overwrites(variable):
    """Whether the gradient of a variable is its new value, as of the scales in float8 training."""
    return getattr(variable, "overwrite_with_gradient", False)


def missing(variables):
    """Keras' warning of variables without gradients."""
    return (
        f"Gradients do not exist for variables {_paths(variables)} when minimizing the loss. If using "
        "`model.compile()`, did you forget to provide a `loss` argument?"
    )


def names(variables):
    """The paths of variables, at most four."""
    paths = _paths(variables)
    return ", ".join(paths if len(paths) <= 4 else [*paths[:3], f"... {paths[-1]}"])


def _paths(variables):
    return [getattr(v, "path", v.name) for v in variables]  # a `tf.Variable` has no path
