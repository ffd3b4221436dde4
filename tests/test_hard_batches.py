"""Every optimizer where numbers are hard: half precision, overflow, a first batch that says nothing, odd weights."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import LAYERWISE, OPTIMIZERS, prepare
from selection import some

import keras_curvature as kc
from keras_curvature.linearization.layers import kronecker
from keras_curvature.optimizers import first_batch


def by_default(*names, of=tuple(OPTIMIZERS)):
    """All of the registry, those that are not named with `-m slow`."""
    return pytest.mark.parametrize("name", some(of, names))


def data(examples=24):
    x = np.random.default_rng(0).standard_normal((examples, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1).astype("int32")


def network(*middle, dtype=None):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(6, activation="tanh", dtype=dtype), *middle, keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4,)), *layers])


def compiled(name, model, **kwargs):
    model, optimizer = prepare(name, model, **kwargs)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    return model


def fit(model, x, y, epochs=4, **kwargs):
    return model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs).history


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@by_default("neumann_resets", "ekfac")
@pytest.mark.parametrize("policy", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)], indirect=True)
def test_weights_in_half_precision_train_with_state_in_float32(name, policy):
    x, y = data()
    model = compiled(name, network())
    seen = fit(model, x, y, epochs=12)["loss"]
    assert {v.dtype for v in model.trainable_variables} == {policy}
    assert {v.dtype for v in model.optimizer.variables} <= {"float32", "float64", "int32", "int64"}
    assert np.isfinite(seen).all() and min(seen[1:]) < seen[0]


def test_averages_of_weights_in_half_precision_are_kept_in_float32_and_end_in_the_weights():
    keras.config.set_dtype_policy("bfloat16")
    try:
        x, y = data()
        model = compiled("soap", network(), use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
        assert np.isfinite(fit(model, x, y)["loss"]).all()
    finally:
        keras.config.set_dtype_policy("float32")


@by_default("curveball", "kfac")
def test_from_a_loss_scale_that_is_far_too_high_training_comes_down_to_one_that_works(name):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        x, y = data()
        model = compiled(name, network())
        model.optimizer.build(model.trainable_variables)
        model.optimizer.dynamic_scale.assign(2.0**24)
        history = fit(model, x, y, epochs=12)
    finally:
        keras.config.set_dtype_policy("float32")
    assert float(model.optimizer.dynamic_scale.numpy()) < 2.0**24
    assert sum(history["skipped_steps"]) > 0
    # conjugate gradients multiply by ever larger vectors: a product overflows now and then
    assert min(history["skipped_steps"][-3:]) == 0 and sum(history["skipped_steps"][-3:]) <= 3
    seen = [loss for loss in history["loss"] if np.isfinite(loss)]
    assert min(seen[1:]) < seen[0]


# these take the gradient of the regularizers for a gradient: Neumann in its warm-up, and CurveBall, which has no
# gradient apart from its product
ANY_BATCH = [name for name in OPTIMIZERS if "neumann" in name or "curveball" in name]


@by_default("adahessian_lazy", of=[name for name in OPTIMIZERS if name not in ANY_BATCH])
def test_a_first_batch_without_weight_is_as_if_it_had_not_been_there(name):
    x, y = data()
    regularized = {"kernel_regularizer": keras.regularizers.L1L2(1e-3, 1e-3)}
    trained = []
    for empty in (True, False):
        keras.utils.set_random_seed(1)
        model = compiled(name, keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, **regularized)]))
        weights = model.get_weights()
        if empty:
            logs = model.train_on_batch(x[:8], y[:8], sample_weight=np.zeros(8, "float32"), return_dict=True)
            assert logs["skipped_steps"] == 0
            for now, before in zip(model.get_weights(), weights):
                np.testing.assert_array_equal(now, before)
        assert int(model.optimizer.iterations.numpy()) == 0
        fit(model, x, y, epochs=1)
        trained.append(model.get_weights())
    for a, b in zip(*trained):
        np.testing.assert_array_equal(a, b)


@by_default("curveball", of=ANY_BATCH)
def test_after_a_first_batch_without_weight_training_goes_on(name):
    x, y = data()
    model = compiled(name, network())
    model.train_on_batch(x[:8], y[:8], sample_weight=np.zeros(8, "float32"))
    history = fit(model, x, y, epochs=12)
    assert min(history["loss"][1:]) < history["loss"][0] and not any(history["skipped_steps"])


@pytest.mark.parametrize("regularizer", [None, "l1", "l2", "orthogonal_regularizer"])
def test_a_gradient_of_regularizers_alone_says_nothing(regularizer):
    x, y = data(8)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer=regularizer)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for weight in (0.0, 1e-3):
        lin = kc.Linearization(model, x, y, np.full(8, weight, "float32"))
        assert bool(first_batch.loss_has_gradient(lin)) == (weight > 0)


@pytest.mark.filterwarnings("ignore:.*Kronecker")
@by_default("shampoo")
def test_weights_without_entries_are_no_obstacle(name):
    class Experts(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(0, 3))

        def call(self, x):
            return x + 0.0 * keras.ops.sum(self.table)

    x, y = data()
    model = compiled(name, network(Experts()))
    history = fit(model, x, y, epochs=8)
    assert min(history["loss"][1:]) < history["loss"][0] and not any(history.get("failed_refreshes", [0]))


@by_default("curveball")
@pytest.mark.parametrize("wide", ["hidden", pytest.param("last", marks=pytest.mark.slow)])
def test_layers_of_two_precisions_train(name, wide):
    x, y = data()
    keras.utils.set_random_seed(1)
    first = keras.layers.Dense(6, activation="tanh", dtype="float64" if wide == "hidden" else None)
    last = keras.layers.Dense(3, dtype="float64" if wide == "last" else None)
    model = compiled(name, keras.Sequential([keras.Input((4,)), first, last]))
    history = fit(model, x, y)
    assert np.isfinite(history["loss"]).all() and min(history["loss"][1:]) < history["loss"][0]


@by_default("plain_psgd", of=(*OPTIMIZERS, "plain_psgd", "plain_soap"))
def test_dense_on_sequences_whose_gradients_have_lost_their_static_shape(name):
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).standard_normal((8, 5, 4)).astype("float32")
    model, optimizer = prepare(name, keras.Sequential([keras.Input((5, 4)), keras.layers.Dense(3)]))
    model.compile(optimizer, "mse", jit_compile=False)
    losses = model.fit(x, x[..., :3], batch_size=4, epochs=6, verbose=0).history["loss"]
    assert min(losses[1:]) < losses[0]


@by_default("locoprop", of=LAYERWISE)
def test_a_data_set_that_does_not_know_its_width_trains_as_one_that_does(name):
    x, y = data()
    trained = []
    for width in (4, None):
        shapes = tf.TensorSpec((None, width)), tf.TensorSpec((None,), tf.int32)
        batches = tf.data.Dataset.from_generator(lambda: [(x[:5], y[:5])], output_signature=shapes)
        model = compiled(name, network())
        model.fit(batches, steps_per_epoch=1, shuffle=False, verbose=0)
        trained.append(model.get_weights())
    for a, b in zip(*trained):
        np.testing.assert_array_equal(a, b)


@by_default("kfac", of=("kfac", "ekfac", "eva"))
def test_sparse_inputs_have_the_factors_of_dense_ones(name):
    x, y = data(8)
    trained = []
    for sparse in (False, True):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,), sparse=sparse)
        model = compiled(name, keras.Model(inputs, keras.layers.Dense(3)(inputs)))
        model.fit(tf.sparse.from_dense(x) if sparse else x, y, epochs=2, batch_size=8, verbose=0)
        trained.append(model.get_weights())
    for a, b in zip(*trained):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fill", [0, 2])
def test_ragged_embeddings_have_the_factors_of_their_tokens(fill):
    rows = [[0, 1, 2], [3, 1, 1]] if not fill else [[0, 1, 2, 4], [3, 1]]
    words, y = tf.ragged.constant(rows, dtype=tf.int32), np.array([[1.0], [-1.0]], "float32")
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None,), dtype="int32", ragged=True)
    embedding = keras.layers.Embedding(5, 2)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.ops.mean(embedding(inputs), 1)))
    model.compile("sgd", "mse")
    lin = kc.Linearization(model, words, y)
    blocks, _, _ = kronecker.blocks(model)
    (A, G), _ = lin.kronecker_factors(blocks, fisher="empirical")[0]
    tokens = [token for row in rows for token in row]
    np.testing.assert_allclose(A, np.bincount(tokens, minlength=5) / len(tokens), rtol=1e-6)
    out, kernel = model(words).numpy(), model.layers[-1].kernel.numpy()[:, 0]
    slopes = [2 * (out[i, 0] - y[i, 0]) * kernel / len(row) for i, row in enumerate(rows) for _ in row]
    np.testing.assert_allclose(G, sum(np.outer(s, s) for s in slopes) / len(rows), rtol=1e-5)


@pytest.mark.parametrize("layer, reason", [
    (lambda: keras.layers.Conv1DTranspose(2, 2), "no Kronecker factors for `Conv1DTranspose`"),
    (lambda: keras.layers.LSTM(2, recurrent_dropout=0.1, return_sequences=True), "with `recurrent_dropout`"),
    (lambda: keras.layers.GRU(2, reset_after=False, return_sequences=True), "recurrent kernel of a GRU"),
], ids=["transposed", "recurrent_dropout", "reset_before"])  # fmt: skip
def test_the_warning_names_the_reason_and_the_share(layer, reason):
    model = kc.curved(keras.Sequential([keras.Input((4, 3)), layer(), keras.layers.Dense(1)]))
    model.compile(kc.KFAC(), "mse")
    with pytest.warns(UserWarning, match=reason) as caught:
        model.optimizer.build(model.trainable_variables)
    assert any(re.search(r"0\.\d+ of all weights", str(w.message)) for w in caught)
