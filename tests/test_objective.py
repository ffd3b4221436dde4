"""Probe sets: matrices of batches put together, against closed forms and plain TensorFlow, in float64.

The oracles are NumPy's, or tapes over Keras' own `stateless_call` and `stateless_compute_loss`.
"""

import contextlib
import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, flat, float64, usual
from keras import layers
from selection import some

from keras_curvature import replicas
from keras_curvature.linearization.fisher import convexity, of_losses
from keras_curvature.linearization.pure import functional
from keras_curvature.monitor.objective import reading
from keras_curvature.monitor.objective.kinds import KINDS
from keras_curvature.monitor.objective.layers import layers_of
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.operator import curvature
from keras_curvature.operators import Function, dense

N, RAGGED = 10, 4  # examples, and a batch size that leaves a rest
SPARSE = keras.losses.SparseCategoricalCrossentropy


@pytest.fixture(autouse=True)
def _in_float64():
    keras.utils.set_random_seed(0)  # for layers made in the test
    with float64():
        yield


def model_of(*stack, loss="mse", inputs=3):
    """A compiled model of a stack of layers."""
    model = keras.Sequential([keras.Input((inputs,)), *stack])
    model.compile("sgd", loss)
    return model


def examples(outputs=2, classes=0, inputs=3, seed=0, n=N):
    """`(x, y)`, with labels where there are classes."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, inputs))
    return x, generator.integers(0, classes, n) if classes else generator.standard_normal((n, outputs))


def matrix(model, data, kind="hessian", **options):
    """The dense matrix that the products of a probe set make up."""
    objective = Objective(model, data, kind, **options)
    return dense(Function(objective.product), objective.weights).numpy()


def evaluated(model, x, y, sample_weight=None, training=False):
    """The loss at weights, as Keras' own stateless methods compute it."""
    rest = [v.value for v in model.non_trainable_variables]
    counters = [v.value for v in model.metrics_variables]
    data = [tf.convert_to_tensor(x), y]

    def loss(weights):
        outputs, _ = model.stateless_call(weights, rest, data[0], training=training)
        return model.stateless_compute_loss(weights, rest, counters, *data, outputs, sample_weight, training)[0]

    return loss


def flat_jacobian(tape, targets, weights):
    """Rows of `(targets, weights)`."""
    found = tape.jacobian(targets, weights, unconnected_gradients="zero")
    rows = targets.shape.num_elements()
    return tf.concat([tf.reshape(j, [rows, -1]) for j in found], 1)


def hessian(loss, weights):
    """By two tapes of TensorFlow's."""
    with tf.GradientTape() as outer:
        outer.watch(weights)
        with tf.GradientTape() as inner:
            inner.watch(weights)
            value = loss(weights)
        gradient = inner.gradient(value, weights, unconnected_gradients="zero")
        gradient = tf.concat([tf.reshape(g, [-1]) for g in gradient], 0)
    return flat_jacobian(outer, gradient, weights).numpy()


def jacobian_of_outputs(model, x):
    """`(examples, outputs, weights)`, of the outputs of the last layer without its activation."""
    weights = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        z, _ = model.stateless_call(weights, rest, tf.convert_to_tensor(x), training=False)
        z = getattr(z, "_keras_logits", z)
    return flat_jacobian(tape, z, weights).numpy().reshape(*z.shape, -1), z.numpy()


