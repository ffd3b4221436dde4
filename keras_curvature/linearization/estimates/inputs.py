"""The second moment of each layer's inputs, `A = mean_n sum_t a_nt a_nt'`, for the blocks of `kronecker.py`.

Examples `n` count as a mean and their positions `t` as a sum, as in the gradient `mean_n sum_t a_nt d_nt'`. So
`A^-1 dL/dW` is the regression of the slopes `d_nt` of the single examples on the inputs. The factor `A` of `factors.py`
is also a mean over the positions.

Reference: Benzing, "Gradient descent on neurons and its link to approximate second-order optimization" (2022),
section 4.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_curvature.linearization.estimates.seen import Seen, by_example, frequencies, sum_square
from keras_curvature.linearization.layers.kronecker import Block
from keras_curvature.linearization.needs import require
from keras_curvature.typing import Vector


def input_second_moments(lin, blocks: Sequence[Block]) -> Vector:
    """The second moments of the inputs of the layers of some blocks, without any backward pass.

    Args:
        lin: A `Linearization`.
        blocks: Of `kronecker.blocks(model)`.

    Returns:
        A matrix for each block, or a diagonal if its inputs are indices: the first of its `factor_shapes`.

    Raises:
        ValueError: The `needs` of the linearization have no `layers`; a layer of `blocks` is called inside a loop of
            the model.
    """
    require(lin, "input_second_moments", "layers")

    def local(recorded):
        seen = Seen(recorded, blocks)
        return [_moment(block, seen) for block in blocks]

    return lin.passes.total(local)


def _moment(block, seen):
    shape, _ = block.factor_shapes
    calls = [by_example(x, seen.place.examples) for x in seen.inputs(block)]
    if not calls:
        return tf.zeros(shape, block.dtype)
    sums = [frequencies([x], block) if block.has_indices else sum_square([x]) for x in calls]
    # an empty slice has a share of 0
    examples = [tf.maximum(tf.cast(tf.shape(x)[1], block.dtype), 1) for x in calls]
    total = tf.add_n([of_call / n for of_call, n in zip(sums, examples)])
    return tf.reshape(total * seen.place.share(block.dtype), shape)
