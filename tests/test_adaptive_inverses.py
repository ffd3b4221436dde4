"""`Refresh` for K-FAC's inverses and EKFAC's bases: new ones where the factors moved, each layer by itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_curveball import stepper
from test_kfac import cross_entropy, made, net, single

from keras_curvature import EKFAC, KFAC, LevenbergMarquardt, Linearization, Refresh

pytestmark = pytest.mark.usefixtures("in_float64")

COMMON = {"fisher": "exact", "factors_every": 2}


def batches(steps, width=4, outputs=3, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(steps):
        yield random.standard_normal((7, width)), np.eye(outputs)[random.integers(outputs, size=7)]


def two_layers(optimizer):
    random = np.random.default_rng(1)
    arrays = [random.standard_normal(shape) for shape in ((4, 5), (5,), (5, 3), (3,))]
    return made(net(arrays), optimizer, cross_entropy())


@pytest.mark.parametrize(("cls", "every", "factors"), some(
    [(KFAC, 1, "kfac"), (KFAC, 1, "tkfac"), (EKFAC, 2, "kfac"), (EKFAC, 2, "tkfac")],
    [(EKFAC, 2, "kfac")],
))  # fmt: skip
def test_without_tolerance_it_is_a_refresh_at_each_look(cls, every, factors):
    found = []
    for inverses_every in (Refresh(0.0), every):
        optimizer = cls(0.1, factors=factors, inverses_every=inverses_every, **COMMON)
        model = two_layers(optimizer)
        step = stepper(model, optimizer)
        seen = [step(x, y) for x, y in batches(7)]
        found.append(np.concatenate([w.ravel() for w in model.get_weights()]))
        if isinstance(inverses_every, Refresh):
            assert seen[0]["refreshes"] == 2 and all(s["failed_refreshes"] == 0 for s in seen)
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_inverses_stay_until_a_trace_moves():
    optimizer = KFAC(0.0, inverses_every=Refresh(0.2), fisher="exact", factors_every=1)
    model, x, y, _ = single(optimizer, "softmax")
    step = stepper(model, optimizer)
    assert [step(x, y)["refreshes"] for _ in range(4)] == [1, 0, 0, 0]  # the same factors
    kept = [v.numpy() for v in optimizer._inverses]
    # the average of the inputs' factor grows by about a tenth of 1, then by much more
    assert step(np.sqrt(1.2) * x, y)["refreshes"] == 0
    for a, b in zip(optimizer._inverses, kept):
        np.testing.assert_array_equal(a, b)
    assert step(4 * x, y)["refreshes"] == 1
    A, G = (v.numpy() for v in optimizer._factors)
    pi = np.sqrt(np.trace(A) / 5 / (np.trace(G) / 3))
    np.testing.assert_allclose(optimizer._inverses[0], np.linalg.inv(A + pi * 0.03**0.5 * np.eye(5)), rtol=1e-10)
    np.testing.assert_allclose(optimizer._inverses[1], np.linalg.inv(G + 0.03**0.5 / pi * np.eye(3)), rtol=1e-10)


def test_another_damping_makes_new_inverses():
    rule = LevenbergMarquardt(1.0, 0.5, high=0.9, every=2)
    optimizer = KFAC(1e-3, rule, inverses_every=Refresh(0.1), fisher="exact", factors_every=50)
    model, x, y, _ = single(optimizer, "softmax")
    step = stepper(model, optimizer)
    seen = [step(x, y) for _ in range(5)]
    assert [s["refreshes"] for s in seen] == [1, 0, 1, 0, 1]
    assert len({s["damping"] for s in seen}) > 1


def test_layers_that_stand_still_keep_theirs():
    """The second layer's inputs are bounded: only the first layer's factor follows the scale of the inputs."""
    optimizer = KFAC(0.0, inverses_every=Refresh(0.5), fisher="exact", factors_every=1)
    model = two_layers(optimizer)
    step, (x, y) = stepper(model, optimizer), next(batches(1))
    assert step(30 * x, y)["refreshes"] == 2
    kept = [v.numpy() for v in optimizer._inverses]
    assert step(90 * x, y)["refreshes"] == 1
    same = [np.array_equal(a, b) for a, b in zip(optimizer._inverses, kept)]
    assert same == [False, False, True, True]


def test_a_failed_inverse_is_tried_again():
    optimizer = KFAC(0.0, inverses_every=Refresh(0.1), fisher="exact", factors_every=50)
    model, x, y, _ = single(optimizer, "softmax")
    step = stepper(model, optimizer)
    step(x, y)
    good, kept = optimizer._factors[0].numpy(), optimizer._inverses[0].numpy()
    optimizer._factors[0].assign(-good)  # Cholesky fails
    for _ in range(2):
        seen = step(x, y)
        assert seen["failed_refreshes"] >= 1 and seen["refreshes"] == 0
        np.testing.assert_array_equal(optimizer._inverses[0], kept)
    optimizer._factors[0].assign(2 * good)
    assert step(x, y)["refreshes"] == 1


def test_bases_stay_while_they_diagonalize_and_moments_go_on():
    optimizer = EKFAC(0.0, inverses_every=Refresh(0.05), fisher="exact", factors_every=1)
    model, x, y, _ = single(optimizer, "softmax")
    step = stepper(model, optimizer)
    assert [step(x, y)["refreshes"] for _ in range(3)] == [1, 0, 0]
    np.testing.assert_array_equal(optimizer._moment_counts, [3])
    kept = optimizer._bases[0].numpy()
    turned = x @ np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    found = [step(5 * turned, y)["refreshes"] for _ in range(2)]
    assert found[0] == 1 and not np.array_equal(optimizer._bases[0], kept)
    A = optimizer._factors[0].numpy()
    U = optimizer._bases[0].numpy()
    B = U.T @ A @ U
    assert np.linalg.norm(B - np.diag(np.diag(B))) <= 0.05 * np.linalg.norm(B)


def test_groups_and_indices_have_inverses_too():
    """A depthwise convolution has a matrix for each channel, an embedding a diagonal."""
    found = []
    for inverses_every in (Refresh(0.0), 1):
        optimizer = KFAC(0.1, inverses_every=inverses_every, fisher="exact", factors_every=1)
        keras.utils.set_random_seed(0)
        model = made(keras.Sequential([
            keras.Input((6,), dtype="int32"), keras.layers.Embedding(5, 3), keras.layers.DepthwiseConv1D(2),
            keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2), keras.layers.Dense(2),
        ]), optimizer, "mse")  # fmt: skip
        random = np.random.default_rng(0)

        @tf.function
        def step(x, y, model=model, optimizer=optimizer):
            return optimizer.step(Linearization(model, x, y))

        for _ in range(3):
            step(tf.constant(random.integers(5, size=(4, 6))), tf.constant(random.standard_normal((4, 2))))
        found.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_allclose(*found, rtol=1e-10)


def test_what_cannot_be_is_told_and_the_config_has_it():
    with pytest.raises(ValueError, match="`EKFAC`: `inverses_every` must be a multiple .* with `check_every=1`"):
        EKFAC(inverses_every=Refresh(0.1, check_every=2))
    for cls in (KFAC, EKFAC):
        again = cls.from_config(cls(inverses_every=Refresh(0.2)).get_config())
        assert again.inverses_every == Refresh(0.2) and "refreshes" in again.reports
        assert "refreshes" not in cls().reports
    with pytest.raises(ValueError, match="`inverses_every` must be an integer >= 1 or a `Refresh`"):
        KFAC(inverses_every=0)