def softmax(z):
    """Rows that sum to 1."""
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def close(a, b, tolerance=1e-10):
    """Equal up to the scale of the second."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


# Closed forms.


def with_a_one(x):
    """A column for the bias."""
    return np.hstack([x, np.ones((len(x), 1))])


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_linear_regression(kind):
    model, (x, y) = model_of(layers.Dense(2)), examples(2)
    a = with_a_one(x)
    # the bias is the last row of the kernel
    close(matrix(model, (x, y), kind, batch_size=RAGGED), np.kron(2 / (N * 2) * a.T @ a, np.eye(2)))


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_logistic_regression(kind):
    model, (x, y) = model_of(layers.Dense(1, "sigmoid"), loss="binary_crossentropy"), examples(classes=2)
    s = model(x).numpy()
    a = with_a_one(x)
    close(matrix(model, (x, y[:, None]), kind, batch_size=RAGGED), a.T @ (s * (1 - s) * a) / N)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_softmax_regression(kind):
    model, (x, y) = model_of(layers.Dense(3, "softmax"), loss=SPARSE()), examples(classes=3)
    p = model(x).numpy()
    blocks = [np.kron(np.outer(a, a), np.diag(q) - np.outer(q, q)) for a, q in zip(with_a_one(x), p)]
    close(matrix(model, (x, y), kind, batch_size=RAGGED), np.mean(blocks, 0))


def test_deep_linear():
    model, (x, y) = model_of(layers.Dense(4, use_bias=False), layers.Dense(2, use_bias=False)), examples(2)

    def loss(weights):
        return tf.reduce_mean(tf.square(x @ weights[0] @ weights[1] - y))

    weights = [v.value for v in model.trainable_variables]
    close(matrix(model, (x, y), batch_size=RAGGED), hessian(loss, weights))
    first, second = [w.numpy() for w in weights]
    jacobian = np.hstack([
        np.einsum("ni,jk->nkij", x, second).reshape(N * 2, -1),
        np.einsum("nj,kl->nklj", x @ first, np.eye(2)).transpose(0, 1, 3, 2).reshape(N * 2, -1),
    ])  # fmt: skip
    close(matrix(model, (x, y), "ggn"), 2 / (N * 2) * jacobian.T @ jacobian)


def test_relu_traces_of_hessian_and_gauss_newton_agree_layer_by_layer():
    stack = [layers.Dense(5, "relu"), layers.Dense(4, "relu"), layers.Dense(3)]
    model, data = model_of(*stack, loss=SPARSE(from_logits=True)), examples(classes=3)
    h, g = matrix(model, data), matrix(model, data, "ggn")
    assert np.abs(h - g).max() > 0.01
    starts = np.cumsum([0, *[v.shape.num_elements() for v in Objective(model, data).weights]])
    whole = np.linalg.eigvalsh(h).max()
    for own in layers_of(model).values():
        block = slice(starts[own[0]], starts[own[-1] + 1])
        assert abs(np.trace(h[block, block]) - np.trace(g[block, block])) < 1e-12
        assert np.linalg.eigvalsh(h[block, block]).max() <= whole


def test_gauss_newton_has_the_spectrum_of_its_gram_matrix():
    model = model_of(layers.Dense(6, "tanh"), layers.Dense(3), loss=SPARSE(from_logits=True))
    x, y = examples(classes=3, n=4)
    J, z = jacobian_of_outputs(model, x)
    p = softmax(z)
    # the root of diag(p) - p p', by which the Gram matrix is symmetric
    roots = [np.diag(np.sqrt(q)) - np.outer(q, np.sqrt(q)) for q in p]
    tall = np.concatenate([j.T @ r for j, r in zip(J, roots)], 1) / np.sqrt(4)
    ours = np.linalg.eigvalsh(matrix(model, (x, y), "ggn", batch_size=3))[::-1]
    theirs = np.linalg.eigvalsh(tall.T @ tall)[::-1]
    close(ours[: len(theirs)], theirs)
    assert np.abs(ours[4 * (3 - 1) :]).max() < 1e-14  # of rank N (C - 1)


# Fisher matrices.


def of_examples(J, slopes):
    """`sum_n (J_n' s_n) (J_n' s_n)'`."""
    g = np.einsum("nkp,nk->np", J, slopes)
    return g.T @ g


def test_empirical_fisher_is_the_mean_over_examples_of_outer_products():
    model, (x, y) = model_of(layers.Dense(4, "tanh"), layers.Dense(3, "softmax"), loss=SPARSE()), examples(classes=3)
    weight = np.linspace(0.0, 2.0, N)
    gradients = []
    for i in range(N):
        weights = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            value = evaluated(model, x[i : i + 1], y[i : i + 1])(weights)
        gradients.append(flat(tape.gradient(value, weights)))
    gradients = np.array(gradients)
    close(matrix(model, (x, y), "empirical_fisher", batch_size=RAGGED), gradients.T @ gradients / N)
    weighed = matrix(model, (x, y, weight), "empirical_fisher", batch_size=RAGGED)
    close(weighed, gradients.T @ (weight[:, None] * gradients) / N)


def test_fishers_of_several_entries_of_an_example():
    model, (x, y) = model_of(layers.Dense(4, "tanh"), layers.Dense(2)), examples(2)
    J, z = jacobian_of_outputs(model, x)
    close(matrix(model, (x, y), "empirical_fisher"), of_examples(J, 2 * (z - y)) / (2 * N))
    close(matrix(model, (x, y), "fisher"), 2 / (2 * N) * np.einsum("nkp,nkq->pq", J, J))


def test_fisher_with_sample_weights_and_probabilities():
    """A loss that reads probabilities and not logits has the same Fisher matrix, and another Gauss-Newton matrix."""
    weight, (x, y) = np.linspace(0.0, 2.0, N), examples(classes=3)
    stack = [layers.Dense(4, "tanh"), layers.Dense(3), layers.Lambda(tf.nn.softmax)]
    model = model_of(*stack, loss=SPARSE())
    logits = keras.Sequential([keras.Input((3,)), *stack[:2]])
    J, z = jacobian_of_outputs(logits, x)
    blocks = [w * j.T @ (np.diag(q) - np.outer(q, q)) @ j for w, j, q in zip(weight, J, softmax(z))]
    close(matrix(model, (x, y, weight), "fisher", batch_size=RAGGED), np.sum(blocks, 0) / N, 1e-6)


def test_fisher_of_positions_is_that_of_all_of_them():
    """Sequences of labels: what `_information_times` does to all positions at once."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5, 3)), layers.Dense(4)])
    model.compile("sgd", SPARSE(from_logits=True))
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((4, 5, 3)), generator.integers(0, 4, (4, 5))
    close(matrix(model, (x, y), "fisher"), matrix(model, (x, y), "ggn"))


