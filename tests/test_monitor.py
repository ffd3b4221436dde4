"""`curvature`: what an operator is asked, against dense matrices made by other means, in float64.

The dense matrices are those of `test_objective.py`, which holds them against closed forms and plain tapes.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat, float64
from keras import layers
from test_objective import (
    SPARSE,
    N,
    evaluated,
    examples,
    hessian,
    jacobian_of_outputs,
    model_of,
    softmax,
)

from keras_curvature import trees
from keras_curvature.monitor.objective.kinds import KINDS
from keras_curvature.monitor.operator import Curvature, curvature
from keras_curvature.monitor.spectra import traces
from keras_curvature.operators import Diagonal, Function, Masked, dense

SPLITS = np.cumsum([12, 4, 12, 3, 9])  # where one of the weights of the network ends, and the next one begins


@pytest.fixture(autouse=True)
def _in_float64():
    keras.utils.set_random_seed(0)  # for layers made in the test
    with float64():
        yield


@pytest.fixture(scope="module")
def network():
    """`(model, data)` of a small classifier."""
    with float64():
        keras.utils.set_random_seed(0)
        stack = [layers.Dense(4, "tanh", name="first"), layers.Dense(3, "tanh", name="dense")]
        stack.append(layers.Dense(3, name="last"))
        return model_of(*stack, loss=SPARSE(from_logits=True)), examples(classes=3)


@pytest.fixture(scope="module")
def hessian_of_network(network):
    """`(Curvature, its matrix)`, of the Hessian."""
    with float64():
        model, data = network
        return curvature(model, data), hessian(evaluated(model, *data), [v.value for v in model.trainable_variables])


@pytest.fixture(scope="module")
def ggn_of_network(network):
    """`(Curvature, its matrix)`, of the Gauss-Newton matrix."""
    with float64():
        model, (x, y) = network
        J, z = jacobian_of_outputs(model, x)
        blocks = [j.T @ (np.diag(q) - np.outer(q, q)) @ j for j, q in zip(J, softmax(z))]
        return curvature(model, (x, y), "ggn"), np.mean(blocks, 0)


def random_vector(like, seed=0):
    """A standard normal vector."""
    generator = np.random.default_rng(seed)
    return [tf.constant(generator.standard_normal(a.shape)) for a in like]


def test_it_is_an_operator_on_lists_of_weights(hessian_of_network):
    c, H = hessian_of_network
    v = random_vector(c.variables)
    np.testing.assert_allclose(flat(c @ v), H @ flat(v), atol=1e-12)
    np.testing.assert_allclose(flat((c + 2.0 * c) @ v), 3 * H @ flat(v), atol=1e-12)
    assert [c.psd, c.layers] == [False, {"first": [0, 1], "dense": [2, 3], "last": [4, 5]}]
    assert [a.shape for a in c.gradient] == [tuple(a.shape) for a in c.variables]
    # the derivative of the loss along the gradient
    ahead, behind = [float(c.objective.loss_at(trees.scale(h, c.gradient))) for h in (1e-4, -1e-4)]
    assert (ahead - behind) / 2e-4 == pytest.approx(float(trees.squared_norm(c.gradient)), rel=1e-6)
    assert (ahead + behind - 2 * float(c.loss)) / 1e-8 == pytest.approx(
        float(c.quadratic_form(c.gradient, c.gradient)), rel=1e-4
    )


def test_eigenpairs(hessian_of_network):
    c, H = hessian_of_network
    values = np.linalg.eigvalsh(H)
    top, bottom = c.top(3, tolerance=1e-8), c.top(2, tolerance=1e-8, most_negative=True)
    np.testing.assert_allclose(top.values, values[::-1][:3], rtol=1e-10)
    np.testing.assert_allclose(bottom.values, values[:2], rtol=1e-10)
    for pairs in (top, bottom):
        for value, vector, residual in zip(pairs.values, pairs.vectors, pairs.residuals):
            assert np.linalg.norm(H @ flat(vector) - value * flat(vector)) == pytest.approx(residual, abs=1e-7)
    sharpest = c.sharpness()
    assert sharpest.products <= 10
    assert sharpest.values[0] == pytest.approx(values[-1], rel=1e-3)
    assert c.sharpness(start=sharpest.vectors[0], steps=5).values[0] == pytest.approx(values[-1], rel=1e-4)
    largest, smallest = c.extremes(steps=30)
    assert [largest.values[0], smallest.values[0]] == pytest.approx([values[-1], values[0]], rel=1e-8)


def test_traces(hessian_of_network, ggn_of_network):
    starts = np.cumsum([0, 16, 15, 12])
    for c, matrix in (hessian_of_network, ggn_of_network):
        # of as many vectors as there are weights, XTrace is exact
        assert c.trace(2 * 43).value == pytest.approx(np.trace(matrix), rel=1e-10)
        by_layer = traces.hutchinson(c, c.variables, 100, parts=c.layers)[1]
        assert list(by_layer) == ["first", "dense", "last"]
        for estimate, begin, end in zip(by_layer.values(), starts, starts[1:]):
            assert abs(estimate.value - np.trace(matrix[begin:end, begin:end])) < 4 * estimate.stderr
            assert 0 < estimate.stderr < 0.2 * np.trace(matrix)
        for found, (begin, end) in zip(c.trace(43, by_layer=True).values(), itertools.pairwise(starts)):
            # a product for each of the 43 weights: nothing is estimated
            assert found.value == pytest.approx(np.trace(matrix[begin:end, begin:end]), rel=1e-10)
            assert found.stderr == 0 and found.products == 43
        # without what is known already, less is left to estimate
        deflated, plain = c.trace(11, pairs=c.top(12, tolerance=1e-6)), c.trace(11)
        assert abs(deflated.value - np.trace(matrix)) < 5 * deflated.stderr
        assert deflated.stderr < plain.stderr / 2


def test_traces_by_labels_are_much_the_closest_of_layers(ggn_of_network):
    c, G = ggn_of_network
    found, whole = c.trace(100, by_layer=True, labels=True), c.trace(100, labels=True)
    products = c.trace(42, by_layer=True)
    for (name, estimate), begin, end in zip(found.items(), (0, 16, 31), (16, 31, 43)):
        assert abs(estimate.value - np.trace(G[begin:end, begin:end])) < 4 * estimate.stderr
        assert estimate.stderr < products[name].stderr / 2
    assert abs(whole.value - np.trace(G)) < 4 * whole.stderr
    assert sum(e.value for e in found.values()) == pytest.approx(whole.value, rel=1e-12)
    assert c.block("dense").trace(100, labels=True) == found["dense"]


def test_what_is_passed_on(hessian_of_network):
    """The metric, known eigenpairs, and the most products."""
    c, H = hessian_of_network
    m = np.random.default_rng(3).uniform(0.5, 2.0, 43)
    M = Diagonal([tf.reshape(tf.constant(a), v.shape) for a, v in zip(np.split(m, SPLITS), c.variables)])
    values = np.linalg.eigvalsh(np.sqrt(m)[:, None] * H * np.sqrt(m))
    assert c.top(1, tolerance=1e-8, metric=M).values[0] == pytest.approx(values[-1], rel=1e-9)
    largest, smallest = c.extremes(steps=30, metric=M)
    assert [largest.values[0], smallest.values[0]] == pytest.approx([values[-1], values[0]], rel=1e-8)
    short = c.top(2, tolerance=1e-8, max_products=4)
    assert short.products == 4 and not short.converged.all()
    pairs, values = c.top(3, tolerance=1e-8), np.linalg.eigvalsh(H)[::-1]
    nodes = c.density(vectors=2, steps=40, pairs=pairs).nodes
    assert np.abs(nodes - values[0]).min() < 1e-10 and nodes.min() == pytest.approx(values[-1], rel=1e-6)


def test_diagonal_and_density(hessian_of_network):
    c, H = hessian_of_network
    (entries, stderr), values = c.diagonal(42, stderr=True), np.linalg.eigvalsh(H)
    assert (np.abs(flat(entries) - np.diag(H)) < 5 * flat(stderr)).all()
    np.testing.assert_array_equal(flat(c.diagonal(42)), flat(entries))
    found = c.density(vectors=2, steps=42)
    assert found.nodes.min() == pytest.approx(values[0], rel=1e-6)
    assert found.nodes.max() == pytest.approx(values[-1], rel=1e-6)
    # with a product for each weight, nothing is estimated
    (entries, stderr), found = c.diagonal(43, stderr=True), c.density(vectors=2, steps=43)
    np.testing.assert_allclose(flat(entries), np.diag(H), atol=1e-12)
    assert not flat(stderr).any()
    np.testing.assert_allclose(found.nodes, values[np.newaxis], atol=1e-12)
    share = np.maximum(-values, 0).sum() / np.abs(values).sum()
    assert found.products == 43 and str(found.negative) == f"{share:.4g} ± 0"


# Blocks.


def test_blocks_are_those_of_the_matrix(hessian_of_network):
    c, H = hessian_of_network
    block = c.block("dense")
    own = slice(16, 31)
    np.testing.assert_allclose(dense(block, block.variables).numpy(), H[own, own], atol=1e-12)
    values = np.linalg.eigvalsh(H[own, own])
    pair = block.top(1, tolerance=1e-8)
    assert [tuple(a.shape) for a in pair.vectors[0]] == [(4, 3), (3,)]
    assert pair.values[0] == pytest.approx(values[-1], rel=1e-10)
    assert pair.values[0] <= np.linalg.eigvalsh(H)[-1]
    np.testing.assert_allclose(flat(block.gradient), flat(c.gradient)[own])
    whole = block.extend(pair.vectors[0])
    assert float(trees.dot(whole, c @ whole)) == pytest.approx(pair.values[0], rel=1e-10)
    assert block.layers == {"dense": [0, 1]}
    ends = c.block("first|last")
    assert ends.layers == {"first": [0, 1], "last": [2, 3]}
    rows = np.r_[0:16, 31:43]
    np.testing.assert_allclose(flat(ends @ random_vector(ends.variables)),
                               H[np.ix_(rows, rows)] @ flat(random_vector(ends.variables)), atol=1e-12)  # fmt: skip
    assert ends.block("last").layers == {"last": [0, 1]}


def test_layers_can_be_chosen_by_names_and_expressions(network):
    model, data = network
    assert list(curvature(model, data, layers="dense").layers) == ["dense"]
    c = curvature(model, data, layers=["last", "fi.*"])
    assert [tuple(v.shape) for v in c.variables] == [(3, 4), (4,), (3, 3), (3,)]


def test_a_masked_operator():
    A = np.arange(25.0).reshape(5, 5) + np.arange(25.0).reshape(5, 5).T
    like = [tf.zeros(2), tf.zeros((1, 2)), tf.zeros(1)]
    like = [tf.cast(a, tf.float64) for a in like]

    def product(v):
        parts = np.split(A @ flat(v), [2, 4])
        return [tf.reshape(tf.constant(part), a.shape) for part, a in zip(parts, like)]

    masked = Masked(Function(product, psd=True), [0, 2], like)
    rows = [0, 1, 4]
    np.testing.assert_allclose(dense(masked, masked.restrict(like)).numpy(), A[np.ix_(rows, rows)])
    assert masked.psd


# Solving.


def test_solutions_are_those_of_the_dense_system(ggn_of_network):
    c, G = ggn_of_network
    b, damping = random_vector(c.variables), 2e-2 * np.trace(G) / len(G)
    solution = c.solve(b, damping, tolerance=1e-8)
    expected = np.linalg.solve(G + damping * np.eye(len(G)), flat(b))
    np.testing.assert_allclose(flat(solution.value), expected, atol=5e-8, rtol=5e-5)
    assert float(solution.residual) <= 1e-8
    with pytest.warns(UserWarning, match="`Curvature.solve`: the residual is .* after 3 products, more than tolerance"):
        short = c.solve(b, damping, max_products=3)
    assert int(short.steps) == 3 and float(short.residual) > 1e-6


def test_an_indefinite_hessian_is_refused_with_the_number(hessian_of_network):
    c, H = hessian_of_network
    lowest, b = np.linalg.eigvalsh(H)[0], random_vector(c.variables)
    with pytest.raises(ValueError, match=f"most negative eigenvalue is {lowest:.2g}.*damping > .*kind='ggn'"):
        c.solve(b, -lowest / 2)
    solution = c.solve(b, -1.2 * lowest)
    np.testing.assert_allclose(flat(solution.value), np.linalg.solve(H - 1.2 * lowest * np.eye(43), flat(b)), rtol=1e-4)


def test_a_hessian_that_is_positive_needs_no_damping():
    model, (x, y) = model_of(layers.Dense(2)), examples(2)
    c, a = curvature(model, (x, y)), np.hstack([x, np.ones((N, 1))])
    newton = c.solve([-g for g in c.gradient], 0.0, tolerance=1e-10)
    best = np.linalg.lstsq(a, y, rcond=None)[0]
    left = [v.numpy() + step.numpy() for v, step in zip(model.trainable_variables, newton.value)]
    np.testing.assert_allclose(np.vstack(left), best, atol=1e-8)


# Peers' cases: curvlinops' registry (models, losses, two ragged batches), each against a dense matrix.


def _perceptron(outputs, loss, extra=(), inputs=10):
    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([
            keras.Input((*extra, inputs)), layers.Dense(5, "relu"), layers.Dense(outputs),
        ])  # fmt: skip
        model.compile("sgd", loss())  # made here, in float64
        return model

    return build


def _convolutional(inputs=8):
    def build():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([
            keras.Input((inputs, inputs, 1)), layers.Conv2D(2, 3, 2, "same", activation="relu"),
            layers.AveragePooling2D(2), layers.Flatten(), layers.Dense(3),
        ])  # fmt: skip
        model.compile("sgd", SPARSE(from_logits=True))
        return model

    return build


def _targets(kind, generator, n, extra):
    if kind == "labels":
        return generator.integers(0, 3, (n, *extra))
    if kind == "soft":
        return generator.uniform(size=(n, *extra, 3))
    return generator.standard_normal((n, *extra, 3))


CE = functools.partial(SPARSE, from_logits=True)
BCE = functools.partial(keras.losses.BinaryCrossentropy, from_logits=True)
MSE = keras.losses.MeanSquaredError
PEERS = {
    "cross entropy": (_perceptron(3, CE), "labels", (10,), 3),
    "cross entropy, an extra dimension": (_perceptron(3, CE, (4,)), "labels", (4, 10), 3),
    "mse": (_perceptron(3, MSE), "numbers", (10,), 3),
    "mse, an extra dimension": (_perceptron(3, MSE, (4,)), "numbers", (4, 10), 3),
    "soft labels": (_perceptron(3, BCE), "soft", (10,), 3),
    "sum": (_perceptron(3, functools.partial(MSE, reduction="sum")), "numbers", (10,), 8),
    "soft labels, sum": (_perceptron(3, functools.partial(BCE, reduction="sum")), "soft", (10,), 8),
    "cnn": (_convolutional(), "labels", (8, 8, 1), 2),
    "cnn 20 x 20": (_convolutional(20), "labels", (20, 20, 1), 2),
}
BY_DEFAULT = [("cross entropy, an extra dimension", "ggn"), ("soft labels", "hessian"), ("cnn", "hessian")]


def _peer(name):
    build, kind, shape, _ = PEERS[name]
    generator = np.random.default_rng(1)
    n = 8 if name != "cross entropy" else 7
    extra = shape[:-1] if len(shape) == 2 else ()
    return build(), generator.uniform(size=(n, *shape)), _targets(kind, generator, n, extra)


def _as_dense(model, x, y, kind):
    """By tapes: the Hessian; or of the outputs `J' H_L J`, with `H_L` the Hessian of the loss of given outputs."""
    weights = [v.value for v in model.trainable_variables]
    if kind == "hessian":
        return hessian(evaluated(model, x, y), weights)
    J, z = jacobian_of_outputs(model, x)
    J = J.reshape(z.size, -1)
    H_L = hessian(lambda z: model.loss(y, z[0]), [tf.constant(z)])
    return J.T @ H_L @ J


def _check_peer(name, kind):
    model, x, y = _peer(name)
    first = PEERS[name][3]
    theirs = _as_dense(model, x, y, kind)
    batches = [slice(0, len(x))] if "sum" in name else [slice(0, first), slice(first, None)]
    data = tf.data.Dataset.from_generator(
        lambda: ((x[batch], y[batch]) for batch in batches),
        output_signature=(tf.TensorSpec((None, *x.shape[1:]), x.dtype), tf.TensorSpec((None, *y.shape[1:]), y.dtype)),
    )
    c = curvature(model, data, kind)
    assert c.objective.counts == [len(x[batch]) for batch in batches]
    v = random_vector(c.variables)
    np.testing.assert_allclose(flat(c @ v), theirs @ flat(v), rtol=1e-5, atol=1e-8)
    if kind == "ggn":
        b, damping = random_vector(c.variables, 1), 2e-2 * np.trace(theirs) / len(theirs)
        expected = np.linalg.solve(theirs + damping * np.eye(len(theirs)), flat(b))
        np.testing.assert_allclose(flat(c.solve(b, damping, 1e-8).value), expected, atol=5e-8, rtol=5e-5)


@pytest.mark.parametrize(("name", "kind"), BY_DEFAULT)
def test_peers_cases(name, kind):
    _check_peer(name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", PEERS)
def test_all_of_the_peers_cases(name, kind):
    _check_peer(name, kind)


# Arguments and messages.

ERRORS = {
    "no such layer": ({"layers": ["dense_9"]}, r"'dense_9' matches no layer.*'first', 'dense', 'last'"),
    "no layer": ({"layers": []}, r"`curvature`: `layers` must be one or more names"),
    "not names": ({"layers": [3]}, r"`layers` must be one or more names.*Received: layers=\[3\]"),
    "kind": ({"kind": "gnn"}, r"`curvature`: `kind` must be one of 'hessian', 'ggn'.*Received: kind='gnn'"),
    "progress": ({"progress": 1}, r"`progress` must be True or False"),
    "expression": ({"layers": "("}, r"`layers`.*'\('"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, network):
    options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        curvature(*network, **options)


def test_errors_of_methods(ggn_of_network):
    c, _ = ggn_of_network
    b = random_vector(c.variables)
    wrong = {
        "`layer`: 'nowhere' matches no layer": lambda: c.block("nowhere"),
        "`layer` must be the name of a layer": lambda: c.block(1),
        "`vector` must be a list of 6 tensors": lambda: c @ b[1:],
        "`damping` must be a number in": lambda: c.solve(b, -1.0),
        "`tolerance` must be a number in": lambda: c.solve(b, 1.0, tolerance=0.0),
        "`products` must be an integer >= 2": lambda: c.trace(1),
        "`by_layer` must be True or False": lambda: c.trace(10, by_layer="first"),
        "`labels` must be True or False": lambda: c.trace(10, labels="all"),
        "`trace`: `pairs` must be `Eigenpairs` of `top`": lambda: c.trace(10, pairs=3),
        "`density`: `pairs` must be `Eigenpairs` of `top`": lambda: c.density(pairs="top"),
        "`density`: `vectors` must be an integer >= 1": lambda: c.density(-1, steps=1000),
        "`density`: `steps` must be an integer >= 1": lambda: c.density(steps=float("inf")),
        "`stderr` must be True or False": lambda: c.diagonal(stderr=1),
        "`pairs` must be left out where": lambda: c.trace(10, pairs=c.top(1), labels=True),
        "`Curvature.noise` is defined for the gradient of all layers": lambda: c.block("first").noise(),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_are_drawn_for_a_gauss_newton_matrix(hessian_of_network):
    with pytest.raises(ValueError, match="`labels` must be False for kind='hessian'"):
        hessian_of_network[0].trace(10, labels=True)


@pytest.mark.parametrize("loss", ["mae", "poisson", "mse"])
def test_labels_are_drawn_where_the_gauss_newton_matrix_is_the_fisher_matrix(loss):
    """Of `y = xW` with a softplus: the second derivative of the loss is 0, or has the true label in it, or is 2."""
    hidden = layers.Dense(2, "softplus", kernel_regularizer=keras.regularizers.L2(0.1))
    model, (x, y) = model_of(hidden, loss=loss), examples(2)
    c = curvature(model, (x, np.abs(y)), "ggn")
    if loss == "mse":
        J, _ = jacobian_of_outputs(model, x)
        expected = 2 * np.mean(J**2, (0, 1)).sum() + 0.2 * 6
        found = c.trace(200, labels=True)
        assert abs(found.value - expected) < 4 * found.stderr < 0.2 * expected
    else:
        with pytest.raises(ValueError, match="the Gauss-Newton matrix differs from it. Use kind='fisher'"):
            c.trace(10, labels=True)


def test_a_bar_counts_the_products(network, capsys):
    c = curvature(*network, progress=True)
    c.trace(5)
    shown = capsys.readouterr().out
    assert "5/5" in shown
    curvature(*network).trace(5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_but_the_hessian_is_positive_semi_definite(network, kind):
    c = curvature(*network, kind)
    lowest = np.linalg.eigvalsh(dense(c, c.variables).numpy())[0]
    assert isinstance(c, Curvature) and c.psd == (lowest > -1e-12)


def test_it_says_what_it_is_without_computing_anything(network, monkeypatch):
    c = curvature(*network, "ggn", batch_size=4)
    monkeypatch.setattr(c.objective, "total", None)
    name = network[0].name
    assert repr(c) == f"<Curvature: ggn of {name!r}, 43 weights, 10 examples in batches of 4, inference mode>"
    assert repr(c.block("dense")) == (
        f"<Curvature: ggn of {name!r}, 15 weights of dense, 10 examples in batches of 4, inference mode>"
    )


def test_noise_is_of_the_probes(ggn_of_network):
    c, _ = ggn_of_network
    assert c.noise(micro_batch=2).examples == N
