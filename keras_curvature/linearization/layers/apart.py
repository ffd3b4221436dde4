"""Whether the examples of a batch stay apart: no layer of a model mixes them, and weights are used by layers alone.

Then one row of the Jacobian, of one output of one example, is made of the inputs and slopes that the layers have at
this example, and one backward pass gives the slopes of all examples. A layer does not tell whether that is so. Batch
normalization mixes by its statistics. Code of the user's may do anything. A physics-informed model differentiates
inside its `call`, which uses the weights once more, unseen. So this is a list of what is known: sequential and
functional models of Keras' own layers.
"""

import keras

from keras_curvature import keras_internals
from keras_curvature.keras_internals import Functional
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.layers.ends import graph_of

FOLDERS = {
    "activations", "attention", "convolutional", "core", "merging", "normalization", "pooling", "regularization",
    "reshaping", "rnn",
}  # fmt: skip
KNOWN = (keras.layers.Rescaling, keras.layers.Normalization)  # of other folders
# They call a function of the user's, or assign to the kernel of another layer.
UNKNOWN = (keras.layers.Lambda, keras.layers.SpectralNormalization)
# On outputs of layers, as in `x + y`; the mask of an embedding is a `NotEqual`.
OPERATIONS = {"Add", "Subtract", "Multiply", "Divide", "TrueDivide", "Negative", "NotEqual"}


def tapped(model, needs, training=True):
    """The layers to tap for the `Needs` of a linearization, a list."""
    if needs.layers or (needs.gram and mixing(model, training) is None):
        return kronecker.layers(model)
    return []


def mixing(model, training=True):
    """What may mix the examples, in words; `None` if they stay apart."""
    if any(len(x.shape) < 2 for x in keras.tree.flatten(getattr(model, "inputs", None) or [])):
        return "inputs without features"
    for layer in keras_internals.layers_of(model):
        found = _of_model(layer) if isinstance(layer, keras.Model) else _of_layer(layer, training)
        if found is not None:
            return found
    return None


def _of_model(model):
    call = type(model).call
    if (call is not Functional.call and call is not keras.Sequential.call) or graph_of(model) is None:
        return f"the `call` of `{type(model).__name__}`"
    for operation in graph_of(model).operations:
        if not isinstance(operation, keras.layers.Layer) and not _keeps_axes(operation):
            return f"the operation `{type(operation).__name__}`"
    return None


def _keeps_axes(operation):
    """Whether an operation on outputs of layers is known, and its tensors are of one rank."""
    if type(operation).__name__ not in OPERATIONS:
        return False
    tensors = [*keras.tree.flatten(operation.input), *keras.tree.flatten(operation.output)]
    return len({len(tensor.shape) for tensor in tensors}) == 1


def _of_layer(layer, training):
    known = keras_internals.folder_of(layer) in FOLDERS or type(layer) in KNOWN
    if not known or isinstance(layer, UNKNOWN) or "call" in vars(layer):
        return f"the layer {layer.name!r} of class `{type(layer).__name__}`"
    if isinstance(layer, keras.layers.BatchNormalization) and training and layer.trainable:
        return f"the batch normalization {layer.name!r} in training mode"
    axes = getattr(layer, "axis", None)
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    if any(isinstance(axis, int) and not (axis > 0 or axis == -1) for axis in axes):
        return f"the layer {layer.name!r} along the axis {layer.axis}"
    return None
