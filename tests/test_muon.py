"""Muon against Keras' own, against singular value decompositions, and what it does with each weight of a model."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from selection import some
from test_soap import random_gradients, trajectory

import keras_curvature as kc
from keras_curvature.linearization.layers import ends
from keras_curvature.operators.unfolding import Unfolding

EXACT = kc.PolarExpress(steps=12)  # as exact as a decomposition
EVERYTHING = {"adam_for": [], "sign": EXACT, "learning_rate": 0.1}


def polar(X):
    """`U V'` by the decomposition."""
    U, _, V = np.linalg.svd(X, full_matrices=False)
    return U @ V


# The update.


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "momentum": 0.9}, {"rms_rate": None}])
def test_trajectory_on_matrices_is_that_of_keras_own_muon(settings):
    shapes = [(6, 9), (9, 4), (5, 5), (3, 40)]
    start, gradients = random_gradients(shapes, steps=20)
    rate = 2.0**-7
    theirs = keras.optimizers.Muon(rate, weight_decay=None, adam_weight_decay=None, **settings)
    common = {name: value for name, value in settings.items() if name != "rms_rate"}
    own = kc.Muon(rate, adam_for=[], sign=kc.NewtonSchulz(), **common)
    expected, seen = (trajectory(optimizer, start, gradients, shapes) for optimizer in (theirs, own))
    if "rms_rate" in settings:  # no scale; ours has one, which the sign cannot see
        sizes = np.concatenate([np.full(a * b, 0.2 * max(a, b) ** 0.5) for a, b in shapes])
        expected = start + np.cumsum(sizes * np.diff(expected, axis=0, prepend=start[None]), axis=0)
    np.testing.assert_allclose(seen, expected, atol=1e-6 * np.abs(expected - start).max())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("per_head", [False, True])
def test_spectral_descent_has_the_length_of_the_nuclear_norm(per_head):
    start, gradients = random_gradients([(5, 3, 4)], steps=3)
    optimizer = kc.Muon.spectral_descent(0.1, adam_for=[], sign=EXACT, per_head=per_head)
    seen = trajectory(optimizer, start, gradients, [(5, 3, 4)])
    w = start.reshape(5, 3, 4)
    for row, weights in zip(gradients, seen):
        G = row.reshape(5, 3, 4)
        heads = [G[:, h] for h in range(3)] if per_head else [G.reshape(5, 12)]
        steps = [np.linalg.norm(X, "nuc") * polar(X) for X in heads]
        w = w - 0.1 * (np.stack(steps, 1) if per_head else steps[0].reshape(5, 3, 4))
        np.testing.assert_allclose(weights, w.ravel(), rtol=1e-8)


@pytest.mark.usefixtures("in_float64")
def test_trajectory_of_what_adam_steps_is_adams():
    shapes = [(5,), (), (1, 3), (6, 4)]
    start, gradients = random_gradients(shapes)
    settings = {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}
    seen = trajectory(kc.Muon(1e-2, adam_rate=0.5, **settings), start, gradients, shapes)
    expected = trajectory(keras.optimizers.Adam(5e-3, **settings), start, gradients, shapes)
    np.testing.assert_allclose(seen, expected, atol=1e-8)


SCALES = {
    "jordan": {(4, 9): 1.5, (9, 4): 1.0},
    "moonlight": {(4, 9): 0.6, (9, 4): 0.6},
    "scion": {(4, 9): 1.5, (9, 4): 2 / 3},
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("scale", SCALES)
def test_the_first_step_is_the_scaled_orthogonal_factor_of_the_gradient(scale):
    for shape, expected in SCALES[scale].items():
        start, gradients = random_gradients([shape], steps=1)
        seen = trajectory(kc.Muon(**EVERYTHING, scale=scale), start, gradients, [shape])
        step = -0.1 * expected * polar(gradients.reshape(shape)).ravel()
        np.testing.assert_allclose(seen[0] - start, step, atol=1e-7)


@pytest.mark.usefixtures("in_float64")
def test_a_tall_matrix_is_the_transposed_wide_one():
    start, gradients = random_gradients([(4, 9)], steps=3)
    wide = trajectory(kc.Muon(adam_for=[]), start, gradients, [(4, 9)])
    turned = [np.array([v.reshape(4, 9).T.ravel() for v in rows]) for rows in (start[None], gradients, wide)]
    tall = trajectory(kc.Muon(adam_for=[]), turned[0][0], turned[1], [(9, 4)])
    np.testing.assert_allclose(tall, turned[2], rtol=1e-12)


# `(shape of a kernel, shape of its matrix)`
KERNELS = [((3, 3, 2, 4), (18, 4)), ((3, 3, 2, 4, 5), (72, 5)), ((3, 8, 16), (24, 16)), ((12, 3, 4), (12, 12)),
           ((3, 4, 12), (12, 12)), ((3, 3, 1, 8), (9, 8)), ((1, 1, 6, 4), (6, 4)), ((3, 3, 6, 1), (9, 6))]  # fmt: skip


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("shape", "matrix"), KERNELS)
def test_a_kernel_is_its_reshaped_matrix(shape, matrix):
    start, gradients = random_gradients([shape], steps=3)
    seen = trajectory(kc.Muon(**EVERYTHING), start, gradients, [shape])
    np.testing.assert_allclose(seen, trajectory(kc.Muon(**EVERYTHING), start, gradients, [matrix]), rtol=1e-12)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("shape", "axis"), [((12, 3, 4), 1), ((3, 4, 12), 0)])
def test_each_head_may_have_a_matrix_of_its_own(shape, axis):
    start, gradients = random_gradients([shape], steps=3)
    seen = trajectory(kc.Muon(**EVERYTHING, per_head=True), start, gradients, [shape])
    for head in range(shape[axis]):
        parts = [np.take(v.reshape(-1, *shape), head, axis + 1) for v in (start, gradients, seen)]
        own, flat = parts[0].shape[1:], [part.reshape(len(part), -1) for part in parts]
        alone = trajectory(kc.Muon(**EVERYTHING, per_head=True), flat[0][0], flat[1], [own])
        np.testing.assert_allclose(flat[2], alone, rtol=1e-9)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("per", ["output", "entry"])
def test_the_second_moment_of_the_signs_follows_the_equations(per):
    shape, b = (6, 4), 0.8
    start, gradients = random_gradients([shape], steps=10)
    settings = {**EVERYTHING, "scale": "scion", "momentum": 0.0, "nesterov": False}
    seen = trajectory(kc.Muon(**settings, normalization=kc.SecondMoment(per, b)), start, gradients, [shape])
    w, v = start.reshape(shape), 0.0
    for row, weights in zip(gradients, seen):
        U = polar(row.reshape(shape))
        v = b * v + (1 - b) * (np.mean(U**2, axis=0, keepdims=True) if per == "output" else U**2)
        step = U / np.sqrt(v)
        w = w - 0.1 * (4 / 6) ** 0.5 * step * np.linalg.norm(U) / np.linalg.norm(step)
        np.testing.assert_allclose(weights, w.ravel(), atol=1e-6)


@pytest.mark.usefixtures("in_float64")
def test_the_second_moment_of_heads_is_that_of_each_head():
    start, gradients = random_gradients([(12, 3, 4)], steps=4)
    settings = {**EVERYTHING, "normalization": kc.SecondMoment(), "per_head": True}
    seen = trajectory(kc.Muon(**settings), start, gradients, [(12, 3, 4)])
    heads = [v.reshape(-1, 12, 3, 4)[:, :, 1].reshape(-1, 48) for v in (start, gradients, seen)]
    alone = trajectory(kc.Muon(**settings), heads[0][0], heads[1], [(12, 4)])
    np.testing.assert_allclose(heads[2], alone, rtol=1e-9)


@pytest.mark.usefixtures("in_float64")
def test_muon_2_divides_the_momentum_by_the_second_moment_of_the_gradient():
    shape, b, mu = (6, 4), 0.8, 0.9
    start, gradients = random_gradients([shape], steps=6)
    settings = {**EVERYTHING, "scale": "scion", "momentum": mu, "nesterov": False}
    seen = trajectory(kc.Muon(**settings, normalization=kc.GradientMoment(b, 1e-4)), start, gradients, [shape])
    w, v, m = start.reshape(shape), 0.0, 0.0
    for row, weights in zip(gradients, seen):
        G = row.reshape(shape)
        m, v = mu * m + (1 - mu) * G, b * v + (1 - b) * G**2
        w = w - 0.1 * (4 / 6) ** 0.5 * polar(m / np.sqrt(v + 1e-4))
        np.testing.assert_allclose(weights, w.ravel(), atol=1e-6)


# Steps in a part of the momentum.


def columns_of_one(seed, shape):
    """The first basis of `LowRankPart` for the tile with the number `seed`."""
    return tf.random.stateless_normal(shape, (0, seed), dtype="float64").numpy()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("shape", "rank", "r"), [((4, 7), 2, 2), ((7, 4), 0.3, 2), ((5, 5), 1.0, 5)])
def test_dion_follows_its_equations(shape, rank, r):
    start, gradients = random_gradients([shape], steps=8)
    mu, out_in = 0.9, shape[1] / shape[0]
    optimizer = kc.Muon.dion(0.1, momentum=mu, adam_for=[], part=kc.LowRankPart(rank))
    seen = trajectory(optimizer, start, gradients, [shape])
    w, M, Q = start.reshape(shape), np.zeros(shape), columns_of_one(0, (min(shape), r))
    for row, weights in zip(gradients, seen):
        M = M + row.reshape(shape)  # the heavy ball of the paper
        tall = M if shape[0] > shape[1] else M.T
        P, _ = np.linalg.qr(tall @ Q)
        R = tall.T @ P
        part = (1 - mu) * P @ R.T
        M = M - (part if shape[0] > shape[1] else part.T)
        Q = R / np.linalg.norm(R, axis=0)
        step = P @ Q.T
        w = w - 0.1 * out_in**0.5 * (step if shape[0] > shape[1] else step.T)
        np.testing.assert_allclose(weights, w.ravel(), rtol=1e-7)


@pytest.mark.usefixtures("in_float64")
def test_dion_on_a_constant_gradient_tends_to_the_sign_of_its_best_approximation():
    random = np.random.default_rng(0)
    U, V = (np.linalg.qr(random.standard_normal((n, 4)))[0] for n in (5, 7))
    G = U * [8.0, 4.0, 1.0, 0.5] @ V.T
    optimizer = kc.Muon.dion(1.0, momentum=0.0, scale="jordan", adam_for=[], part=kc.LowRankPart(2))
    seen = trajectory(optimizer, np.zeros(35), np.tile(G.ravel(), (60, 1)), [(5, 7)])
    step = (seen[-2] - seen[-1]).reshape(5, 7) / (7 / 5) ** 0.5
    # what is left out waits in the momentum: after the two large ones left it, the small ones have their turn
    np.testing.assert_allclose(np.linalg.svd(step)[1][2:], 0, atol=1e-12)
    np.testing.assert_allclose(step @ step.T @ step, step, atol=0.2)
    np.testing.assert_allclose(U @ (U.T @ step @ V) @ V.T, step, atol=1e-10)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_dion2_follows_its_equations(shape):
    start, gradients = random_gradients([shape], steps=8)
    mu = 0.8
    optimizer = kc.Muon.dion2(0.1, momentum=mu, adam_for=[], part=kc.RowPart(0.4), sign=EXACT)
    seen = trajectory(optimizer, start, gradients, [shape])
    w, M = start.reshape(shape), np.zeros(shape)
    for row, weights in zip(gradients, seen):
        M = M + row.reshape(shape)
        wide = M if shape[0] < shape[1] else M.T
        chosen = np.argsort(-np.abs(wide).sum(1))[:2]  # 0.4 of 4, rounded up
        step = np.zeros_like(wide)
        step[chosen] = polar(wide[chosen])
        wide[chosen] *= mu  # of `M` itself
        w = w - 0.1 * (shape[1] / shape[0]) ** 0.5 * (step if shape[0] < shape[1] else step.T)
        np.testing.assert_allclose(weights, w.ravel(), atol=1e-6)


@pytest.mark.usefixtures("in_float64")
def test_all_rows_are_muon():
    shapes = [(4, 9), (5, 3), (6, 2, 3)]
    start, gradients = random_gradients(shapes)
    settings = {"adam_for": [], "nesterov": False, "per_head": True}
    runs = [trajectory(kc.Muon(**settings, part=part), start, gradients, shapes) for part in (None, kc.RowPart(1.0))]
    np.testing.assert_allclose(*runs, rtol=1e-10)


def test_unfolding_and_back_is_nothing():
    for shape, _ in KERNELS:
        for per_head in (False, True):
            unfolding, X = Unfolding(shape, per_head), tf.random.stateless_normal(shape, [0, 1])
            np.testing.assert_array_equal(unfolding.tensor(unfolding.matrix(X)), X)


def test_matrices_of_one_size_are_computed_together():
    random, shapes = np.random.default_rng(0), [(4, 9), (9, 4), (4, 9), (2, 2, 1, 9), (5, 5), (3,)]
    variables = [keras.Variable(random.standard_normal(s), dtype="float32") for s in shapes]
    optimizer = kc.Muon(adam_for=[])
    optimizer.build(variables)
    gradients = [tf.constant(random.standard_normal(s), "float32") for s in shapes]
    graph = tf.function(lambda: optimizer.apply(gradients, variables)).get_concrete_function().graph
    stacks = {tuple(op.outputs[0].shape) for op in graph.get_operations() if "MatMul" in op.type}
    assert stacks == {(4, 4, 4), (4, 4, 9), (5, 5)}


# Values that are no good.


def degenerate():
    """Gradients of one kernel: of one row, zero, of rank one, with rows that are the same."""
    random = np.random.default_rng(0)
    column, row, half = (random.standard_normal(s) for s in ((6, 1), (1, 5), (3, 5)))
    return {"one_row": row, "one_column": column, "zero": np.zeros((6, 5)), "rank_one": column @ row,
            "duplicated": np.concatenate([half, half])}  # fmt: skip


VARIANTS = {
    "plain": lambda **kwargs: kc.Muon(0.1, **kwargs),
    "normalized": lambda **kwargs: kc.Muon(0.1, normalization=kc.SecondMoment(), **kwargs),
    "muon_2": lambda **kwargs: kc.Muon(0.1, normalization=kc.GradientMoment(epsilon=1e-30), **kwargs),
    "dion": lambda **kwargs: kc.Muon.dion(0.1, part=kc.LowRankPart(2), **kwargs),
    "dion2": lambda **kwargs: kc.Muon.dion2(0.1, part=kc.RowPart(0.5), **kwargs),
}


USUAL = [("float32", 1e-25), ("float16", 1e4)]
EVERY_SCALE = list(itertools.product(["float32", "bfloat16", "float16"], [1e-25, 1.0, 1e4]))


@pytest.mark.parametrize(("dtype", "scale"), some(EVERY_SCALE, USUAL))
@pytest.mark.parametrize("make", VARIANTS)
def test_degenerate_gradients_do_no_harm(dtype, scale, make):
    cases = list(degenerate().values())
    variables = [keras.Variable(np.ones(g.shape), dtype=dtype) for g in cases]
    optimizer = VARIANTS[make](adam_for=[])
    optimizer.build(variables)
    step = tf.function(lambda given: optimizer.apply(given, variables))
    for _ in range(5):
        step([tf.constant(scale * g, dtype) for g in cases])
    moved = [np.abs(np.array(v.value, "float64") - 1) for v in variables]
    assert int(optimizer.skipped_steps) == 0 and all(np.isfinite(v.numpy()).all() for v in optimizer.variables)
    assert all(m.max() < 1.5 for m in moved)
    still = {"zero"} if scale > 1e-8 else {"zero", "one_row", "one_column"}  # Adam has an epsilon, the sign has none
    still = set(degenerate()) if scale < 1e-8 and dtype == "float16" else still  # zero in that precision
    assert {name for name, m in zip(degenerate(), moved) if m.max() < 1e-3} == still


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [kc.Muon, kc.Muon.dion, kc.Muon.dion2])
def test_xla_takes_the_same_steps(dtype, make):
    shapes = [(6, 6), (7,), (3, 3, 2, 4), (4, 40), (4, 3)]
    start, gradients = random_gradients(shapes)
    compiled, graph = (
        trajectory(make(1e-2), start, gradients, shapes, jit, dtype).astype("float32") for jit in (True, False)
    )
    np.testing.assert_allclose(compiled, graph, atol=2e-5 if dtype == "float32" else 2e-2)
    assert np.abs(graph[-1] - start).max() > 5e-3


# Which weights are matrices.


def transformer():
    """`(model, paths of its ends)`: tokens through attention to the next token."""
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(11, 8, name="tokens")(tokens)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 4, name="attention")(x, x)])
    x = layers.LayerNormalization()(x)
    logits = layers.Dense(11, name="logits")(layers.Dense(16, activation="relu", name="hidden")(x))
    return keras.Model(tokens, layers.Activation("softmax")(logits)), {"tokens/embeddings", "logits/kernel"}


def two_heads():
    """Two outputs, of which the variables show the last one only."""
    given = keras.Input((4,))
    first = layers.Dense(3, name="first")(given)
    hidden = layers.Dense(6, name="hidden")(given)
    second = layers.Dense(2, name="second")(layers.BatchNormalization()(hidden))
    return keras.Model(given, [first, layers.ReLU()(second)]), {"first/kernel", "second/kernel"}


def nested():
    """The output comes from a model inside the model, a `Sequential` after which there is no weight."""
    head = keras.Sequential([layers.Dense(6, name="inside"), layers.Dense(3, name="last"), layers.Softmax()])
    given = keras.Input((4,))
    return keras.Model(given, layers.Rescaling(2.0)(head(layers.Dense(5)(given)))), {"last/kernel"}


class Subclassed(keras.Model):
    """A model without a graph."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = layers.Dense(5, name="inner"), layers.Dense(1, name="outer")

    def call(self, x):
        """Two layers."""
        return self.outer(self.inner(x))


