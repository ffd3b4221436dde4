"""Rows of the Jacobian by layers against those by products; gradients of examples; which models mix their examples."""

import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, WITHOUT_ROWS, flat, float64
from selection import some

import keras_curvature as kc
from keras_curvature import Linearization, Needs, operators, trees
from keras_curvature.linearization.jacobian import by_layers
from keras_curvature.linearization.layers import apart

CASES = {**MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
MIX = {"batch_normalization", "batch_normalization_2d", "nested", "subclassed", "subclassed_passing_training",
       "subclassed_without_training", "loss_added_loss"}  # fmt: skip
# Weights in no block: they are left to products.
PARTLY = {"conv2d_transpose": 2, "separable_conv": 3, "recurrent_dropout": 3, "prelu": 1}
USUAL = ["dense", "einsum_dense", "conv2d", "depthwise_conv", "layer_normalization", "group_normalization", "gru",
         "prelu", "embedding", "attention", "shared_layer", "several_outputs", "loss_sample_weights",
         "loss_sparse_from_logits"]  # fmt: skip
BY_LAYERS, BY_PRODUCTS = Needs(products=True, gram=True), Needs(products=True)


def answers(case, **how):
    """What the rows give by layers, and their array by products, as arrays."""

    def ask():
        lin = Linearization(case.model, *case.batch, needs=BY_LAYERS, **how)
        A = Linearization(case.model, *case.batch, needs=BY_PRODUCTS).rows().dense()
        rows, u = lin.rows(), tf.cos(1.3 * tf.range(A.shape[0], dtype=A.dtype))
        scale = [tf.constant(0.5 + 0.3 * i, A.dtype) for i in range(len(lin.weights))]
        found = {
            "gram": rows.gram(), "scaled gram": rows.gram(scale), "transposed": trees.flatten(rows.transposed(u)),
            "squares": trees.flatten(rows.squared_columns()), "dense": rows.dense(), "A": A, "u": u,
            "scale": trees.flatten([tf.fill(w.shape, s) for w, s in zip(lin.weights, scale)]),
        }  # fmt: skip
        noted.update(by_layers=rows.is_by_layers, others=getattr(rows, "_others", None))
        return found

    noted = {}
    return {name: value.numpy() for name, value in tf.function(ask, autograph=False)().items()} | noted


def check(found):
    """The numbers by layers against the array by products."""
    A, close = found["A"], {"rtol": 1e-10, "atol": 1e-13}
    np.testing.assert_allclose(found["gram"], A @ A.T, **close)
    np.testing.assert_allclose(found["scaled gram"], (A * found["scale"]) @ A.T, **close)
    np.testing.assert_allclose(found["transposed"], A.T @ found["u"], **close)
    np.testing.assert_allclose(found["squares"], (A * A).sum(0), **close)
    np.testing.assert_allclose(found["dense"], A, **close)


@pytest.mark.parametrize("kind", some([k for k in CASES if k not in WITHOUT_ROWS | MIX], USUAL[::2]))
def test_rows_by_layers_are_those_by_products(kind):
    with float64():
        found = answers(CASES[kind]().compile())
    check(found)
    assert found["by_layers"] and len(found["others"]) == PARTLY.get(kind, 0)


@pytest.mark.parametrize("kind", some(["conv1d", "embedding", "attention"], ["attention"]))
@pytest.mark.parametrize("pairs", [False, True])
def test_both_ways_to_sum_over_positions_are_the_same(kind, pairs, monkeypatch):
    monkeypatch.setattr(by_layers, "_pairs_are_cheaper", lambda layer: pairs)
    monkeypatch.setattr(by_layers, "AT_A_TIME", 40)  # in pieces of few input features
    with float64():
        check(answers(CASES[kind]().compile()))


def test_micro_batches_and_batches_of_unknown_size_have_the_same_rows_by_layers():
    with float64():
        case = MODELS["several_outputs"]().compile()
        check(answers(case, micro_batches=2))
        kind = {"value": tf.TensorSpec([None, 2], tf.float64), "kind": tf.TensorSpec([None], tf.int32)}

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float64), kind], autograph=False)
        def unknown(x, y):
            rows = Linearization(case.model, x, y, needs=BY_LAYERS).rows()
            assert rows.is_by_layers and rows.count is None
            return rows.gram(), trees.flatten(rows.transposed(rows.residual)), rows.dense()

        K, g, A = (a.numpy() for a in unknown(case.x, case.y))
        rows = Linearization(case.model, *case.batch, needs=BY_PRODUCTS).rows()
        expected, r = rows.dense().numpy(), rows.residual.numpy()
    np.testing.assert_allclose(A, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(K, expected @ expected.T, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(g, expected.T @ r, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("wide", ["hidden", "last"])
def test_layers_of_two_precisions_have_the_same_rows(wide):
    keras.utils.set_random_seed(1)
    first = keras.layers.Dense(4, activation="tanh", dtype="float64" if wide == "hidden" else None)
    last = keras.layers.Dense(2, dtype="float64" if wide == "last" else None)
    model = keras.Sequential([keras.Input((3,)), first, keras.layers.PReLU(), last])
    model.compile("sgd", "mse")
    random = np.random.default_rng(0)
    batch = random.standard_normal((5, 3)).astype("float32"), random.standard_normal((5, 2)).astype("float32")
    rows = Linearization(model, *batch, needs=BY_LAYERS).rows()
    assert rows.is_by_layers and rows._others  # PReLU's weights are left to products
    by_products = Linearization(model, *batch, needs=BY_PRODUCTS).rows()
    A, u = by_products.dense().numpy(), random.standard_normal(10)
    v = [tf.constant(random.standard_normal(w.shape), w.dtype) for w in model.trainable_variables]
    close = {"rtol": 1e-4, "atol": 1e-6}
    for found, right in {
        "gram": (rows.gram(), A @ A.T), "product": (rows @ v, A @ trees.flatten(v, "float64").numpy()),
        "transposed": (trees.flatten(rows.transposed(tf.constant(u)), "float64"), A.T @ u),
        "squares": (trees.flatten(rows.squared_columns(), "float64"), (A * A).sum(0)),
        "residual": (rows.residual, by_products.residual), "dense": (rows.dense(), A),
    }.values():  # fmt: skip
        assert found.dtype == tf.float64
        np.testing.assert_allclose(found, right, **close)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("positions", [1, 8])
def test_all_questions_to_a_layer_in_single_precision(groups, positions):
    """Other tests ask in double precision, which has other kernels: one of single precision read past a matrix' end."""
    random, count, d_in, d_out = np.random.default_rng(0), 64, 9, 16
    a = random.standard_normal((count, groups, positions, d_in)).astype("float32")
    d = random.standard_normal((count, 1, groups, positions, d_out)).astype("float32")
    matrix = random.standard_normal((groups * d_in, d_out)).astype("float32")
    block = types.SimpleNamespace(has_indices=False, shape=(groups * d_in, d_out), tensors=lambda m: [m])
    layer = by_layers.Layer(block, tf.constant(a), tf.constant(d))
    A = np.einsum("bgti,bkgtj->bkgij", a.astype("float64"), d).reshape(count, -1)
    u = random.standard_normal((count, 1)).astype("float32")
    for found, right in {
        "product": (by_layers.times(layer, tf.constant(matrix)), A @ matrix.reshape(-1, 1).astype("float64")),
        "transposed": (by_layers.transposed(layer, tf.constant(u)), A.T @ u), "gram": (by_layers.gram(layer), A @ A.T),
        "squares": (by_layers.squares(layer), (A * A).sum(0)), "dense": (by_layers.dense(layer)[0], A),
    }.values():  # fmt: skip
        np.testing.assert_allclose(np.reshape(found, right.shape), right, rtol=1e-4, atol=1e-4 * np.abs(right).max())


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_half_precision_eagerly_and_by_xla(jit_compile):
    case = MODELS["conv2d"]().compile()
    A = Linearization(case.model, *case.batch, needs=BY_PRODUCTS).rows().dense().numpy()
    ask = lambda: Linearization(case.model, *case.batch, needs=BY_LAYERS).rows().gram()  # noqa: E731
    found = tf.function(ask, autograph=False, jit_compile=jit_compile)()
    np.testing.assert_allclose(found, A @ A.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ask(), A @ A.T, rtol=1e-4, atol=1e-6)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        half = MODELS["conv2d"]().compile()
        lin = Linearization(half.model, *half.batch, needs=BY_LAYERS, loss_scale=tf.constant(1024.0))
        K = lin.rows().gram()
    finally:
        keras.config.set_dtype_policy(policy)
    assert K.dtype == tf.float32 and lin.rows().is_by_layers
    np.testing.assert_allclose(K, A @ A.T, rtol=0.05, atol=0.02)


# Gradients of examples.


@pytest.mark.parametrize("kind", some(
    ["dense", "batch_normalization", "lstm", "embedding", "several_outputs", "subclassed_without_training",
     "loss_sparse_from_softmax", "loss_sample_weights", "loss_huber"],
    ["several_outputs", "embedding", "loss_sample_weights"],
))  # fmt: skip
def test_gradients_of_examples_sum_to_the_gradient(kind):
    with float64():
        case = CASES[kind]().compile()

        def ask():
            lin = Linearization(case.model, *case.batch, needs=BY_LAYERS)
            rows = lin.gradients_of_examples()
            along = rows @ lin.gradient
            return rows.dense(), rows.gram(), along, trees.flatten(lin.gradient)

        G, K, along, g = (a.numpy() for a in tf.function(ask, autograph=False)())
    assert G.shape[0] == len(keras.tree.flatten(case.x)[0])
    np.testing.assert_allclose(G.sum(0), g, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(K, G @ G.T, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(along, G @ g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv2d", "loss_sparse_from_logits", "loss_sample_weights"])
def test_the_gradient_of_an_example_is_that_of_its_own_loss(kind):
    with float64():
        case = CASES[kind]().compile()
        x, y, sample_weight = (None if a is None else np.asarray(a) for a in case.batch)
        G = Linearization(case.model, *case.batch).gradients_of_examples().dense().numpy()
        loss = keras.losses.get(case.loss)
        for i in range(len(x)):
            one = slice(i, i + 1)
            with tf.GradientTape() as tape:
                weight = None if sample_weight is None else sample_weight[one]
                value = loss(y[one], case.model(x[one], training=True)) if weight is None else (
                    loss(y[one], case.model(x[one], training=True), weight))  # fmt: skip
            g = flat(tape.gradient(value, case.model.trainable_variables))
            np.testing.assert_allclose(G[i], g / len(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", some(
    ["several_outputs", "lstm", "loss_sparse_from_logits", "loss_poisson", "loss_binary_from_sigmoid",
     "loss_sample_weights"],
    ["several_outputs", "loss_poisson"],
))  # fmt: skip
def test_squares_of_fisher_rows_sum_to_the_fisher_matrix(kind):
    with float64():
        case = CASES[kind]().compile()
        lin = Linearization(case.model, *case.batch)
        for of in ("exact", "empirical"):
            S = lin.fisher_rows(of).dense().numpy()
            F = operators.base.dense(lin.fisher(of), lin.weights).numpy()
            np.testing.assert_allclose(S.T @ S, F, rtol=1e-8, atol=1e-12)
        sampled = lin.fisher_rows("sampled", seed=3).dense().numpy()
        np.testing.assert_allclose(np.square(sampled.sum(0)), flat(lin.fisher_diagonal(seed=3)), rtol=1e-8, atol=1e-13)


def test_bad_questions_are_refused_in_words():
    case = MODELS["dense"]().compile()
    lin = Linearization(case.model, *case.batch)
    with pytest.raises(ValueError, match="kind='half'"):
        lin.fisher_rows("half")
    with pytest.raises(ValueError, match="memory=-1"):
        lin.gradients_of_examples(memory=-1)
    with pytest.raises(ValueError, match="Needs\\(products=True\\)"):
        Linearization(case.model, *case.batch, needs=Needs()).gradients_of_examples()
    own = CASES["loss_own_compute_loss"]().compile()
    with pytest.raises(ValueError, match="Set its likelihood in the class"):
        Linearization(own.model, *own.batch).gradients_of_examples().dense()


# Which models mix their examples.


class Centred(keras.layers.Layer):
    """Subtracts the mean of the batch."""

    def call(self, x):
        return x - tf.reduce_mean(x, 0)


def stack(*layers):
    """A functional model with layers in the middle."""
    inputs = x = keras.Input((4,))
    for layer in (keras.layers.Dense(3), *layers, keras.layers.Dense(2)):
        x = layer(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(("make", "what"), [
    (lambda: stack(keras.layers.BatchNormalization()), "batch normalization .* in training mode"),
    (lambda: stack(Centred()), "of class `Centred`"),
    (lambda: stack(keras.layers.Lambda(lambda x: x[::-1])), "of class `Lambda`"),
    (lambda: stack(keras.layers.Softmax(axis=0)), "along the axis 0"),
    (lambda: stack(lambda x: x - keras.ops.mean(x, 0)), "the operation `Mean`"),
    (lambda: stack(lambda x: x + x[:, 0]), "the operation"),
    (lambda: kc.problems.poisson(points=3).model(), "of class `PoissonResiduals`"),
    (lambda: CASES["subclassed"]().model, "the `call` of `Subclassed`"),
])  # fmt: skip
def test_a_model_that_may_mix_its_examples_is_known(make, what):
    assert re.search(what, apart.mixing(make()))


def test_batch_normalization_with_fixed_statistics_does_not_mix():
    frozen = keras.layers.BatchNormalization(trainable=False)
    assert apart.mixing(stack(frozen)) is None
    assert apart.mixing(stack(keras.layers.BatchNormalization()), training=False) is None
    with float64():
        case = MODELS["batch_normalization_2d"]().compile()
        lin = Linearization(case.model, *case.batch, training=False)
        by, A = lin.rows(), Linearization(case.model, *case.batch, needs=BY_PRODUCTS, training=False).rows().dense()
    assert by.is_by_layers
    np.testing.assert_allclose(by.gram(), A @ tf.transpose(A), rtol=1e-10, atol=1e-13)


def test_a_row_reads_its_own_example_alone():
    """In all models that do not mix: another example has no influence on the outputs of one."""
    for kind in ("attention", "gru", "group_normalization", "shared_layer", "embedding"):
        with float64():
            case = MODELS[kind]()
            assert apart.mixing(case.model) is None
            before = keras.tree.flatten(case.model(case.x))[0].numpy()
            other = keras.tree.map_structure(np.array, case.x)
            for a in keras.tree.flatten(other):
                a[-1] = a[0]
            after = keras.tree.flatten(case.model(other))[0].numpy()
        np.testing.assert_array_equal(before[:-1], after[:-1])
        assert np.abs(before[-1] - after[-1]).max() > 0
