"""Stochastic traces, diagonals and norms against matrices that are written down."""

import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_lanczos import network_like, operator, pieces, random, reflected, rows

from keras_curvature.monitor.spectra import traces
from keras_curvature.operators import Function
from keras_curvature.solvers import flat, krylov, lanczos

PARTS = {"kernel": [0], "bias": [1]}


def symmetric(seed, n):
    A = random(seed, n, n)
    return A + A.T + np.diag(np.arange(n))


def blocks(A):
    """The traces of the diagonal blocks of `PARTS`."""
    first = int(tf.size(pieces(len(A))[0]))
    return {"kernel": np.trace(A[:first, :first]), "bias": np.trace(A[first:, first:])}


def estimators(A):
    """Every estimator of a trace, as functions of a seed, and of the traces of parts."""
    like, a = pieces(len(A)), operator(A)
    pairs = lanczos.eigenpairs(a, like, 3, tolerance=0.5)  # far from converged: it is unbiased all the same
    return {
        "hutchinson": lambda seed: traces.hutchinson(a, like, 40, seed),
        "deflated": lambda seed: traces.deflated(a, like, pairs, 40, seed),
        "xtrace": lambda seed: traces.xtrace(a, like, 40, seed),
    }


@pytest.mark.parametrize("name", ["hutchinson", "deflated", "xtrace"])
@pytest.mark.parametrize("kind", some(["spiked", "symmetric"], ["spiked"]))
def test_trace_is_unbiased_and_its_standard_error_honest(name, kind):
    A = reflected(network_like(0, 60)) if kind == "spiked" else symmetric(0, 60)
    estimator = estimators(A)[name]
    found = [estimator(seed) for seed in range(50)]
    errors = np.array([one.value - np.trace(A) for one in found])
    deviations = errors / [one.stderr for one in found]
    assert np.all(np.abs(deviations) < 4)
    # that of XTrace may be too large; that of a mean of independent numbers is neither
    assert (0.25 if name == "xtrace" else 0.7) < np.sqrt(np.mean(deviations**2)) < 1.4
    assert abs(errors.mean()) < 4 * errors.std() / 50**0.5
    assert all(one.products == 40 for one in found)


def test_variance_of_signs_is_that_of_the_formula():
    A = symmetric(1, 40)
    found = np.array([traces.hutchinson(operator(A), pieces(40), 2, seed).value for seed in range(600)])
    variance = 2 * (np.sum(A**2) - np.sum(np.diag(A) ** 2)) / 2
    np.testing.assert_allclose(found.var(), variance, rtol=0.2)  # 3 standard errors
    estimate = traces.hutchinson(operator(A), pieces(40), 1000)
    np.testing.assert_allclose(estimate.stderr, (variance * 2 / 1000) ** 0.5, rtol=0.1)


def test_signs_are_exact_on_a_diagonal_and_normal_numbers_are_not():
    values = random(0, 50)
    found, parts = traces.hutchinson(operator(values), pieces(50), 2, parts=PARTS)
    np.testing.assert_allclose(found.value, values.sum(), rtol=1e-12)
    assert found.stderr < 1e-13
    np.testing.assert_allclose(parts["kernel"].value, values[:32].sum(), rtol=1e-12)


@pytest.mark.parametrize("known", [False, True])
def test_parts_add_up_to_the_whole_and_are_those_of_the_blocks(known):
    A = reflected(network_like(1, 60)) + 0.1 * symmetric(2, 60)
    pairs = lanczos.eigenpairs(operator(A), pieces(60), 4)
    arguments = (operator(A), pieces(60), pairs) if known else (operator(A), pieces(60))
    ask = traces.deflated if known else traces.hutchinson
    whole, parts = ask(*arguments, products=200, parts=PARTS)
    assert ask(*arguments, products=200) == whole
    np.testing.assert_allclose(sum(part.value for part in parts.values()), whole.value, rtol=1e-12)
    for name, exact in blocks(A).items():
        assert abs(parts[name].value - exact) < 4 * parts[name].stderr < 0.5 * abs(exact) + 4


def test_variance_of_a_part_is_that_of_the_formula():
    A = symmetric(3, 40)
    squares = A**2
    b = slice(0, 26)
    variance = 2 * (squares[b, b].sum() - np.sum(np.diag(squares)[b])) + squares[b, 26:].sum()
    _, parts = traces.hutchinson(operator(A), pieces(40), 1500, parts=PARTS)
    np.testing.assert_allclose(parts["kernel"].stderr, (variance / 1500) ** 0.5, rtol=0.1)