# Batches, modes, and data.


def normalized(loss="mse"):
    """A model with batch statistics that are not those it begins with."""
    model = model_of(layers.Dense(4), layers.BatchNormalization(momentum=0.5), layers.Activation("tanh"),
                     layers.Dense(2), loss=loss)  # fmt: skip
    model(examples(seed=1)[0], training=True)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_products_through_batch_normalization_are_central_differences(training):
    model, (x, y) = normalized(), examples(2)
    objective = Objective(model, (x, y), batch_size=5, training=training)
    v = [tf.constant(np.random.default_rng(2).standard_normal(w.shape)) for w in objective.weights]
    at = objective.weights

    def gradient(step):
        weights = [a + step * b for a, b in zip(at, v)]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            halves = [evaluated(model, x[i::2], y[i::2], training=training)(weights) for i in range(2)]
            value = (halves[0] + halves[1]) / 2
        return flat(tape.gradient(value, weights))

    # of interleaved rows, as batches of 5
    objective = Objective(model, (np.vstack([x[0::2], x[1::2]]), np.vstack([y[0::2], y[1::2]])), batch_size=5,
                    training=training)  # fmt: skip
    difference = (8 * (gradient(1e-3) - gradient(-1e-3)) - (gradient(2e-3) - gradient(-2e-3))) / (12 * 1e-3)
    close(flat(objective.product(v)), difference, 1e-8)
    close(flat(objective.gradient()), gradient(0.0))


def test_in_inference_mode_it_does_not_matter_how_the_examples_are_cut():
    model, (x, y) = normalized(), examples(2)
    v = [tf.ones(w.shape, w.dtype) for w in model.trainable_variables]
    whole, order = Objective(model, (x, y)), np.random.default_rng(3).permutation(N)
    for inputs, targets in ((x, y), (x[order], y[order])):
        objective = Objective(model, (inputs, targets), batch_size=RAGGED)
        close(flat(objective.product(v)), flat(whole.product(v)), 1e-14)
        assert float(objective.loss()) == pytest.approx(float(whole.loss()), rel=1e-14)
    in_training = [flat(Objective(model, (x, y), batch_size=size, training=True).product(v)) for size in (5, None)]
    assert np.abs(in_training[0] - in_training[1]).max() > 0.01


def test_the_other_mode_is_of_the_same_examples():
    model, (x, y) = normalized(), examples(2)
    shuffled = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(N, reshuffle_each_iteration=True).batch(5)
    objective = Objective(model, shuffled, training=True)
    other = objective.in_mode(False)
    assert float(other.loss()) == pytest.approx(float(Objective(model, (x, y)).loss()), rel=1e-14)
    assert float(other.in_mode(True).loss()) == float(objective.loss()) != float(other.loss())
    assert objective.in_mode(True) is objective


def test_sample_weights_that_a_mean_is_taken_over():
    model = model_of(layers.Dense(2), loss=keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
    x, y = examples(2)
    weight, a = np.linspace(0.0, 2.0, N), with_a_one(x)
    expected = np.kron(2 / (weight.sum() * 2) * (weight[:, None] * a).T @ a, np.eye(2))
    close(matrix(model, (x, y, weight), batch_size=RAGGED), expected)


class Adding(layers.Layer):
    """Adds a mean over the batch to the loss."""

    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def of_three_outputs():
    """Means over two kinds of weights and over examples, with an activity regularizer and an added loss beside them."""
    inputs = keras.Input((3,))
    a = layers.Dense(2, name="a")(inputs)
    b = layers.Dense(1, name="b", activity_regularizer=keras.regularizers.L2(0.25))(inputs)
    model = keras.Model(inputs, {"a": a, "b": b, "c": layers.Dense(1, name="c")(Adding()(inputs + a[:, :1]))})
    loss = {name: keras.losses.MeanSquaredError("mean_with_sample_weight") for name in "ab"} | {"c": "mse"}
    model.compile("sgd", loss, loss_weights={"a": 1.0, "b": 0.5, "c": 2.0})
    generator = np.random.default_rng(1)
    y = {name: generator.standard_normal((N, width)) for name, width in (("a", 2), ("b", 1), ("c", 1))}
    weight = {"a": np.linspace(0.0, 2.0, N), "b": np.array([1.0] * 4 + [0.0] * 4 + [9.0] * 2), "c": np.arange(N) + 1.0}
    return model, (examples()[0], y, weight)


def loss_of_three_outputs(model, data):
    """The loss of all examples, written out."""
    x, y, weight = data
    places = [(v.path.split("/")[0], v.path.split("/")[-1]) for v in model.trainable_variables]

    def loss(weights):
        known = dict(zip(places, weights, strict=True))
        a, b = (x @ known[name, "kernel"] + known[name, "bias"] for name in "ab")
        sums = x + a[:, :1]
        c = sums @ known["c", "kernel"] + known["c", "bias"]
        by_example = {name: tf.reduce_mean((z - y[name]) ** 2, -1) for name, z in (("a", a), ("b", b), ("c", c))}
        means = {name: tf.reduce_sum(weight[name] * by_example[name]) for name in "abc"}
        added = 0.25 * tf.reduce_sum(b**2) / N + 0.1 * tf.reduce_mean(sums**2)
        return means["a"] / weight["a"].sum() + 0.5 * means["b"] / weight["b"].sum() + 2 * means["c"] / N + added

    return loss


def of_words():
    """A masked loss, of sentences with 1 to 5 words."""
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(7, 2, mask_zero=True)])
    model.add(layers.Dense(2))
    model.compile("sgd", "mse")
    generator = np.random.default_rng(2)
    x = generator.integers(1, 7, (N, 5)) * (np.arange(5) < np.repeat([1, 2, 4, 5], [4, 2, 2, 2])[:, None])
    return model, (x.astype("int32"), generator.standard_normal((N, 5, 2)))


