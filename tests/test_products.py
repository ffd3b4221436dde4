"""Loss, gradient and curvature products against Keras' own train step and dense, dumb matrices, in float64.

The oracle assigns weights, calls the model as Keras' train step calls it, and differentiates once at most; second
derivatives are central differences. Properties are crossed with the registries of `cases.py`.
"""

import functools
import inspect
import itertools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BATCH, LOSSES, MODELS, Case, float64, normal, usual
from keras import layers
from selection import some

from keras_curvature import Linearization, trees
from keras_curvature.keras_internals import replaced
from keras_curvature.linearization import Gradients
from keras_curvature.linearization.fisher import convexity
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.needs import Needs
from keras_curvature.linearization.pure import differentiable
from keras_curvature.operators import Identity, dense
from keras_curvature.solvers import ConjugateGradient

CASES = {**MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
USUAL = usual(CASES)
every_case = pytest.mark.parametrize("name", some(CASES, USUAL))
NOT_CONVEX = ["loss_cosine_similarity", "loss_squared_logarithmic", "loss_focal"]
NORMALIZED = ["batch_normalization", "layer_normalization", "group_normalization"]
RANDOM = [
    "dropout", "spatial_dropout", "gaussian_dropout", "gaussian_noise", "alpha_dropout", "recurrent_dropout",
    "attention", "nested", "subclassed", "subclassed_passing_training",
]  # fmt: skip
TRACED = [
    "dense", "conv2d", "max_pooling", "batch_normalization", "layer_normalization", "dropout", "lstm", "subclassed",
    "several_outputs", "loss_sparse_from_softmax",
]  # fmt: skip
COMPILED = [
    "dense", "conv2d", "max_pooling", "batch_normalization", "layer_normalization", "embedding", "simple_rnn", "prelu",
    "loss_sparse_from_softmax",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_float64():
    with float64():
        yield


class Oracle:
    """Keras' own train step on the batch of a compiled case, without the update, at weights that it assigns."""

    def __init__(self, case):
        self.case, self.model = case, case.model
        self.variables = [*self.model.variables, *self.model.metrics_variables]
        self.start = [v.numpy() for v in self.variables]
        self.weights = [v.numpy() for v in self.model.trainable_variables]
        self.outputs, self.leaves = self.says(self.weights)

    def reset(self, weights=None):
        """Every variable as it was, but for the given weights."""
        for variable, value in zip(self.variables, self.start):
            variable.assign(value)
        for variable, value in zip(self.model.trainable_variables, weights or []):
            variable.assign(value)

    def says(self, weights):
        """`(y_pred, leaves)` of Keras' train step: `leaves` is what the loss reads, logits where there are some."""
        self.reset(weights)
        arguments = {"training": True} if self.model._call_has_training_arg else {}
        outputs = self.model(self.case.x, **arguments)
        return outputs, [getattr(y, "_keras_logits", y) if self._reads_logits else y for y in tf.nest.flatten(outputs)]

    @property
    def _reads_logits(self):
        losses = tf.nest.flatten(self.case.loss)
        return any("rossentropy" in getattr(loss, "name", str(loss)).title().replace("_", "") for loss in losses)

    def loss_of(self, outputs):
        """The loss that Keras' train step computes from the outputs."""
        x, y, sample_weight = self.case.batch
        return self.model._compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)

    def forward(self, weights):
        """`(loss, leaves)` at `weights`."""
        outputs, leaves = self.says(weights)
        return self.loss_of(outputs), leaves

    def backward(self, weights, cotangents=None):
        """`(df/dw, df/dleaves, J'c)`."""
        with tf.GradientTape(persistent=True) as tape:
            outputs, leaves = self.says(weights)
            loss = self.loss_of(outputs)
        variables = self.model.trainable_variables
        gradients, slopes = tape.gradient(loss, variables), tape.gradient(loss, leaves)
        pulled = [None] * len(variables) if cotangents is None else tape.gradient(leaves, variables, cotangents)
        return _densely(gradients, variables), _densely(slopes, leaves), _densely(pulled, variables)

    def slopes(self, leaves):
        """`dL/dleaves` as a function of the leaves alone: the compiled loss, with outputs made of the leaves."""
        flat = []
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            for y, leaf in zip(tf.nest.flatten(self.outputs), leaves):
                logits = getattr(y, "_keras_logits", None)
                made = tf.identity(leaf)
                if logits is not None and self._reads_logits:
                    made = self.model.layers[-1].activation(leaf)
                    made._keras_logits = tf.identity(leaf)
                if hasattr(y, "_keras_mask"):
                    made._keras_mask = y._keras_mask
                flat.append(made)
            loss = self.loss_of(tf.nest.pack_sequence_as(self.outputs, flat))
        return _densely(tape.gradient(loss, leaves), leaves)

    # Second derivatives.

    def hessian_product(self, v):
        """`H v` by central differences of the gradient."""
        return _central(lambda w: self.backward(w)[0], self.weights, v)

    def push(self, v):
        """`J v` by central differences of the leaves."""
        return _central(lambda w: self.forward(w)[1], self.weights, v)

    def curve(self, u):
        """`H_L u` by central differences of the slopes in the leaves."""
        return _central(self.slopes, self.leaves, u)

    def gauss_newton_product(self, v):
        """`J' H_L J v`, and the second derivative of L2 weight regularizers."""
        pulled = self.backward(self.weights, self.curve(self.push(v)))[2]
        return [p + self.l2(w) * a for p, w, a in zip(pulled, self.model.trainable_variables, v)]

    @staticmethod
    def l2(variable):
        """Second derivative of the variable's L2 regularizer."""
        return 2.0 * float(getattr(variable.regularizer, "l2", 0.0))


def _densely(values, like):
    return [
        tf.zeros_like(tf.convert_to_tensor(a)) if v is None else tf.convert_to_tensor(v) for v, a in zip(values, like)
    ]


def _central(function, at, along, h=1e-5):
    along = [tf.convert_to_tensor(a) for a in along]
    length = max(float(trees.norm(along)), 1e-300)
    plus, minus = ([tf.convert_to_tensor(a + s * h / length * d) for a, d in zip(at, along)] for s in (1, -1))
    return [(p - m) * (length / (2 * h)) for p, m in zip(function(plus), function(minus))]


def _vector(like, seed):
    random = np.random.default_rng(seed)
    return [tf.constant(random.standard_normal(a.shape)) for a in like]


def _flat(vector):
    return np.concatenate([np.ravel(a) for a in vector])


def _error(ours, theirs):
    """Relative to the longer of the two; absolute below 1e-6."""
    ours, theirs = _flat(ours), _flat(theirs)
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), np.linalg.norm(ours), 1e-6)


