"""Natural gradient steps against dense linear algebra in float64."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, flat, float64
from selection import some

import keras_curvature as kc
from keras_curvature import ConjugateGradient, Linearization, NaturalGradient, operators
from keras_curvature.optimizers import local_models

CASES = {**MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
CG = ConjugateGradient(max_steps=2000, progress_tolerance=0.0, residual_tolerance=1e-13)
WAYS = ("auto", "rows", "weights", "qr", CG)


def step(case, optimizer, steps=1):
    """`(step, reports)` of the last of some steps on the batch."""
    model = kc.curved(case.model)
    case.compile(optimizer, jit_compile=False)
    for _ in range(steps):
        before = flat(model.trainable_variables)
        logs = model.train_on_batch(*case.batch, return_dict=True)
    return flat(model.trainable_variables) - before, logs


def matrices(case, fisher, seed=0):
    """`(F with L2, g)` at the weights, as arrays, by products; of drawn labels by rows."""
    if not case.model.compiled:
        case.compile()
    lin = Linearization(case.model, *case.batch)
    if fisher == "sampled":
        S = lin.fisher_rows("sampled", seed).dense().numpy()
        F = S.T @ S
    else:
        F = operators.base.dense(lin.fisher(fisher), lin.weights).numpy()
    l2 = np.concatenate([np.full(int(tf.size(w)), c) for c, w in zip(lin.l2, lin.weights)])
    return F + np.diag(l2), flat(lin.gradient)


KINDS = [
    "dense", "conv2d", "gru", "batch_normalization", "embedding", "several_outputs", "loss_sparse_from_logits",
    "loss_regularized", "loss_sample_weights", "loss_poisson",
]  # fmt: skip
FISHERS = ["sampled", "exact", "empirical"]


@pytest.mark.parametrize(("kind", "fisher"), some(
    list(itertools.product(KINDS, FISHERS)),
    [("dense", "sampled"), ("loss_regularized", "exact")],
))  # fmt: skip
def test_all_ways_to_solve_give_the_natural_gradient(kind, fisher):
    with float64():
        F, g = matrices(CASES[kind](), fisher)
        expected = -np.linalg.solve(F + 0.03 * np.eye(len(g)), g)
        for way in WAYS:
            found, logs = step(CASES[kind](), NaturalGradient(fisher=fisher, damping=0.03, solver=way))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * np.abs(expected).max(), err_msg=str(way))
            assert (logs["cg_iterations"] > 0) == (way is CG)


def test_the_solution_in_rows_is_ren_and_goldfarbs():
    """`(g - S'(lambda + S S')^-1 S g) / lambda`, without an array of rows."""
    with float64():
        case = CASES["loss_sparse_from_logits"]().compile()
        lin = Linearization(case.model, *case.batch)
        S, g = lin.fisher_rows("empirical").dense().numpy(), flat(lin.gradient)
        optimizer = NaturalGradient(fisher="empirical", damping=0.1, solver="rows")
        found, _ = step(CASES["loss_sparse_from_logits"](), optimizer)
    expected = -(g - S.T @ np.linalg.solve(0.1 * np.eye(len(S)) + S @ S.T, S @ g)) / 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-11)


def test_no_array_of_rows_is_formed(monkeypatch):
    made = []
    monkeypatch.setattr(local_models, "WithRows", lambda *args: made.append(args))
    step(CASES["conv2d"](), NaturalGradient(fisher="sampled", solver="rows"))
    assert not made


def test_with_exact_labels_of_squares_it_is_gauss_newton():
    with float64():
        ours, _ = step(CASES["dense"](), NaturalGradient(fisher="exact", damping=0.2))
        theirs, _ = step(CASES["dense"](), kc.GaussNewton(damping=0.2))
    np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-12)


def test_a_running_average_of_matrices():
    with float64():
        case, F = CASES["loss_sparse_from_logits"](), None
        optimizer = NaturalGradient(0.5, fisher="exact", damping=0.3, decay=0.8)
        for _ in range(3):
            new, g = matrices(case, "exact")
            F = new if F is None else 0.8 * F + 0.2 * new
            found, _ = step(case, optimizer)
            expected = -0.5 * np.linalg.solve(F + 0.3 * np.eye(len(g)), g)
            np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-11)


def test_the_matrix_of_a_part_of_the_batch():
    with float64():
        case = CASES["dense"]().compile()
        lin = Linearization(case.model, *case.batch)
        S, g = lin.chunk(0.5, 0).fisher_rows("empirical").dense().numpy(), flat(lin.gradient)
        found, _ = step(CASES["dense"](), NaturalGradient(fisher="empirical", damping=0.3, curvature_batch=0.5))
    assert len(S) == 3
    np.testing.assert_allclose(found, -np.linalg.solve(S.T @ S + 0.3 * np.eye(len(g)), g), rtol=1e-8, atol=1e-11)


def test_the_damping_adapts_by_the_ratio_of_the_change_to_the_prediction():
    with float64():
        F, g = matrices(CASES["dense"](), "exact")
        d = -np.linalg.solve(F + 0.7 * np.eye(len(g)), g)
        rule = kc.LevenbergMarquardt.martens(initial=0.7)
        case = CASES["dense"]().compile()
        lin = Linearization(case.model, *case.batch)
        after = lin.loss_at(kc.trees.unflatten(tf.constant(0.5 * d), lin.weights))
        expected = float(after - lin.loss) / (0.5 * g @ d + 0.125 * d @ F @ d)
        for options in ({"solver": "rows"}, {"solver": "weights"}, {"decay": 0.5}):
            found, logs = step(CASES["dense"](), NaturalGradient(0.5, fisher="exact", damping=rule, **options))
            np.testing.assert_allclose(found, 0.5 * d, rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(logs["reduction_ratio"], expected, rtol=1e-5)


def test_it_trains_a_classifier_faster_than_its_gradient():
    random = np.random.default_rng(0)
    x = random.standard_normal((256, 8)).astype("float32") * np.logspace(-1, 1, 8).astype("float32")
    y = (x @ (random.standard_normal(8) / np.logspace(-1, 1, 8)) > 0).astype("int32")
    losses = {}
    for name, optimizer in (("natural", NaturalGradient(fisher="exact")), ("sgd", keras.optimizers.SGD(0.1))):
        keras.utils.set_random_seed(0)
        model = kc.curved(keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(2)]))
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        losses[name] = model.fit(x, y, batch_size=64, epochs=8, verbose=0, shuffle=False).history["loss"][-1]
    assert losses["natural"] < 0.6 * losses["sgd"]


@pytest.mark.parametrize(("make", "expected"), [
    (lambda: NaturalGradient(fisher="true"), "fisher='true'"),
    (lambda: NaturalGradient(damping=0.0), "damping=0.0"),
    (lambda: NaturalGradient(solver="dense"), "solver='dense'"),
    (lambda: NaturalGradient(curvature_batch=2.0), "curvature_batch=2.0"),
    (lambda: NaturalGradient(decay=1.0), "decay=1.0"),
    (lambda: NaturalGradient(decay=0.5, solver="rows"), "decay=0.5"),
    (lambda: NaturalGradient(memory=0), "memory=0"),
])  # fmt: skip
def test_bad_arguments_fail_at_construction(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


# The metric from other data.


def regression(x, optimizer, **kwargs):
    """A curved network compiled with squares, in float64."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)]
    model = kc.curved(keras.Sequential(layers))
    model.compile(optimizer, loss="mse", **kwargs)
    random = np.random.default_rng(0)
    return model, (random.standard_normal((5, 3)), random.standard_normal((5, 2)))


