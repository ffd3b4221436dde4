"""Every problem against what it says of itself, and the analytic ones against their formulas."""

import math
import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some

from keras_curvature import problems
from keras_curvature.problems.losses import squared_error_of_logits

ANALYTIC = ["quadratic", "rosenbrock", "rosenbrock_noise_1", "rosenbrock_noise_3", "rahimi_recht"]
# x and y of one sample; labels of classes are integers of shape ().
SHAPES = {
    "quadratic": ((1,), (20,)),
    "rosenbrock": ((1,), (2,)),
    "rosenbrock_noise_1": ((1,), (2,)),
    "rosenbrock_noise_3": ((1,), (2,)),
    "rahimi_recht": ((6,), (10,)),
    "logistic": ((100,), (1,)),
    "sinc": ((1,), (1,)),
    "poisson_2d": ((4,), (1,)),
    "digits_mlp": ((64,), ()),
    "digits_autoencoder": ((64,), (64,)),
    "mnist_mlp": ((784,), ()),
    "curveball_mlp": ((784,), ()),
    "autoencoder": ((784,), (784,)),
    "curveball_cnn": ((32, 32, 3), ()),
    "curveball_cnn_bn": ((32, 32, 3), ()),
    "mlp": ((784,), ()),
    "cnn": ((32, 32, 3), ()),
    "cnn_bn": ((32, 32, 3), ()),
    "transformer": ((32,), ()),
    "lstm": ((16, 2), ()),
}
WEIGHTS = {
    "quadratic": 20,
    "rosenbrock": 2,
    "rahimi_recht": 160,
    "logistic": 100,
    "sinc": 61,
    "poisson_2d": 129,
    "digits_mlp": 64 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10,
    "mnist_mlp": 784 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10,
    "curveball_cnn": 32 * 76 + 32 * 801 + 64 * 801 + 64 * 1025 + 10 * 65,
    "mlp": 784 * 512 + 512 + 512 * 513 + 513 * 10,
}
NETWORKS = [name for name in SHAPES if name not in ANALYTIC]


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def loss_of(problem, model, x, y):
    """The loss `fit` minimises: of the outputs, and of the regularizers."""
    return problem.loss()(y, model(x)) + sum(model.losses)


def test_registry_lists_every_problem_under_its_own_name():
    assert set(problems.PROBLEMS) == set(SHAPES)
    assert all(problem.name == name for name, problem in problems.PROBLEMS.items())