def _everything(case, u, v, step):
    """All that a `Linearization` gives, as a nest of tensors."""
    lin = Linearization(case.model, *case.batch)
    G, H = lin.gauss_newton(), lin.hessian()
    pushed_u, pushed_v = G.push(u), G.push(v)
    return {
        "loss": lin.loss, "loss_at": lin.loss_at(step), "loss_at_0": lin.loss_at(trees.zeros_like(step)),
        "gradient": lin.gradient, "gradient_at": lin.gradient_at(step), "hessian": H @ v, "gauss_newton": G @ v,
        "inner": G.inner(pushed_u, pushed_v), "quadratic_form": G.quadratic_form(u, v),
        "pull": G.pull(pushed_v), "pull_with_gradient": G.pull_with_gradient(pushed_v),
    }  # fmt: skip


@functools.cache
def measured(name):
    """One case, once: what the package says and what the oracle says, both eagerly, which is the cheapest."""
    with float64():
        case = CASES[name]().compile()
        case.model._symbolic_build(data_batch=case.batch)
        oracle = Oracle(case)
        u, v = _vector(oracle.weights, 1), _vector(oracle.weights, 2)
        step = trees.scale(0.1, _vector(oracle.weights, 3))
        # warm up Keras' lazy parts, so that `ours` cannot move them unseen
        loss = oracle.forward(oracle.weights)[0]
        gradient = oracle.backward(oracle.weights)[0]
        after = [variable.numpy() for variable in oracle.variables]
        shifted = [w + s for w, s in zip(oracle.weights, step)]
        theirs = {
            "loss": loss, "gradient": gradient, "hessian": oracle.hessian_product(v),
            "gauss_newton": oracle.gauss_newton_product(v), "loss_at": oracle.forward(shifted)[0],
            "gradient_at": oracle.backward(shifted)[0],
        }  # fmt: skip
        oracle.reset()
        ours = _everything(case, u, v, step)
        moved = [variable.numpy() for variable in oracle.variables]
    return types.SimpleNamespace(
        case=case, oracle=oracle, u=u, v=v, step=step, theirs=theirs, ours=ours, after=after, moved=moved
    )