def subclassed():
    """Its last weight."""
    model = Subclassed()
    model(np.ones((2, 4), "float32"))
    return model, {"outer/kernel"}


def siamese():
    """A model inside the model that is called twice, once behind another layer."""
    one, other = keras.Input((4,)), keras.Input((4,))
    encoder = keras.Sequential([layers.Dense(6, name="inside"), layers.Dense(3, name="code")])
    return keras.Model([one, other], [encoder(one), encoder(layers.Dense(4)(other))]), {"code/kernel"}


class Positions(layers.Layer):
    """Adds a table of positions, as KerasHub's `PositionEmbedding` does."""

    def build(self, shape):
        """The table, with the name that embeddings have."""
        self.table = self.add_weight(shape=shape[1:], name="embeddings")

    def call(self, x):
        """`x` plus the table."""
        return x + self.table


class Reversible(layers.Layer):
    """An embedding that also makes the outputs, with a matrix of their own, as `ReversibleEmbedding` does."""

    def build(self, shape):
        """The two matrices, of eleven tokens and width 8."""
        self.table = self.add_weight(shape=(11, 8), name="embeddings")
        self.back = self.add_weight(shape=(8, 11), name="reverse_embeddings")

    def call(self, x, reverse=False):
        """Vectors of tokens, or scores of tokens."""
        return keras.ops.matmul(x, self.back) if reverse else keras.ops.take(self.table, x, axis=0)