@pytest.mark.parametrize("name", SHAPES)
def test_problem_builds_what_it_says(name):
    problem = problems.get(name)
    x, y = problem.sample(6)
    shape_x, shape_y = SHAPES[name]
    assert x.shape == (6, *shape_x) and y.shape == (6, *shape_y)
    assert x.dtype == ("int32" if name == "transformer" else "float32")
    assert y.dtype == ("int32" if shape_y == () else "float32")
    model = problem.model()
    assert model.built and not model.compiled
    assert math.prod(model(x).shape) == 6 * model.output_shape[-1]
    assert np.isfinite(loss_of(problem, model, x, y))
    assert model.count_params() == WEIGHTS.get(name, model.count_params())
    weights = model.get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(weights, problem.model(0).get_weights(), strict=True))
    if name != "logistic":  # starts at zero, whatever the seed
        assert any((a != b).any() for a, b in zip(weights, problem.model(1).get_weights(), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_sample_depends_on_the_seed_alone(name):
    problem = problems.get(name)
    first, again = problem.sample(5, seed=3), problem.sample(5, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    if problem.stand_in is not None:
        assert (problem.sample(5, seed=4)[0] != first[0]).any()


@pytest.mark.parametrize("name", ANALYTIC)
def test_loss_at_the_solution_is_the_minimum(name):
    problem = problems.get(name)
    model = problem.model(seed=2)
    x, y = problem.data()
    before = float(loss_of(problem, model, x, y))
    model.set_weights(problem.solution())
    np.testing.assert_allclose(loss_of(problem, model, x, y), problem.minimum, atol=1e-10)
    assert before > problem.minimum + 0.1


@pytest.mark.parametrize("name", ["digits_mlp", "transformer", "lstm", "autoencoder", *ANALYTIC])
def test_set_floatx_is_enough_for_float64(name, float64):
    problem = problems.get(name)
    model = problem.model()
    x, y = problem.sample(4)
    assert {variable.dtype for variable in model.weights} == {"float64"}
    assert x.dtype == "float64" or name == "transformer"
    assert loss_of(problem, model, x, y).dtype == "float64"


def test_building_a_model_leaves_python_randomness_and_the_policy_alone():
    keras.utils.set_random_seed(7)
    kernels = [keras.layers.Dense(3).kernel_initializer((2, 3)) for _ in range(2)]
    keras.utils.set_random_seed(7)
    between = [keras.layers.Dense(3).kernel_initializer((2, 3))]
    problems.get("digits_mlp").model(3)
    between.append(keras.layers.Dense(3).kernel_initializer((2, 3)))
    np.testing.assert_array_equal(kernels, between)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert problems.get("digits_mlp").model().layers[1].compute_dtype == "bfloat16"
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")


def test_query_key_and_value_start_apart():
    model = problems.get("transformer").model(0)
    attention = next(x for x in model.layers if isinstance(x, keras.layers.MultiHeadAttention))
    query, key = attention.query_dense.kernel, attention.key_dense.kernel
    assert np.abs(query - key).max() > 0.1


def test_quadratic_hessian_is_the_hessian(float64):
    problem = problems.quadratic(dimension=6, condition=50.0, seed=4)
    model = problem.model()
    x, y = problem.sample(3)
    (w,) = (variable.value for variable in model.trainable_variables)
    with tf.GradientTape() as outer:
        outer.watch(w)
        with tf.GradientTape() as inner:
            loss = loss_of(problem, model, x, y)
        gradient = inner.gradient(loss, w)
    A = problem.hessian()
    np.testing.assert_allclose(outer.jacobian(gradient, w), A, rtol=1e-12, atol=1e-14)
    distance = w.numpy() - problem.solution()[0]
    np.testing.assert_allclose(loss, distance @ A @ distance / 2, rtol=1e-12)
    eigenvalues = np.linalg.eigvalsh(A)
    np.testing.assert_allclose([eigenvalues[-1], eigenvalues[-1] / eigenvalues[0]], [1, 50], rtol=1e-10)


@pytest.mark.parametrize("noise", [0, 1, 3])
def test_rosenbrock_is_the_noisy_formula(noise, float64):
    problem = problems.rosenbrock(noise)
    eps, zeros = problem.data(samples=200, seed=5)
    assert eps.shape == (200, 1) and zeros.shape == (200, 2)
    assert (eps == 1).all() if noise == 0 else 0.9 * noise < eps.max() < noise
    model = problem.model(seed=1)
    u, v = model.get_weights()[0]
    expected = np.mean((1 - u) ** 2 + 100 * eps**2 * (v - u**2) ** 2)
    np.testing.assert_allclose(loss_of(problem, model, eps, zeros), expected, rtol=1e-12)


def test_table_1_starts_lie_on_the_diagonal():
    starts = problems.table_1_starts(n=100, seed=0)
    assert starts.shape == (100, 2)
    np.testing.assert_array_equal(starts[:, 0], starts[:, 1])
    assert -0.5 <= starts.min() < -0.45 and -0.05 < starts.max() < 0
    np.testing.assert_array_equal(problems.rosenbrock_start(9), problems.table_1_starts(1, seed=9)[0])
    np.testing.assert_allclose(
        problems.get("rosenbrock").model(9).get_weights()[0], problems.rosenbrock_start(9), rtol=1e-6
    )
    assert problems.first_below([1.0, 2e-4, 5e-5, 0.0]) == 3
    assert problems.first_below([1.0, 2e-4]) is None


def test_rahimi_recht_is_the_mean_over_samples_of_the_sum_over_outputs():
    problem = problems.get("rahimi_recht")
    x, y = problem.data()
    assert x.shape == (1000, 6) and y.shape == (1000, 10) and problem.batch_size == 1000
    model = problem.model()
    W1, W2 = model.get_weights()
    expected = np.square(x @ W1 @ W2 - y).sum(axis=1).mean()
    np.testing.assert_allclose(loss_of(problem, model, x, y), expected, rtol=1e-5)
    np.testing.assert_allclose([W1.std(), W2.std()], [2 / 16, 1 / 10], rtol=0.25)
    assert np.abs(y[:, 9]).max() < 1e-4 < np.abs(y[:, 8]).max()  # the last row of A is the tiny one


def test_logistic_is_ill_conditioned_at_its_start():
    problem = problems.get("logistic")
    x, y = problem.data()
    assert x.shape == (20_000, 100) and y.shape == (20_000, 1) and 0.4 < y.mean() < 0.6
    model = problem.model()
    np.testing.assert_allclose(loss_of(problem, model, x, y), np.log(2), rtol=1e-5)
    eigenvalues = np.linalg.eigvalsh(x.T @ x / (4 * len(x)) + 2e-6 * np.eye(100))
    assert 0.5e4 < eigenvalues[-1] / eigenvalues[0] < 2e4
    model.set_weights([np.full((100, 1), 2.0)])
    np.testing.assert_allclose(sum(model.losses), 1e-6 * 400, rtol=1e-5)


@pytest.mark.parametrize(
    "name", some(NETWORKS, ["logistic", "digits_autoencoder", "transformer"])
)
def test_ten_steps_of_sgd_lower_the_loss(name):
    problem = problems.get(name)
    rate = {"logistic": 0.5, "transformer": 0.02, "lstm": 0.5}.get(name, 0.05)
    model = problem.compiled(keras.optimizers.SGD(rate), jit_compile=False, run_eagerly=True)
    x, y = problem.sample(32)
    losses = []
    for _ in range(11):
        model.reset_metrics()  # Keras 3.10 does not
        losses.append(float(model.train_on_batch(x, y, return_dict=True)["loss"]))
    assert losses[-1] < losses[0]


def test_rosenbrock_trains_through_fit():
    problem = problems.get("rosenbrock")
    model = problem.compiled(keras.optimizers.SGD(1e-3, momentum=0.95), seed=1, jit_compile=False)
    x, y = problem.data(samples=1000)
    model.fit(x, y, batch_size=problem.batch_size, verbose=0)
    np.testing.assert_allclose(model.get_weights()[0], [1, 1], atol=0.05)


def test_sum_squares_sums_over_outputs_and_averages_over_samples():
    y = np.zeros((2, 3, 2), "float32")
    loss = problems.SumSquares()
    assert loss.convex_in_outputs
    assert float(loss(y, y + 2)) == 24.0
    assert float(loss(y, y + 2, sample_weight=np.array([1.0, 0.0]))) == 12.0
    restored = keras.losses.deserialize(keras.losses.serialize(problems.SumSquares(reduction="sum")))
    assert isinstance(restored, problems.SumSquares) and float(restored(y, y + 2)) == 48.0
    np.testing.assert_array_equal(squared_error_of_logits(y, y), [1.5, 1.5])


def test_sparse_normal_gives_every_unit_its_share():
    start = problems.SparseNormal(seed=1)
    kernel = np.array(start((200, 300)))
    np.testing.assert_array_equal((kernel != 0).sum(axis=0), 15)
    np.testing.assert_allclose([kernel[kernel != 0].mean(), kernel[kernel != 0].std()], [0, 1], atol=0.05)
    assert (np.array(problems.SparseNormal()((4, 3))) != 0).all()  # fewer inputs than 15
    np.testing.assert_array_equal((np.array(start((3, 3, 4, 8))) != 0).sum(axis=(0, 1, 2)), 15)
    restored = keras.initializers.deserialize(keras.initializers.serialize(start))
    np.testing.assert_array_equal(restored((200, 300)), kernel)


@pytest.mark.parametrize(
    "name", ["quadratic", "rosenbrock", "digits_autoencoder", "transformer", "curveball_cnn_bn"]
)
def test_models_survive_their_configuration(name):
    problem = problems.get(name)
    model = problem.model()
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    x, _ = problem.sample(3)
    np.testing.assert_allclose(copy(x), model(x), rtol=1e-6)


def test_autoencoder_is_mirrored_and_linear_in_the_middle():
    layers = problems.get("autoencoder").model().layers[1:]
    assert [layer.units for layer in layers] == [1000, 500, 250, 30, 250, 500, 1000, 784]
    assert [layer.activation.__name__ for layer in layers] == ["sigmoid"] * 3 + ["linear"] + [
        "sigmoid"
    ] * 3 + ["linear"]


def test_digits_are_split_by_class():
    (x, y), (x_test, y_test) = problems.data("digits")
    assert x.shape == (1437, 64) and x_test.shape == (360, 64) and x.dtype == "float32"
    assert x.min() == 0 and x.max() == 1
    counts, counts_test = np.bincount(y), np.bincount(y_test)
    np.testing.assert_allclose(counts_test / (counts + counts_test), 0.2, atol=0.01)


@pytest.mark.parametrize("kind", ["images", "tokens", "adding"])
def test_every_class_of_the_synthetic_data_occurs(kind):
    _, y = problems.synthetic(kind, samples=2000)
    share = np.bincount(y) / 2000
    assert len(share) == {"images": 10, "tokens": 4, "adding": 2}[kind]
    assert share.min() > 0.03


def test_tensorflow_datasets_are_found_in_data_dir():
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("TFDS_DATA_DIR is not set")
    (x, y), (x_test, y_test) = problems.data("mnist")
    assert x.shape == (60000, 28, 28, 1) and x_test.shape == (10000, 28, 28, 1)
    assert y.dtype == y_test.dtype == "int32" and x.dtype == "float32" and x.max() == 1


def test_errors_name_the_argument(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match=r"quadratic.*name='rosenbrok'"):
        problems.get("rosenbrok")
    with pytest.raises(ValueError, match="name='svhn'"):
        problems.data("svhn")
    with pytest.raises(ValueError, match="data_dir=None"):
        problems.get("mnist_mlp").data()
    with pytest.raises(FileNotFoundError, match="data_dir.*download=True"):
        problems.data("cifar10", data_dir=tmp_path)
    with pytest.raises(ValueError, match="kind='text'"):
        problems.synthetic("text")
    with pytest.raises(ValueError, match=r"shape=\(30, 30, 1\)"):
        problems.synthetic("images", shape=(30, 30, 1))
    with pytest.raises(ValueError, match="samples=0"):
        problems.synthetic("tokens", samples=0)
    with pytest.raises(ValueError, match="condition=0.5"):
        problems.quadratic(condition=0.5)
    with pytest.raises(ValueError, match="dimension=0"):
        problems.quadratic(dimension=0)
    with pytest.raises(ValueError, match="noise=-1"):
        problems.rosenbrock(noise=-1)
    with pytest.raises(ValueError, match="samples=0"):
        problems.logistic(samples=0)
    with pytest.raises(ValueError, match="n=0"):
        problems.table_1_starts(n=0)
    with pytest.raises(ValueError, match="incoming=0"):
        problems.SparseNormal(incoming=0)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    (tmp_path / "mnist").mkdir()
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"keras_curvature\[examples\]"):
        problems.data("digits")
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        problems.data("mnist", data_dir=tmp_path)