@every_case
def test_loss_and_gradient_are_those_of_keras_train_step(name):
    m = measured(name)
    np.testing.assert_allclose(m.ours["loss"], m.theirs["loss"], 1e-12)
    assert _error(m.ours["gradient"], m.theirs["gradient"]) < 1e-10


@every_case
def test_other_points_equal_assigning_the_weights(name):
    m = measured(name)
    np.testing.assert_allclose(m.ours["loss_at"], m.theirs["loss_at"], 1e-12)
    np.testing.assert_allclose(m.ours["loss_at_0"], m.theirs["loss"], 1e-12)
    assert _error(m.ours["gradient_at"], m.theirs["gradient_at"]) < 1e-10


@every_case
def test_hessian_products_are_differences_of_gradients(name):
    m = measured(name)
    assert _error(m.ours["hessian"], m.theirs["hessian"]) < 1e-6


@every_case
def test_gauss_newton_products_are_j_h_j(name):
    m = measured(name)
    assert _error(m.ours["gauss_newton"], m.theirs["gauss_newton"]) < 1e-6


@every_case
def test_the_factors_of_gauss_newton_agree_with_its_product(name):
    ours, u = measured(name).ours, measured(name).u
    np.testing.assert_allclose(ours["inner"], trees.dot(u, ours["gauss_newton"]), 1e-8, 1e-10)
    np.testing.assert_allclose(ours["quadratic_form"], ours["inner"], 1e-10, 1e-14)
    assert _error(ours["pull"], ours["gauss_newton"]) < 1e-10
    assert _error(ours["pull_with_gradient"], trees.add(ours["gauss_newton"], ours["gradient"])) < 1e-10


@every_case
def test_nothing_moves_until_commit_and_commit_is_keras_train_step(name):
    m = measured(name)
    for before, now in zip(m.oracle.start, m.moved):
        np.testing.assert_array_equal(now, before)
    m.oracle.reset()
    Linearization(m.case.model, *m.case.batch).commit()
    for variable, expected in zip(m.oracle.variables, m.after):
        np.testing.assert_allclose(variable.numpy(), expected, 1e-12, 1e-14, err_msg=variable.path)
    m.oracle.reset()


@pytest.mark.parametrize("name", some(TRACED, ["batch_normalization", "loss_sparse_from_softmax"]))
def test_graph_is_eager(name):
    m = measured(name)
    graph = tf.function(lambda: _everything(m.case, m.u, m.v, m.step))()
    for key, value in m.ours.items():
        assert _error(tf.nest.flatten(graph[key]), tf.nest.flatten(value)) < 1e-9, key


@pytest.mark.parametrize("name", some(COMPILED, ["conv2d", "loss_sparse_from_softmax"]))
def test_compiled_by_xla_is_eager(name):
    m = measured(name)
    compiled = tf.function(lambda: _everything(m.case, m.u, m.v, m.step), jit_compile=True)()
    for key, value in m.ours.items():
        assert _error(tf.nest.flatten(compiled[key]), tf.nest.flatten(value)) < 1e-9, key


# What single properties are about.