def language():
    """The output layer is an embedding in reverse."""
    tokens, ends_of = keras.Input((7,), dtype="int32"), Reversible(name="tokens")
    x = layers.Dense(8, name="hidden")(Positions(name="positions")(ends_of(tokens)))
    expected = {"tokens/embeddings", "tokens/reverse_embeddings", "positions/embeddings"}
    return keras.Model(tokens, ends_of(x, reverse=True)), expected


MODELS = {"transformer": transformer, "two_heads": two_heads, "nested": nested, "subclassed": subclassed,
          "siamese": siamese, "language": language}  # fmt: skip


def short(variables):
    """The last two parts of their paths, a set."""
    return {"/".join(v.path.split("/")[-2:]) for v in variables}


@pytest.mark.parametrize("name", MODELS)
def test_the_ends_of_a_model_are_its_embeddings_and_the_layers_of_its_outputs(name):
    model, expected = MODELS[name]()
    assert short(ends.ends_of_model(model)) == expected
    by_variables = short(ends.ends_of_variables(model.trainable_variables))
    assert by_variables == (expected if name != "two_heads" else {"first/kernel"})


def by_muon(optimizer, model):
    """The last parts of the paths of the weights that the matrix sign steps."""
    return short([model.trainable_variables[i] for i in optimizer._hidden])


