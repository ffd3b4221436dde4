"""The rows of the Jacobian, against central differences and against products that other tests hold to an oracle."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, WITHOUT_ROWS, by_central_differences, flat, float64, put
from selection import some

import keras_curvature as kc
from keras_curvature import Linearization, Needs, trees
from keras_curvature.linearization.jacobian import columns

CASES = {**MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
OF_SQUARES = {"dense", "loss_mse", "loss_mse_sum", "batch_normalization", "lstm", "masked_outputs", "conv2d"}
USUAL = ["batch_normalization", "lstm", "shared_layer", "several_outputs", "loss_mse_sum", "loss_sample_weights",
         "loss_binary_from_sigmoid", "loss_categorical_from_softmax", "loss_regularized", "loss_huber"]  # fmt: skip


def wave(shape, dtype):
    """Numbers that are not special, of this shape."""
    return tf.cos(1.3 * tf.reshape(tf.range(tf.reduce_prod(shape), dtype=dtype), shape))


def questions(lin):
    """What the rows give with and without the array, beside the products of the linearization."""
    kept, by_products = lin.rows(), lin.rows()
    A, v = kept.dense(), [wave(w.shape, w.dtype) for w in lin.weights]
    u = wave(tf.shape(A)[:1], A.dtype)
    G = trees.subtract(lin.gauss_newton() @ v, [c * a for c, a in zip(lin.l2, v)])
    return {
        "A": A, "r": kept.residual, "v": trees.flatten(v), "u": u, "Gv": trees.flatten(G),
        "g": trees.flatten(lin.gradient), "Av": by_products @ v, "A'u": trees.flatten(by_products.transposed(u)),
        "Av of the array": kept @ v, "A'u of the array": trees.flatten(kept.transposed(u)),
        "norms": trees.flatten(kept.column_norms()), "gram": kept.gram(trees.flatten(v)),
        "is_exact": tf.constant(kept.is_exact),
    }  # fmt: skip


def answers(case, **how):
    """Those of a compiled case, computed in a graph, as arrays."""
    ask = tf.function(lambda: questions(Linearization(case.model, *case.batch, **how)), autograph=False)
    return {name: value.numpy() for name, value in ask().items()}


@pytest.mark.parametrize("kind", some([kind for kind in CASES if kind not in WITHOUT_ROWS], USUAL[::2]))
def test_the_array_multiplies_as_the_products_do(kind):
    with float64():
        found = answers(CASES[kind]().compile())
    A, r, v, u = (found[name] for name in ("A", "r", "v", "u"))
    close = {"rtol": 1e-9, "atol": 1e-11}
    for name in ("Av", "Av of the array"):
        np.testing.assert_allclose(found[name], A @ v, **close)
    for name in ("A'u", "A'u of the array"):
        np.testing.assert_allclose(found[name], A.T @ u, **close)
    np.testing.assert_allclose(A.T @ (A @ v), found["Gv"], **close)
    np.testing.assert_allclose(found["norms"], np.sqrt((A * A).sum(0)), **close)
    np.testing.assert_allclose(found["gram"], (A * v) @ A.T, **close)
    assert r.shape == A.shape[:1]
    if found["is_exact"]:
        np.testing.assert_allclose(A.T @ r, found["g"], **close)
    assert found["is_exact"] or kind not in OF_SQUARES


@pytest.mark.parametrize(("reduction", "weighted"), [
    ("sum_over_batch_size", False), ("sum_over_batch_size", True), ("sum", True)
])  # fmt: skip
def test_rows_and_residuals_of_a_mean_square_by_hand(reduction, weighted):
    with float64():
        case = MODELS["dense"]()
        case.loss = keras.losses.MeanSquaredError(reduction=reduction)
        case.sample_weight = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0]) if weighted else None
        found = answers(case.compile())
        J = by_central_differences(lambda: case.model(case.x), case.model.trainable_variables)
        error = np.ravel(case.model(case.x) - case.y)
    outputs, examples = 3, 6
    share = 2.0 / outputs / (examples if reduction != "sum" else 1)
    root = np.sqrt(share * np.repeat(case.sample_weight if weighted else np.ones(examples), outputs))
    np.testing.assert_allclose(found["A"], root[:, None] * J, atol=1e-8)
    np.testing.assert_allclose(found["r"], root * error, rtol=1e-12)
    assert found["is_exact"]


@pytest.mark.parametrize("order", [2, 3, 4])
def test_derivatives_along_a_path_are_those_of_nested_tapes(order):
    with float64():
        case = MODELS["dense"]().compile()
        lin, variables = Linearization(case.model, *case.batch), case.model.trainable_variables
        path = [[c * wave(w.shape, w.dtype) ** k for w in lin.weights] for k, c in ((1, 0.3), (2, -0.5), (3, 0.2))]
        path = path[: order - 1]
        bent = lin.rows().bent(*path, h=0.01).numpy()
        t = tf.constant(0.0, tf.float64)
        start, rest = [tf.identity(v.value) for v in variables], [v.value for v in case.model.non_trainable_variables]

        u = wave([18], tf.float64)

        def output(t):
            shares = [t, t * t / 2, t * t * t / 6]  # a power has no derivative at 0
            at = [w + sum(s * v[i] for s, v in zip(shares, path)) for i, w in enumerate(start)]
            return tf.tensordot(u, tf.reshape(case.model.stateless_call(at, rest, case.x)[0], [-1]), 1)

        def derivative(function):
            def of(t):
                with tf.GradientTape() as tape:
                    tape.watch(t)
                    z = function(t)
                return tape.gradient(z, t)

            return of

        for _ in range(order):
            output = derivative(output)
        expected = np.sqrt(2.0 / 18) * output(t).numpy()
    np.testing.assert_allclose(np.dot(u, bent), expected, rtol=2e-3)
    assert abs(expected) > 1e-2


def test_a_path_has_one_to_three_vectors():
    with float64():
        case = MODELS["dense"]().compile()
        rows = Linearization(case.model, *case.batch).rows()
        with pytest.raises(ValueError, match="one to three vectors. Received: 4 vectors"):
            rows.bent(*[rows._lin.weights] * 4)


def test_the_second_difference_along_a_vector_by_hand():
    with float64():
        case = MODELS["dense"]().compile()
        lin, variables = Linearization(case.model, *case.batch), case.model.trainable_variables
        v = [0.5 * wave(w.shape, w.dtype) for w in lin.weights]
        bent, pulled = lin.rows().bent(v, h=1e-3), lin.rows().pulled_bent(v, h=1e-3)
        A = lin.rows().dense().numpy()

        def directional():
            J = by_central_differences(lambda: case.model(case.x), variables)
            return J @ flat(v)

        w, h = flat(variables), 1e-4
        sides = []
        for sign in (1, -1):
            put(variables, w + sign * h * flat(v))
            sides.append(directional())
        expected = np.sqrt(2.0 / 18) * (sides[0] - sides[1]) / (2 * h)
    np.testing.assert_allclose(bent, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flat(pulled), A.T @ bent.numpy(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", some(["dense", "several_outputs", "loss_sample_weights", "lstm"], ["several_outputs"]))
def test_micro_batches_have_the_same_rows(kind):
    with float64():
        whole, sliced = (answers(CASES[kind]().compile(), micro_batches=count) for count in (1, 2))
    for name in ("A", "r", "Av", "A'u"):
        np.testing.assert_allclose(sliced[name], whole[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at_a_time", some([1, 4], [4]))
@pytest.mark.parametrize("few", [0, 1024])
def test_some_products_at_a_time_and_batches_of_unknown_size_have_the_same_rows(at_a_time, few, monkeypatch):
    monkeypatch.setattr(columns, "at_a_time", lambda recorded: at_a_time)
    monkeypatch.setattr(columns, "FEW", few)
    with float64():
        case = MODELS["several_outputs"]().compile()
        known = answers(case)
        kind = {"value": tf.TensorSpec([None, 2], tf.float64), "kind": tf.TensorSpec([None], tf.int32)}

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float64), kind], autograph=False)
        def unknown(x, y):
            rows = Linearization(case.model, x, y).rows()
            assert rows.count is None
            return rows.dense(), rows.residual

        A, r = unknown(case.x, case.y)
    np.testing.assert_allclose(A, known["A"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(r, known["r"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_eagerly_in_a_graph_and_by_xla_they_are_the_same(jit_compile):
    case = MODELS["conv2d"]().compile()
    ask = lambda: Linearization(case.model, *case.batch).rows().dense()  # noqa: E731
    found = tf.function(ask, autograph=False, jit_compile=jit_compile)()
    np.testing.assert_allclose(found, ask(), rtol=1e-4, atol=1e-6)
    assert found.dtype == tf.float32


@pytest.mark.parametrize("kind", ["loss_cosine_similarity", "loss_focal", "loss_own_compute_loss"])
def test_losses_without_rows_are_refused_in_words(kind):
    case = CASES[kind]().compile()
    with pytest.raises(ValueError, match="convex in the model's outputs|Set its likelihood in the class"):
        Linearization(case.model, *case.batch).rows().dense()


def test_a_loss_of_one_number_for_all_examples_is_refused_in_words():
    case = MODELS["dense"]()
    case.loss = lambda y, z: tf.sqrt(tf.reduce_mean(tf.square(y - z)))
    case.compile()
    with pytest.raises(ValueError, match="returns one number for all of them"):
        Linearization(case.model, *case.batch).rows().dense()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("matrix", ["rows", "gradients_of_examples"])
def test_a_loss_that_couples_examples_is_refused_in_words(width, matrix):
    """It returns a number for each example; that of one example reads the mean over all."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(width)])
    model.compile(loss=lambda y, z: tf.reduce_mean(tf.square(z - tf.reduce_mean(z, 0) - y), -1))
    x, y = np.arange(10.0).reshape(5, 2), np.ones((5, width))
    ask = lambda: getattr(Linearization(model, x, y), matrix)().dense()  # noqa: E731
    for run in (ask, tf.function(ask, autograph=False)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="outputs of one example change the slopes of others"):
            run()
    assert np.isnan(tf.function(ask, autograph=False, jit_compile=True)()).any()  # XLA knows no such errors