@pytest.mark.parametrize("name", NORMALIZED)
def test_without_exact_moments_hessian_products_would_be_wrong(name, monkeypatch):
    m = measured(name)
    monkeypatch.setattr(differentiable, "_plain_moments", inspect.unwrap(getattr(*replaced.MOMENTS)))
    product = Linearization(m.case.model, *m.case.batch).hessian() @ m.v
    assert _error(product, m.theirs["hessian"]) > 0.01


@pytest.mark.parametrize("name", some(RANDOM, usual(RANDOM)))
def test_training_noise_is_there_and_the_same_in_every_evaluation(name):
    m = measured(name)
    lin = Linearization(m.case.model, *m.case.batch)
    inference = tf.nest.flatten(m.case.model(m.case.x, training=False))
    assert _error(tf.nest.flatten(lin.outputs), inference) > 0.01
    zero = trees.zeros_like(lin.weights)
    first, second = lin.loss_at(zero), lin.loss_at(zero)
    assert first == second == lin.loss
    np.testing.assert_array_equal(_flat(lin.gradient_at(zero)), _flat(lin.gradient_at(zero)))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", ["max_pooling", "lstm"])
def test_without_products_keras_own_kernels_compute_the_gradient(name, micro_batches, monkeypatch):
    case = CASES[name]().compile()
    case.model._symbolic_build(data_batch=case.batch)
    v, asked = _vector(case.model.trainable_variables, 1), []
    for module, function in ((replaced.CUDNN_OK[0], "_is_gpu_available"), (tf.nn, "max_pool")):
        own = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, own=own, **kw: asked.append(own) or own(*args, **kw))

    def gradients(**needs):
        asked.clear()
        lin = Linearization(case.model, *case.batch, micro_batches=micro_batches, **needs)
        found = [lin.loss, *lin.gradient, lin.loss_at(v), *lin.gradient_at(v), *lin.chunk(0.5).gradient]
        return lin, found, len(asked)

    (_, expected, never), (lin, found, times) = gradients(), gradients(needs=Needs())
    assert never == 0 and times >= 4
    assert _error(found, expected) < 1e-12
    blocks = kronecker.blocks(case.model)[0]
    for need, ask in {
        "products": [lin.gauss_newton, lin.fisher, lin.hidden_gauss_newton], "hessian": [lin.hessian],
        "layers": [lambda: lin.kronecker_factors(blocks), lambda: lin.kronecker_means(blocks)],
    }.items():  # fmt: skip
        for question in ask:
            with pytest.raises(ValueError, match=rf"(?s)not among the needs.*Received: .*needs = Needs\({need}=True\)"):
                question()


def test_a_call_without_training_argument_is_run_as_keras_runs_it():
    m = measured("subclassed_without_training")
    lin = Linearization(m.case.model, *m.case.batch)
    np.testing.assert_allclose(lin.outputs, m.case.model(m.case.x), 1e-12)


DENSELY = ["dense", "batch_normalization", "attention", *(f"loss_{name}" for name in LOSSES)]


# of losses that are alike in their second derivative one: of logits, of weights and regularizers, of what is not convex
BY_DEFAULT = [
    "dense", "batch_normalization", "loss_mse", "loss_huber", "loss_poisson", "loss_binary_from_sigmoid",
    "loss_categorical_from_logits", "loss_squared_logarithmic", "loss_sample_weights", "loss_regularized",
    "loss_own_compute_loss",
]  # fmt: skip


