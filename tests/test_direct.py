"""Damped inverses against dense matrices."""

import numpy as np
import pytest
import tensorflow as tf

from keras_curvature.solvers import direct


def positive(seed, *shape, rank=None, dtype=np.float64):
    """Random positive semi-definite matrices `(..., d, d)`, of a rank."""
    root = np.random.RandomState(seed).randn(*shape[:-1], rank or 2 * shape[-1])
    return (root @ np.swapaxes(root, -1, -2) / root.shape[-1]).astype(dtype)


@pytest.mark.parametrize("shape", [(7, 7), (2, 8, 8)])
def test_large_triangles_are_inverted_by_halves(shape):
    lower = np.linalg.cholesky(positive(1, *shape))
    found = direct._inverse_of_triangle(tf.constant(lower), largest=2).numpy()
    np.testing.assert_allclose(found, np.linalg.inv(lower), atol=1e-12)
    np.testing.assert_array_equal(found, np.tril(found))


def split(A, G, damping):
    """The dampings of two factors."""
    return direct.split_damping(*(direct.mean_eigenvalue(tf.constant(factor)) for factor in (A, G)), damping)


@pytest.mark.parametrize("shape", [(5, 5), (3, 4, 4), (1, 1)])
def test_inverse_times_the_damped_matrix_is_the_identity(shape):
    M = positive(0, *shape, rank=2)  # singular without damping
    found = direct.inverse(tf.constant(M), 0.3).numpy()
    unit = np.eye(shape[-1])
    np.testing.assert_allclose(found @ (M + 0.3 * unit), np.broadcast_to(unit, shape), atol=1e-12)
    np.testing.assert_array_equal(found, np.swapaxes(found, -1, -2))


def test_matrix_of_one_number_is_inverted_inside_a_condition():
    M, count = tf.Variable([[2.0]]), tf.Variable(0)  # nothing that could be computed beforehand

    @tf.function
    def invert():
        return tf.cond(tf.equal(count % 2, 0), lambda: direct.inverse(M + 0.0, 0.5), lambda: M + 0.0)

    np.testing.assert_allclose(invert(), [[0.4]], rtol=1e-6)


def test_each_of_several_matrices_has_its_own_damping():
    M, dampings = positive(1, 3, 4, 4), np.array([0.1, 1.0, 10.0])
    found = direct.inverse(tf.constant(M), tf.constant(dampings)).numpy()
    for one, damping, inverse in zip(M, dampings, found):
        np.testing.assert_allclose(inverse, np.linalg.inv(one + damping * np.eye(4)), rtol=1e-10)


def test_diagonal_is_inverted_as_the_matrix_that_it_means():
    d = np.array([0.5, 2.0, 0.0])
    found = direct.inverse_of_diagonal(tf.constant(d), 0.25).numpy()
    dense = direct.inverse(tf.constant(np.diag(d)), 0.25).numpy()
    np.testing.assert_allclose(np.diag(found), dense, rtol=1e-13)


@pytest.mark.parametrize("matrix", [[[1.0, 2.0], [2.0, 1.0]], [[np.nan, 0.0], [0.0, 1.0]], [1.0, -1.0], [1.0, np.nan]])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_what_has_no_inverse_is_nan_and_does_not_raise(matrix, jit_compile):
    invert = direct.inverse if np.ndim(matrix) == 2 else direct.inverse_of_diagonal
    found = tf.function(invert, jit_compile=jit_compile)(tf.constant(matrix), tf.constant(0.5)).numpy()
    assert np.isnan(found).any()


def test_damping_of_the_factors_is_that_of_the_paper_wherever_the_scale_is():
    A, G, damping = positive(2, 4, 4), positive(3, 3, 3), 0.7
    pi = np.sqrt(np.trace(A) / 4 / (np.trace(G) / 3))
    left, right = split(A, G, damping)
    np.testing.assert_allclose([left, right], [pi * damping**0.5, damping**0.5 / pi], rtol=1e-13)
    product = np.kron(A + left * np.eye(4), G + right * np.eye(3))
    moved = [tf.constant(100.0 * A), tf.constant(G / 100.0)]
    left, right = split(*moved, damping)
    np.testing.assert_allclose(np.kron(moved[0] + left * np.eye(4), moved[1] + right * np.eye(3)), product, rtol=1e-12)


def test_inverse_by_factors_is_exact_where_a_factor_is_a_multiple_of_the_identity():
    # then sqrt(damping)/pi and pi sqrt(damping) are what (A + s I) (x) (c I) needs, but for the cross terms
    c, G, damping = 2.0, positive(4, 3, 3), 0.4
    A = c * np.eye(4)
    left, right = split(A, G, damping)
    found = np.kron(direct.inverse(tf.constant(A), left), direct.inverse(tf.constant(G), right))
    expected = np.linalg.inv(np.kron(A + float(left) * np.eye(4), G + float(right) * np.eye(3)))
    np.testing.assert_allclose(found, expected, rtol=1e-11)
    undamped = np.kron(direct.inverse(tf.constant(A), 0.0), direct.inverse(tf.constant(G), 0.0))
    np.testing.assert_allclose(undamped @ np.kron(A, G), np.eye(12), atol=1e-10)


@pytest.mark.parametrize("zero", ["A", "G", "both"])
def test_factor_of_zeros_leaves_the_damping_alone(zero):
    A = positive(5, 4, 4) * (zero == "G")
    G = positive(6, 3, 3) * (zero == "A")
    left, right = split(A, G, 0.25)
    np.testing.assert_allclose([left, right], [0.5, 0.5], rtol=1e-14)
    assert np.isfinite(direct.inverse(tf.constant(A), left)).all()


def test_each_group_splits_the_damping_for_itself():
    A, G = positive(7, 3, 4, 4), positive(8, 3, 2, 2)
    left, right = split(A, G, 0.1)
    for i in range(3):
        alone = split(A[i], G[i], 0.1)
        np.testing.assert_allclose([left[i], right[i]], alone, rtol=1e-13)
    inverses = direct.inverse_of_diagonal(tf.constant(A[:, 0] ** 2), left).numpy()
    np.testing.assert_allclose(inverses, 1 / (A[:, 0] ** 2 + left.numpy()[:, None]), rtol=1e-13)


@pytest.mark.parametrize("groups", [(), (3,)])
def test_rank_one_inverse_is_the_dense_one(groups):
    random = np.random.RandomState(10)
    a, b, W = random.randn(*groups, 4), random.randn(*groups, 2), random.randn(*groups, 4, 2)
    found = direct.solve_rank_one(tf.constant(a), tf.constant(b), 0.2, tf.constant(W)).numpy()
    for vectors in zip(a.reshape(-1, 4), b.reshape(-1, 2), W.reshape(-1, 8), found.reshape(-1, 8)):
        of_inputs, of_slopes, matrix, solution = vectors
        dense = np.kron(np.outer(of_inputs, of_inputs), np.outer(of_slopes, of_slopes)) + 0.2 * np.eye(8)
        np.testing.assert_allclose(solution, np.linalg.solve(dense, matrix), rtol=1e-11)
