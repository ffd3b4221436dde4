"""Operations that TensorFlow cannot differentiate: an error names the layer and the operation.

`tape.gradient` gives `None` for two reasons. Either the result does not depend on the tensor: the derivative is zero.
Or the path to the tensor leads through an operation that TensorFlow registers as not differentiable: the derivative is
zero for some of these operations (`StopGradient`, comparisons, sampled counts) and missing for the others. TensorFlow
2.21 registers 195 of 609 operations this way. Other operations are not in the registry; their derivative is a
`LookupError`. Under `strictly()` every operation of both kinds is one of

    zero        the derivative is zero (almost) everywhere: `ZERO`, and operations without floating inputs or outputs
    right       `second_derivatives.py` has the derivative
    refused     any other: `NotDifferentiable`, while tracing

and an operation whose registered gradient raises an error, because it was not written to be differentiated again, is
refused with that error.

TensorFlow looks up an operation's gradient in one place, `lookup` of its registry. It does so only if the path from a
result to a watched tensor leads through the operation. So `lookup` is where we distinguish the three.
"""

import contextlib
import contextvars

import tensorflow as tf

from keras_curvature.keras_internals import guard, holding, is_continuous, replaced
from keras_curvature.linearization.pure.second_derivatives import ADDED, INSTEAD

# Registered as not differentiable, with floating inputs and outputs, and the derivative is zero.
ZERO = {
    "EditDistance": "piecewise constant",
    "OnesLike": "constant",
    "StatelessRandomBinomial": "samples are counts",
    "StatelessRandomPoisson": "samples are counts",
    "StopGradient": "its purpose",
    "TPUReplicatedInput": "stands outside of the program that is differentiated",
    "ZerosLike": "constant",
}

# Registered, but their gradients fail when they run, or do not always exist.
FAILING = {
    "EagerPyFunc": "a `tf.py_function` can be differentiated once",
    "PreventGradient": None,  # its own message says why
}

_strict = contextvars.ContextVar("strict", default=False)


class NotDifferentiable(ValueError):
    """TensorFlow lacks a derivative that is needed."""


@contextlib.contextmanager
def strictly():
    """A context in which derivatives that TensorFlow lacks raise `NotDifferentiable` instead of being zero."""
    with holding(_strict, True):
        try:
            yield
        except NotImplementedError as error:  # from a gradient that stands on the tape and not in the registry
            raise _refusal("custom_gradient", _layer(), str(error)) from error


def _refusal(operation, layer, reason=None):
    return NotDifferentiable(
        f"TensorFlow cannot differentiate the operation `{operation}`"
        f"{f' in layer `{layer}`' if layer else ''}, and a curvature product needs its derivative."
        f"{f' Reason: {reason}.' if reason else ''} Replace or freeze the layer, with all layers before it, or "
        "replace the loss. Or train with an optimizer that needs only gradients: `SOAP`, `Shampoo`, `Neumann`, "
        "`keras_curvature.PSGD` with its default arguments, or a Keras optimizer."
    )


def _lookup(original, registry, operation):
    """The gradient function of an operation, from TensorFlow's registry or from this package."""
    if registry is not replaced.GRADIENT_REGISTRY:
        return original(registry, operation)
    if operation in INSTEAD:
        return INSTEAD[operation]
    try:
        found = original(registry, operation)
    except LookupError:
        if operation in ADDED:
            return ADDED[operation]
        if _strict.get() and hasattr(tf.raw_ops, operation):  # otherwise the name of a function, without an entry
            return _refuse(operation)
        raise
    if not _strict.get():
        return found
    if found is None:
        return None if operation in ZERO or not is_continuous(operation) else _refuse(operation)
    return _refuse(operation) if operation in FAILING else _in_words(operation, found)


def _refuse(operation):
    def gradient(op, *gradients):
        reason = op.get_attr("message").decode() if operation == "PreventGradient" else FAILING.get(operation)
        raise _refusal(operation, _layer(), reason)

    return gradient


def _in_words(operation, gradient):
    """The gradient function, whose errors are refusals."""

    def worded(op, *gradients):
        try:
            return gradient(op, *gradients)
        except NotDifferentiable:
            raise
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            raise _refusal(operation, _layer(), f"{type(error).__name__}: {error}") from error

    return worded


def _symbolic_gradient(original, *args, f=None, **kwargs):
    """Refuse it at trace time: TensorFlow traces it for any TensorFlow 1 function, and fails when it runs."""
    if _strict.get():
        raise _refusal("SymbolicGradient", _layer(), f"of the function {getattr(f, 'name', f)}")
    return original(*args, f=f, **kwargs)


def _layer():
    """The layer whose gradient is computed, from TensorFlow's name scopes, or an empty string."""
    scopes = [s for s in tf.get_current_name_scope().split("/") if not s.startswith("gradient_tape")]
    return "/".join(scopes)


guard(*replaced.LOOKUP, _lookup)
guard(*replaced.SYMBOLIC_GRADIENT, _symbolic_gradient)