@pytest.mark.parametrize("name", some(DENSELY, BY_DEFAULT))
def test_dense_matrices(name):
    m = measured(name)
    lin = Linearization(m.case.model, *m.case.batch)
    G = lin.gauss_newton()
    identity = [tf.reshape(e, [-1, *w.shape]) for e, w in zip(_unit_vectors(lin.weights), lin.weights)]
    matrix = dense(G, lin.weights) if name.startswith("loss_") else None
    if matrix is None:  # every column of J by one central difference would be slow here: a few of them
        for i in range(0, len(identity[0]), 17):
            e = [a[i] for a in identity]
            assert _error(G @ e, m.oracle.gauss_newton_product(e)) < 1e-6
        return
    columns = [_flat(m.oracle.push([a[i] for a in identity])) for i in range(matrix.shape[0])]
    J = np.stack(columns, 1)  # (batch * outputs, weights)
    units = [tf.reshape(e, [-1, *leaf.shape]) for e, leaf in zip(_unit_vectors(m.oracle.leaves), m.oracle.leaves)]
    H = np.stack([_flat(m.oracle.curve([a[i] for a in units])) for i in range(J.shape[0])], 1)
    l2 = np.concatenate([np.full(v.shape.num_elements(), m.oracle.l2(v)) for v in m.case.model.trainable_variables])
    expected = J.T @ H @ J + np.diag(l2)
    np.testing.assert_allclose(matrix, expected, 1e-6, 1e-6 * np.abs(expected).max() + 1e-9)
    np.testing.assert_allclose(matrix, tf.transpose(matrix), 1e-9, 1e-12)
    lowest, highest = np.linalg.eigvalsh(matrix)[[0, -1]]
    assert G.psd == (name not in NOT_CONVEX)
    if G.psd:
        assert lowest > -1e-12 * max(highest, 1.0)


def _unit_vectors(like):
    """Per tensor of `like` the rows that belong to it of the identity, `(n, entries)`."""
    sizes = [tf.convert_to_tensor(a).shape.num_elements() for a in like]
    return tf.split(tf.eye(sum(sizes), dtype=tf.float64), sizes, axis=1)


@pytest.mark.parametrize("name", ["dense", "layer_normalization", "loss_regularized"])
def test_the_hessian_is_symmetric(name):
    m = measured(name)
    lin = Linearization(m.case.model, *m.case.batch)
    matrix = dense(lin.hessian(), lin.weights)
    np.testing.assert_allclose(matrix, tf.transpose(matrix), 1e-8, 1e-11)
    assert not lin.hessian().psd


def _linear_model(outputs, loss, activation=None):
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(outputs, activation, use_bias=False)])
    model.compile("sgd", loss)
    return model, normal(random, BATCH, 3), random


def test_scaling_of_the_mean_squared_error():
    model, x, random = _linear_model(2, "mse")
    G = dense(Linearization(model, x, normal(random, BATCH, 2)).gauss_newton(), model.trainable_variables)
    np.testing.assert_allclose(G, np.kron(x.T @ x, np.eye(2)) * 2 / (BATCH * 2), 1e-10)  # 1/B and 1/d


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_scaling_of_the_cross_entropy(activation):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    model, x, random = _linear_model(3, loss, activation)
    y = random.integers(0, 3, (BATCH,))
    G = dense(Linearization(model, x, y).gauss_newton(), model.trainable_variables)
    p = tf.nn.softmax(x @ model.trainable_variables[0].numpy()).numpy()
    H = [np.diag(q) - np.outer(q, q) for q in p]
    np.testing.assert_allclose(G, sum(np.kron(np.outer(a, a), h) for a, h in zip(x, H)) / BATCH, 1e-10, 1e-14)


@pytest.mark.parametrize("loss, activation", [("sparse", "softmax"), ("categorical", "softmax"), ("binary", "sigmoid")])
def test_a_model_that_ends_in_softmax_has_the_curvature_of_its_logits(loss, activation):
    products = []
    for name in (f"{loss}_from_logits", f"{loss}_from_{activation}"):
        case = LOSSES[name](seed=5).compile()
        lin = Linearization(case.model, *case.batch)
        products.append(_flat(lin.gauss_newton() @ _vector(lin.weights, 0)))
        assert lin.gauss_newton().psd
    np.testing.assert_allclose(products[0], products[1], 1e-9)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    "name", some(["dense", "batch_normalization", "lstm", "loss_sparse_from_softmax"], ["dense", "batch_normalization"])
)
def test_mixed_precision_is_near_full_precision(name, policy):
    found = []
    for now in ("float32", policy):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(now)
        case = CASES[name]().compile()
        scale = tf.constant(128.0) if now == "mixed_float16" else None
        lin = Linearization(case.model, *case.batch, loss_scale=scale)
        v = [tf.cast(a, tf.float32) for a in _vector(lin.weights, 0)]
        found.append([lin.gradient, lin.gauss_newton() @ v, lin.hessian() @ v])
    for full, mixed in zip(*found):
        assert _error(mixed, full) < 0.03
        assert all(a.dtype == tf.float32 for a in mixed)


