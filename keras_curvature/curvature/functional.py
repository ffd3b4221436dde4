"""The model as a pure function of its weights.

A Keras model has state: batch statistics move with every call in training mode, a dropout layer draws a new
mask, compiled losses count what they saw. A curvature product needs the opposite, a function that gives the
same value at the same weights however often it is called. `PureModel` is that function on one batch: it reads
the state once, evaluates under a `keras.StatelessScope`, and hands back what the state would have become, for
the train step to commit once.

Two facts of Keras (3.15) shape this file.

* `tf.nn.moments`, under BatchNormalization, LayerNormalization and GroupNormalization, stops the gradient at
  the mean. First derivatives are still exact, and so are Gauss-Newton products, which are made of them; second
  derivatives are 3% to 49% off. `differentiable_keras(twice=True)` puts the plain mean and variance in its place
  while a Hessian is traced.
* A model that ends in a softmax or sigmoid carries its logits along (`y_pred._keras_logits`), and Keras'
  cross-entropies read those. So the loss may leave the model through the logits and not through the output;
  both are kept as *leaves*, and the derivative tells which of them the loss really used.
"""

import contextlib
import dataclasses
import importlib

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import nn as keras_nn

from keras_curvature import replicas

# `import ... as` would give the function of that name, which hides the module
keras_rnn = importlib.import_module("keras.src.backend.tensorflow.rnn")


def _plain_moments(x, axes, keepdims):
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=True)
    return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))


_keras_max_pool = keras_nn.max_pool


def _max_pool(inputs, pool_size, strides=None, padding="valid", data_format=None):
    """Keras' max pooling; of images and without overlap, with a gradient whose transpose is cheap.

    TensorFlow's `MaxPoolGradGrad`, of which forward mode is made, takes 2-5 times as long as a pass forward. Where
    windows do not overlap, the tangent is a sum over windows of the tangents where the maximum was.
    """
    size = (pool_size,) * 2 if isinstance(pool_size, int) else tuple(pool_size)
    step = size if strides is None else (strides,) * 2 if isinstance(strides, int) else tuple(strides)
    last = (data_format or keras.config.image_data_format()) == "channels_last"
    if not (last and inputs.shape.rank == 4 and size == step and padding == "valid"):
        return _keras_max_pool(inputs, pool_size, strides, padding, data_format)
    window = {"ksize": [1, *size, 1], "strides": [1, *size, 1], "padding": "VALID"}

    @tf.custom_gradient
    def pool(x):
        y = tf.raw_ops.MaxPool(input=x, **window)
        largest = tf.stop_gradient(
            tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=tf.ones_like(y), **window)
        )

        def gradient(dy):
            mean = tf.raw_ops.AvgPoolGrad(orig_input_shape=tf.shape(x), grad=dy, **window)
            return largest * (float(size[0] * size[1]) * mean)

        return y, gradient

    return pool(inputs)


