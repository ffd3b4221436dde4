"""The Nyström preconditioner as an option of `HessianFree` and of `Curvature.solve`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat, put

import keras_curvature as kc
from keras_curvature.linearization import Linearization

pytestmark = pytest.mark.usefixtures("in_float64")
N, LARGE, RANK, DAMPING = 40, 20, 24, 1e-3


def low_rank(optimizer="sgd"):
    """`(model, x, y, G)`: a linear model; its Gauss-Newton matrix has 20 large eigenvalues and others near 0."""
    random = np.random.default_rng(0)
    U = np.linalg.qr(random.standard_normal((N, LARGE)))[0]
    x = random.standard_normal((120, LARGE)) @ np.diag(np.logspace(0, 2, LARGE)) @ U.T
    x += 1e-3 * random.standard_normal(x.shape)
    y = random.standard_normal((120, 1))
    model = keras.Sequential([keras.Input((N,)), keras.layers.Dense(1, use_bias=False)])
    put(model.trainable_variables, 0.1 * random.standard_normal(N))
    model = kc.curved(model)
    model.compile(optimizer, "mse")
    return model, x, y, 2.0 * x.T @ x / len(x)


def hessian_free(preconditioner, **more):
    solver = kc.ConjugateGradient(400, progress_tolerance=0.0, residual_tolerance=1e-12)
    return kc.HessianFree(
        damping=DAMPING, solver=solver, line_search=None, warm_start=0.0, preconditioner=preconditioner, **more
    )


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_hessian_free_takes_the_dense_step_in_fewer_iterations(curvature):
    counts = {}
    for name, preconditioner in {"none": 0.0, "squares": 0.75, "nystrom": kc.Nystrom(rank=RANK)}.items():
        model, x, y, G = low_rank(hessian_free(preconditioner, curvature=curvature))
        before, g = flat(model.trainable_variables), flat(Linearization(model, x, y).gradient)
        logs = model.train_on_batch(x, y, return_dict=True)
        step = flat(model.trainable_variables) - before
        if name == "nystrom":
            assert logs["failed_refreshes"] == 0
        np.testing.assert_allclose(step, -np.linalg.solve(G + DAMPING * np.eye(N), g), rtol=1e-4, atol=1e-5)
        counts[name] = logs["cg_iterations"]
    assert counts["nystrom"] <= 5 < counts["none"] / 4 and counts["nystrom"] < counts["squares"] / 4


def test_the_sketch_is_kept_between_refreshes_and_saved():
    model, x, y, G = low_rank(hessian_free(kc.Nystrom(rank=RANK, every=2)))
    values = []
    for _ in range(4):
        model.train_on_batch(x, y)
        values.append(model.optimizer._values.numpy())
    assert np.array_equal(values[0], values[1]) and np.array_equal(values[2], values[3])
    assert not np.array_equal(values[1], values[2])
    np.testing.assert_allclose(values[0][:LARGE], np.sort(np.linalg.eigvalsh(G))[::-1][:LARGE], rtol=1e-3)
    config = keras.optimizers.serialize(model.optimizer)
    assert keras.optimizers.deserialize(config).preconditioner == kc.Nystrom(rank=RANK, every=2)


def test_an_overflowing_product_skips_the_step_and_keeps_the_sketch():
    model, x, y, _ = low_rank(hessian_free(kc.Nystrom(rank=4, every=1)))
    model.train_on_batch(x, y)
    before = [v.numpy() for v in [*model.trainable_variables, *model.optimizer._vectors, model.optimizer._values]]
    model.reset_metrics()
    logs = model.train_on_batch(1e200 * x, y, return_dict=True)
    assert logs["skipped_steps"] == 1
    after = [v.numpy() for v in [*model.trainable_variables, *model.optimizer._vectors, model.optimizer._values]]
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_solutions_of_the_monitor_are_those_of_the_dense_system_after_fewer_products(kind):
    model, x, y, G = low_rank()
    c = kc.curvature(model, (x, y), kind=kind)
    b = [tf.constant(np.random.default_rng(1).standard_normal((N, 1)))]
    plain, helped = c.solve(b, DAMPING, 1e-9), c.solve(b, DAMPING, 1e-9, rank=RANK)
    np.testing.assert_allclose(flat(helped.value), np.linalg.solve(G + DAMPING * np.eye(N), flat(b)), rtol=1e-5)
    assert int(helped.steps) + RANK < int(plain.steps)


def test_without_damping_the_preconditioner_is_that_of_rounding():
    model, x, y, G = low_rank()
    b = [tf.constant((G @ np.random.default_rng(1).standard_normal(N))[:, None])]
    solution = kc.curvature(model, (x, y), kind="ggn").solve(b, 0.0, 1e-9, rank=RANK)
    assert np.linalg.norm(G @ flat(solution.value) - flat(b)) <= 2e-9 * np.linalg.norm(flat(b))


def test_products_of_the_sketch_count():
    model, x, y, _ = low_rank()
    c, b = kc.curvature(model, (x, y), kind="ggn"), [tf.ones((N, 1), tf.float64)]
    with pytest.warns(UserWarning, match="after 5 products"):
        assert int(c.solve(b, 1e-6, 1e-12, max_products=5, rank=3).steps) == 2
    with pytest.raises(ValueError, match=r"`rank` must be less than `max_products` \(5\). Received: rank=5"):
        c.solve(b, 1e-6, max_products=5, rank=5)
    with pytest.raises(ValueError, match="`rank` must be an integer >= 0"):
        c.solve(b, 1e-6, rank=-1)


@pytest.mark.parametrize("make, words", [
    (lambda: kc.Nystrom(rank=0), "`rank` must be an integer"), (lambda: kc.Nystrom(every=0), "`every` must be"),
    (lambda: kc.HessianFree(preconditioner="nystrom"), r"`preconditioner` must be a number in \[0, 1\], or `Nystrom"),
    (lambda: kc.HessianFree(preconditioner=1.5), "`preconditioner` must be a number"),
])  # fmt: skip
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