@pytest.mark.parametrize("name", NOT_CONVEX)
def test_losses_that_are_not_convex_are_named_and_refused(name):
    m = measured(name)
    G = Linearization(m.case.model, *m.case.batch).gauss_newton()
    assert not G.psd and not (G + 1.0 * Identity()).psd
    assert G.not_convex == (type(m.case.loss).__name__,)
    with pytest.raises(ValueError, match="positive semi-definite.*convex in the model's outputs.*truncate=True"):
        ConjugateGradient().solve(G, m.theirs["gradient"])


def test_a_loss_says_itself_that_it_is_not_convex():
    def loss(y, y_pred):
        return tf.sin(y_pred - y)

    assert convexity.is_convex(loss)
    loss.convex_in_outputs = False
    assert not convexity.is_convex(loss)
    assert convexity.is_convex("mse") and not convexity.is_convex("msle")


def test_products_in_a_loop():
    m = measured("batch_normalization")
    lin = Linearization(m.case.model, *m.case.batch)
    G, H = lin.gauss_newton(), lin.hessian()

    @tf.function
    def looped(v):
        lin = Linearization(m.case.model, *m.case.batch)
        G, H = lin.gauss_newton(), lin.hessian()
        body = lambda i, v: (i + 1, H @ (G @ v))  # noqa: E731
        return tf.while_loop(lambda i, v: i < 3, body, (tf.constant(0), v))[1]

    expected = m.v
    for _ in range(3):
        expected = H @ (G @ expected)
    assert _error(looped(m.v), expected) < 1e-10


@pytest.mark.parametrize("name", ["dense", "dropout", "loss_sparse_from_softmax", "loss_regularized"])
def test_a_loss_scale_changes_no_number(name):
    m = measured(name)
    lin = Linearization(m.case.model, *m.case.batch)
    scaled = Linearization(m.case.model, *m.case.batch, loss_scale=tf.constant(1024.0))
    G, S = lin.gauss_newton(), scaled.gauss_newton()
    pairs = [
        ([scaled.loss], [lin.loss]), (scaled.gradient, lin.gradient), (S @ m.v, G @ m.v),
        (scaled.hessian() @ m.v, lin.hessian() @ m.v), (scaled.gradient_at(m.step), lin.gradient_at(m.step)),
        ([S.quadratic_form(m.u, m.v)], [G.quadratic_form(m.u, m.v)]),
        (S.pull_with_gradient(S.push(m.v)), G.pull_with_gradient(G.push(m.v))),
        (scaled.squared_gradients(), lin.squared_gradients()),
    ]  # fmt: skip
    for ours, theirs in pairs:
        assert _error(ours, theirs) < 1e-12


def test_a_shift_moves_the_point_and_no_weight():
    m = measured("dense")
    shifted = Linearization(m.case.model, *m.case.batch, shift=m.step)
    np.testing.assert_allclose(shifted.loss, m.theirs["loss_at"], 1e-12)
    assert _error(shifted.gradient, m.theirs["gradient_at"]) < 1e-12
    back = trees.negative(m.step)
    np.testing.assert_allclose(shifted.loss_at(back), m.theirs["loss"], 1e-12)
    np.testing.assert_array_equal(_flat(trees.values(shifted.variables)), _flat(m.oracle.weights))


# Squared gradients.


def _each_gradient(case):
    """The gradient of each example alone, `[(examples, ...)]`, by one train step's loss per example."""
    gradients = []
    for i in range(BATCH):
        one = [None if a is None else a[i : i + 1] for a in case.batch]
        with tf.GradientTape() as tape:
            loss = case.model._compute_loss(one[0], one[1], case.model(one[0], training=True), one[2])
        gradients.append(_densely(tape.gradient(loss, case.model.trainable_variables), case.model.trainable_variables))
    return [tf.stack(g) for g in zip(*gradients)]


