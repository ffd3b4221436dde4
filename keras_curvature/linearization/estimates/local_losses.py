"""Gradients of local losses: how the gradient of a layer's weights changes if its inputs and targets are held.

Around the pre-activations `z_nt = W' a_nt` and their slopes `d_nt` a layer has the local loss of a squared error, or
the matching loss of its activation `f`, which is increasing:

    squared     1/2 |W' a - (z - gamma d)|^2             matching     F(W' a) - (f(z) - gamma d)' W' a,     f = F'

The gradient of their sum, divided by `gamma`, is `dL/dW + C(V) / gamma` at the weights `W + V`, with

    squared     C(V) = mean_n sum_t a_nt a_nt' V
    matching    C(V) = mean_n sum_t a_nt (f(z_nt + V' a_nt) - f(z_nt))'

so the first one needs `second moments of the inputs <inputs.py>` alone, and the second one the inputs of each example.

Reference: Amid, Anil and Warmuth, "LocoProp: Enhancing backprop via local loss optimization" (2022), section 3.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_curvature import replicas
from keras_curvature.linearization.estimates.seen import Seen, gram, joined
from keras_curvature.linearization.layers.kronecker import Block
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Scalar, Vector

INCREASING = frozenset((
    "celu", "elu", "exponential", "hard_sigmoid", "hard_tanh", "leaky_relu", "log_sigmoid", "relu", "relu6", "selu",
    "sigmoid", "softplus", "softsign", "tanh",
))  # fmt: skip


def matches(block: Block) -> bool:
    """Whether the layer of a block has an activation with a matching loss that is not the squared one.

    Not where its bias is not in the block, because it is frozen or has other axes than the outputs: `z` is not `W'a`.
    """
    layer = block.weights.layer
    if getattr(layer, "bias", None) is not block.weights.bias:
        return False
    name = getattr(getattr(layer, "activation", None), "__name__", None)
    if name == "softmax":  # the gradient of log sum exp, but over the last axis alone
        return isinstance(layer, keras.layers.Dense)
    return name in INCREASING and not block.has_indices and not isinstance(layer, keras.layers.RNN)


def inputs_of_examples(lin, blocks: Sequence[Block]) -> Any:
    """The inputs of the layers of some blocks, for `matching_changes`; they stay on their replicas.

    Raises:
        ValueError: The `needs` of the linearization have no `layers`; a layer is called inside a loop of the model, or
            on rows that belong to no example.
    """
    require(lin, "inputs_of_examples", "layers")

    def local(recorded):
        seen = Seen(recorded, blocks)
        # rows are concatenated along the first axis: (examples, groups, positions, d_in)
        return [tf.transpose(joined(seen.inputs(block), seen, block), [1, 0, 2, 3]) for block in blocks]

    return lin.passes.rows(local)


def matching_changes(blocks: Sequence[Block], inputs: Any, weights: Vector, moves: Vector, examples: Scalar) -> Vector:
    """`C(V)` of the matching loss for each block, summed over the replicas.

    Args:
        blocks: Those of `inputs_of_examples`.
        inputs: What that returned.
        weights: The matrices `W`, in the dtype of the blocks.
        moves: The matrices `V`.
        examples: Number of examples of the whole batch.
    """

    def local(inputs, weights, moves):
        return [_change(*each) for each in zip(blocks, inputs, weights, moves)]

    found = replicas.total(local, inputs, list(weights), list(moves))
    return [C / tf.cast(examples, C.dtype) for C in found]


def _change(block, inputs, W, V):
    grouped = W.shape.rank == 3
    W, V = (X if grouped else X[tf.newaxis] for X in (W, V))
    examples, positions = tf.shape(inputs)[0], tf.shape(inputs)[2]
    flat = tf.reshape(tf.transpose(inputs, [1, 0, 2, 3]), [inputs.shape[1], examples * positions, inputs.shape[3]])
    z, f = tf.matmul(flat, W), block.weights.layer.activation
    C = gram(flat, f(z + tf.matmul(flat, V)) - f(z))
    return C if grouped else tf.squeeze(C, 0)
