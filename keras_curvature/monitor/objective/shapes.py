"""Check that examples have the shapes, and the labels, that a model and its loss take."""

import keras
import numpy as np
import tensorflow as tf

from keras_curvature.linearization.fisher import of_losses
from keras_curvature.linearization.fisher.convexity import name_of

# Keras' losses of other targets than one for each output: sequences of labels, or a class for each row of outputs.
OTHER_TARGETS = ("ctc", "categoricalgeneralizedcrossentropy", "circle")


def check_inputs(owner, model, x):
    """Refuse inputs of a shape that a model with known inputs does not take."""
    inputs, given = getattr(model, "inputs", None), keras.tree.flatten(x)
    if not inputs or (isinstance(x, dict) and len(given) >= len(inputs)):
        return  # a dict is matched by names, and may hold more than the model takes
    takes, got = [tuple(i.shape) for i in inputs], [tuple(a.shape) for a in given]
    if len(takes) != len(got) or not all(map(_takes, takes, got)):
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold inputs of the shape that the model {model.name!r} takes: "
            f"{', '.join(map(str, takes))}. Received: inputs of shape {', '.join(map(str, got))}"
        )


def check_targets(owner, model, y):
    """Refuse targets of a shape that the Keras loss of a model with one known output does not take."""
    if type(model).compute_loss is not keras.Model.compute_loss or model.loss is None:
        return  # a loss of its own
    if y is None:
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold targets for the loss of the model {model.name!r}, as `(x, y)`. "
            "Received: inputs alone"
        )
    says = _compared(model)
    if says is None or not tf.is_tensor(y):
        return
    got = tuple(y.shape)
    takes = says[:-1] if _is_sparse(model.loss) else says
    if not (_takes(takes, got) or (len(got) == len(takes) + 1 and got[-1] == 1 and _takes(takes, got[:-1]))):
        raise ValueError(
            f"`{owner.__name__}`: `data` must hold targets of shape {takes}, for the loss {name_of(model.loss)} of the "
            f"model {model.name!r}, whose outputs have the shape {says}. Received: targets of shape {got}"
        )


def check_labels(owner, model, labels):
    """Refuse labels of a sparse cross-entropy that are no class of a model with one known output.

    TensorFlow fails on them within the graph on CPUs, and takes their loss as NaN on GPUs.

    Args:
        labels: The targets of each batch, a list.
    """
    says = _compared(model)
    if says is None or not _is_sparse(model.loss) or getattr(model.loss, "axis", -1) not in (-1, len(says) - 1):
        return
    classes, ignored = says[-1], getattr(model.loss, "ignore_class", None)
    for y in labels:
        if classes is None or not isinstance(y, tf.Tensor):
            return
        known = np.asarray(y)
        known = known if ignored is None else known[known != ignored]
        wrong = known[~((known >= 0) & (known < classes))]  # NaN is neither
        if wrong.size:
            raise ValueError(
                f"`{owner.__name__}`: `data` must hold labels from 0 to {classes - 1}, for the {classes} outputs of "
                f"the model {model.name!r}. Received: {wrong.size} others, such as {wrong[0]}"
            )


def _compared(model):
    """The shape of the one known output of a model with a Keras loss that is compared with targets; else `None`."""
    outputs = getattr(model, "outputs", None) or []
    own = of_losses.is_of_compute_loss(model) or model.loss is None
    return tuple(outputs[0].shape) if len(outputs) == 1 and not own and _is_of_keras(model.loss) else None


def _is_sparse(loss):
    return "sparse" in name_of(loss).lower()


def _is_of_keras(loss):
    """Whether it is a Keras loss that compares outputs and targets entry by entry, or class by class."""
    of = type(loss) if isinstance(loss, keras.losses.Loss) else loss
    known = isinstance(loss, str) or getattr(of, "__module__", "").startswith("keras.")
    return known and name_of(loss).lower().replace("_", "") not in OTHER_TARGETS


def _takes(shape, got):
    # Keras adds an axis to data with one number per example
    got = (*got, 1) if len(got) == len(shape) - 1 and shape[-1] == 1 else got
    return len(shape) == len(got) and all(a is None or a == b for a, b in zip(shape, got))