def expected_with_metric_of(x, model, batch, damping):
    """`-(F + lambda I)^-1 g` with the Gauss-Newton matrix on other inputs, of the mean squared error."""
    lin = Linearization(model, *batch)
    J = [[] for _ in range(len(x) * 2)]
    for i in range(len(x)):
        for k in range(2):
            with tf.GradientTape() as tape:
                z = model(x[i : i + 1])[0, k]
            J[2 * i + k] = flat(tape.gradient(z, [v.value for v in model.trainable_variables]))
    F = np.stack(J).T @ np.stack(J) * 2 / (2 * len(x))
    return -np.linalg.solve(F + damping * np.eye(len(F)), flat(lin.gradient))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_metric_of_other_inputs_in_turn(jit_compile):
    with float64():
        x = np.random.default_rng(1).standard_normal((6, 3))
        optimizer = NaturalGradient(0.5, fisher="exact", damping=0.1, metric_data=x, curvature_batch=4)
        model, batch = regression(x, optimizer, jit_compile=jit_compile)
        for chosen in ([0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]):
            expected = 0.5 * expected_with_metric_of(x[chosen], model, batch, 0.1)
            before = flat(model.trainable_variables)
            model.fit(*batch, batch_size=5, verbose=0)
            np.testing.assert_allclose(flat(model.trainable_variables) - before, expected, rtol=1e-8, atol=1e-12)