@pytest.mark.parametrize("curve", [False, True])
def test_every_matrix_between_the_ends_is_muons(curve):
    model, _ = transformer()
    model = kc.curved(model) if curve else model
    optimizer = kc.Muon()
    model.compile(optimizer, "sparse_categorical_crossentropy")
    tokens = np.random.default_rng(0).integers(0, 11, (4, 7))
    model.fit(tokens, tokens, verbose=0)
    assert by_muon(optimizer, model) == {
        *(f"{part}/kernel" for part in ("query", "key", "value", "attention_output", "hidden"))
    }  # and neither the biases of attention, which have two axes, nor those of the normalization
    assert optimizer.adam_for is None


def two_towers():
    """Two outputs from models whose layers have the same names, and so their weights the same paths."""
    given = keras.Input((4,))
    towers = []
    for name, units in (("a", 3), ("b", 2)):
        inner = keras.Input((4,))
        kernels = layers.Dense(units, name="out")(layers.Dense(6, name="hidden")(inner))
        towers.append(keras.Model(inner, kernels, name=name)(given))
    head = layers.Dense(2, name="out")(towers[1])
    return keras.Model(given, [towers[0], head]), {"out/kernel"}


def sign_of_soap():
    return kc.SOAP(sign=True)


@pytest.mark.parametrize(
    "make, build",
    some(
        list(itertools.product([kc.Muon, kc.Scion, sign_of_soap], [two_heads, two_towers])),
        [(kc.Muon, two_towers), (sign_of_soap, two_heads)],
    ),
)
def test_what_only_the_model_knows_is_kept_in_its_file(make, build, tmp_path):
    """A loaded file is a plain model, which does not show its layers: it trains on as the curved one."""
    (model, _), x = build(), np.random.default_rng(0).standard_normal((4, 4)).astype("float32")
    y = [np.ones((4, 3)), np.ones((4, 2))]
    model = kc.curved(model)
    model.compile(make(), "mse")
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")  # a warning here would be an error
    again = kc.curved(keras.models.load_model(tmp_path / "model.keras"))
    for each in (model, loaded, again):
        each.fit(x, y, verbose=0, shuffle=False)
        assert len(each.optimizer._hidden) == {two_heads: 1, two_towers: 3}[build]
        assert each.optimizer._hidden == model.optimizer._hidden
        for a, b in zip(each.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)  # the signs of Muon amplify rounding
    assert loaded.optimizer.get_config()["ends"] == model.optimizer.get_config()["ends"]