@pytest.mark.parametrize(
    "name", ["dense", "dense_selu", "loss_sparse_from_logits", "loss_sparse_from_softmax", "loss_sample_weights"]
)
def test_squared_gradients_of_dense_layers_are_exact(name):
    case = measured(name).case
    expected = [tf.reduce_mean(g**2, 0) for g in _each_gradient(case)]
    for seed in (0, 1):
        assert _error(Linearization(case.model, *case.batch).squared_gradients(seed), expected) < 1e-10


ESTIMATED = ["conv2d", "embedding", "lstm", "einsum_dense", "time_distributed"]


@pytest.mark.parametrize("name", some(ESTIMATED, ["conv2d", "embedding", "einsum_dense"]))
def test_squared_gradients_of_other_layers_are_unbiased(name, monkeypatch):
    case = measured(name).case
    expected = [tf.reduce_mean(g**2, 0) for g in _each_gradient(case)]
    estimates = []
    # all patterns of signs but for the sign of the whole: the average is the expectation, exactly
    for signs in itertools.product([0, 1], repeat=BATCH - 1):
        drawn = tf.constant([1, *signs])
        monkeypatch.setattr(tf.random, "stateless_uniform", lambda *args, drawn=drawn, **kwargs: drawn)
        estimates.append(Linearization(case.model, *case.batch).squared_gradients())
    average = [tf.reduce_mean(tf.stack(e), 0) for e in zip(*estimates)]
    assert _error(average, expected) < 1e-10
    assert _error(estimates[0], expected) > 1e-3


def test_squared_gradients_of_a_layer_used_twice_are_unbiased(monkeypatch):
    random = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    inputs, hidden = keras.Input((4,)), layers.Dense(4, activation="tanh")
    model = keras.Model(inputs, layers.Dense(2)(hidden(hidden(inputs))))
    case = Case(model, normal(random, BATCH, 4), normal(random, BATCH, 2)).compile()
    estimates = []
    for signs in itertools.product([0, 1], repeat=BATCH - 1):
        drawn = tf.constant([1, *signs])
        monkeypatch.setattr(tf.random, "stateless_uniform", lambda *args, drawn=drawn, **kwargs: drawn)
        estimates.append(Linearization(model, *case.batch).squared_gradients())
    average = [tf.reduce_mean(tf.stack(e), 0) for e in zip(*estimates)]
    assert _error(average, [tf.reduce_mean(g**2, 0) for g in _each_gradient(case)]) < 1e-10


def test_the_signs_of_squared_gradients_follow_the_seed():
    case = measured("conv2d").case
    lin = Linearization(case.model, *case.batch)
    one, same, other = (_flat(lin.squared_gradients(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-6


# Parts of the batch.


@pytest.mark.parametrize("name", ["dense", "shared_layer", "several_outputs", "loss_sample_weights"])
def test_a_chunk_is_the_linearization_of_every_so_manieth_example(name):
    m = measured(name)
    lin = Linearization(m.case.model, *m.case.batch)
    for size, length in ((0.5, 3), (2, 2), (1.0, 6), (100, 6), (4, 4)):
        for index in range(3):
            pieces = BATCH // length
            rows = np.arange(index % pieces, BATCH, pieces)[:length]
            part = tf.nest.map_structure(lambda a, rows=rows: None if a is None else a[rows], m.case.batch)
            ours, theirs = lin.chunk(size, index), Linearization(m.case.model, *part)
            np.testing.assert_allclose(ours.loss, theirs.loss, 1e-12)
            assert _error(ours.gauss_newton() @ m.v, theirs.gauss_newton() @ m.v) < 1e-12


def test_a_chunk_of_a_batch_of_unknown_size():
    m = measured("dense")

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float64), tf.TensorSpec([None, 3], tf.float64)])
    def losses(x, y):
        lin = Linearization(m.case.model, x, y)
        return [lin.chunk(size, tf.constant(1)).loss for size in (0.5, 2, 100)]

    lin = Linearization(m.case.model, *m.case.batch)
    np.testing.assert_allclose(
        losses(m.case.x, m.case.y), [lin.chunk(0.5, 1).loss, lin.chunk(2, 1).loss, lin.loss], 1e-12
    )


