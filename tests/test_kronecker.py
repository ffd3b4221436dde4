"""Kronecker factors against dense Fisher matrices made of Jacobians, and against layers written out, in float64."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import MODELS, flat
from keras import layers
from selection import some

import keras_curvature as kc
from keras_curvature import Linearization
from keras_curvature.linearization.estimates import factors
from keras_curvature.linearization.layers import kronecker
from keras_curvature.operators import dense
from keras_curvature.operators.kronecker import BlockDiagonal, InEigenbasis, KroneckerProduct
from keras_curvature.optimizers.kfac import KFAC

pytestmark = pytest.mark.usefixtures("in_float64")


class Problem:
    """A stack of layers with its batch; weights, inputs and targets are drawn from a seed.

    Args:
        shape: Of one input.
        stack: Layers, with the output layer.
        examples: In the batch.
        classes: Whether the loss is that of class labels, over the last axis, or the squared error.
        sharing: As of `kronecker.blocks`.
    """

    def __init__(self, shape, stack, examples=3, classes=False, sharing="expand", seed=0):
        keras.utils.set_random_seed(seed)
        random = np.random.default_rng(seed)
        self.model = keras.Sequential([keras.Input(shape), *stack])
        for v in self.model.trainable_variables:
            v.assign(0.7 * random.standard_normal(v.shape))
        self.x = random.standard_normal((examples, *shape))
        said = self.model.output_shape[1:]
        labels = random.integers(0, said[-1], (examples, *said[:-1]))
        self.y = labels if classes else random.standard_normal((examples, *said))
        self.classes = classes
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if classes else "mse"
        self.model.compile(loss=loss)
        self.blocks, self.diagonal, self.unsupported = kronecker.blocks(self.model, sharing)

    def lin(self, **options):
        """The linearization of the batch."""
        return Linearization(self.model, self.x, self.y, **options)

    def factors(self, fisher="exact", **options):
        """`[(A, G)]` as numpy arrays."""
        return [[f.numpy() for f in pair] for pair in self.lin(**options).kronecker_factors(self.blocks, (), fisher)[0]]

    def jacobian(self, block):
        """`(examples, outputs, weights)` of the outputs in the weights of a block: kernel, then bias."""
        variables = [self.model.trainable_variables[i] for i in block.variables]
        with tf.GradientTape() as tape:
            outputs = self.model(self.x, training=True)
        found = [j.numpy() for j in tape.jacobian(outputs, variables)]
        n, outputs = len(self.x), int(np.prod(outputs.shape[1:]))
        return np.concatenate([j.reshape(n, outputs, -1) for j in found], -1)

    def output_hessian(self):
        """Second derivative of the loss in the outputs of each example, `(examples, outputs, outputs)`."""
        said = self.model(self.x, training=True).numpy()
        n, entries = len(said), int(np.prod(said.shape[1:]))
        if not self.classes:
            return np.tile(2.0 * np.eye(entries) / (n * entries), (n, 1, 1))
        p = np.exp(said) / np.exp(said).sum(-1, keepdims=True)
        rows = entries // p.shape[-1]
        own = np.einsum("nrc,cd->nrcd", p.reshape(n, rows, -1), np.eye(p.shape[-1]))
        own -= np.einsum("nrc,nrd->nrcd", p.reshape(n, rows, -1), p.reshape(n, rows, -1))
        return np.einsum("nrcd,rs->nrcsd", own, np.eye(rows)).reshape(n, entries, entries) / (n * rows)

    def fisher(self, block):
        """The block of the Fisher matrix, dense."""
        J = self.jacobian(block)
        return np.einsum("nki,nkl,nlj->ij", J, self.output_hessian(), J)


def close(ours, theirs, tolerance=1e-10):
    """Equal up to rounding, of the largest."""
    np.testing.assert_allclose(ours, theirs, tolerance, tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("without", ["scale", "center"])
def test_frozen_normalization_has_no_block(without):
    stack = [layers.Dense(3), layers.BatchNormalization(**{without: False}), layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,)), *stack])
    stack[1].trainable = False
    found, diagonal, unsupported = kronecker.blocks(model)
    assert [block.variables for block in found] == [(0, 1), (2, 3)] and not diagonal and not unsupported


# Where Kronecker factors are the whole truth.


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("classes", [False, True])
def test_one_dense_layer_and_one_example_is_exact(classes, sharing):
    problem = Problem((4,), [layers.Dense(3)], examples=1, classes=classes, sharing=sharing)
    ((A, G),) = problem.factors()
    close(np.kron(A, G), problem.fisher(problem.blocks[0]))


@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear_network_with_squared_loss_is_exact(bias):
    problem = Problem((4,), [layers.Dense(3, use_bias=bias), layers.Dense(5), layers.Dense(2)], examples=6)
    for block, (A, G) in zip(problem.blocks, problem.factors()):
        close(np.kron(A, G), problem.fisher(block))


def test_expand_is_exact_for_linear_networks_with_a_loss_at_each_position():
    stack = [layers.Dense(3), layers.EinsumDense("btc,cd->btd", (5, 4), bias_axes="d"), layers.Dense(2)]
    problem = Problem((5, 3), stack)
    for block, (A, G) in zip(problem.blocks, problem.factors()):
        close(np.kron(A, G), problem.fisher(block))


def test_reduce_is_exact_for_linear_networks_that_average_the_positions():
    problem = Problem((5, 3), [layers.Dense(4), layers.Dense(3), layers.GlobalAveragePooling1D()], sharing="reduce")
    for block, (A, G) in zip(problem.blocks, problem.factors()):
        close(np.kron(A, G), problem.fisher(block))
    expanded = Problem((5, 3), [layers.Dense(4), layers.Dense(3), layers.GlobalAveragePooling1D()])
    assert not np.allclose(problem.factors()[0][0], expanded.factors()[0][0])


def test_expand_and_reduce_agree_where_there_is_one_position():
    def stack():
        return [layers.Conv2D(3, (4, 5), activation="tanh"), layers.Reshape((1, 3)), layers.Dense(2), layers.Flatten()]

    pairs = [Problem((4, 5, 2), stack(), classes=True, sharing=sharing).factors() for sharing in ("expand", "reduce")]
    for ours, theirs in zip(*pairs):
        for a, b in zip(ours, theirs):
            close(a, b)


NORMALIZATIONS = {
    "layer": layers.LayerNormalization, "rms": layers.RMSNormalization, "group": lambda: layers.GroupNormalization(2),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_scale_and_shift_have_their_exact_blocks(name):
    problem = Problem((3, 4), [NORMALIZATIONS[name](), layers.Activation("tanh"), layers.Flatten(), layers.Dense(2)])
    block, (A, G) = problem.blocks[0], problem.factors()[0]
    F = problem.fisher(block)
    close(G, np.ones((4, 1, 1)))
    for c in range(4):
        own = [c, c + 4][: A.shape[-1]]
        close(A[c], F[np.ix_(own, own)])


# Layers written out.


def unrolled(x, kernel_size, strides, dilation, padding):
    """Patches of images, `(examples, positions, taps * channels)`, one pixel after another."""
    n, height, width, channels = x.shape
    begins, counts = [], []
    for size, k, s, d in zip((height, width), kernel_size, strides, dilation):
        reach = (k - 1) * d + 1
        count = -(-size // s) if padding == "same" else (size - reach) // s + 1
        begins.append(-(max((count - 1) * s + reach - size, 0) // 2) if padding == "same" else 0)
        counts.append(count)
    found = np.zeros((n, *counts, *kernel_size, channels))
    for i, j, p, q in itertools.product(*map(range, (*counts, *kernel_size))):
        row, column = begins[0] + i * strides[0] + p * dilation[0], begins[1] + j * strides[1] + q * dilation[1]
        if 0 <= row < height and 0 <= column < width:
            found[:, i, j, p, q] = x[:, row, column]
    return found.reshape(n, counts[0] * counts[1], -1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "kernel_size, strides, dilation, padding",
    [((2, 3), (1, 1), (1, 1), "valid"), ((3, 2), (2, 3), (1, 1), "same"), ((2, 2), (1, 1), (2, 3), "same")],
)
def test_convolution_has_the_factors_of_the_unrolled_dense_layer(kernel_size, strides, dilation, padding, sharing):
    options = {"strides": strides, "dilation_rate": dilation, "padding": padding, "activation": "tanh"}
    stack = [layers.Conv2D(3, kernel_size, **options), layers.Flatten(), layers.Dense(4)]
    image = Problem((5, 6, 2), stack, classes=True, sharing=sharing)
    patches = unrolled(image.x, kernel_size, strides, dilation, padding)
    stack = [layers.Dense(3, activation="tanh"), layers.Flatten(), layers.Dense(4)]
    matrix = Problem(patches.shape[1:], stack, classes=True, sharing=sharing)
    weights = image.model.get_weights()
    matrix.model.set_weights([weights[0].reshape(-1, 3), *weights[1:]])
    matrix.x, matrix.y = patches, image.y
    for ours, theirs in zip(image.factors(), matrix.factors()):
        for a, b in zip(ours, theirs):
            close(a, b)


@pytest.mark.parametrize("depthwise", [False, True])
def test_groups_have_the_factors_of_separate_convolutions(depthwise):
    layer = layers.DepthwiseConv2D(2, depth_multiplier=3) if depthwise else layers.Conv2D(6, 2, groups=2)
    parts, filters = (4, 3) if depthwise else (2, 3)
    grouped = Problem((4, 4, 4), [layer, layers.Activation("tanh"), layers.Flatten(), layers.Dense(2)])

    class Apart(layers.Layer):
        def __init__(self):
            super().__init__()
            self.made = [layers.Conv2D(filters, 2) for _ in range(parts)]

        def build(self, shape):
            for made in self.made:
                made.build((*shape[:-1], shape[-1] // parts))

        def call(self, x):
            return tf.concat([made(part) for made, part in zip(self.made, tf.split(x, parts, -1))], -1)

    apart = Problem((4, 4, 4), [Apart(), layers.Activation("tanh"), layers.Flatten(), layers.Dense(2)])
    kernel, bias, *others = grouped.model.get_weights()
    if depthwise:
        kernel = kernel.transpose(0, 1, 3, 2).reshape(2, 2, 1, 3, 4).transpose(4, 0, 1, 2, 3)
    else:
        kernel = kernel.reshape(2, 2, 2, 2, 3).transpose(3, 0, 1, 2, 4)
    pairs = zip(kernel, bias.reshape(parts, filters))
    apart.model.set_weights([*[w for pair in pairs for w in pair], *others])
    apart.x, apart.y = grouped.x, grouped.y
    (A, G), last = grouped.factors()
    *of_parts, other = apart.factors()
    for g, (ours, theirs) in enumerate(of_parts):
        close(A[g], ours)
        close(G[g], theirs)
    close(last[1], other[1])


def test_embedding_has_the_factors_of_a_dense_layer_on_unit_vectors():
    words = np.random.default_rng(1).integers(0, 5, (4, 3))
    stack = [layers.Activation("tanh"), layers.Flatten(), layers.Dense(2)]
    one_hot = Problem((3, 5), [layers.Dense(4, use_bias=False), *stack], examples=4)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(5, 4), *stack[:2], layers.Dense(2)])
    model.set_weights(one_hot.model.get_weights())
    model.compile(loss="mse")
    one_hot.x, lin = np.eye(5)[words], Linearization(model, words, one_hot.y)
    blocks, diagonal, _ = kronecker.blocks(model)
    assert not diagonal and blocks[0].kinds == ("diagonal", "matrix") and blocks[0].factor_shapes == ((5,), (4, 4))
    (A, G), _ = lin.kronecker_factors(blocks, fisher="exact")[0]
    theirs = one_hot.factors()[0]
    close(np.diag(A), theirs[0])
    close(G, theirs[1])
    U = np.linalg.eigh(G)[1]
    ours = lin.kronecker_second_moments(blocks[:1], [(None, tf.constant(U))], fisher="exact")[0][0]
    bases = [(tf.eye(5, dtype=tf.float64), tf.constant(U))]
    close(ours, one_hot.lin().kronecker_second_moments(one_hot.blocks[:1], bases, fisher="exact")[0][0])
    (a, b), _ = lin.kronecker_means(blocks)
    (c, d), _ = one_hot.lin().kronecker_means(one_hot.blocks)
    close(a, c)
    close(b, d)


def steps(kind, x, kernel, recurrent, bias, zeros):
    """A recurrent layer written out: states before each step, and the last one; `zeros` are added to its gates."""
    units, sigmoid, tanh = recurrent.shape[0], tf.sigmoid, tf.tanh
    h = c = tf.zeros((len(x), units), tf.float64)
    before = []
    for t in range(x.shape[1]):
        before.append(h)
        if kind == "gru":
            said = x[:, t] @ kernel + bias[0] + zeros[0][:, t]
            again = h @ recurrent + bias[1] + zeros[1][:, t]
            (z, r, new), (rz, rr, rh) = tf.split(said, 3, 1), tf.split(again, 3, 1)
            z, r = sigmoid(z + rz), sigmoid(r + rr)
            h = z * h + (1 - z) * tanh(new + r * rh)
            continue
        said = x[:, t] @ kernel + h @ recurrent + bias + zeros[0][:, t]
        if kind == "simple_rnn":
            h = tanh(said)
        else:
            i, f, new, o = tf.split(said, 4, 1)
            c = sigmoid(f) * c + sigmoid(i) * tanh(new)
            h = sigmoid(o) * tanh(c)
    return tf.stack(before, 1), h


RECURRENT = {"simple_rnn": layers.SimpleRNN, "lstm": layers.LSTM, "gru": layers.GRU}


@pytest.mark.parametrize("backwards", some([False, True], [True]))
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_have_the_factors_of_the_steps_written_out(kind, backwards):
    problem = Problem((4, 3), [RECURRENT[kind](2, go_backwards=backwards), layers.Dense(2)])
    kernel, recurrent, bias, W, b = map(tf.constant, problem.model.get_weights())
    zeros = [tf.zeros((3, 4, kernel.shape[1]), tf.float64)] * 2
    x = problem.x[:, ::-1] if backwards else problem.x
    with tf.GradientTape() as tape:
        parts = [tf.identity(z) for z in zeros]
        tape.watch(parts)
        before, last = steps(kind, tf.constant(x), kernel, recurrent, bias, parts)
        loss = tf.reduce_mean(tf.square(last @ W + b - problem.y))
    d = tape.gradient(loss, parts)
    d = [d[0], d[0] if d[1] is None else d[1]]
    ones = np.ones((3, 4, 1))
    after = np.concatenate([before, ones], -1) if kind == "gru" else before.numpy()  # a bias of its own
    wanted = [(np.concatenate([x, ones], -1), d[0]), (after, d[1])]
    for (A, G), (a, slope) in zip(problem.factors("empirical"), wanted):
        close(A, np.einsum("nti,ntj->ij", a, a) / 12)
        close(G, 6 * np.einsum("nti,ntj->ij", slope, slope))  # of a mean over 3 examples and 2 outputs


def test_calls_of_a_layer_are_positions():
    one, two = keras.Input((3,)), keras.Input((3,))
    both = layers.Dense(3, activation="tanh")
    model = keras.Model([one, two], layers.Dense(2)(both(both(one)) + both(two)))
    model.compile(loss="mse")
    x, y = np.random.default_rng(0).standard_normal((2, 4, 3)), np.random.default_rng(1).standard_normal((4, 2))
    blocks, _, _ = kronecker.blocks(model)
    lin = Linearization(model, list(x), y)
    (A, _), _ = lin.kronecker_factors(blocks, fisher="empirical")[0]
    seen = [np.concatenate([a, np.ones((4, 1))], 1) for a in (*x, both(x[0]).numpy())]
    close(A, sum(a.T @ a for a in seen) / 12)
    M, _ = lin.kronecker_second_moments(blocks, [(None, None)] * 2, fisher="empirical")[0]
    squares = 0
    for n in range(4):  # each example's own gradient
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model([x[0, n : n + 1], x[1, n : n + 1]]) - y[n]))
        own = [g.numpy().reshape(-1, 3) for g in tape.gradient(loss, both.trainable_variables)]
        squares += np.concatenate(own) ** 2
    close(M, 2 * squares / 4)  # each output is a draw of its own, of weight 1/2


def test_rows_that_all_examples_share_count_once():
    class Positions(layers.Layer):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(4, 3)

        def build(self, shape):
            self.embedding.build()

        def call(self, x):
            return x + self.embedding(tf.range(4))

    problem = Problem((4, 3), [Positions(), layers.Activation("tanh"), layers.Flatten(), layers.Dense(2)])
    block, (A, G) = problem.blocks[0], problem.factors("empirical")[0]
    with tf.GradientTape() as tape:
        loss = problem.model.compute_loss(problem.x, problem.y, problem.model(problem.x))
    (g,) = tape.gradient(loss, [problem.model.trainable_variables[block.variables[0]]])
    g = tf.convert_to_tensor(g).numpy()
    close(A, np.full(4, 0.25))
    close(G, 6 * g.T @ g)  # of a mean over 3 examples and 2 outputs
    moments = problem.lin().kronecker_second_moments([block], [(None, None)], fisher="empirical")[0][0]
    close(moments, 6 * g**2)


# Labels.


def test_sampled_factors_tend_to_the_exact_ones():
    problem = Problem((3,), [layers.Dense(3, activation="tanh"), layers.PReLU(), layers.Dense(3)], classes=True)

    @tf.function
    def sampled(seed):
        pairs, diagonals = problem.lin().kronecker_factors(problem.blocks, problem.diagonal, "sampled", seed)
        return [G for _, G in pairs], diagonals

    exact, _ = problem.lin().kronecker_factors(problem.blocks, (), "exact")
    drawn = [tf.nest.flatten(sampled(tf.constant(seed))) for seed in range(400)]
    wanted = [*[G.numpy() for _, G in exact], np.diag(alone(problem, problem.diagonal[0]))]
    for found, expected in zip(zip(*drawn), wanted):
        found = np.stack(found)
        error = np.abs(found.mean(0) - expected) / (found.std(0) / np.sqrt(len(found)) + 1e-12)
        assert error.max() < 4.5, error.max()
        assert found.std(0).max() > 1e-3


def test_factors_and_moments_of_one_seed_share_their_backward_pass():
    problem = Problem((3,), [layers.Dense(3, activation="tanh"), layers.Dense(3)], classes=True)
    eyes = [(tf.eye(4, dtype="float64"), tf.eye(3, dtype="float64"))] * 2

    def draws(same_tensor):
        @tf.function
        def both(seed):
            lin, other = problem.lin(), seed if same_tensor else tf.identity(seed)
            factors, _ = lin.kronecker_factors(problem.blocks, (), "sampled", seed)
            return factors, lin.kronecker_second_moments(problem.blocks, eyes, (), "sampled", other)[0]

        graph = both.get_concrete_function(tf.constant(3)).graph
        found = [op for op in graph.get_operations() if "StatelessRandom" in op.type and "Uniform" in op.type]
        return len(found), both(tf.constant(3))

    (once, shared), (twice, apart) = draws(True), draws(False)
    assert (once, twice) == (1, 2)
    for a, b in zip(tf.nest.flatten(shared), tf.nest.flatten(apart)):
        np.testing.assert_array_equal(a, b)


def alone(problem, index):
    """The dense Fisher block of one variable."""
    block = type("Variable", (), {"variables": (index,)})
    return problem.fisher(block)


def test_exact_diagonal_of_other_weights_is_unbiased():
    problem = Problem((3,), [layers.Dense(3), layers.PReLU(), layers.Dense(2)], classes=True)
    assert [path.split("/")[-1] for path in problem.unsupported] == ["alpha"]

    @tf.function
    def estimate(seed):
        return problem.lin().kronecker_factors(problem.blocks, problem.diagonal, "exact", seed)[1][0]

    found = np.stack([estimate(tf.constant(seed)) for seed in range(300)])
    error = np.abs(found.mean(0) - np.diag(alone(problem, 2))) / (found.std(0) / np.sqrt(len(found)) + 1e-12)
    assert error.max() < 4.5


# Second moments in an eigenbasis.

SHARED = {
    "dense": ((3,), lambda: [layers.Dense(4, activation="tanh"), layers.Dense(3)]),
    "positions": ((4, 3), lambda: [layers.Dense(4, activation="tanh"), layers.Flatten(), layers.Dense(3)]),
    "conv2d": ((4, 4, 2), lambda: [layers.Conv2D(2, 2, activation="tanh"), layers.Flatten(), layers.Dense(3)]),
}


def eigenbases(pairs):
    return [tuple(np.linalg.eigh(factor)[1] for factor in pair) for pair in pairs]


@pytest.mark.parametrize("sharing", some(["expand", "reduce"], ["expand"]))
@pytest.mark.parametrize("name", SHARED)
def test_eigenbasis_is_never_further_from_the_fisher_than_the_factors(name, sharing):
    shape, stack = SHARED[name]
    problem = Problem(shape, stack(), examples=5, classes=True, sharing=sharing)
    pairs = problem.factors()
    bases = eigenbases(pairs)
    moments, _ = problem.lin().kronecker_second_moments(problem.blocks, bases, (), "exact")
    for block, (A, G), (U, V), s in zip(problem.blocks, pairs, bases, moments):
        F, basis = problem.fisher(block), np.kron(U, V)
        close(s.numpy().ravel(), np.diag(basis.T @ F @ basis))
        rotated = basis @ np.diag(s.numpy().ravel()) @ basis.T
        ours, theirs = np.linalg.norm(F - rotated), np.linalg.norm(F - np.kron(A, G))
        assert ours <= theirs * (1 + 1e-12)
        assert ours < 0.999 * theirs or A.shape[0] * G.shape[0] == len(problem.x)


def test_gradients_of_examples_are_squared_in_pieces_where_they_are_many(monkeypatch):
    shape, stack = SHARED["conv2d"]
    problem = Problem(shape, stack(), examples=5, classes=True)
    bases = eigenbases(problem.factors("empirical"))

    @tf.function(input_signature=[tf.TensorSpec((None, *shape), tf.float64), tf.TensorSpec((None,), tf.int64)])
    def of_any_length(x, y):
        return Linearization(problem.model, x, y).kronecker_second_moments(problem.blocks, bases, (), "empirical")[0]

    whole = problem.lin().kronecker_second_moments(problem.blocks, bases, (), "empirical")[0]
    unknown = of_any_length(problem.x, problem.y)
    monkeypatch.setattr(factors, "AT_A_TIME", 40)  # two examples of the first block
    pieces = problem.lin().kronecker_second_moments(problem.blocks, bases, (), "empirical")[0]
    for a, b, c in zip(whole, pieces, unknown):
        close(a, b)
        close(a, c)


# Means.


@pytest.mark.parametrize("name", SHARED)
def test_means_are_those_of_single_examples(name):
    shape, stack = SHARED[name]
    problem = Problem(shape, stack(), examples=5, classes=True)
    lin = problem.lin()
    a, b = lin.kronecker_means(problem.blocks)[-1]
    model = problem.model
    hidden = keras.Model(model.inputs, model.layers[-1].input)([problem.x]).numpy()
    said = model(problem.x).numpy()
    p = np.exp(said) / np.exp(said).sum(1, keepdims=True)
    close(a, [*hidden.mean(0), 1.0])
    close(b, (p - np.eye(3)[problem.y]).mean(0))
    assert lin.is_known("gradient")
    for ours, theirs in zip(lin.gradient, problem.lin().gradient):
        close(ours, theirs.numpy())
    if name == "conv2d":  # of patches and positions
        a, b = lin.kronecker_means(problem.blocks)[0]
        close(a, [*unrolled(problem.x, (2, 2), (1, 1), (1, 1), "valid").mean((0, 1)), 1.0])
        close(b, lin.gradient[1].numpy() / 9)


# However the batch is cut, wherever it is computed.


def orthonormal(like):
    return tf.linalg.qr(np.random.default_rng(0).standard_normal(like.shape))[0]


def everything(lin, blocks, diagonal):
    """Means, factors, diagonals and second moments, flat."""
    means = lin.kronecker_means(blocks)
    found = lin.kronecker_factors(blocks, diagonal, "sampled", 3)
    bases = [tuple(orthonormal(f) if f.shape.rank > 1 else None for f in pair) for pair in found[0]]
    return tf.nest.flatten([means, found, lin.kronecker_second_moments(blocks, bases, diagonal, "sampled", 3)])


CUT = ["dense", "conv2d", "dropout", "prelu", "embedding", "layer_normalization", "depthwise_conv"]


@pytest.mark.parametrize("name", some(CUT, ["conv2d", "dropout", "embedding", "layer_normalization"]))
def test_micro_batches_make_up_the_whole(name):
    case = MODELS[name]().compile()
    blocks, diagonal, _ = kronecker.blocks(case.model)
    whole, halves, uneven = (
        everything(Linearization(case.model, *case.batch, micro_batches=n), blocks, diagonal) for n in (1, 2, 4)
    )
    for a, b, c in zip(whole, halves, uneven):
        close(b, a.numpy())
        close(c, a.numpy())


TRACED = ["dense", "conv2d", "lstm", "attention", "batch_normalization", "embedding", "depthwise_conv", "bidirectional"]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", TRACED)
def test_graphs_and_xla_compute_the_same(name, compiled, micro_batches):
    case = MODELS[name]().compile()
    blocks, diagonal, _ = kronecker.blocks(case.model)
    batch = [None if a is None else tf.constant(a) for a in case.batch]

    def run():
        lin = Linearization(case.model, *batch, micro_batches=micro_batches)
        means = lin.kronecker_means(blocks)
        found = tf.cond(
            lin.loss > -1.0, lambda: lin.kronecker_factors(blocks, diagonal, "empirical"),
            lambda: lin.kronecker_factors(blocks, diagonal, "empirical"),
        )  # fmt: skip
        bases = [tuple(orthonormal(f) if f.shape.rank > 1 else None for f in pair) for pair in found[0]]
        return tf.nest.flatten([means, found, lin.kronecker_second_moments(blocks, bases, diagonal, "empirical")])

    dropout = name == "attention" and compiled  # draws other masks there
    for a, b in zip(run(), tf.function(run, jit_compile=compiled)()):
        assert a.shape == b.shape and (dropout or np.allclose(a, b, 1e-9, 1e-11))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_the_loss_scale_of_half_precision_is_taken_out_again(fisher):
    problem = Problem((3,), [layers.Dense(3, activation="tanh"), layers.PReLU(), layers.Dense(2)], classes=True)
    lins = [problem.lin(), problem.lin(loss_scale=tf.constant(1024.0, tf.float64))]
    found = [lin.kronecker_factors(problem.blocks, problem.diagonal, fisher) for lin in lins]
    for plain, scaled in zip(*map(tf.nest.flatten, found)):
        close(scaled, plain.numpy())
    for plain, scaled in zip(*[tf.nest.flatten(lin.kronecker_means(problem.blocks)) for lin in lins]):
        close(scaled, plain.numpy())


@pytest.mark.parametrize("name", ["conv2d", "layer_normalization"])
def test_half_precision_gives_factors_in_single(name):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    cases = [MODELS[name]().compile()]
    keras.config.set_dtype_policy("mixed_bfloat16")
    cases.append(MODELS[name]().compile())
    found = []
    for case in cases:
        case.model.set_weights(cases[0].model.get_weights())
        blocks, diagonal, _ = kronecker.blocks(case.model)
        lin = Linearization(case.model, *cases[0].batch)
        found.append(tf.nest.flatten(lin.kronecker_factors(blocks, diagonal, "empirical")))
    for single, half in zip(*found):
        assert half.dtype == tf.float32
        np.testing.assert_allclose(half, single, 0.1, 0.05 * np.abs(single).max())


def test_a_layer_that_the_loss_does_not_reach_has_factors_of_zeros():
    class Idle(layers.Layer):
        def __init__(self):
            super().__init__()
            self.unused, self.unread = layers.Dense(2), layers.Dense(2)

        def build(self, shape):
            self.unused.build(shape)
            self.unread.build(shape)

        def call(self, x):
            self.unread(x)
            return x

    problem = Problem((3,), [Idle(), layers.Dense(2)])
    (A, G), (B, H), _ = problem.factors()
    assert not A.any() and not G.any() and B.any() and not H.any()


# What it costs.


def operations(function, kinds):
    """How many operations of some kinds the results of a traced function depend on."""
    graph = function.get_concrete_function().graph
    reached, queue = set(), [t.op for t in graph.outputs]
    while queue:
        op = queue.pop()
        if op.name not in reached:
            reached.add(op.name)
            queue += [t.op for t in op.inputs]
    return sum(graph.get_operation_by_name(name).type in kinds for name in reached)


def test_factors_cost_one_pass_to_the_activations_and_share_the_forward_pass():
    problem = Problem((4,), [layers.Dense(5, activation="tanh"), layers.Dense(6, activation="tanh"), layers.Dense(3)])
    x, y = tf.constant(problem.x), tf.constant(problem.y)

    @tf.function
    def gradient():
        return Linearization(problem.model, x, y).gradient

    @tf.function
    def with_factors():
        lin = Linearization(problem.model, x, y)
        return lin.gradient, lin.kronecker_factors(problem.blocks, (), "sampled")

    @tf.function
    def with_means():
        lin = Linearization(problem.model, x, y)
        return lin.kronecker_means(problem.blocks), lin.gradient

    # 3 products forward, 3 for the weights and 2 for the activations backward; 2 backward again; 2 for each block
    assert operations(gradient, ["MatMul"]) == 8
    assert operations(with_factors, ["MatMul"]) == 8 + 2 + 6
    assert operations(with_means, ["MatMul"]) == 8


def depthwise():
    """One output for each of the groups."""
    return layers.DepthwiseConv1D(2)


@pytest.mark.parametrize("make", some([layers.LayerNormalization, depthwise], [depthwise]))
def test_groups_with_one_output_train_in_a_graph(make):
    # whose factors of one number, in a condition, have cost TensorFlow 2.21 all results of the step
    problem = Problem((3, 4), [make(), layers.Flatten(), layers.Dense(2)], classes=True)
    model = kc.curved(problem.model)
    model.compile(KFAC(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(problem.x, problem.y, batch_size=3, epochs=3, verbose=0).history
    assert history["skipped_steps"] == [0, 0, 0] and history["loss"][-1] < history["loss"][0]


# Operators.


def random_factor(random, d, groups=()):
    root = random.standard_normal((*groups, d, d))
    return tf.constant(root @ np.swapaxes(root, -1, -2))


def test_kronecker_products_multiply_as_their_matrices_do():
    random = np.random.default_rng(0)
    A, G, diagonal = random_factor(random, 3), random_factor(random, 2), tf.constant(random.random(3))
    like = [tf.zeros((3, 2), tf.float64)]
    close(dense(KroneckerProduct(A, G), like), np.kron(A, G))
    close(dense(KroneckerProduct(diagonal, G), like), np.kron(np.diag(diagonal), G))
    (a, U), (g, V) = np.linalg.eigh(A), np.linalg.eigh(G)
    close(dense(InEigenbasis(tf.constant(U), tf.constant(V), tf.constant(np.outer(a, g))), like), np.kron(A, G))
    values = tf.constant(np.outer(diagonal, g))
    close(dense(InEigenbasis(None, tf.constant(V), values), like), np.kron(np.diag(diagonal), G))
    groups = KroneckerProduct(random_factor(random, 3, (2,)), random_factor(random, 2, (2,)))
    W = tf.constant(random.standard_normal((2, 3, 2)))
    (image,) = groups @ [W]
    for g in range(2):
        close(image[g], (groups.A[g] @ W[g] @ groups.G[g]).numpy())
    assert groups.psd


def test_blocks_beside_a_diagonal_are_the_whole_matrix():
    problem = Problem((3,), [layers.Dense(2), layers.PReLU(), layers.Dense(2)], examples=1)
    pairs, diagonals = problem.lin().kronecker_factors(problem.blocks, problem.diagonal, "empirical")
    operators = [KroneckerProduct(*pair) for pair in pairs]
    F = BlockDiagonal(problem.blocks, operators, dict(zip(problem.diagonal, diagonals)))
    matrix = dense(F, problem.lin().weights).numpy()
    expected = np.zeros((16, 16))
    for block, begin in ((problem.blocks[0], 0), (problem.blocks[1], 10)):
        g = flat([problem.lin().gradient[i] for i in block.variables])
        expected[begin : begin + len(g), begin : begin + len(g)] = 2 * np.outer(g, g)  # one example: exact
    g = flat([problem.lin().gradient[2]])
    expected[8:10, 8:10] = 2 * np.diag(g * g)  # a mean over two outputs
    close(matrix, expected)