def test_the_ends_of_another_model_are_not_those_of_this_one():
    model, _ = two_heads()
    model = kc.curved(model)
    model.compile(kc.Muon(), "mse")
    model.optimizer.build(model.trainable_variables)
    config = model.optimizer.get_config()
    other = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(5), layers.Dense(1)])
    optimizer = kc.Muon.from_config(config)
    with pytest.warns(UserWarning, match="notes the embeddings and output layers of a model with other weights"):
        optimizer.build(other.trainable_variables)
    assert len(optimizer._hidden) == 2 and "ends" not in optimizer.get_config()
    # an optimizer that has met a curved model, and trains another one that does not show itself
    met = kc.Scion()
    kc.curved(two_heads()[0]).compile(met, "mse")
    assert met.ends(other.trainable_variables) == [other.trainable_variables[4]]


def test_adam_for_names_what_adam_steps():
    model, _ = two_heads()
    optimizer = kc.Muon(adam_for=["first", "hidden/k"])
    optimizer.build(model.trainable_variables)
    assert by_muon(optimizer, model) == {"second/kernel"}
    with pytest.warns(UserWarning, match="(?s)`Muon`: `adam_for`: .'third'. are in none of the paths.*second/kernel"):
        kc.Muon(adam_for=["third"]).build(model.trainable_variables)