# Hidden states.


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("cls", some([layers.SimpleRNN, layers.LSTM, layers.GRU], [layers.SimpleRNN]))
def test_hidden_gauss_newton(cls, sequences):
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    recurrent = cls(2, return_sequences=sequences)
    model = keras.Sequential([keras.Input((3, 1)), recurrent, layers.Flatten(), layers.Dense(1)])
    model.compile("sgd", "mse")
    x = normal(random, BATCH, 3, 1)
    whole = cls(2, return_sequences=True)
    whole.build(x.shape)
    weights = [v.numpy() for v in recurrent.trainable_variables]

    def states(weights):
        for variable, value in zip(whole.trainable_variables, weights):
            variable.assign(value)
        return [whole(x)]

    lin = Linearization(model, x, normal(random, BATCH, 1))
    ours = dense(lin.hidden_gauss_newton(), lin.weights)
    units = [tf.reshape(e, [-1, *w.shape]) for e, w in zip(_unit_vectors(weights), weights)]
    J = np.stack([_flat(_central(states, weights, [a[i] for a in units])) for i in range(len(units[0]))], 1)
    expected = np.zeros(ours.shape)
    expected[: J.shape[1], : J.shape[1]] = J.T @ J / BATCH
    np.testing.assert_allclose(ours, expected, 1e-6, 1e-8)
    assert lin.hidden_gauss_newton().psd


# Refusals.


def test_spectral_normalization_is_refused():
    model = keras.Sequential([keras.Input((3,)), layers.SpectralNormalization(layers.Dense(2))])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="assigns its trainable weight `.*kernel` during the forward pass"):
        Linearization(model, np.ones((2, 3)), np.ones((2, 2))).gradient  # noqa: B018


def test_what_cannot_be_linearized_is_refused():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"has no loss.*model\.compile\(loss="):
        Linearization(model, np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="`model` must be a `keras.Model`. Received: model=3"):
        Linearization(3, np.ones((2, 3)))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="needs a recurrent layer.*structural_damping=0.0"):
        Linearization(model, np.ones((2, 3)), np.ones((2, 2))).hidden_gauss_newton()


def test_a_plain_model_has_gradients_and_says_what_else_it_needs():
    known = Gradients("MyMethod", [tf.ones([2])], [])
    assert known.gradient[0].shape == (2,)
    for name in ("hessian", "gauss_newton", "loss_at", "squared_gradients"):
        with pytest.raises(ValueError, match=rf"(?s)`MyMethod` needs .*`Linearization.{name}`.*keras_curvature.curved"):
            getattr(known, name)
    with pytest.raises(AttributeError):
        known.nothing  # noqa: B018


def test_forward_mode_leaves_nothing_in_the_graph_of_the_pass_it_is_made_from():
    inputs = keras.Input((6,))
    hidden = keras.layers.LayerNormalization()(keras.layers.Dense(5, use_bias=False)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3, use_bias=False)(keras.layers.Activation("gelu")(hidden)))
    model.compile(loss="mse")
    x, y = tf.ones((4, 6)), tf.ones((4, 3))
    Linearization(model, x, y).loss  # noqa: B018 (builds the loss)

    @tf.function
    def push(*vector):
        return Linearization(model, x, y).gauss_newton().push(list(vector)).pushed

    graph = push.get_concrete_function(*[tf.ones(v.shape, v.dtype) for v in model.trainable_variables]).graph
    needed, waiting = set(), [tensor.op for tensor in graph.outputs]
    while waiting:
        op = waiting.pop()
        if op.name not in needed:
            needed.add(op.name)
            waiting += [tensor.op for tensor in op.inputs] + list(op.control_inputs)
    products = [op for op in graph.get_operations() if op.name in needed and op.type == "MatMul"]
    # of the pass forward x W1, since h is needed; of forward mode x V1, h V2 and (dh) W2
    assert len(products) == 4, [op.name for op in products]
