"""Sampled, exact and empirical cotangents against dense Fisher and Gauss-Newton matrices, in float64."""

import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BATCH, LOSSES, MODELS, Case, flat, float64, normal
from keras import layers
from selection import some

import keras_curvature
from keras_curvature import Linearization
from keras_curvature.linearization.fisher import likelihoods
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.pure import slices
from keras_curvature.operators import dense


def masked(seed=0):
    """A class for each of four steps, of which some are masked."""
    random = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((4, 3)), layers.Masking(), layers.Dense(3)])
    x = normal(random, BATCH, 4, 3)
    x[0, 2:] = x[3, 1] = 0.0
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Case(model, x, random.integers(0, 3, (BATCH, 4)).astype("int32"), loss)


CASES = {"masked": masked, **MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
LIKELY = [
    "mse", "mse_sum", "mae", "poisson", "kl_divergence", "binary_from_logits", "binary_from_sigmoid", "binary_smoothed",
    "categorical_from_logits", "categorical_from_softmax", "categorical_smoothed", "sparse_from_logits",
    "sparse_from_softmax",
]  # fmt: skip
USUAL = [
    "mse_sum", "mae", "poisson", "kl_divergence", "binary_from_sigmoid", "categorical_smoothed", "sparse_from_logits",
]  # fmt: skip
UNLIKELY = ["hinge", "huber", "focal", "cosine_similarity", "own_compute_loss"]
# Where the second derivative of the loss in what it reads does not depend on the labels, it is the Fisher information.
GAUSS_NEWTON = [
    "loss_mse", "loss_mse_sum", "loss_binary_from_logits", "loss_binary_from_sigmoid", "loss_binary_smoothed",
    "loss_categorical_from_logits", "loss_categorical_from_softmax", "loss_categorical_smoothed",
    "loss_sparse_from_logits", "loss_sparse_from_softmax", "loss_sample_weights", "loss_loss_weights_list",
    "loss_one_output_without_loss", "loss_added_loss", "loss_activity_regularized", "several_outputs", "masked",
    "masked_outputs", "embedding_lstm",
]  # fmt: skip
USUAL_GAUSS_NEWTON = [
    "loss_mse_sum", "loss_binary_from_logits", "loss_categorical_smoothed", "loss_sparse_from_softmax",
    "loss_sample_weights", "loss_loss_weights_list", "several_outputs", "masked",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_float64():
    with float64():
        yield


def recorded(case):
    """`(linearization, its pass)` of a compiled case."""
    lin = Linearization(case.model, *case.batch)
    return lin, lin.passes.here().recorded


def pulled_apart(recording, cotangents):
    """`J_i' c_i` for each example `i`, an array `(examples, weights)`."""
    rows = []
    for i in range(BATCH):
        alone = [tf.concat([0 * c[:i], c[i : i + 1], 0 * c[i + 1 :]], 0) for c in cotangents]
        rows.append(np.concatenate([g.numpy().ravel() for g in recording.pull(alone)]))
    return np.stack(rows)


def outer(recording, cotangents):
    """`sum_i (J_i' c_i) (J_i' c_i)'`."""
    rows = pulled_apart(recording, cotangents)
    return rows.T @ rows


def information(name, says):
    """The Fisher information of one example by the books, `(d, d)`, in what the model says before any activation."""
    d = len(says)
    if name.startswith("mse"):
        return 2 * np.eye(d) / d
    if name == "mae":
        return np.eye(d) / d
    if name == "poisson":  # of a rate softplus(says): its derivative is the sigmoid
        return np.diag((1 / (1 + np.exp(-says))) ** 2 / np.log1p(np.exp(says))) / d
    if name.startswith("binary"):
        p = 1 / (1 + np.exp(-says))
        return np.diag(p * (1 - p)) / d
    p = np.exp(says) / np.exp(says).sum()
    return np.diag(p) - np.outer(p, p)


def by_the_books(name, case):
    """The Fisher matrix of the batch loss, dense: no label, no sampling, no Keras loss."""
    model = case.model
    hidden, last = model.layers
    with tf.GradientTape() as tape:
        says = hidden(case.x) @ last.kernel + last.bias
    jacobian = tape.jacobian(says, [v.value for v in model.trainable_variables])
    J = np.concatenate([j.numpy().reshape(*says.shape, -1) for j in jacobian], -1)  # (batch, d, weights)
    mean = 1.0 if name == "mse_sum" else 1.0 / BATCH
    return mean * sum(j.T @ information(name, s) @ j for j, s in zip(J, says.numpy()))


@pytest.mark.parametrize("name", some(LIKELY, USUAL))
def test_exact_cotangents_make_up_the_fisher_matrix(name):
    case = LOSSES[name]().compile()
    _, recording = recorded(case)
    found = sum(outer(recording, c) for c in recording.cotangents("exact"))
    # Keras' epsilon stands in the Poisson and Kullback-Leibler losses
    rtol = 1e-5 if name in ("poisson", "kl_divergence") else 1e-10
    expected = by_the_books(name, case)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("name", some(GAUSS_NEWTON, USUAL_GAUSS_NEWTON))
def test_exact_cotangents_make_up_the_gauss_newton_matrix_with_all_its_weights(name):
    lin, recording = recorded(CASES[name]().compile())
    found = sum(outer(recording, c) for c in recording.cotangents("exact"))
    if name in ("masked", "several_outputs"):  # positions and outputs one by one
        assert len(recording.cotangents("exact")) == {"masked": 4 * 3, "several_outputs": 2 + 3}[name]
    expected = dense(lin.gauss_newton(), lin.variables)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def many(name, examples=40000):
    """The case of a loss with one and the same example many times over, and labels of each."""
    case = LOSSES[name]()
    repeat = examples // BATCH
    x = np.repeat(case.x[:1], repeat * BATCH, 0)
    return Case(case.model, x, np.tile(case.y, [repeat] + [1] * (case.y.ndim - 1)), case.loss).compile()


@pytest.mark.parametrize("name", some(LIKELY, USUAL))
def test_sampled_cotangents_have_the_fisher_information_as_their_mean(name):
    case = many(name)
    _, recording = recorded(case)
    (c,) = [c.numpy() for c in recording.cotangents("sampled", seed=3)]
    exact = sum(np.einsum("i,j->ij", e[0].numpy()[0], e[0].numpy()[0]) for e in recording.cotangents("exact"))
    exact = exact * len(c)
    found = c.T @ c
    np.testing.assert_allclose(found, exact, atol=0.04 * np.abs(exact).max())
    if name != "kl_divergence":  # which is one of probabilities that sum up to 1, where they may go
        assert np.abs(c.mean(0)).max() < 0.02 * np.abs(c).max()  # no slope on the average
    other = recording.cotangents("sampled", seed=4)[0].numpy()
    assert np.abs(other - c).max() > 0


def test_sampled_labels_of_a_poisson_model_are_poisson():
    rates = np.repeat([[0.3, 4.0, 30.0, 90.0]], 50000, 0)
    uniform = np.random.default_rng(0).uniform(size=rates.shape)
    found = likelihoods.Poisson({}, False).sample(tf.constant(rates), lambda shape: tf.constant(uniform)).numpy()
    assert (found == np.round(found)).all() and found.min() == 0
    np.testing.assert_allclose(found.mean(0), rates[0], rtol=0.02)
    np.testing.assert_allclose(found.var(0), rates[0], rtol=0.03)
    np.testing.assert_allclose((found[:, 0] == 0).mean(), np.exp(-0.3), rtol=0.01)


@pytest.mark.parametrize("name", ["sample_weights", "several_outputs"])
def test_sampled_slopes_are_those_of_the_compiled_loss_with_other_labels(name):
    lin, recording = recorded((LOSSES.get(name) or MODELS[name])().compile())
    slopes, drawn = recording.sampled_slope(seed=5), recording.cotangents("sampled", seed=5)
    exact = recording.cotangents("exact")
    for i, (slope, c) in enumerate(zip(slopes, drawn)):
        # omega s and sqrt(omega) s: parallel, and their ratio is sqrt(omega)
        curvature = sum(np.square(e[i].numpy()).sum(-1) for e in exact)  # omega times the trace of the information
        ratio = np.linalg.norm(slope, axis=-1) / np.where(curvature > 0, np.linalg.norm(c, axis=-1), 1)
        np.testing.assert_allclose(slope, ratio[:, None] * c, atol=1e-14)
        assert (curvature > 0).sum() >= BATCH - 1
    total = lin.sampled_gradient(5)
    for a, b in zip(total, recording.pull(slopes)):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def of_rows(cotangents):
    """The outer product of each row of a tensor of cotangents with itself."""
    c = cotangents[0].numpy()
    return c[..., :, None] * c[..., None, :]


def classes(name):
    """A case with one label for each row; `masked`, of four steps, with a mean over all or a sum."""
    case = LOSSES[name]() if name in LOSSES else masked()
    if name == "masked_sum":
        case.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    return case


@pytest.mark.parametrize("name", ["masked", "masked_sum", "sample_weights", "sparse_from_softmax"])
def test_empirical_is_exact_on_the_average_over_the_classes_that_the_model_draws(name):
    case = classes(name)
    _, recording = recorded(case.compile())
    p, found = tf.nn.softmax(recording.leaves[0]).numpy(), 0
    for label in range(p.shape[-1]):
        case.y = np.full_like(case.y, label)
        c = recorded(case)[1].cotangents("empirical")
        found = found + p[..., label, None, None] * of_rows(c)
    expected = sum(of_rows(c) for c in recording.cotangents("exact"))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert expected.max() > 1e-3


@pytest.mark.parametrize("name", ["mse", "mse_sum"])
def test_empirical_is_exact_on_the_average_over_the_numbers_that_the_model_draws(name):
    case = LOSSES[name]()
    _, recording = recorded(case.compile())
    z = recording.leaves[0].numpy()
    patterns = list(itertools.product((-(0.5**0.5), 0.5**0.5), repeat=z.shape[-1]))  # as good as normal numbers
    found = 0
    for away in patterns:
        case.y = z + np.array(away)
        found = found + of_rows(recorded(case)[1].cotangents("empirical")) / len(patterns)
    expected = sum(of_rows(c) for c in recording.cotangents("exact"))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_mean_of_squared_gradients_is_of_whole_examples_whatever_the_loss_weighs():
    case = LOSSES["mse"]().compile()
    lin, recording = recorded(case)
    expected = 0
    for i in range(BATCH):
        own = Linearization(case.model, case.x[i : i + 1], case.y[i : i + 1]).gradient
        expected = expected + flat(own) ** 2 / BATCH
    np.testing.assert_allclose(flat(lin.squared_gradients()), expected, rtol=1e-10)
    scale = sum(np.square(c).sum() for c in recording.cotangents("empirical"))
    np.testing.assert_allclose(  # of a mean over the outputs, a likelihood is the product over them
        scale, case.y.shape[-1] * BATCH * sum(np.square(s).sum() for s in recording.slope), rtol=1e-10
    )


@pytest.mark.parametrize("left_out", [-1, 1])
def test_a_class_that_the_loss_leaves_out_has_no_weight(left_out):
    case = LOSSES["sparse_from_logits"]()
    case.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=left_out)
    case.y = np.where(np.arange(BATCH) < 2, left_out, 2).astype("int32")
    lin, recording = recorded(case.compile())
    found = sum(outer(recording, c) for c in recording.cotangents("exact"))
    np.testing.assert_allclose(found, dense(lin.gauss_newton(), lin.variables), atol=1e-12)
    assert not np.any(recording.cotangents("sampled")[0][:2])


@pytest.mark.parametrize("name", UNLIKELY)
def test_a_loss_that_is_no_likelihood_is_named(name):
    _, recording = recorded(LOSSES[name]().compile())
    # whoever has asked: not all of them have a `fisher`
    with pytest.raises(ValueError, match=r'loss=\w.*`SquareRootFreeAdam` have `fisher="empirical"`.*of `SophiaG`'):
        recording.cotangents("sampled")
    for c, slope in zip(recording.cotangents("empirical"), recording.slope, strict=True):
        np.testing.assert_allclose(c, np.sqrt(BATCH) * slope.numpy(), rtol=1e-14)  # an example is a draw


def test_what_is_no_fisher_matrix_is_refused():
    _, recording = recorded(LOSSES["mse"]().compile())
    with pytest.raises(ValueError, match='`fisher` must be "sampled", "empirical" or "exact". Received: fisher=1'):
        recording.cotangents(1)


def test_a_loss_of_ones_own_names_its_likelihood():
    def half_squares(y, z):
        return 0.5 * keras.ops.sum(keras.ops.square(y - z), -1)

    half_squares.likelihood = likelihoods.Gaussian
    case = LOSSES["mse"]()
    case.loss = half_squares
    lin, recording = recorded(case.compile())
    found = sum(outer(recording, c) for c in recording.cotangents("exact"))
    np.testing.assert_allclose(found, dense(lin.gauss_newton(), lin.variables), atol=1e-12)


def test_labels_are_those_of_the_whole_batch_however_it_is_cut():
    random = np.random.default_rng(0)
    x, y = normal(random, 12, 3), random.integers(0, 3, (12, 4)).astype("int32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.RepeatVector(4), layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    whole, cut = (Linearization(model, x, y, micro_batches=n) for n in (1, 3))
    blocks, _, _ = kronecker.blocks(model)
    true = [tf.nest.flatten(lin.kronecker_factors(blocks, fisher="empirical")) for lin in (whole, cut)]
    for a, b in [*zip(whole.sampled_gradient(7), cut.sampled_gradient(7)), *zip(*true)]:
        np.testing.assert_allclose(a, b, rtol=1e-10)
        assert np.abs(a).max() > 1e-3


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_an_output_that_no_trainable_weight_reaches_adds_nothing(kind):
    random = np.random.default_rng(0)
    with float64():
        inputs = keras.Input((3,))
        outputs = layers.Dense(2)(layers.Dense(4, activation="tanh")(inputs))
        frozen = layers.Dense(2, trainable=False)(inputs)
        one, two = keras.Model(inputs, outputs), keras.Model(inputs, [outputs, frozen])
        x, y = (tf.constant(normal(random, BATCH, n)) for n in (3, 2))
        one.compile(loss="mse")
        two.compile(loss=["mse", "mae"])
        found, expected = Linearization(two, x, [y, y]), Linearization(one, x, y)
        like = expected.weights
        matrices = [dense(lin.fisher(kind), like) for lin in (found, expected)]
        np.testing.assert_allclose(*matrices, 1e-12, 1e-14)
        np.testing.assert_allclose(*(flat(lin.gradient) for lin in (found, expected)), 1e-12)
        factors = [
            [a for pair in lin.kronecker_factors(kronecker.blocks(lin.model)[0], fisher=kind)[0] for a in pair]
            for lin in (found, expected)
        ]
        np.testing.assert_allclose(*map(flat, factors), 1e-12, 1e-14)


def test_the_remedy_for_a_loss_of_ones_own():
    def half_squares(y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    x, y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")
    model.compile("sgd", half_squares)
    lin = keras_curvature.Linearization(model, x, y)
    with pytest.raises(ValueError, match="`likelihood = keras_curvature.likelihoods.Gaussian`"):
        lin.fisher() @ lin.gradient
    half_squares.likelihood = keras_curvature.likelihoods.Gaussian
    model.compile("sgd", half_squares)
    found = keras_curvature.Linearization(model, x, y).fisher() @ lin.gradient
    model.compile("sgd", "mse")
    expected = keras_curvature.Linearization(model, x, y).fisher() @ lin.gradient
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def own_and_compiled(likelihood, compiled):
    """Two models of one function: with a `compute_loss` and a `likelihood` of its own, and with Keras' loss."""
    case, other = LOSSES["own_compute_loss"](), LOSSES["own_compute_loss"]()
    own = type("Named", (type(case.model),), {"likelihood": likelihood, "compute_loss": own_loss(compiled)})
    model = own(case.model.inputs[0], case.model.outputs[0])
    model.compile("sgd")
    plain = keras.Model(other.model.inputs[0], other.model.outputs[0])
    plain.set_weights(model.get_weights())
    plain.compile("sgd", compiled)
    y = (case.y > 0).astype("float64")
    weights = np.linspace(0.5, 2.0, BATCH)
    return [Linearization(m, case.x, y, weights) for m in (model, plain)]


def own_loss(loss):
    """A `compute_loss` that calls a loss of Keras'."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return loss(y, y_pred, sample_weight)

    return compute_loss


@pytest.mark.parametrize(("likelihood", "compiled"), [
    (likelihoods.Gaussian, keras.losses.MeanSquaredError),
    (likelihoods.Bernoulli({}, logits=True), lambda: keras.losses.BinaryCrossentropy(from_logits=True)),
])  # fmt: skip
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_a_compute_loss_with_a_likelihood_is_what_the_compiled_loss_is(likelihood, compiled, fisher):
    found, expected = (
        np.concatenate([np.ravel(c) for c in tf.nest.flatten(lin.passes.here().recorded.cotangents(fisher))])
        for lin in own_and_compiled(likelihood, compiled())
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert np.abs(found).max() > 0


def test_a_compute_loss_without_a_likelihood_is_told_where_it_goes():
    case = LOSSES["own_compute_loss"]().compile()
    with pytest.raises(ValueError, match="a model with a `compute_loss` of its own and one output has it in its class"):
        Linearization(case.model, *case.batch).fisher_diagonal()


def traces(last, loss, dtype=None):
    """The traces of the Gauss-Newton and of the Fisher matrix, of a model that ends in these layers."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "tanh", dtype=dtype), *last])
    model.compile("sgd", loss)
    random = np.random.default_rng(0)
    batch = random.standard_normal((6, 4)).astype("float32"), np.array([0, 1, 1, 0, 1, 0])
    return [keras_curvature.curvature(model, batch, kind=kind).trace(100).value for kind in ("ggn", "fisher")]


@pytest.mark.parametrize("dtype", [None, "float64", "mixed_bfloat16"])
def test_the_logits_of_a_softmax_are_read_in_every_precision(dtype):
    ggn, fisher = traces([layers.Dense(3, "softmax", dtype=dtype)], "sparse_categorical_crossentropy", dtype)
    np.testing.assert_allclose(ggn, fisher, rtol=1e-4 if dtype != "mixed_bfloat16" else 2e-2)


@pytest.mark.parametrize(
    ("last", "loss"),
    [
        ([], keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)),
        ([layers.Reshape((3,))], "sparse_categorical_crossentropy"),
    ],
    ids=["ignore_class", "reshape"],
)
def test_a_cross_entropy_that_loses_the_logits_is_warned_of(last, loss, monkeypatch):
    monkeypatch.setattr(slices, "_warned", set())
    with pytest.warns(UserWarning, match="loss=sparse_categorical_crossentropy reads probabilities and not the logits"):
        ggn, fisher = traces([layers.Dense(3, "softmax"), *last], loss)
    assert abs(ggn - fisher) > 0.05 * fisher


def test_losses_that_are_made_for_what_they_read_are_not_warned_of(monkeypatch):
    monkeypatch.setattr(slices, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        traces([layers.Dense(3)], keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        traces([layers.Dense(3, "softmax")], "sparse_categorical_crossentropy")
