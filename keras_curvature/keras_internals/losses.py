"""Private names of Keras' losses, and of the outputs that they read."""

from keras.src.losses.losses import LossFunctionWrapper

from keras_curvature.keras_internals.guards import twin

LOGITS, MASK = "_keras_logits", "_keras_mask"


def losses_of(model):
    """The `keras.losses.Loss` objects of a compiled and built model, a list; empty without any."""
    return [compiled.loss for compiled in _compiled(model) if compiled is not None]


def changed_losses(model, change):
    """The compiled loss of a built model, `(y, outputs, sample_weight)` to a scalar, with other losses in it.

    Args:
        model: A compiled and built `keras.Model`; it stays as it is.
        change: A function of a `keras.losses.Loss` to what is called in its place.
    """
    losses = [compiled._replace(loss=change(compiled.loss)) for compiled in _compiled(model)]
    return twin(model._compile_loss, _flat_losses=losses)


def _compiled(model):
    return getattr(model._compile_loss, "_flat_losses", None) or []


def function_of(loss):
    """The function that a loss of Keras' averages over the examples; `None` for losses with a `call` of their own."""
    wraps = isinstance(loss, LossFunctionWrapper) and type(loss).call is LossFunctionWrapper.call
    return loss.fn if wraps else None


def options_of(loss):
    """The arguments that a loss of Keras' hands its function, a dict; empty for other losses."""
    return getattr(loss, "_fn_kwargs", {})


def carried(tensor):
    """What Keras has attached to an output for losses and metrics: `{LOGITS: tensor, MASK: tensor}`, those there."""
    return {name: getattr(tensor, name) for name in (LOGITS, MASK) if hasattr(tensor, name)}


def carry(tensor, found):
    """Attach `found`, as `carried` gives it, to a tensor of our own, and return the tensor."""
    for name, value in found.items():
        setattr(tensor, name, value)
    return tensor


def logits_of(tensor):
    """The logits that a softmax or sigmoid has attached to its output; `None` without."""
    return getattr(tensor, LOGITS, None)
