"""The two ends of a model: the weights of its embeddings, and of the layers that make its outputs.

Methods that treat matrices as maps between activations leave both ends to other methods: an embedding is a list of
vectors, of which a batch sees a few, and each column of an output layer belongs to one class.
"""

import keras

from keras_curvature import keras_internals
from keras_curvature.keras_internals import Functional

# Names that Keras' layers give to weights that multiply or shift single units, whatever the number of their axes: the
# biases of attention have one for heads and one for units.
VECTORS = frozenset(("alpha", "beta", "bias", "gamma", "scale"))
EMBEDDINGS = "embeddings"  # the name that the weights of `Embedding`, `PositionEmbedding` and their kin have
REVERSED = "reverse_embeddings"  # the output layer of an untied `ReversibleEmbedding`


def is_kernel(variable):
    """Whether a variable is a kernel: of two axes or more, and not one that multiplies or shifts single units."""
    return len(variable.shape) >= 2 and variable.name not in VECTORS


def ends_of_variables(variables):
    """The ends as far as variables can tell, a list: by the names of embeddings, and the last kernel."""
    kernels = [v for v in variables if is_kernel(v)]
    outputs = [v for v in kernels if v.name == REVERSED] or [v for v in kernels[-1:] if v.name != EMBEDDINGS]
    return [v for v in kernels if v.name == EMBEDDINGS] + outputs


def ends_of_model(model):
    """The kernels of all embeddings, and of the layers that make the outputs, a list.

    From each output the model's graph is followed back to the first layer with a kernel, past activations, sums and
    normalizations. In a layer of several kernels, the last of them counts. A subclassed model has no graph: its last
    trainable kernel counts, as in `ends_of_variables`.
    """
    found = []
    for layer in keras_internals.layers_of(model):
        embeds = isinstance(layer, keras.layers.Embedding)
        found += [v for v in keras_internals.own_weights(layer) if is_kernel(v) and (embeds or v.name == EMBEDDINGS)]
    graph = graph_of(model)
    if graph is None:
        return found + ends_of_variables(model.trainable_variables)
    known = {}
    for output in graph.outputs:
        found += _last_kernels(output, known)
    return found


def graph_of(model):
    """The functional model with the graph of `model`, itself or in a built `Sequential`; `None` if it has none."""
    if isinstance(model, keras.Sequential):
        return keras_internals.functional_of(model)
    return model if isinstance(model, Functional) else None


def _last_kernels(tensor, known):
    """The kernels of the last layers on all ways to a tensor; `known` are those of the tensors before."""
    layer, inputs = keras_internals.made_by(tensor)
    key = (id(layer), id(tensor))
    if key not in known:
        graph = graph_of(layer)
        found = []
        if graph is not None:
            for output in graph.outputs:
                found += _last_kernels(output, known)
        elif isinstance(layer, keras.layers.Layer):
            found = [v for v in layer.weights if is_kernel(v)][-1:]
        if not found:
            for given in inputs:
                found += _last_kernels(given, known)
        known[key] = found
    return known[key]