def test_deflation_with_eigenvectors_leaves_the_variance_of_the_rest():
    values = np.concatenate([[100, 80, -50], random(0, 97)])
    A = reflected(values)
    ends = [lanczos.eigenpairs(operator(A), pieces(100), k, 1e-9, low) for k, low in ((2, False), (1, True))]
    pairs = krylov.Eigenpairs(
        np.concatenate([end.values for end in ends]), sum((end.vectors for end in ends), []), None, 0, None
    )
    found = traces.deflated(operator(A), pieces(100), pairs, 500)
    rest = A - sum(value * np.outer(u, u) for value, u in zip(pairs.values, rows(pairs.vectors)))
    variance = 2 * (np.sum(rest**2) - np.sum(np.diag(rest) ** 2))
    np.testing.assert_allclose(found.stderr, (variance / 500) ** 0.5, rtol=0.15)
    assert abs(found.value - values.sum()) < 4 * found.stderr
    assert found.stderr < 0.1 * traces.hutchinson(operator(A), pieces(100), 500).stderr


# ----------------------------------------------------------------------------------------------------------- XTrace


def naive(A, W):
    """XTrace with a decomposition of its own for each vector that is left out, in place of one for all."""
    n, k = W.shape
    found = []
    for i in range(k):
        Q = np.linalg.qr(A @ np.delete(W, i, 1))[0]
        outside = W[:, i] - Q @ (Q.T @ W[:, i])
        found.append(np.trace(Q.T @ A @ Q) + (n - k + 1) * (outside @ A @ outside) / (outside @ outside))
    return np.mean(found)


CASES = {
    "curvlinops": random(0, 10, 10) + random(0, 10, 10).T,
    "spiked": reflected(network_like(0, 50)),
    "flat": symmetric(0, 30),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [2, 5])
def test_xtrace_is_the_naive_leave_one_out(name, k):
    A = CASES[name]
    layout = flat.Layout(pieces(len(A)))
    W = np.array([layout.normal(3, "sketch", i) for i in range(k)]).T
    found = traces.xtrace(operator(A), pieces(len(A)), 2 * k + 1, seed=3)
    assert found.products == 2 * k
    np.testing.assert_allclose(found.value, naive(A, W), rtol=1e-9)
    without = [naive(A, np.delete(W, j, 1)) for j in range(k)]  # the jackknife, of as many estimates
    np.testing.assert_allclose(found.stderr, np.sqrt((k - 1) * np.var(without)), rtol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 4, 9, 10, 12])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-10), (np.float32, 2e-5)])
def test_xtrace_of_low_rank_is_exact_also_where_there_are_zeros(rank, dtype, tolerance):
    values = np.concatenate([np.arange(1.0, rank + 1), np.zeros(60 - rank)])
    like = pieces(60, tf.as_dtype(dtype))
    for A in (values, reflected(values)):  # exactly singular, and up to rounding
        found = traces.xtrace(operator(A, dtype), like, 20)
        if rank < 10:
            np.testing.assert_allclose(found.value, values.sum(), rtol=tolerance, atol=1e-12)
            assert found.stderr <= tolerance * max(values.sum(), 1e-3)
        else:
            assert abs(found.value - values.sum()) < 4 * found.stderr


def test_xtrace_of_a_multiple_of_the_identity_is_exact():
    np.testing.assert_allclose(traces.xtrace(operator(np.full(40, 3.0)), pieces(40), 8).value, 120, rtol=1e-12)


def test_xtrace_with_as_many_vectors_as_weights_is_exact():
    A = symmetric(0, 6)
    found = traces.xtrace(operator(A), pieces(6), 40)
    assert found.products == 12
    np.testing.assert_allclose(found.value, np.trace(A), rtol=1e-10)


def test_xtrace_beats_hutchinson_on_a_spectrum_that_falls_off():
    A = reflected(1 / np.arange(1, 81))  # eigenthings' case: 80 weights, 60 products, 30 trials
    exact, errors = np.trace(A), {}
    for ask in (traces.hutchinson, traces.xtrace):
        errors[ask] = [ask(operator(A), pieces(80), 60, seed).value - exact for seed in range(30)]
    assert np.std(errors[traces.xtrace]) < 0.4 * np.std(errors[traces.hutchinson])
    found = traces.hutchinson(operator(A), pieces(80), 400)
    assert abs(found.value - exact) < 3 * found.stderr
    assert abs(traces.xtrace(operator(A), pieces(80), 98).value / exact - 1) < 0.05