def loss_of_words(model, data):
    """The loss of all examples, written out."""
    x, y = data

    def loss(weights):
        table, kernel, bias = weights
        slots = tf.reduce_mean((tf.gather(table, x) @ kernel + bias - y) ** 2, -1)
        return tf.reduce_sum(slots * (x > 0)) / np.sum(x > 0)

    return loss


def of_labels_that_do_not_count():
    """A mask that the loss makes, in which the first batch has two labels and the last one none."""
    model = model_of(layers.Dense(3), loss=SPARSE(from_logits=True, ignore_class=-1))
    return model, (examples()[0], np.array([-1, 2, -1, 1, 0, 1, 2, 1, -1, -1]))


def loss_of_labels(model, data):
    """The loss of all examples, written out."""
    (x, y), count = data, np.sum(data[1] >= 0)

    def loss(weights):
        log_p = tf.nn.log_softmax(x @ weights[0] + weights[1])
        return -tf.reduce_sum(log_p * np.eye(3)[y] * (y >= 0)[:, None]) / count

    return loss


WEIGHTED = {
    "outputs": (of_three_outputs, loss_of_three_outputs), "words": (of_words, loss_of_words),
    "ignored": (of_labels_that_do_not_count, loss_of_labels),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTED)
def test_means_over_weights_and_unmasked_steps_are_those_of_all_examples_however_they_are_cut(name):
    (model, data), loss_of = WEIGHTED[name][0](), WEIGHTED[name][1]
    objective = Objective(model, data, batch_size=RAGGED)
    weights, loss = objective.weights, loss_of(model, data)
    expected = hessian(loss, weights)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        value = loss(weights)
    close(float(objective.loss()), value.numpy(), 1e-13)
    close(float(objective.loss_at([tf.zeros_like(w) for w in weights])), value.numpy(), 1e-13)
    gradient = tape.gradient(value, weights)
    close(flat(objective.gradient()), flat([tf.convert_to_tensor(g) for g in gradient]), 1e-13)
    close(dense(Function(objective.product), weights).numpy(), expected)
    close(float(Objective(model, data).loss()), value.numpy(), 1e-13)
    close(float(objective.in_mode(True).loss()), value.numpy(), 1e-13)


@pytest.mark.parametrize(("name", "kind"), some(
    [(name, kind) for name in WEIGHTED for kind in ("ggn", "fisher", "empirical_fisher")],
    [("outputs", "fisher"), ("words", "ggn"), ("ignored", "empirical_fisher")],
))  # fmt: skip
def test_every_kind_of_means_over_weights_is_that_of_the_whole(name, kind):
    model, data = WEIGHTED[name][0]()
    close(matrix(model, data, kind, batch_size=RAGGED), matrix(model, data, kind))


def test_a_list_of_one_weight_is_that_weight_and_a_regularizer_counts_as_in_the_whole():
    layer = layers.Dense(2, activity_regularizer=keras.regularizers.L2(0.25))
    model = model_of(layer, loss=keras.losses.MeanSquaredError("mean_with_sample_weight"))
    (x, y), weight = examples(2), np.array([1.0] * 4 + [0.0] * 4 + [9.0] * 2)
    kernel, bias = model.get_weights()
    outputs = x @ kernel + bias
    expected = weight @ np.mean((outputs - y) ** 2, -1) / weight.sum() + 0.25 * np.sum(outputs**2) / N
    for given in (weight, [weight]):
        close(float(Objective(model, (x, y, given), batch_size=RAGGED).loss()), expected, 1e-13)


