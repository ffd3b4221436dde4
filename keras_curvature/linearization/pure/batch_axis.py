"""The batch axis of outputs: which rows belong to which example.

An output has a row for each example, or as many rows for each (`(batch * time, features)`). An output without a batch
axis, such as the boundary values of a physics-informed model, belongs to no example: estimates over the examples treat
it as one more example, of weight 1. Outputs with another batch axis, `(time, batch, features)`, are refused.
"""

import keras
import tensorflow as tf

# Rows per example of an output that belongs to no example.
NONE = None
REMEDY = (
    "Transpose the output, so that the batch is its first axis. Or use a method that needs no per-example "
    "gradients: `HessianFree(preconditioner=0.0)`, `CurveBall`, `AdaHessian`, `SophiaH`."
)


def have_other_length(shape, examples):
    """Whether the first axis is known not to be the examples."""
    # the length is unknown for slices of unknown size
    return shape.rank == 0 or (shape[0] is not None and not (isinstance(examples, int) and shape[0] == examples))


def described(model, i, outputs, shape, examples):
    """The sentence that names output `i` of the flat outputs of a model."""
    names = sorted(outputs) if isinstance(outputs, dict) else getattr(model, "output_names", None) or []
    name = f"{i} ({names[i]!r})" if len(names) == len(keras.tree.flatten(outputs)) else str(i)
    size = examples if isinstance(examples, int) else "an unknown number of"
    return f"Received: output {name} of the model {model.name!r}, of shape {tuple(shape)} for {size} examples."


def per_example(recorded):
    """Number of rows that each leaf of a `Pass` has for one example, a list of integers or scalar tensors.

    `NONE` for a leaf that has no batch axis.

    Raises:
        ValueError: The rows of a leaf are not those of examples, and another axis may be, as far as shapes are known.
        tf.errors.InvalidArgumentError: The same, where the length is known only when the graph runs.
    """
    return [_per_example(recorded, leaf) for leaf in recorded.leaves]


def _per_example(recorded, leaf):
    examples, shape = recorded.pure.place.examples, leaf.shape
    if not have_other_length(shape, examples) and shape[0] is not None:
        return 1
    if shape.rank and shape[0] is not None and isinstance(examples, int) and examples and shape[0] % examples == 0:
        return shape[0] // examples
    if _has_no_batch_axis(shape, examples):
        return NONE
    message = _message(recorded, leaf)
    if shape[0] is not None:
        raise ValueError(message)
    length, examples = tf.shape(leaf)[0], tf.cast(examples, tf.int32)
    rows = length // tf.maximum(examples, 1)
    with tf.control_dependencies([tf.debugging.assert_equal(rows * examples, length, message)]):
        return tf.identity(rows)


def _has_no_batch_axis(shape, examples):
    """Whether no axis can be the examples: all lengths are known, and none is, or may be, their number."""
    return shape.is_fully_defined() and not (isinstance(examples, int) and examples in shape.as_list())


def _message(recorded, leaf):
    outputs, examples = recorded.evaluation.outputs, recorded.pure.place.examples
    flat = keras.tree.flatten(outputs)
    i = next((i for i, y in enumerate(flat) if y is leaf), 0)
    received = described(recorded.pure.model, i, outputs, leaf.shape, examples)
    return (
        "Estimates from per-example gradients (`fisher='empirical'`, `EKFAC`, the diagonal blocks of "
        "`KFAC`, the preconditioner of `HessianFree`) need outputs with the batch as their first axis. "
        f"{received} {REMEDY}"
    )


def spread(numbers, rows):
    """One number per example, `(examples,)`, as one per row."""
    return numbers if isinstance(rows, int) and rows == 1 else tf.repeat(numbers, rows)


def folded(numbers, rows):
    """Sums over the rows of each example: `(examples * rows,)` to `(examples,)`."""
    if isinstance(rows, int) and rows == 1:
        return numbers
    return tf.reduce_sum(tf.reshape(numbers, [tf.size(numbers) // tf.maximum(rows, 1), tf.maximum(rows, 1)]), 1)
