"""The diagonal of the Hessian and of Fisher matrices against dense ones, and the methods that are written on them."""

import numpy as np
import pytest
import tensorflow as tf
from cases import LOSSES, MODELS, flat, float64
from selection import some

import keras_curvature as kc
from keras_curvature import Linearization
from keras_curvature.linearization.estimates import diagonals as diagonal
from keras_curvature.operators import dense
from keras_curvature.optimizers.adahessian import AdaHessian
from keras_curvature.optimizers.diagonal_newton import DiagonalNewton
from keras_curvature.optimizers.esgd import ESGD
from keras_curvature.optimizers.square_root_free_adam import SquareRootFreeAdam


@pytest.fixture(autouse=True)
def _in_float64():
    with float64():
        yield


def linearized(name, **kwargs):
    """The linearization of a case of `cases.py`, compiled."""
    case = {**MODELS, **LOSSES}[name]().compile()
    return Linearization(case.model, *case.batch, **kwargs)


def drawn(name, estimate):
    """`estimate(lin, seed)` of a case as a function of the seed, traced once, to a numpy vector."""
    case = {**MODELS, **LOSSES}[name]().compile()

    @tf.function
    def draw(seed):
        return tf.concat([tf.reshape(t, [-1]) for t in estimate(Linearization(case.model, *case.batch), seed)], 0)

    return lambda seed: draw(tf.constant(seed)).numpy()


def test_the_exact_diagonal_is_that_of_the_dense_hessian():
    lin = linearized("mse")
    expected = np.diag(dense(lin.hessian(), lin.variables))
    np.testing.assert_allclose(flat(lin.hessian_diagonal(probe="exact")), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("probe", some(["rademacher", "gaussian"], ["rademacher"]))
def test_probes_average_to_the_diagonal(probe):
    lin = linearized("mse")
    H = np.asarray(dense(lin.hessian(), lin.variables))
    draw = drawn("mse", lambda lin, seed: lin.hessian_diagonal(seed, probe))
    found = np.stack([draw(seed) for seed in range(200)])
    # of signs, the variance of an entry is the sum of the squares of the rest of its row
    rest = np.square(H).sum(1) - np.square(np.diag(H)) * (1 if probe == "rademacher" else -1)
    error = (found.mean(0) - np.diag(H)) / np.sqrt(rest / len(found) + 1e-30)
    assert np.abs(error).max() < 4.5
    assert 0.3 < np.square(error).mean() < 2.5  # the entries are not independent: 0.4 to 1.7 in twelve such means
    joint = flat(lin.hessian_diagonal(7, probe, probes=3))
    np.testing.assert_allclose(joint, found[21:24].mean(0), rtol=1e-10, atol=1e-14)


def test_probes_are_signs_or_normal_and_shared_by_all():
    like = [tf.zeros([40, 50]), tf.zeros([2000])]
    signs, other = diagonal.draw(like, 3), diagonal.draw(like, 4)
    assert set(np.unique(flat(signs))) == {-1.0, 1.0}
    assert abs(flat(signs).mean()) < 0.06 and abs(np.mean(flat(signs) * flat(other))) < 0.06
    assert abs(np.mean(signs[0].numpy().ravel() * signs[1].numpy())) < 0.08  # each tensor its own
    np.testing.assert_array_equal(flat(signs), flat(diagonal.draw(like, tf.constant(3))))
    normal = flat(diagonal.draw(like, 3, "gaussian"))
    assert abs(normal.mean()) < 0.06 and abs(normal.std() - 1) < 0.04


def test_kernels_are_averaged_over_their_spatial_axes():
    shapes = [(3, 4), (2, 3, 4), (3, 3, 2, 5), (2, 2, 2, 1, 3), (7,)]
    tensors = [np.random.default_rng(0).standard_normal(shape) for shape in shapes]
    found = diagonal.average_kernels([tf.constant(t) for t in tensors])
    for a, t in zip(found, tensors):
        expected = t.mean(tuple(range(t.ndim - 2)), keepdims=True) if t.ndim >= 4 else t
        np.testing.assert_allclose(a, expected)


def test_fisher_diagonals_average_to_the_dense_gauss_newton_matrix():
    lin = linearized("loss_weights_list")
    expected = np.diag(dense(lin.gauss_newton(), lin.variables))
    draw = drawn("loss_weights_list", lambda lin, seed: lin.fisher_diagonal(seed))
    draws = np.stack([draw(seed) for seed in range(200)])
    error = (draws.mean(0) - expected) / (draws.std(0) / np.sqrt(len(draws)) + 1e-30)
    assert np.abs(error).max() < 4.5
    # of one layer's kernel, the sums of squares of each example by themselves have the same mean
    draw = drawn("loss_weights_list", lambda lin, seed: lin.squared_gradients(seed, "sampled"))
    squares = np.stack([draw(seed) for seed in range(200)])
    error = (squares.mean(0) - expected) / (squares.std(0) / np.sqrt(len(squares)) + 1e-30)
    assert np.abs(error).max() < 4.5
    assert squares.std(0).sum() < 0.9 * draws.std(0).sum()


def test_the_gradient_comes_with_the_hessian_that_came_first():
    lin = linearized("dropout")
    expected, loss = flat(lin.gradient), lin.loss
    calls = []
    case = MODELS["dropout"]().compile()
    call = case.model.call
    object.__setattr__(case.model, "call", lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs))
    lin = Linearization(case.model, *case.batch)
    calls.clear()
    product = flat(lin.hessian() @ diagonal.draw(lin.weights, 1))
    np.testing.assert_allclose(flat(lin.gradient), expected, rtol=1e-12)
    np.testing.assert_allclose(lin.loss, loss, rtol=1e-12)
    lin.commit()
    assert len(calls) == 1 and all(lin.reached)
    late = linearized("dropout")
    _ = late.gradient
    np.testing.assert_allclose(flat(late.hessian() @ diagonal.draw(lin.weights, 1)), product, rtol=1e-9)


