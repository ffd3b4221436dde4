"""Trace-restricted factors: TKFAC and TEKFAC against dense Fisher matrices in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_curveball import stepper
from test_kfac import fisher_of, matrix, single, softmax

from keras_curvature import EKFAC, KFAC, Linearization, curved
from keras_curvature.linearization.estimates.trace_factors import restricted, trace_factors
from keras_curvature.linearization.layers import kronecker

pytestmark = pytest.mark.usefixtures("in_float64")


def dense_factors(a, z):
    """`E[|s|^2 a a']` and `E[|a|^2 s s']` of one softmax layer, over all labels."""
    p = softmax(z)
    G = np.array([np.diag(q) - np.outer(q, q) for q in p])
    of_slopes, of_inputs = np.trace(G, axis1=1, axis2=2), np.sum(a**2, axis=1)
    return np.einsum("n,ni,nj->ij", of_slopes, a, a) / len(a), np.einsum("n,nij->ij", of_inputs, G) / len(a)


def test_the_product_has_the_trace_of_the_block_and_the_step_is_its_inverse():
    optimizer = KFAC(1.0, 0.1, 0.0, fisher="exact", kl_clip=None, factors="tkfac")
    model, x, y, a = single(optimizer, "softmax")
    W = matrix(model)
    A, G = dense_factors(a, a @ W)
    G /= np.trace(G)
    F = fisher_of(a, a @ W)
    np.testing.assert_allclose(np.trace(np.kron(A, G)), np.trace(F))
    of_kfac = np.kron(a.T @ a / 7, np.mean([np.diag(q) - np.outer(q, q) for q in softmax(a @ W)], axis=0))
    assert abs(np.trace(of_kfac) / np.trace(F) - 1) > 0.005
    pi = np.sqrt((np.trace(A) / 5) / (1 / 3))
    inverse = np.kron(np.linalg.inv(A + pi * 0.1**0.5 * np.eye(5)), np.linalg.inv(G + 0.1**0.5 / pi * np.eye(3)))
    g = a.T @ (softmax(a @ W) - y) / 7
    stepper(model, optimizer)(x, y)
    np.testing.assert_allclose(matrix(model), W - (inverse @ g.ravel()).reshape(5, 3), rtol=1e-9)


def test_factors_of_different_batches_are_averaged_before_the_division():
    optimizer = KFAC(0.0, factors_every=1, fisher="exact", factors="tkfac")
    model, x, y, a = single(optimizer, "softmax")
    step, found = stepper(model, optimizer), []
    for scale in (1.0, 3.0):
        step(scale * x, y)
        found.append(dense_factors(np.c_[scale * x, np.ones(7)], np.c_[scale * x, np.ones(7)] @ matrix(model)))
    for factor, pair in zip(optimizer._factors, zip(*found)):
        np.testing.assert_allclose(factor, sum(pair) / 2, rtol=1e-12)


def test_tekfac_divides_by_the_second_moments_in_the_eigenbasis_of_these_factors():
    optimizer = EKFAC(1.0, 0.1, 0.0, fisher="exact", kl_clip=None, factors="tkfac")
    model, x, y, a = single(optimizer, "softmax")
    W = matrix(model)
    F = fisher_of(a, a @ W)
    U = np.kron(*(np.linalg.eigh(factor)[1] for factor in dense_factors(a, a @ W)))
    corrected = U @ np.diag(np.diag(U.T @ F @ U)) @ U.T
    g = (a.T @ (softmax(a @ W) - y) / 7).ravel()
    stepper(model, optimizer)(x, y)
    expected = W - np.linalg.solve(corrected + 0.1 * np.eye(15), g).reshape(5, 3)
    np.testing.assert_allclose(matrix(model), expected, rtol=1e-9)


def test_with_inputs_of_one_length_they_are_kfacs():
    factors = []
    for kind in ("kfac", "tkfac"):
        optimizer = KFAC(1.0, fisher="exact", factors=kind)
        model, x, y, _ = single(optimizer, "mse")  # where the Fisher matrix of the outputs is the same for all examples
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        stepper(model, optimizer)(x, y)
        A, G = (np.array(f) for f in optimizer._factors)
        factors.append(np.kron(A, G) / np.trace(G if kind == "tkfac" else np.eye(1)))
    np.testing.assert_allclose(*factors, rtol=1e-12)


def model_of_all_kinds():
    """Indices, a convolution, normalization, a dense layer at several positions."""
    return keras.Sequential([
        keras.Input((6,), dtype="int32"), keras.layers.Embedding(7, 4), keras.layers.Conv1D(5, 2),
        keras.layers.LayerNormalization(), keras.layers.Dense(3), keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(3),
    ])  # fmt: skip


@pytest.mark.parametrize("sharing", some(["expand", "reduce"], ["expand"]))
def test_traces_of_both_factors_are_those_of_examples_or_positions(sharing):
    random = np.random.default_rng(0)
    x, y = random.integers(7, size=(5, 6)), random.standard_normal((5, 3))
    model = curved(model_of_all_kinds())
    model.compile("sgd", "mse")
    lin, blocks = Linearization(model, x, y), kronecker.blocks(model, sharing)[0]
    weighted, _ = trace_factors(lin, blocks, fisher="exact")
    whole = tf.function(lambda: trace_factors(Linearization(model, x, y, micro_batches=2), blocks, fisher="exact"))()
    plain, _ = lin.kronecker_factors(blocks, fisher="exact")
    for block, (A, G), cut, (A_k, G_k) in zip(blocks, weighted, whole[0], plain):
        for factor, other in zip((A, G), cut):
            np.testing.assert_allclose(factor, other, rtol=1e-10, atol=1e-14)
        if block.sharing == "exact":
            np.testing.assert_array_equal(A, A_k)
            np.testing.assert_array_equal(restricted([block], [A, G])[1], G_k)
            continue
        trace = np.sum(A) if block.has_indices else np.trace(A)
        np.testing.assert_allclose(trace, np.trace(G), rtol=1e-10)
        if block.shape[-1] == 3 and block is blocks[-1]:  # one position: the exact trace, by the Jacobian
            inputs = keras.Model(model.inputs[0], model.layers[-2].output)(x).numpy()
            np.testing.assert_allclose(trace, 2 * np.mean(np.sum(np.c_[inputs, np.ones(5)] ** 2, 1)), rtol=1e-10)


def test_an_unknown_kind_is_refused():
    for cls in (KFAC, EKFAC):
        with pytest.raises(ValueError, match='"kfac" or "tkfac". Received: factors=\'traces\''):
            cls(factors="traces")
