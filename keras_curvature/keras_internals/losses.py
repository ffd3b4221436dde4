"""Private names of Keras' losses, and of the attributes that they read from the outputs."""

import keras
from keras.src.losses.loss import apply_mask
from keras.src.losses.losses import LossFunctionWrapper

from keras_curvature.keras_internals.guards import twin

LOGITS, MASK = "_keras_logits", "_keras_mask"


def losses_of(model):
    """The `keras.losses.Loss` objects of a compiled and built model, a list."""
    return [compiled.loss for compiled in _compiled(model) if compiled is not None]


def changed_losses(model, change):
    """The compiled loss of a built model with other losses in it, a function `(y, outputs, sample_weight)`.

    Args:
        model: A compiled and built `keras.Model`; it does not change.
        change: A function from a `keras.losses.Loss` to the function that replaces it.
    """
    losses = [compiled._replace(loss=change(compiled.loss)) for compiled in _compiled(model)]
    return twin(model._compile_loss, _flat_losses=losses)


def _compiled(model):
    return getattr(model._compile_loss, "_flat_losses", None) or []


def function_of(loss):
    """The function that a Keras loss averages over the examples; `None` for a loss with its own `call`."""
    wraps = isinstance(loss, LossFunctionWrapper) and type(loss).call is LossFunctionWrapper.call
    return loss.fn if wraps else None


def options_of(loss):
    """The keyword arguments that a Keras loss passes to its function, a dict; empty for other losses."""
    return getattr(loss, "_fn_kwargs", {})


def with_mask(sample_weight, mask, dtype, reduction):
    """The weights by which a loss multiplies its values: sample weights, a mask, or both; one of them may be `None`."""
    given = None if sample_weight is None else keras.ops.convert_to_tensor(sample_weight, dtype)
    return apply_mask(given, mask, dtype=dtype, reduction=reduction)


def carried(tensor):
    """The attributes of an output that losses and metrics read: `{LOGITS: tensor, MASK: tensor}`, if present."""
    return {name: getattr(tensor, name) for name in (LOGITS, MASK) if hasattr(tensor, name)}


def carry(tensor, found):
    """Set the attributes that `carried` returned on another tensor, and return that tensor."""
    for name, value in found.items():
        setattr(tensor, name, value)
    return tensor


def logits_of(tensor):
    """The logits that a softmax or sigmoid attaches to its output; `None` for other outputs."""
    return getattr(tensor, LOGITS, None)