def test_what_is_no_probe_is_refused():
    lin = linearized("mse")
    with pytest.raises(ValueError, match='`probe` must be one of "rademacher", "gaussian", "exact". Received: probe='):
        lin.hessian_diagonal(probe="uniform")
    with pytest.raises(ValueError, match="`probes` must be an integer >= 1. Received: probes=0"):
        lin.hessian_diagonal(probes=0)
    with pytest.raises(ValueError, match='`fisher` must be "empirical" or "sampled". Received: fisher=.exact.'):
        lin.squared_gradients(fisher="exact")


# The methods, by hand.


def trajectory(optimizer, by_hand, steps=4, name="mse", rtol=1e-9):
    """Check the weights after each step of training one case against `by_hand(lin, weights, step) -> weights`."""
    case = {**MODELS, **LOSSES}[name]()
    model = kc.curved(case.model)
    case.compile(optimizer, run_eagerly=True)
    for step in range(steps):
        weights = flat(model.trainable_variables)
        expected = by_hand(Linearization(model, *case.batch), weights, step)
        model.train_on_batch(*case.batch)
        np.testing.assert_allclose(flat(model.trainable_variables), expected, rtol=rtol, atol=1e-12)
        assert np.abs(expected - weights).max() > 1e-6


def test_esgd_divides_by_the_root_of_the_mean_of_squared_products():
    squares = []

    def by_hand(lin, weights, step):
        if step % 2 == 0:
            v = flat(diagonal.draw(lin.weights, step, "gaussian"))
            squares.append(np.square(np.asarray(dense(lin.hessian(), lin.variables)) @ v))
        return weights - 0.05 * flat(lin.gradient) / (np.sqrt(np.mean(squares, 0)) + 0.3)

    trajectory(ESGD(0.05, epsilon=0.3, every=2, step_max=None), by_hand, steps=5)
    assert len(squares) == 3


@pytest.mark.parametrize("probes", ["exact", 3])
def test_diagonal_newton_divides_by_the_clipped_diagonal(probes):
    def by_hand(lin, weights, step):
        H = np.asarray(dense(lin.hessian(), lin.variables))
        if probes == "exact":
            h = np.diag(H)
        else:
            zs = [flat(diagonal.draw(lin.weights, 3 * step + i)) for i in range(3)]
            h = np.mean([z * (H @ z) for z in zs], 0)
        assert (h < 0.2).any() and (h > 0.6).any()  # clipped from both sides
        step = np.clip(flat(lin.gradient) / np.clip(h, 0.2, 0.6), -0.5, 0.5)
        assert (np.abs(step) == 0.5).any()
        return weights - 0.3 * step

    optimizer = DiagonalNewton(0.3, curvature_min=0.2, curvature_max=0.6, step_max=0.5, probes=probes)
    trajectory(optimizer, by_hand, steps=3)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_square_root_free_adam_divides_by_the_average_of_squares(fisher):
    m, v = [0.0], [0.0]

    def by_hand(lin, weights, step):
        g = flat(lin.gradient)
        drawn = g if fisher == "empirical" else flat(lin.sampled_gradient(step))
        m.append(0.8 * m[-1] + 0.2 * g)
        v.append(0.9 * v[-1] + 0.1 * np.square(drawn))
        return weights - 0.02 * m[-1] / (1 - 0.8 ** (step + 1)) / (v[-1] / (1 - 0.9 ** (step + 1)) + 0.1)

    optimizer = SquareRootFreeAdam(0.02, beta_1=0.8, beta_2=0.9, epsilon=0.1, fisher=fisher)
    trajectory(optimizer, by_hand, name="sparse_from_logits")