def test_a_mean_over_weights_in_a_compute_loss_of_its_own():
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return 2.0 * super().compute_loss(x, y, y_pred, sample_weight, training)

    (model, data) = of_three_outputs()
    own = Own(model.inputs, model.outputs[0])
    own.compile("sgd", keras.losses.MeanSquaredError("mean_with_sample_weight"))
    data = data[0], data[1]["a"], data[2]["b"]
    close(*[float(Objective(own, data, batch_size=size).loss()) for size in (RAGGED, None)], 1e-13)


def test_which_losses_are_sums_and_which_no_likelihoods():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, {name: layers.Dense(1, name=name)(inputs) for name in "ab"})
    model.compile("sgd", {"a": keras.losses.MeanSquaredError(reduction="sum"), "b": "huber"})
    x, y = DATA
    assert Objective(model, (x, {"a": y[:, :1], "b": y[:, 1:]})).is_sum
    assert of_losses.unknown(model) == "huber"
    model = _linear()
    assert not Objective(model, DATA).is_sum and of_losses.unknown(model) is None


def test_a_sum_is_the_mean_of_the_sums_of_batches():
    model, (x, y) = model_of(layers.Dense(2), loss=keras.losses.MeanSquaredError(reduction="sum")), examples(2)
    a = with_a_one(x)
    close(matrix(model, (x, y), batch_size=5), np.kron(2 / 2 * a.T @ a / 2, np.eye(2)))
    close(matrix(model, (x, y)), np.kron(2 / 2 * a.T @ a, np.eye(2)))


class Numbered(keras.utils.PyDataset):
    """Batches of 4 of some arrays."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return -(-len(self.x) // 4)

    def __getitem__(self, i):
        return self.x[4 * i : 4 * i + 4], self.y[4 * i : 4 * i + 4]


def test_every_form_of_data_is_the_same():
    model, (x, y) = model_of(layers.Dense(2)), examples(2)
    x, y = tf.constant(x), tf.constant(y)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    expected = float(Objective(model, (x, y)).loss())
    for data in (dataset, Numbered(x, y), (x, y), [x, y], (x.numpy(), y.numpy()), dataset.repeat()):
        objective = Objective(model, data, examples=N)
        assert (objective.examples, float(objective.loss())) == (N, pytest.approx(expected, rel=1e-14))
    assert [objective.batches, objective.batch_size, objective.counts] == [3, 4, [4, 4, 2]]
    assert Objective(model, dataset, batch_size=5).counts == [5, 5]
    first = Objective(model, dataset, examples=7)
    assert first.counts == [4, 3]
    assert float(first.loss()) == pytest.approx(float(Objective(model, (x[:7], y[:7])).loss()), rel=1e-14)


def test_batches_of_arrays_are_equal_where_they_can_be():
    sizes = {1: 1, 1024: 1024, 60000: 500, 1500: 500, 2048: 512, 1797: 450}
    assert {rows: reading.size_for(rows) for rows in sizes} == sizes
    # of large examples, no more than 16 MB: 27 images
    assert [reading.size_for(1024, 4 * 224 * 224 * 3), reading.size_for(1000, 2**25)] == [16, 1]
    model, (x, y) = model_of(layers.Dense(1), inputs=2**18), examples(1, inputs=2**18, n=9)
    assert Objective(model, (x.astype("float32"), y)).counts == [5, 4]  # of 2 MB each, in float64


def test_inputs_by_name_and_added_losses_alone():
    keras.utils.set_random_seed(0)
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    joined = layers.Concatenate()([layers.Dense(2)(inputs["a"]), inputs["b"]])
    model = keras.Model(inputs, layers.Dense(2)(joined))
    model.compile("sgd", "mse")
    (x, y), b = examples(2), np.random.default_rng(1).standard_normal((N, 2))
    ours = matrix(model, ({"a": x, "b": b}, y), batch_size=RAGGED)

    def loss(weights):
        kernel, bias, out, out_bias = weights
        return tf.reduce_mean(tf.square(tf.concat([x @ kernel + bias, b], 1) @ out + out_bias - y))

    close(ours, hessian(loss, [v.value for v in model.trainable_variables]))


class Energy(layers.Layer):
    """A loss that is all added."""

    def build(self, shape):
        """A kernel."""
        self.kernel = self.add_weight(shape=(shape[-1],))

    def call(self, x):
        """`x`, and the mean of `(k'x)^4`."""
        self.add_loss(tf.reduce_mean(tf.square(tf.square(tf.linalg.matvec(x, self.kernel.value)))))
        return x


def test_a_model_whose_losses_are_all_added():
    model, (x, _) = model_of(Energy(), loss=None), examples()
    k = model.trainable_variables[0].numpy()
    close(matrix(model, x, batch_size=5), np.einsum("n,ni,nj->ij", 12 * (x @ k) ** 2, x, x) / N)
    with pytest.raises(ValueError, match="does not depend on the model's outputs"):
        Objective(model, x, "ggn").product(Objective(model, x).weights)


# Kinds crossed with cases.

CASES = {
    "dense": MODELS["dense"], "conv2d": MODELS["conv2d"], "sample_weights": LOSSES["sample_weights"],
    "loss_weights": LOSSES["loss_weights_list"], "regularized": LOSSES["regularized"],
}  # fmt: skip


@pytest.mark.parametrize("name", some(CASES, ["dense", "sample_weights"]))
def test_ragged_batches_make_up_the_hessian_of_the_whole(name):
    case = CASES[name]().compile()
    objective = Objective(case.model, tuple(a for a in case.batch if a is not None), batch_size=4)
    weights = objective.weights
    v = [tf.constant(np.random.default_rng(1).standard_normal(w.shape)) for w in weights]
    expected = hessian(evaluated(case.model, *case.batch), weights) @ flat(v)
    close(flat(objective.product(v)), expected)


def _has(kind, case):
    """Whether the losses of a case have such a matrix."""
    if kind == "fisher" and type(case.model).compute_loss is keras.Model.compute_loss:
        functional.build_for(case.model, *case.batch)
        return not any(of_losses.objection(compiled.loss) for compiled in case.model._compile_loss._flat_losses)
    return kind != "fisher" and not (kind == "ggn" and convexity.not_convex(case.model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in [*MODELS, *LOSSES] if name != "mse_sum"])  # takes equal batches
def test_ragged_batches_make_up_every_kind_of_the_whole(name, kind):
    case = {**MODELS, **LOSSES}[name]().compile()
    data = tuple(a for a in case.batch if a is not None)
    if not _has(kind, case):
        with pytest.raises(ValueError, match=f"kind='{kind}'` needs a loss that is"):
            Objective(case.model, data, kind)
        return
    v = [tf.constant(np.random.default_rng(1).standard_normal(w.shape)) for w in case.model.trainable_variables]
    ragged, whole = [Objective(case.model, data, kind, batch_size=size).product(v) for size in (4, None)]
    close(flat(ragged), flat(whole))


# Nothing moves.


def noisy():
    """A model with masks, batch statistics and metrics, that has been trained for a step."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5), layers.GaussianNoise(0.1),
        layers.Dense(2),
    ])  # fmt: skip
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    model.fit(*examples(2), verbose=0)
    return model