def test_a_loss_of_the_users_has_blocks_of_its_examples():
    with float64():
        case = MODELS["dense"]()
        case.loss = lambda y, z: tf.reduce_logsumexp(tf.square(z - y), -1)
        found = answers(case.compile())
    np.testing.assert_allclose(found["A"].T @ (found["A"] @ found["v"]), found["Gv"], rtol=1e-9, atol=1e-11)
    assert not found["is_exact"]


def test_too_little_memory_is_told_in_bytes():
    case = MODELS["dense"]().compile()
    n = case.model.count_params()
    with pytest.raises(ValueError, match=f"18 rows of {n} weights, need {18 * n * 4:,} bytes.*5 rows would fit"):
        Linearization(case.model, *case.batch).rows(memory=5 * n * 4 + 1).dense()
    with pytest.raises(ValueError, match="memory=0"):
        Linearization(case.model, *case.batch).rows(memory=0)


def test_the_needs_must_have_products():
    case = MODELS["dense"]().compile()
    with pytest.raises(ValueError, match="Needs\\(products=True\\)"):
        Linearization(case.model, *case.batch, needs=Needs()).rows()


def test_rows_of_a_batch_that_overflows_are_nan_and_raise_nothing():
    case = MODELS["dense"]().compile()
    case.x[0, 0] = np.nan
    for loss in ("mse", kc.problems.losses.SumSquares(), keras.losses.CategoricalCrossentropy(from_logits=True)):
        case.loss = loss
        case.compile()
        assert np.isnan(Linearization(case.model, *case.batch).rows().dense()).any()
