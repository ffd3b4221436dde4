"""SINGD against its equations in NumPy, against K-FAC's inverses at its fixed point, and where no inverse exists."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_curveball import made, stepper
from test_kfac import cross_entropy, matrix, net, single, softmax

import keras_curvature as kc
from keras_curvature import curved
from keras_curvature.solvers.inverse_free import InverseFree

float64 = pytest.mark.usefixtures("in_float64")


def changed(A, G, K, C, M_K, M_C, damping, alpha, rate, traces):
    """One change of both factors, by the equations."""
    H_K, H_C = K.T @ A @ K, C.T @ G @ C
    d_K, d_C = len(K), len(C)
    t_C, s_C = (np.trace(H_C) / d_C, np.trace(C.T @ C) / d_C) if traces else (1, 1)
    t_K, s_K = (np.trace(H_K) / d_K, np.trace(K.T @ K) / d_K) if traces else (1, 1)
    M_K = alpha * M_K + 0.5 * (t_C * H_K + damping * s_C * K.T @ K - np.eye(d_K))
    M_C = alpha * M_C + 0.5 * (t_K * H_C + damping * s_K * C.T @ C - np.eye(d_C))
    K = K - rate * K @ M_K / max(1, np.linalg.norm(M_K))
    C = C - rate * C @ M_C / max(1, np.linalg.norm(M_C))
    return K, C, M_K, M_C


@float64
@pytest.mark.parametrize("traces", [True, False])
def test_steps_are_those_of_the_equations(traces):
    settings = {"damping": 0.1, "alpha": 0.5, "rate": 0.2, "traces": traces}
    optimizer = kc.SINGD(0.3, momentum=0.5, every=2, fisher="exact", kl_clip=None, **settings)
    model, x, y, a = single(optimizer, "softmax")
    step, v, state = stepper(model, optimizer), 0.0, None
    for t in range(6):
        W = matrix(model)
        p, A = softmax(a @ W), a.T @ a / 7
        G = np.mean([np.diag(q) - np.outer(q, q) for q in p], axis=0)
        if state is None:
            of_A, of_G = np.trace(A) / 5, np.trace(G) / 3
            k, c = [(of_A * of_G + 0.1) ** -0.25] * 2 if traces else [(x + 0.1) ** -0.5 for x in (of_A, of_G)]
            state = k * np.eye(5), c * np.eye(3), np.zeros((5, 5)), np.zeros((3, 3))
        if t % 2 == 0:
            state = changed(A, G, *state, **settings)
        K, C, *_ = state
        v = 0.5 * v - K @ K.T @ (a.T @ (p - y) / 7) @ C @ C.T
        step(x, y)
        np.testing.assert_allclose(matrix(model), W + 0.3 * v, rtol=1e-9)


def random_factors(dimensions=(5, 3), seed=0):
    random = np.random.default_rng(seed)
    roots = [random.standard_normal((d, d)) for d in dimensions]
    return [tf.constant(X @ X.T / len(X)) for X in roots]


def settled(rule, A, G, diagonal=False, steps=3000):
    """`K` and `C` after many changes."""
    shape = [X.shape[:1] if diagonal else X.shape for X in (A, G)] * 2

    @tf.function
    def run():
        state = rule.moved(A, G, *[tf.zeros(s, A.dtype) for s in shape], tf.constant(True))
        loop = lambda i, *state: (i + 1, *rule.moved(A, G, *state, tf.constant(False)))  # noqa: E731
        return tf.while_loop(lambda i, *_: i < steps, loop, (0, *state))[1:3]

    return [X.numpy() for X in run()]


def test_without_traces_its_fixed_points_are_kfacs_inverses():
    A, G = random_factors()
    for X, K in zip((A, G), settled(InverseFree(0.1, 0.5, 0.2, False), A, G)):
        np.testing.assert_allclose(K @ K.T, np.linalg.inv(X + 0.1 * np.eye(len(X))), rtol=1e-7, atol=1e-10)


def test_with_traces_its_fixed_point_inverts_each_factor_beside_the_size_of_the_other():
    A, G = random_factors()
    K, C = settled(InverseFree(0.1, 0.5, 0.2, True), A, G)
    for X, own, Y, other in ((A, K, G, C), (G, C, A, K)):
        size, damping = np.trace(other.T @ Y @ other) / len(other), 0.1 * np.trace(other.T @ other) / len(other)
        np.testing.assert_allclose(own @ own.T, np.linalg.inv(size * X + damping * np.eye(len(X))), rtol=1e-6)


def test_diagonal_factors_follow_the_diagonal():
    A, G = random_factors()
    for X, k in zip((A, G), settled(InverseFree(0.1, 0.5, 0.2, False), A, G, diagonal=True)):
        np.testing.assert_allclose(k**2, 1 / (np.diag(X) + 0.1), rtol=1e-9)


@pytest.mark.parametrize("lead", [0, 1])
def test_a_stack_is_its_matrices(lead):
    rule, pairs = InverseFree(0.1, 0.5, 0.2, True), [random_factors((4, 2), seed) for seed in (1, 2)]
    zeros = [tf.zeros(X.shape, tf.float64) for X in pairs[0]] * 2
    alone = [rule.moved(*pair, *zeros, tf.constant(True)) for pair in pairs]
    stacks = [tf.stack(each) for each in zip(*[(*pair, *zeros) for pair in pairs])]
    together = rule.moved(*stacks, tf.constant([True, True]))
    for one, *parts in zip(together, *alone):
        np.testing.assert_allclose(one[lead], parts[lead], rtol=1e-13)


def of_all_kinds():
    """A network with an embedding, normalization, two kinds of convolutions, and a weight without factors."""
    keras.utils.set_random_seed(1)
    return keras.Sequential([
        keras.Input((6,), dtype="int32"), keras.layers.Embedding(5, 3), keras.layers.DepthwiseConv1D(2),
        keras.layers.LayerNormalization(), keras.layers.Conv1D(4, 2), keras.layers.PReLU(),
        keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2),
    ])  # fmt: skip


@float64
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_all_kinds_of_layers_train(structure):
    random, model = np.random.default_rng(0), of_all_kinds()
    optimizer = kc.SINGD(0.05, damping=0.1, every=2, structure=structure)
    with pytest.warns(UserWarning, match="alpha.*diagonal of the Fisher matrix"):
        made(model, optimizer, "mse")
    x, y = random.integers(5, size=(8, 6)), random.standard_normal((8, 2))
    step = stepper(model, optimizer)
    seen = [step(x, y) for _ in range(40)]
    assert all(s["skipped_steps"] == s["failed_refreshes"] == 0 for s in seen)
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]


def test_singular_factors_and_bfloat16_weights_do_no_harm():
    """Equal inputs make a factor of rank one, beside a damping that float32 cannot see in it."""
    keras.utils.set_random_seed(0)
    model = curved(keras.Sequential([
        keras.Input((20,)), keras.layers.Dense(16, activation="tanh", dtype="bfloat16"), keras.layers.Dense(3),
    ]))  # fmt: skip
    model.compile(kc.SINGD(1e-2, damping=1e-9, every=1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.full((32, 20), 100.0, "float32"), np.arange(32) % 3
    log = model.fit(x, y, batch_size=8, epochs=25, verbose=0).history
    assert sum(log["skipped_steps"]) == sum(log["failed_refreshes"]) == 0
    assert np.isfinite(log["loss"]).all() and log["loss"][-1] < 1.2


@float64
def test_a_block_that_fails_keeps_all_of_its_factors():
    optimizer = kc.SINGD(0.1, every=1)
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape) for shape in ((4, 5), (5,), (5, 3), (3,))]
    model = made(net(arrays), optimizer, cross_entropy())
    step, (x, y) = stepper(model, optimizer), (random.standard_normal((7, 4)), np.eye(3)[random.integers(3, size=7)])
    step(x, y)
    optimizer._factors[2].assign(np.full((5, 5), np.nan))  # the M_K of the first block
    before = [v.numpy() for v in optimizer._factors]
    assert step(x, y)["failed_refreshes"] > 0
    same = [np.array_equal(a, b, equal_nan=True) for a, b in zip(optimizer._factors, before)]
    assert same == [True] * 4 + [False] * 4
    np.testing.assert_array_equal(optimizer._counts, [1, 2])


@pytest.mark.parametrize(
    "arguments",
    [{"damping": 0.0}, {"momentum": 1.0}, {"alpha": 1.0}, {"rate": 1.0}, {"every": 0}, {"traces": 1},
     {"structure": "block"}, {"fisher": "true"}, {"sharing": "none"}],
)  # fmt: skip
def test_bad_arguments_fail_at_construction(arguments):
    with pytest.raises(ValueError, match=f"`SINGD`: `{next(iter(arguments))}`"):
        kc.SINGD(**arguments)
