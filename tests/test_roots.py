"""Inverse roots and bases of eigenvectors against what they must satisfy, and with matrices that are no good."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_curvature.operators.tiles import Tiles
from keras_curvature.solvers import eigenbases
from keras_curvature.solvers.dealing import in_stacks
from keras_curvature.solvers.roots import CoupledNewton, EigenRoot

EXACT = {"eigen": EigenRoot(), "newton": CoupledNewton(relative_epsilon=0.0, tolerance=1e-12)}
XLA_ACCURACY = 1e-5  # its eigendecomposition stops at 1e-6, in float64 too
both = pytest.mark.parametrize("name", EXACT)
with_and_without_xla = pytest.mark.parametrize("jit_compile", [False, True])


def positive(*shape, seed=0, smallest=0.1):
    """A stack of symmetric matrices with eigenvalues of at least `smallest`."""
    a = np.random.default_rng(seed).standard_normal((*shape, shape[-1]))
    return a @ np.swapaxes(a, -1, -2) + smallest * np.eye(shape[-1])


def root_of(component, matrices, p, epsilon=1e-15, jit_compile=False):
    compiled = tf.function(lambda A: component.inverse_root(A, p, epsilon), jit_compile=jit_compile)
    return compiled(tf.constant(matrices)).numpy()


@both
@with_and_without_xla
def test_its_power_times_the_matrix_is_the_identity(name, jit_compile):
    A, accuracy = positive(3, 5), XLA_ACCURACY if jit_compile else 1e-10
    for p in (1, 2, 6):
        X = root_of(EXACT[name], A, p, jit_compile=jit_compile)
        np.testing.assert_allclose(np.linalg.matrix_power(X, p) @ A, np.broadcast_to(np.eye(5), A.shape), atol=accuracy)
        np.testing.assert_allclose(X, np.swapaxes(X, -1, -2), atol=1e-10)


@both
def test_epsilon_is_added_to_the_diagonal(name):
    A = positive(4, smallest=0.0)
    X = root_of(EXACT[name], A, 4, epsilon=0.5)
    np.testing.assert_allclose(np.linalg.matrix_power(X, 4) @ (A + 0.5 * np.eye(4)), np.eye(4), atol=1e-10)


def test_eigenvalues_below_epsilon_are_lifted_together():
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))
    values = np.array([-0.5, 0.0, 1.0, 4.0])
    X = root_of(EigenRoot(), basis * values @ basis.T, 1 / 0.3, epsilon=1e-3)
    expected = basis * (values + 0.5 + 1e-3) ** -0.3 @ basis.T
    np.testing.assert_allclose(X, expected, rtol=1e-10)


def test_newton_adds_a_share_of_the_norm_where_epsilon_is_less():
    A = np.ones((3, 3))  # of rank one, norm 3
    X = root_of(CoupledNewton(relative_epsilon=1e-2, tolerance=1e-12), A, 2)
    np.testing.assert_allclose(X @ X @ (A + 0.03 * np.eye(3)), np.eye(3), atol=1e-10)


@both
@with_and_without_xla
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_matrix_of_a_stack_fails_alone(name, jit_compile, bad):
    A = positive(3, 4)
    A[1, 2, 3] = bad
    X = root_of(EXACT[name], A, 2, jit_compile=jit_compile)
    assert np.isnan(X[1]).all()
    others = root_of(EXACT[name], A[[0, 2]], 2)
    np.testing.assert_allclose(X[[0, 2]], others, rtol=XLA_ACCURACY if jit_compile else 1e-10)


def test_an_iteration_that_does_not_arrive_has_failed():
    A = np.diag([1e12, 1.0])
    assert np.isnan(root_of(CoupledNewton(relative_epsilon=0.0, max_steps=2), A, 4)).all()
    assert np.isnan(root_of(CoupledNewton(relative_epsilon=0.0), np.diag([1.0, -1.0]), 4)).all()
    assert np.isfinite(root_of(CoupledNewton(relative_epsilon=0.0), A, 4)).all()


@pytest.mark.parametrize("root", [EigenRoot(), CoupledNewton()])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_in_single_precision_a_singular_matrix_has_a_finite_root(root, scale):
    a = np.random.default_rng(0).standard_normal((8, 3)).astype("float32")
    X = root_of(root, np.float32(scale) * a @ a.T, 4, epsilon=1e-12)
    assert np.isfinite(X).all()
    inside = a / np.linalg.norm(a)
    assert np.linalg.norm(X @ inside) < 2 * (scale * 3 + 1e-12) ** -0.25 * 3


def test_the_bad_are_told():
    with pytest.raises(ValueError, match="`EigenRoot`: `exponent` must be .* .0, inf., or None. Received: exponent=0"):
        EigenRoot(exponent=0)
    with pytest.raises(ValueError, match="one over an integer, or use `EigenRoot`. Received: exponent=0.3"):
        CoupledNewton(exponent=0.3)
    for wrong in ({"tolerance": 0}, {"max_steps": 0}, {"relative_epsilon": -1}):
        with pytest.raises(ValueError, match=f"`CoupledNewton`: `{next(iter(wrong))}`"):
            CoupledNewton(**wrong)


@pytest.mark.parametrize("root", [EigenRoot(exponent=0.3), CoupledNewton(exponent=0.25, max_steps=7)])
def test_a_root_is_saved_and_loaded(root):
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(root)) == root


def test_matrices_of_one_size_are_computed_together_and_come_back_in_order():
    matrices = [positive(n, seed=i) for i, n in enumerate([3, 5, 3, 4, 5, 3])]
    calls = []

    def inverse(pair):
        calls.append(tuple(pair[0].shape))
        return tf.linalg.inv(pair[0]) + pair[1]

    pairs = [(tf.constant(A), tf.constant(float(i) * np.ones_like(A))) for i, A in enumerate(matrices)]
    for i, (found, A) in enumerate(zip(in_stacks(inverse, pairs), matrices)):
        np.testing.assert_allclose(found, np.linalg.inv(A) + i, rtol=1e-9)
    assert sorted(calls) == [(2, 5, 5), (3, 3, 3), (4, 4)]


def test_groups_are_joined_along_their_axis_and_large_items_stay_alone():
    counts, calls = [2, 3, 1, 4], []
    groups = [np.stack([positive(2, seed=9 * i + j) for j in range(n)]) for i, n in enumerate(counts)]
    items = [(tf.constant(A), tf.range(n)) for A, n in zip(groups, counts)]

    def scaled(item):
        calls.append(item[0].shape[0])
        return tf.linalg.inv(item[0]), item[1]

    for largest, expected in ((None, [10]), (15, [4, 6])):
        calls.clear()
        for (inverse, same), (A, numbers) in zip(in_stacks(scaled, items, [True] * 4, largest), items):
            np.testing.assert_allclose(inverse, np.linalg.inv(A), rtol=1e-9)
            np.testing.assert_array_equal(same, numbers)
        assert sorted(calls) == expected


# Bases of eigenvectors.


def assert_orthonormal(Q):
    np.testing.assert_allclose(np.swapaxes(Q, -1, -2) @ Q, np.broadcast_to(np.eye(Q.shape[-1]), Q.shape), atol=1e-10)


def test_decompose_has_the_largest_eigenvalue_first():
    A = positive(2, 5)
    Q = eigenbases.decompose(tf.constant(A)).numpy()
    assert_orthonormal(Q)
    rotated = np.swapaxes(Q, -1, -2) @ A @ Q
    for matrix in rotated:
        np.testing.assert_allclose(matrix, np.diag(np.sort(np.diag(matrix))[::-1]), atol=1e-10)


@with_and_without_xla
def test_refine_is_a_power_iteration_and_leaves_the_columns_where_they_are(jit_compile):
    A = positive(3, 4)
    bases = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 4, 4)))[0]
    seen = tf.function(eigenbases.refine, jit_compile=jit_compile)(tf.constant(A), tf.constant(bases)).numpy()
    assert_orthonormal(seen)
    for a, q, found in zip(A, bases, seen):
        order = np.argsort(-np.diag(q.T @ a @ q))
        expected, _ = np.linalg.qr(a @ q[:, order])
        np.testing.assert_allclose(np.abs(found[:, order].T @ expected), np.eye(4), atol=1e-10)
    unsorted = eigenbases.refine(tf.constant(A[0]), tf.constant(bases[0]), sort=False)
    np.testing.assert_allclose(np.abs(unsorted.numpy().T @ np.linalg.qr(A[0] @ bases[0])[0]), np.eye(4), atol=1e-10)


def test_refined_often_enough_the_basis_is_that_of_the_eigenvectors():
    A, Q = positive(5), np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0]
    for _ in range(200):
        Q = eigenbases.refine(tf.constant(A), tf.constant(Q)).numpy()
    rotated = Q.T @ A @ Q
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-8)


@with_and_without_xla
def test_a_basis_stays_one_where_the_matrix_is_singular_and_fails_where_it_is_not_finite(jit_compile):
    vector = np.random.default_rng(0).standard_normal(4)
    A = np.stack([np.zeros((4, 4)), np.outer(vector, vector), np.full((4, 4), np.nan)])
    eye = np.broadcast_to(np.eye(4), A.shape)
    for compute in (eigenbases.decompose, lambda A: eigenbases.refine(A, tf.constant(eye))):
        Q = tf.function(compute, jit_compile=jit_compile)(tf.constant(A)).numpy()
        assert_orthonormal(Q[:2])
        assert np.isnan(Q[2]).all()


# Tiles.


@pytest.mark.parametrize("size", [None, 3, 10])
def test_tiles_have_their_shapes_and_make_the_variables_again(size):
    tiles = Tiles([(5, 7), (7,), (3, 3, 2, 4), ()], 18, size)
    random = np.random.default_rng(0)
    vector = [tf.constant(random.standard_normal(shape)) for shape in tiles.variables]
    parts = tiles.split(vector)
    assert [tuple(part.shape) for part in parts] == tiles.shapes
    assert size is None or max(n for shape in tiles.shapes for n in shape) <= size
    for joined, original in zip(tiles.join(parts), vector):
        np.testing.assert_array_equal(joined, original)