@contextlib.contextmanager
def differentiable_keras(twice=False):
    """While open, Keras computes what can be differentiated as often as a product needs.

    Max pooling gets a cheap forward mode; recurrent layers on a GPU run their loop and not cuDNN's kernel, whose
    backward pass has no derivative; and, if `twice`, normalization has second derivatives. Gauss-Newton products are
    of first order (a product with `J` and one with `J'`), and exact with Keras' own moments, whose gradient is the
    cheaper one.

    Open it around the replicas and not inside one: the threads of a `MirroredStrategy` take turns, and the names
    that are replaced here are shared by all of them.
    """
    originals = keras_nn._compute_moments, keras_nn.max_pool, keras_rnn.cudnn_ok
    keras_nn._compute_moments = _plain_moments if twice else originals[0]
    keras_nn.max_pool = _max_pool
    keras_rnn.cudnn_ok = lambda *args, **kwargs: False
    try:
        yield
    finally:
        keras_nn._compute_moments, keras_nn.max_pool, keras_rnn.cudnn_ok = originals


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one forward pass gives.

    Attributes:
        outputs: The model's outputs, in its own structure.
        leaves: The tensors through which the loss depends on the model: its floating outputs and their logits.
        loss: Scalar: the compiled loss with sample weights, masks, regularizers and added losses; under a
            strategy, this replica's share of it (Keras divides by the number of replicas).
        state: Next values of the model's non-trainable variables, `None` for those that the pass did not touch.
        counters: Next values of the variables of the model's metrics that the loss itself moves.
    """

    outputs: object
    leaves: list
    loss: tf.Tensor
    state: list
    counters: list


class PureModel:
    """A compiled model on one batch, as a function of its trainable weights.

    Args:
        model: A built and compiled `keras.Model`.
        x, y, sample_weight: The batch, as Keras' `train_step` unpacks it.
    """

    def __init__(self, model, x, y=None, sample_weight=None):
        self.model, self.x, self.y, self.sample_weight = model, x, y, sample_weight
        self._arguments = {"training": True} if _takes_training(model) else {}
        self._stateful = model.non_trainable_variables
        self._counting = model.metrics_variables
        # read once: the seeds and batch statistics of every later evaluation are those of this moment
        self._state = [tf.identity(v.value) for v in self._stateful]

    def evaluate(self, weights, loss_tape=None):
        """Forward pass and loss at `weights`.

        Args:
            weights: Tensors, one per trainable variable of the model.
            loss_tape: A `tf.GradientTape` to record the loss as a function of the leaves, opened only for that.

        Returns:
            An `Evaluation`.
        """
        model = self.model
        mapping = [*zip(model.trainable_variables, weights), *zip(self._stateful, self._state)]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            given = [scope.get_current_value(v) for v in model.trainable_variables]
            before = [scope.get_current_value(v) for v in self._stateful]
            outputs = model(self.x, **self._arguments)
            outputs, leaves = _cut(outputs)
            with loss_tape or contextlib.nullcontext():
                if loss_tape is not None:
                    loss_tape.watch(leaves)
                loss = compute_loss(model, self.x, self.y, outputs, self.sample_weight)
        _check_not_assigned(scope, model.trainable_variables, given)
        after = [scope.get_current_value(v) for v in self._stateful]
        counters = [scope.get_current_value(v) for v in self._counting]
        return Evaluation(
            outputs,
            leaves,
            loss,
            [None if new is old else tf.convert_to_tensor(new) for new, old in zip(after, before)],
            counters,
        )

    def commit(self, evaluation):
        """Write the batch statistics, seeds and loss counters of `evaluation` into the model."""
        variables = [*self._stateful, *self._counting]
        for variable, value in zip(variables, [*evaluation.state, *evaluation.counters]):
            if value is not None:
                variable.assign(value)


def _check_not_assigned(scope, variables, given):
    """Refuse a model that sets its own trainable weights in a forward pass: it is no function of its weights."""
    for variable, value in zip(variables, given):
        if scope.get_current_value(variable) is not value:
            raise ValueError(
                f"A layer assigns its trainable weight `{variable.path}` during the forward pass (as "
                "`SpectralNormalization` does), so the loss is not a function of the weights and has no curvature. "
                "Replace or freeze that layer, or train with an optimizer that needs gradients only, without "
                "`keras_curvature.curved`."
            )


def piece(batch, size, index):
    """The `index`-th piece of a replica's slice of the batch; see `Linearization.chunk`."""
    first = next(a for a in keras.tree.flatten(batch) if a is not None)
    if isinstance(first.shape[0], int):
        examples = first.shape[0]  # and all the lengths are numbers too: XLA wants to know the shape of a slice
        share = size * examples if isinstance(size, float) else size / replicas.count()
        length = max(1, min(round(share), examples))
    else:
        examples = tf.shape(first)[0]
        share = size * tf.cast(examples, tf.float32) if isinstance(size, float) else size / replicas.count()
        length = tf.clip_by_value(tf.cast(tf.math.round(share), tf.int32), 1, examples)
    start = (tf.cast(index, tf.int32) % (examples // length)) * length

    def cut(a):
        if a is None:
            return None
        a = tf.convert_to_tensor(a)
        piece = tf.slice(a, [start] + [0] * (a.shape.rank - 1), [length] + [-1] * (a.shape.rank - 1))
        return tf.ensure_shape(piece, [length if isinstance(length, int) else None, *a.shape[1:]])

    return keras.tree.map_structure(cut, batch)


def _cut(outputs):
    """Outputs whose floating tensors are fresh, and the list of these tensors and of the logits they carry."""
    leaves = []

    def fresh(y):
        if not (tf.is_tensor(y) and y.dtype.is_floating):
            return y
        logits = getattr(y, "_keras_logits", None)
        # Keras' losses would cast half precision to float32, and lose the logits by that
        cut = tf.cast(y, tf.float32) if logits is not None and y.dtype.size < 4 else tf.identity(y)
        leaves.append(cut)
        if hasattr(y, "_keras_mask"):
            cut._keras_mask = y._keras_mask
        if logits is not None:
            cut._keras_logits = tf.identity(tf.cast(logits, cut.dtype))
            leaves.append(cut._keras_logits)
        return cut

    return keras.tree.map_structure(fresh, outputs), leaves


# Private names of Keras 3.15, each in one function; `tests/test_keras_internals.py` checks that they are there.


def compute_loss(model, x, y, y_pred, sample_weight):
    """`model.compute_loss` in training mode, whether or not the user's own version takes `training`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)


def _takes_training(model):
    return model._call_has_training_arg


def build_for(model, x, y, sample_weight):
    """Create whatever of the model, its loss, metrics and optimizer waits to see a first batch.

    Keras does so when its train step is traced; under a `StatelessScope` it would be too late for variables.
    """
    if all(_is_built(part) for part in (model, model.optimizer, model._compile_loss, model._compile_metrics)):
        return
    with tf.init_scope():
        model._symbolic_build(data_batch=(x, y, sample_weight))


def _is_built(part):
    return part is None or part.built
