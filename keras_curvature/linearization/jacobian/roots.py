"""Roots `R` of the second derivative of a loss in the outputs, `H_L = R'R`, for one slice of the batch.

For a loss that is a sum over the entries of an output, such as a mean squared error, `R` is a diagonal. For other
losses of Keras it is a block for each example, or for each row of the output where the loss reads the last axis only.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import keras_internals, trees
from keras_curvature.linearization.fisher import likelihoods, of_losses, probabilities
from keras_curvature.linearization.fisher.convexity import name_of
from keras_curvature.linearization.pure.matmul import vectorized_map

# Keras' losses that are sums over entries, and those that are sums over the rows of the last axis.
OF_ENTRIES = {
    keras.losses.mean_squared_error, keras.losses.mean_absolute_error, keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error, keras.losses.huber, keras.losses.log_cosh, keras.losses.poisson,
    keras.losses.binary_crossentropy, keras.losses.hinge, keras.losses.squared_hinge, keras.losses.kl_divergence,
}  # fmt: skip
OF_ROWS = {
    keras.losses.categorical_crossentropy, keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_hinge,
}  # fmt: skip
ENTRY, ROW, EXAMPLE = "entry", "row", "example"
# Entries of a block: its root costs this number squared in memory, and cubed in time, for each example.
LARGEST_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Root:
    """The root of the second derivative in one leaf.

    Attributes:
        values: Shaped as the leaf for a diagonal; else `(blocks, entries, entries)`.
        shape: The leaf's shape, with tensors for unknown lengths.
        is_diagonal: Whether `R` is a diagonal.
    """

    values: tf.Tensor
    shape: list
    is_diagonal: bool

    def times(self, tangent):
        """`R u`, shaped as the leaf."""
        tangent = tf.cast(tangent, self.values.dtype)
        return self.values * tangent if self.is_diagonal else self._by_block("bij,bj->bi", tangent)

    def transposed(self, rows):
        """`R' u`, shaped as the leaf."""
        return self.values * rows if self.is_diagonal else self._by_block("bij,bi->bj", rows)

    def _by_block(self, equation, values):
        blocks = tf.reshape(values, [-1, self.values.shape[-1]])
        return tf.reshape(tf.einsum(equation, self.values, blocks), self.shape)


def roots(recorded):
    """`[Root]`, one for each leaf of a `Pass`."""
    recorded.require_leaves()
    probabilities.warn(recorded)
    return [_root(recorded, i, structure) for i, structure in enumerate(_structures(recorded))]


def residuals(recorded, found):
    """`r` with `R' r` the slope of the loss in each leaf, as far as the slope is in the range of `R'`."""
    return [_residual(root, wide(recorded, slope)) for root, slope in zip(found, recorded.slope)]


def are_squares(recorded):
    """Whether the compiled loss is a sum of squares, so that `A'r` is its gradient but for what is added to it."""
    if of_losses.is_of_compute_loss(recorded.pure.model):
        return _is_gaussian(getattr(recorded.pure.model, "likelihood", None))
    return all(
        keras_internals.function_of(loss) is keras.losses.mean_squared_error or _is_gaussian(_declared(loss))
        for loss in keras_internals.losses_of(recorded.pure.model)
    )


def wide(recorded, tensor):
    """In full precision, without the loss scale."""
    tensor = trees.full_precision(tensor)
    return tensor if recorded.loss_scale is None else tensor / tf.cast(recorded.loss_scale, tensor.dtype)


def slopes_of_examples(recorded):
    """The slopes of the loss in the leaves, of a loss that is a sum over the examples; another one is refused."""
    recorded.require_leaves()
    found = zip(_structures(recorded), recorded.slope)
    return [_uncoupled(recorded, i, slope) if kind == EXAMPLE else slope for i, (kind, slope) in enumerate(found)]


def objection(model):
    """Why a compiled and built model has no rows, a `ValueError`; `None` if it has."""
    if of_losses.is_of_compute_loss(model) and getattr(model, "likelihood", None) is None:
        return ValueError(
            f"The rows of the Jacobian need a loss that is a sum over the examples, and nothing is known of "
            f"`{type(model).__name__}.compute_loss`. Set its likelihood in the class, such as `likelihood = "
            "keras_curvature.likelihoods.Gaussian` for a sum of squares; or solve without rows, by "
            "`GaussNewton(solver=ConjugateGradient())`."
        )
    return None


# The structure of the second derivative.


def _structures(recorded):
    """`"entry"`, `"row"` or `"example"` for each leaf."""
    model = recorded.pure.model
    error = objection(model)
    if error is not None:
        raise error
    if of_losses.is_of_compute_loss(model):
        return [_of_likelihood(model.likelihood)] * len(recorded.leaves)
    found = {}

    def noting(loss):
        def noted(y, outputs, sample_weight=None):
            logits = keras_internals.logits_of(outputs)
            structure = _structure(loss)
            if structure == EXAMPLE:
                _check_has_examples(loss, y, outputs)
            found.update({i: structure for i, leaf in enumerate(recorded.leaves) if leaf is outputs or leaf is logits})
            return loss(y, outputs, sample_weight)

        return noted

    recorded.pure.compiled_loss(recorded.evaluation.outputs, noting)
    return [found.get(i, EXAMPLE) for i in range(len(recorded.leaves))]


def _structure(loss):
    declared, function = _declared(loss), keras_internals.function_of(loss)
    if declared is not None:
        return _of_likelihood(declared)
    last = keras_internals.options_of(loss).get("axis", -1) == -1
    if function in OF_ENTRIES:
        return ENTRY
    return ROW if function in OF_ROWS and last else EXAMPLE


def _check_has_examples(loss, y, outputs):
    """Refuse a loss of the user's that returns one number for all examples: its second derivative may couple them."""
    if not tf.convert_to_tensor(loss.call(y, outputs)).shape.rank:
        raise ValueError(
            "The rows of the Jacobian need a loss that is a sum over the examples. Received: "
            f"loss={_name(loss)}, which returns one number for all of them. Return one number "
            "for each example, without the last mean or sum; or solve without rows, by "
            "`GaussNewton(solver=ConjugateGradient())`."
        )