@pytest.mark.parametrize("method", [ESGD, SquareRootFreeAdam])
def test_an_estimate_that_is_not_finite_is_left_out(method, monkeypatch):
    case = LOSSES["mse"]()
    model = kc.curved(case.model)
    kwargs = {"every": 1} if method is ESGD else {"fisher": "sampled"}
    optimizer = method(0.01, **kwargs)
    case.compile(optimizer, run_eagerly=True)
    average = optimizer._average
    broken = [np.nan, 1.0, np.inf]

    def breaking(estimate):
        def broken_estimate():
            first, *rest = estimate()
            return [first * broken[0], *rest]

        return average(broken_estimate)

    monkeypatch.setattr(optimizer, "_average", breaking, raising=True)
    start = flat(model.trainable_variables[:1])
    seen = []
    while broken:
        logs = model.train_on_batch(*case.batch, return_dict=True)
        seen.append(logs.get("failed_refreshes"))
        if len(broken) == 3:  # nothing is known of the first weight yet: it stays, and the others go on
            np.testing.assert_array_equal(flat(model.trainable_variables[:1]), start)
        broken.pop(0)
    assert np.isfinite(flat(model.trainable_variables)).all() and int(optimizer.skipped_steps.numpy()) == 0
    np.testing.assert_array_equal(optimizer._counts.numpy(), [1, 3, 3, 3])
    if method is ESGD:
        assert seen[0] == 1.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ESGD(every=0), "`every` must be an integer >= 1. Received: every=0"),
        (lambda: ESGD(epsilon=0.0), r"`epsilon` must be a number in \(0.0, inf\). Received: epsilon=0.0"),
        (lambda: DiagonalNewton(probes=0), '`probes` must be an integer >= 1, or "exact". Received: probes=0'),
        (lambda: DiagonalNewton(curvature_min=4.0), r"`curvature_max` must be a number in \[4.0.*=3.0"),
        (lambda: DiagonalNewton(step_max=-1.0), "`step_max` must be .* Received: step_max=-1.0"),
        (lambda: ESGD(step_max=0.0), "`step_max` must be .* Received: step_max=0.0"),
        (lambda: AdaHessian(step_max=-1.0), "`step_max` must be .* Received: step_max=-1.0"),
        (lambda: SquareRootFreeAdam(step_max="long"), "`step_max` must be .* Received: step_max='long'"),
        (lambda: SquareRootFreeAdam(fisher="exact"), '`fisher` must be "empirical" or "sampled". Received: fisher='),
        (lambda: SquareRootFreeAdam(beta_1=1.0), "`beta_1` must be .* Received: beta_1=1.0"),
        (lambda: SquareRootFreeAdam(fisher="sampled", gradient_accumulation_steps=2), "cannot accumulate"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("method", [AdaHessian, ESGD, SquareRootFreeAdam])
def test_no_entry_of_a_step_is_longer_than_the_limit(method):
    """The other entries are those of the step without limit."""
    steps = []
    for limits in (False, True):
        bound = float(np.median(np.abs(steps[0]))) if limits else None
        case = LOSSES["mse"]()
        case.compile(method(0.01, step_max=bound), run_eagerly=True)
        start = flat(case.model.trainable_variables)
        kc.curved(case.model).train_on_batch(*case.batch)
        steps.append((flat(case.model.trainable_variables) - start) / 0.01)
    free, limited = steps
    np.testing.assert_allclose(limited, np.clip(free, -bound, bound), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [AdaHessian, ESGD, SquareRootFreeAdam])
def test_a_config_from_before_the_limit_has_none(method):
    config = method().get_config()
    assert config["step_max"] is not None
    assert method.from_config(config).step_max == config["step_max"]
    del config["step_max"]
    assert method.from_config(config).step_max is None


@pytest.mark.parametrize(("make", "expected"), [
    (AdaHessian.paper, {"step_max": None, "learning_rate": 0.15}),
    (ESGD.paper, {"step_max": None, "learning_rate": 0.01}),
    (DiagonalNewton.notes, {"step_max": 0.5, "learning_rate": 0.01}),
    (SquareRootFreeAdam.notes, {"step_max": None, "epsilon": 1e-2, "beta_1": 0.0, "fisher": "sampled"}),
])  # fmt: skip
def test_the_settings_of_the_sources_are_one_call_away(make, expected):
    config = make().get_config()
    assert {name: config[name] for name in expected} == pytest.approx(expected)


def test_square_root_free_adam_trains_a_plain_model_and_asks_for_a_curved_one_to_sample():
    case = LOSSES["mse"]().compile(SquareRootFreeAdam())
    first = case.model.train_on_batch(*case.batch)
    for _ in range(5):
        last = case.model.train_on_batch(*case.batch)
    assert last < first
    case.compile(SquareRootFreeAdam(fisher="sampled"))
    with pytest.raises(ValueError, match=r"needs more than gradients \(`Linearization.sampled_gradient`\)"):
        case.model.train_on_batch(*case.batch)