def test_curvlinops_cases():
    # its sampled estimates take up to 1e5 products until they are within 1e-3; here 2000, and their standard errors
    A = np.random.RandomState(0).rand(10, 10)
    A, like = (A + A.T) / 2, pieces(10)
    assert abs(traces.xtrace(operator(A), like, 20).value - np.trace(A)) < 5e-4
    B = np.random.RandomState(1).rand(15, 15)
    assert abs(traces.xtrace(operator(B + B.T), pieces(15), 30).value - 2 * np.trace(B)) < 5e-4
    found = traces.hutchinson(operator(A), like, 2000)
    assert abs(found.value - np.trace(A)) < 4 * found.stderr < 0.7
    entries, errors = (rows([found])[0] for found in traces.diagonal(operator(A), like, 2000))
    assert np.all(np.abs(entries - np.diag(A)) < 4 * errors) and errors.max() < 0.05
    norm = traces.squared_frobenius(operator(A), like, 2000)
    assert abs(norm.value - np.sum(A**2)) < 4 * norm.stderr < 0.15 * np.sum(A**2)


# --------------------------------------------------------------------------------------- diagonal and Frobenius norm


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_diagonal_with_the_standard_error_of_each_entry(dtype):
    A = symmetric(0, 60)
    entries, errors = traces.diagonal(operator(A, dtype), pieces(60, tf.as_dtype(dtype)), 400)
    assert entries[0].shape == errors[0].shape == (2, 20) and entries[0].dtype == dtype
    entries, errors = rows([entries])[0], rows([errors])[0]
    exact = np.sqrt((np.sum(A**2, 1) - np.diag(A) ** 2) / 400)
    np.testing.assert_allclose(errors, exact, rtol=0.15)
    deviations = (entries - np.diag(A)) / errors
    assert np.abs(deviations).max() < 4 and 0.8 < deviations.std() < 1.2


def test_diagonal_of_a_diagonal_is_exact():
    values = random(0, 20)
    entries, errors = traces.diagonal(operator(values), pieces(20), 2)
    np.testing.assert_allclose(rows([entries])[0], values, rtol=1e-13)
    np.testing.assert_array_equal(rows([errors])[0], 0)


def test_squared_frobenius_norm():
    A = symmetric(0, 60)
    found = [traces.squared_frobenius(operator(A), pieces(60), 30, seed) for seed in range(30)]
    deviations = [(one.value - np.sum(A**2)) / one.stderr for one in found]
    assert np.abs(deviations).max() < 4.5 and abs(np.mean(deviations)) < 4 / 30**0.5
    assert found[0].products == 30


def test_the_seed_decides():
    A = operator(symmetric(0, 30))
    for ask in (traces.hutchinson, traces.xtrace, traces.squared_frobenius):
        one, same, other = (ask(A, pieces(30), 6, seed) for seed in (0, 0, 1))
        assert one == same != other


def test_products_are_counted_as_made():
    made, A = [], operator(symmetric(0, 30))
    count = Function(lambda v: made.append(0) or A @ v)
    for ask, asked in [(traces.hutchinson, 7), (traces.xtrace, 8), (traces.squared_frobenius, 5)]:
        made.clear()
        assert ask(count, pieces(30), asked).products == len(made) == asked


@pytest.mark.parametrize("call, message", [
    (lambda a, v: traces.hutchinson(a, v, 1), "`hutchinson`: `products` must be an integer >= 2. Received: products=1"),
    (lambda a, v: traces.deflated(a, v, lanczos.eigenpairs(a, v, 1), 0), "`deflated`: `products` must be"),
    (lambda a, v: traces.xtrace(a, v, 3), "`xtrace`: `products` must be an integer >= 4"),
    (lambda a, v: traces.diagonal(a, v, 1), "`diagonal`: `products` must be"),
    (lambda a, v: traces.squared_frobenius(a, v, 1.5), "`squared_frobenius`: `products` must be"),
    (lambda a, v: traces.hutchinson(a, v, parts={"a": [2]}), r"`parts` must be a dict of names to .* in \[0, 2\)"),
    (lambda a, v: traces.xtrace(a, v, 30, memory_limit=100), "Remedy: pass fewer products"),
    (lambda a, v: traces.hutchinson(Function(lambda v: [x * np.inf for x in v]), v), "not finite"),
])  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(operator(np.arange(1.0, 21.0)), pieces(20))