def _names(recorded):
    return ", ".join(_name(loss) for loss in keras_internals.losses_of(recorded.pure.model))


def _name(loss):
    return name_of(getattr(loss, "fn", loss))


def _declared(loss):
    """The likelihood that a loss of the user's names, or `None`."""
    return getattr(loss, "likelihood", None) or getattr(getattr(loss, "fn", None), "likelihood", None)


def _of_likelihood(likelihood):
    return ROW if likelihood.by_rows else ENTRY


def _is_gaussian(likelihood):
    return likelihood is likelihoods.Gaussian or isinstance(likelihood, likelihoods.Gaussian)


# Roots.


def _root(recorded, i, structure):
    leaf = recorded.leaves[i]
    shape = [length if length is not None else tf.shape(leaf)[k] for k, length in enumerate(leaf.shape)]
    entries = leaf.shape[1:] if structure == EXAMPLE else leaf.shape[-1:]
    if structure == ENTRY or (entries.is_fully_defined() and entries.num_elements() == 1):
        curved = wide(recorded, recorded.curve(_only(recorded, i, tf.ones_like(leaf)))[i])
        curved = _uncoupled(recorded, i, curved) if structure == EXAMPLE else curved
        return Root(tf.sqrt(_no_less_than_zero(curved)), shape, True)
    size = _size_of_block(recorded, leaf, entries)

    def column(unit):
        blocks = tf.ones([tf.size(leaf) // size, 1], leaf.dtype) * unit
        return recorded.curve(_only(recorded, i, tf.reshape(blocks, shape)))[i]

    columns = vectorized_map(column, tf.eye(size, dtype=leaf.dtype))  # (entries, *leaf)
    blocks = tf.reshape(wide(recorded, columns), [size, -1, size])
    if structure == EXAMPLE:
        blocks = _uncoupled(recorded, i, blocks)
    return Root(_root_of_blocks(tf.transpose(blocks, [1, 0, 2])), shape, False)


def _uncoupled(recorded, i, tensor):
    """`tensor`, unless the slopes of some examples change with the outputs of others: then an error, in XLA NaN."""
    leaf = recorded.leaves[i]
    numbers = tf.range(tf.shape(leaf)[0])
    moved = (tf.random.stateless_uniform(tf.shape(numbers), (0, 1)) < 0.5) & (numbers < tf.shape(leaf)[0] - 1)
    moved = tf.reshape(moved | (numbers == 0), [-1] + [1] * (leaf.shape.rank - 1))
    tangent = tf.cast(tf.random.stateless_normal(tf.shape(leaf), (0, 2)), leaf.dtype)
    change = recorded.curve(_only(recorded, i, tf.where(moved, tangent, tf.zeros_like(leaf))))[i]
    # exactly 0 in a sum over the examples; a NaN says nothing of the others, and is seen to elsewhere
    coupled = tf.reduce_any(~moved & tf.math.is_finite(change) & (change != 0))
    message = (
        "The rows of the Jacobian need a loss that is a sum over the examples. Received: "
        f"loss={_names(recorded)}, in which the outputs of one example change the slopes of others. Solve without "
        "rows, by `GaussNewton(solver=ConjugateGradient())`."
    )
    with tf.control_dependencies([tf.debugging.assert_equal(coupled, False, message)]):
        return tf.where(coupled, tf.constant(float("nan"), tensor.dtype), tensor)


def _size_of_block(recorded, leaf, entries):
    size = entries.num_elements() if entries.is_fully_defined() else None
    if size is None or size > LARGEST_BLOCK:
        raise ValueError(
            f"The second derivative of the loss couples the entries of an output of shape {tuple(leaf.shape)}, as far "
            f"as is known, and the rows of the Jacobian need its root, with at most {LARGEST_BLOCK} entries for each "
            f"example. Received: loss={_names(recorded)}. If it is a sum over entries, say so by its likelihood, such "
            "as `my_loss.likelihood = keras_curvature.likelihoods.Gaussian`; or solve without rows, by "
            "`GaussNewton(solver=ConjugateGradient())`."
        )
    return size


def _only(recorded, i, tangent):
    """Tangents of all leaves that are zero but for leaf `i`."""
    return [tangent if k == i else tf.zeros_like(leaf) for k, leaf in enumerate(recorded.leaves)]


def _root_of_blocks(blocks):
    """`R` of symmetric matrices `(blocks, d, d)`, from eigenvalues; negative ones are rounding, and count as 0."""
    # eigenvalues of a NaN raise an error
    finite = tf.reduce_all(tf.math.is_finite(blocks), [1, 2], keepdims=True)
    symmetric = 0.5 * (blocks + tf.linalg.matrix_transpose(blocks))
    values, vectors = tf.linalg.eigh(tf.where(finite, symmetric, tf.zeros_like(blocks)))
    largest = tf.reduce_max(values, -1, keepdims=True)
    kept = values > _rounding(values.dtype) * blocks.shape[-1] * largest
    root = tf.sqrt(tf.where(kept, values, tf.zeros_like(values)))
    found = root[..., tf.newaxis] * tf.linalg.matrix_transpose(vectors)  # row l: sqrt(value) times vector l
    return tf.where(finite, found, tf.constant(float("nan"), found.dtype))


def _residual(root, slope):
    if root.is_diagonal:
        return tf.math.divide_no_nan(slope, root.values)
    # the rows of a block are orthogonal: the pseudo-inverse of R' is R over their squared lengths
    squares = tf.reduce_sum(root.values * root.values, -1)  # (blocks, entries)
    along = tf.reshape(root.times(slope), tf.shape(squares))
    return tf.reshape(tf.math.divide_no_nan(along, squares), root.shape)


def _no_less_than_zero(values):
    """At least 0; NaN stays NaN."""
    return tf.where(values < 0, tf.zeros_like(values), values)


def _rounding(dtype):
    return float(np.finfo(dtype.as_numpy_dtype).eps)