def test_a_layer_of_one_output_is_the_output_layer():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6), layers.Dense(5, name="hidden"), layers.Dense(1)])
    optimizer = kc.Muon()
    optimizer.build(model.trainable_variables)
    assert len(optimizer._hidden) == 2


def test_the_bad_are_told():
    wrong = {"momentum": 1.0, "beta_1": -0.1, "beta_2": 1, "epsilon": 0, "scale": "adam", "sign": kc.EigenRoot(),
             "adam_for": "dense", "adam_rate": -1.0, "normalization": "rows", "part": 0.5}  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`Muon`: `{name}`"):
            kc.Muon(**{name: value})
    for wrong in ({"per": "row"}, {"beta": 1.0}):
        with pytest.raises(ValueError, match=f"`SecondMoment`: `{next(iter(wrong))}`"):
            kc.SecondMoment(**wrong)
    for component, argument, value in (
        (kc.LowRankPart, "rank", 0), (kc.LowRankPart, "rank", 1.5), (kc.LowRankPart, "rank", None),
        (kc.RowPart, "fraction", 0), (kc.GradientMoment, "beta", 1.0), (kc.GradientMoment, "epsilon", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{component.__name__}`: `{argument}`"):
            component(**{argument: value})
    with pytest.raises(ValueError, match="`Muon`: `nesterov` must be False with a `part`"):
        kc.Muon(part=kc.RowPart())
    with pytest.raises(ValueError, match="`Muon`: `normalization` must be None with a `part`"):
        kc.Muon.dion(normalization=kc.SecondMoment())