def test_inputs_of_the_metric_are_saved_with_the_state(tmp_path):
    x = np.random.default_rng(1).standard_normal((6, 3)).astype("float32")
    optimizer = NaturalGradient(metric_data={"a": x, "b": np.arange(6, dtype="uint8")}, curvature_batch=0.5)
    a, b = keras.Input((3,), name="a"), keras.Input((), name="b", dtype="uint8")
    outputs = keras.layers.Dense(2)(keras.layers.concatenate([a, keras.layers.Embedding(6, 2)(b)]))
    model = kc.curved(keras.Model({"a": a, "b": b}, outputs))
    model.compile(optimizer, loss="mse")
    batch = {"a": x[:4] + 1.0, "b": np.arange(4, dtype="uint8")}, np.ones((4, 2), "float32")
    model.train_on_batch(*batch)
    model.save(tmp_path / "model.keras")
    loaded = kc.curved(keras.models.load_model(tmp_path / "model.keras"))
    for each in (model, loaded):
        each.train_on_batch(*batch)
    for ours, theirs in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    loaded.compile(NaturalGradient.from_config(optimizer.get_config()), loss="mse")
    with pytest.raises(ValueError, match=r"has the shapes of `metric_data` alone: \[\[6, 3\], \[6\]\]"):
        loaded.train_on_batch(*batch)


@pytest.mark.parametrize(("arguments", "expected"), [
    ({"metric_data": "data"}, "`metric_data` must be an array, .* Received: metric_data=\\['str'"),
    ({"metric_data": []}, "`metric_data` must be"),
    ({"metric_data": [[1.0], [2.0], [3.0], [4.0]]}, "\\['list', 'list', 'list', '... 4 in all'\\]"),
    ({"metric_data": np.array([[1.0, np.nan]])}, "of finite numbers.*float64 \\(1, 2\\) with NaN"),
    ({"metric_data": [np.ones((3, 2)), np.ones((4, 2))]}, "`metric_data` must be"),
    ({"metric_data": np.array(["a", "b"])}, "`metric_data` must be"),
    ({"metric_data": np.ones((3, 2)), "fisher": "empirical"}, "`metric_data`, which has no labels"),
    ({"metric_data": np.ones((3, 2)), "curvature_batch": 4}, "at most the 3 examples of `metric_data`"),
])  # fmt: skip
def test_metric_data_that_cannot_work_is_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        NaturalGradient(**arguments)


@pytest.mark.parametrize(("arrays", "expected"), [
    (np.ones((5, 2)), r"must be one array, as the inputs.* of the shapes \[\(None, 3\)\]. Received: .*\[\[5, 2\]\]"),
    (np.ones(5), r"must be one array.* of the shapes \[\(None, 3\)\]"),
    ((np.ones((5, 3)), np.ones(5)), "must be one array"),  # inputs and targets, of which Keras would drop the latter
    ({"x": np.ones((5, 3))}, "must be one array.*with the keys \\['x'\\]"),
])  # fmt: skip
def test_metric_data_that_is_not_as_the_inputs_is_refused_by_its_name(arrays, expected):
    x = np.ones((4, 3))
    model, batch = regression(x, NaturalGradient(metric_data=arrays))
    with pytest.raises(ValueError, match=f"`metric_data` {expected}"):
        model.train_on_batch(*batch)