def everything(model):
    """All that a model is made of, and the random generators of the process."""
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    drawn = keras.src.random.seed_generator.global_seed_generator().state.numpy()
    return [v.numpy() for v in variables], drawn, random.getstate(), np.random.get_state()[1].copy()


def test_nothing_moves_and_masks_are_those_of_the_seed():
    model, data = noisy(), examples(2)
    before = everything(model)
    v = [tf.ones(w.shape, w.dtype) for w in model.trainable_variables]
    options = {"training": True, "batch_size": RAGGED}
    objective = Objective(model, data, **options)
    first = [objective.loss(), *objective.product(v), *objective.gradient(), objective.loss_at(v)]
    for was, now in zip(keras.tree.flatten(before), keras.tree.flatten(everything(model)), strict=True):
        np.testing.assert_array_equal(was, now)
    model(data[0], training=True)  # moves the seeds, and statistics that are not asked for
    again = Objective(model, data, **options)
    for same in (objective, again):
        second = [same.loss(), *same.product(v), *same.gradient(), same.loss_at(v)]
        np.testing.assert_array_equal(flat(second), flat(first))
    assert float(Objective(model, data, seed=1, **options).loss()) != float(objective.loss())
    # masks of batches differ: the same examples twice have another loss than once
    twice = tuple(np.concatenate([a[:5], a[:5]]) for a in data)
    assert float(Objective(model, twice, training=True, batch_size=5).loss()) != pytest.approx(
        float(Objective(model, twice, training=True, batch_size=5, examples=5).loss()), rel=1e-6
    )


def test_answers_are_at_the_weights_of_the_moment():
    model, (x, y) = model_of(layers.Dense(2)), examples(2)
    objective = Objective(model, (x, y))
    before = float(objective.loss())
    step = [0.1 * tf.ones(v.shape, v.dtype) for v in model.trainable_variables]
    ahead = float(objective.loss_at(step))
    for v, s in zip(model.trainable_variables, step):
        v.assign_add(s)
    assert float(objective.loss()) == pytest.approx(ahead, rel=1e-14) != before


def test_mixed_precision_is_measured_in_float32():
    keras.config.set_floatx("float32")
    models, (x, y) = [], examples(classes=3)
    x = x.astype("float32")
    for policy in ("mixed_float16", "mixed_bfloat16", "float32"):
        keras.config.set_dtype_policy(policy)
        models.append(model_of(layers.Dense(5, "tanh"), layers.Dense(3, "softmax"), loss=SPARSE()))
        models[-1].set_weights(models[0].get_weights())
    v = [tf.ones(w.shape) for w in models[0].trainable_variables]
    for kind in ("hessian", "ggn"):
        objective = [Objective(model, (x, y), kind) for model in models]
        *half, single = [flat([p.loss(), *p.product(v)]) for p in objective]
        for ours in half:
            close(ours, single, 1e-5)
    assert [layer.compute_dtype for layer in models[0].layers] == ["float16", "float16"]
    assert float(models[0].evaluate(x, y, verbose=0)) != float(models[2].evaluate(x, y, verbose=0))


# Errors.


class Restless(layers.Layer):
    """Draws numbers that no seed generator of its own is behind."""

    def call(self, x):
        """`x`, a little away."""
        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)


def _linear(loss="mse"):
    return model_of(layers.Dense(2), loss=loss)


DATA = examples(2)
ERRORS = {
    "model": (lambda: (3, DATA), {}, r"`model` must be a `keras.Model`. Received: model=3"),
    "not compiled": (lambda: (keras.Sequential([layers.Dense(2)]), DATA), {}, r"has no loss. Call `model.compile"),
    "kind": (lambda: (_linear(), DATA), {"kind": "hessain"}, r"`kind` must be one of 'hessian', 'ggn'.*'hessain'"),
    "training": (lambda: (_linear(), DATA), {"training": 1}, r"`training` must be True or False. Received: training=1"),
    "examples": (lambda: (_linear(), DATA), {"examples": 0}, r"`examples` must be an integer >= 1"),
    "batch_size": (lambda: (_linear(), DATA), {"batch_size": 2.0}, r"`batch_size` must be an integer >= 1"),
    "seed": (lambda: (_linear(), DATA), {"seed": -1}, r"`seed` must be an integer >= 0"),
    "empty": (lambda: (_linear(), (DATA[0][:0], DATA[1][:0])), {}, r"`data` must hold.*at least one.*\(0, 3\)"),
    "lengths": (lambda: (_linear(), (DATA[0], DATA[1][:4])), {}, r"equally many in all.*\(10, 3\), \(4, 2\)"),
    "shape": (lambda: (_linear(), (DATA[0][:, :2], DATA[1])), {}, r"`data` must hold inputs.*None, 3.*\(10, 2\)"),
    "targets": (
        lambda: (_linear(), (DATA[0], DATA[1][:, :1])), {}, r"targets of shape \(None, 2\).*loss mse.*\(10, 1\)",
    ),
    "labels": (
        lambda: (_linear("sparse_categorical_crossentropy"), DATA), {}, r"targets of shape \(None,\),.*\(10, 2\)",
    ),
    "no targets": (lambda: (_linear(), DATA[0]), {}, r"`data` must hold targets.*Received: inputs alone"),
    "generator": (lambda: (_linear(), (batch for batch in [DATA])), {}, r"`data` must be arrays `\(x, y\)`, a"),
    "no batch": (
        lambda: (_linear(), tf.data.Dataset.from_tensor_slices(DATA).batch(4).take(0)), {}, r"at least one batch",
    ),
    "endless": (
        lambda: (_linear(), tf.data.Dataset.from_tensor_slices(DATA).batch(4).repeat()), {}, r"given with `examples=`",
    ),
    "not finite": (lambda: (_linear(), (DATA[0] * np.inf, DATA[1])), {}, r"loss on these examples is (nan|inf)"),
    "not convex": (
        lambda: (_linear("cosine_similarity"), DATA), {"kind": "ggn"},
        r"`kind='ggn'` needs a loss that is convex in the outputs; `cosine_similarity` is not known to be. Use kind=",
    ),
    "no likelihood": (
        lambda: (_linear("huber"), DATA), {"kind": "fisher"}, r"`kind='fisher'` needs.*`huber` is not. Use kind='ggn'",
    ),
    "unequal sums": (
        lambda: (_linear(keras.losses.MeanSquaredError(reduction="sum")), DATA), {"batch_size": 4},
        r"reduction='sum'.*\[2, 4\] examples",
    ),
    "restless": (
        lambda: (model_of(Restless(), layers.Dense(2)), DATA), {}, r"differs between two evaluations.*SeedGenerator",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    make, options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        Objective(*make(), **options)


@pytest.mark.parametrize(("shift", "floatx", "refused"), [
    (1e-5, "float32", False), (1e-3, "float32", True), (1e-11, "float64", False), (1e-8, "float64", True),
])  # fmt: skip
def test_a_loss_may_differ_by_rounding(monkeypatch, shift, floatx, refused):
    """As sums on an accelerator do; numbers drawn at random differ by more."""
    keras.config.set_dtype_policy(floatx)
    keras.config.set_floatx(floatx)
    losses = iter([2.0, 2.0 * (1 + shift)])
    monkeypatch.setattr(Objective, "loss", lambda objective: next(losses))
    with pytest.raises(ValueError, match="differs between two evaluations") if refused else contextlib.nullcontext():
        Objective(_linear(), DATA)


@pytest.mark.parametrize("bad", ["x", "y"])
def test_numbers_that_are_not_finite_are_found_where_the_loss_is(monkeypatch, bad):
    """A fused ReLU makes 0 of NaN, and the loss is finite."""
    x, y = (np.where(np.arange(N)[:, None] == 3, np.nan, a) if name == bad else a for name, a in zip("xy", DATA))
    monkeypatch.setattr(Objective, "loss", lambda objective: 1.0)
    with pytest.raises(ValueError, match="`data` must hold finite numbers.*NaN"):
        Objective(_linear(), (x, y))


def test_a_model_may_fill_what_is_missing():
    model = model_of(layers.Lambda(lambda x: tf.where(tf.math.is_nan(x), tf.zeros_like(x), x)), layers.Dense(2))
    x, y = DATA
    missing = np.arange(3 * N).reshape(N, 3) % 4 == 0
    filled, left = np.where(missing, 0.0, x), np.where(missing, np.nan, x)
    np.testing.assert_array_equal(
        *[flat(Objective(model, (a, y), batch_size=RAGGED).gradient()) for a in (filled, left)]
    )


@pytest.mark.parametrize("of_data_set", [False, True])
def test_what_does_not_fit_into_memory_is_refused_with_the_bytes(monkeypatch, of_data_set):
    """A row has 3 + 2 numbers of 8 bytes."""
    monkeypatch.setattr(reading, "MEMORY", 250)
    data = tf.data.Dataset.from_tensor_slices(DATA).batch(4) if of_data_set else DATA
    many = "8 of them need 3.2e-07" if of_data_set else "10 of them need 4e-07"
    with pytest.raises(ValueError, match=rf"{many} GB, more than 2.5e-07 GB. Pass `examples=6` or fewer"):
        Objective(_linear(), data)
    assert Objective(_linear(), data, examples=6).examples == 6


def test_examples_stay_in_the_memory_of_the_host_and_are_cut_before_they_are_copied():
    big = np.broadcast_to(np.ones(3), (2**40, 3))  # 25 TB, if somebody looked at all of it
    read = reading.batches(Objective, (big, np.broadcast_to(1.0, (2**40, 2))), 5, 2, "float32")
    assert [a.shape.as_list() for a, _, _ in read] == [[2, 3], [2, 3], [1, 3]]
    assert {(a.device[-5:], a.dtype) for a in keras.tree.flatten(read) if a is not None} == {("CPU:0", tf.float32)}


def test_several_workers_are_refused(monkeypatch):
    monkeypatch.setattr(replicas, "of_several_workers", lambda strategy: True)
    with pytest.raises(ValueError, match="Curvature is measured in one process"):
        Objective(_linear(), DATA)


def test_a_model_that_waits_for_its_shape_is_built_by_the_data():
    model = keras.Sequential([layers.Dense(2)])
    model.compile("sgd", "mse")
    assert [tuple(v.shape) for v in Objective(model, DATA).variables] == [(3, 2), (2,)]


def test_layers_by_name():
    stack = [layers.Dense(3, name="dense"), layers.LayerNormalization(name="norm")]
    inputs, inner = keras.Input((4, 3)), keras.Sequential([keras.Input((4, 3)), *stack], name="encoder")
    attended = layers.MultiHeadAttention(2, 2, name="attention")(inner(inputs), inner(inputs))
    outputs = layers.Dense(2, name="dense")(layers.LSTM(3, name="lstm")(attended))
    model = keras.Model(inputs, outputs)
    assert layers_of(model) == {
        "encoder/dense": [0, 1], "norm": [2, 3], "attention": list(range(4, 12)), "lstm": [12, 13, 14],
        "dense": [15, 16],
    }  # fmt: skip
    assert len(model.trainable_variables) == 17


class Namesakes(keras.Model):
    """Layers of one name, which Keras lets a model have, and weights of no layer."""

    def __init__(self):
        super().__init__(name="d")
        self.parts = [layers.Dense(2, name=name) for name in ("d", "d", "d_2", "d")]
        self.factor = self.add_weight(name="factor", shape=(2,), initializer="ones")

    def call(self, x):
        """All of them in a row."""
        for part in self.parts:
            x = part(x)
        return x * self.factor


def test_every_weight_is_in_one_layer_whatever_the_layers_are_called():
    model = Namesakes()
    model.compile("sgd", "mse")
    c = curvature(model, DATA)
    assert sorted(map(tuple, c.layers.values())) == [(0,), (1, 2), (3, 4), (5, 6), (7, 8)]
    assert len(c.variables) == len(model.trainable_variables) == 9
    assert set(c.layers) >= {"d_2"} and len(set(c.layers)) == 5
    assert [tuple(v.shape) for v in c.block(next(iter(c.layers))).variables] == [(2,)]


@pytest.mark.parametrize("name", some(MODELS, usual(MODELS)))
def test_layers_have_every_weight_once(name):
    case = MODELS[name]().compile()
    functional.build_for(case.model, *case.batch)
    places = sorted(i for own in layers_of(case.model).values() for i in own)
    assert places == list(range(len(case.model.trainable_variables)))
