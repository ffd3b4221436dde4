"""Solvers against `numpy.linalg.solve`, closed forms, Martens' own code, and a scalar re-implementation of his rule."""

import math
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from keras_curvature.operators import Diagonal, Function, Identity, Scaled, dense
from keras_curvature.solvers import ConjugateGradient, NeumannSeries
from keras_curvature.solvers.base import Solver

REFERENCE = np.load(pathlib.Path(__file__).parent / "reference" / "hessian_free_cg.npz")
CASES = ["plain", "precon_warm", "long", "maxiters", "maxiters_unaligned", "negative_curvature", "positive_start"]


def matrix(A, psd=True):
    """The operator of a matrix on vectors of two tensors, `(2, 2)` and the rest."""

    def product(v):
        flat = tf.linalg.matvec(tf.constant(A), tf.concat([tf.reshape(a, [-1]) for a in v], 0))
        return split(flat)

    return Function(product, psd)


def split(flat):
    """A flat array as a vector of two tensors."""
    flat = tf.convert_to_tensor(flat)
    return [tf.reshape(flat[:4], [2, 2]), flat[4:]]


def flat(vector):
    """The entries of a vector, as one array."""
    return np.concatenate([np.ravel(a) for a in vector])


@pytest.fixture
def spd():
    """`(A, b, x)` with `A x = b`, condition 100."""
    random = np.random.default_rng(0)
    Q = np.linalg.qr(random.standard_normal((12, 12)))[0]
    A = Q @ np.diag(np.geomspace(0.1, 10, 12)) @ Q.T
    b = random.standard_normal(12)
    return A, b, np.linalg.solve(A, b)


EXACTLY = ConjugateGradient(max_steps=100, progress_tolerance=0.0, residual_tolerance=1e-12)


def test_reaches_the_solution(spd):
    A, b, x = spd
    solution = EXACTLY.solve(matrix(A), split(b))
    np.testing.assert_allclose(flat(solution.value), x, 1e-9)
    assert solution.steps <= 20
    assert solution.residual <= 1e-11
    residual = np.linalg.norm(b - A @ flat(solution.value)) / np.linalg.norm(b)
    np.testing.assert_allclose(solution.residual, residual, atol=1e-12)


def test_warm_start(spd):
    A, b, x = spd
    near = EXACTLY.solve(matrix(A), split(b), start=split(x + 1e-8))
    np.testing.assert_allclose(flat(near.value), x, 1e-9)
    at = EXACTLY.solve(matrix(A), split(b), start=split(x))
    assert at.steps <= 1
    np.testing.assert_allclose(flat(at.value), x, 1e-9)


def test_preconditioner(spd):
    A, b, x = spd
    inverse = matrix(np.linalg.inv(A))
    assert EXACTLY.solve(matrix(A), split(b), preconditioner=inverse).steps <= 2
    D = np.geomspace(1, 1e4, 12)
    scaled = matrix(D[:, None] * A * D)
    jacobi = Diagonal(split(1 / (D * np.diag(A) * D)))
    solution = EXACTLY.solve(scaled, split(D * b), preconditioner=jacobi)
    np.testing.assert_allclose(flat(solution.value), x / D, 1e-7)
    assert solution.steps < EXACTLY.solve(scaled, split(D * b)).steps


def test_in_a_graph_and_compiled(spd):
    A, b, x = spd
    for jit_compile in (False, True):
        solve = tf.function(lambda b: EXACTLY.solve(matrix(A), b).value, jit_compile=jit_compile)
        np.testing.assert_allclose(flat(solve(split(b))), x, 1e-9)


def test_a_right_side_of_zero():
    solution = ConjugateGradient().solve(matrix(np.eye(6)), split(np.zeros(6)))
    np.testing.assert_array_equal(flat(solution.value), np.zeros(6))
    assert solution.steps == 0 and solution.residual == 0
    np.testing.assert_array_equal(flat(solution.iterate(0)), np.zeros(6))


def test_really_stops_early(spd):
    A, b, _ = spd
    products = tf.Variable(0)

    def counted(v):
        products.assign_add(1)
        return matrix(A) @ v

    @tf.function
    def solve(b):
        return ConjugateGradient(max_steps=100, residual_tolerance=1e-2).solve(Function(counted, psd=True), b).steps

    steps = solve(split(b))
    assert steps < 20
    assert products == steps


@pytest.mark.parametrize("share", [None, 0.0, 0.8, -2.0])  # of the solution, to start from
@pytest.mark.parametrize("tolerance", [5e-4, 0.0])
def test_the_quadratic_of_each_stored_iterate_is_known_without_a_product(spd, share, tolerance):
    A, b, x = spd
    solver = ConjugateGradient(max_steps=11, progress_tolerance=tolerance)
    start = None if share is None else split(share * x)
    solution = solver.solve(matrix(A), split(b), start, Diagonal(split(1 / np.diag(A))))
    assert int(solution.count) >= 3
    for j in range(int(solution.count)):
        iterate = flat(solution.iterate(j))
        expected = 0.5 * iterate @ A @ iterate - b @ iterate
        np.testing.assert_allclose(solution.quadratic(j), expected, 1e-10)


@pytest.mark.parametrize("started", [False, True])
def test_a_graph_has_one_product(spd, started):
    A, b, _ = spd
    traced, products = [], tf.Variable(0)

    def counted(v):
        traced.append(1)
        products.assign_add(1)
        return matrix(A) @ v

    @tf.function
    def solve(b):
        return ConjugateGradient(max_steps=7).solve(Function(counted, psd=True), b, b if started else None).steps

    assert solve(split(b)) == 7
    assert len(traced) == 1 and products == 7 + started


def test_operators_that_are_not_psd_are_refused_with_the_remedy(spd):
    A, b, _ = spd
    with pytest.raises(ValueError, match="`ConjugateGradient` needs a positive semi-definite.*truncate=True"):
        ConjugateGradient().solve(matrix(A, psd=False), split(b))
    with pytest.raises(ValueError, match="positive semi-definite"):
        ConjugateGradient().solve(matrix(A) + matrix(A, psd=False), split(b))
    with pytest.raises(ValueError, match="positive semi-definite"):
        ConjugateGradient().solve(-1.0 * matrix(A), split(b))
    ConjugateGradient().solve(0.5 * matrix(A) + 1.0 * Identity(), split(b))


def test_truncation_ends_before_negative_curvature():
    diagonal = np.array([3.0, 2.0, 1.0, 1.0, 1.0, -0.1])
    b, truncating = np.ones(6), ConjugateGradient(truncate=True)
    A = matrix(np.diag(diagonal), psd=False)
    solution = truncating.solve(A, split(b))
    # the iterates descend, and stay within the directions of positive curvature
    x, values = flat(solution.value), [0.0]
    for j in range(int(solution.count)):
        iterate = flat(solution.iterate(j))
        values.append(0.5 * iterate @ (diagonal * iterate) - b @ iterate)
    assert values == sorted(values, reverse=True) and values[-1] < 0
    assert np.isfinite(x).all() and solution.steps < 6
    # where the first direction already curves down, the start is the answer
    stuck = truncating.solve(matrix(-np.eye(6), psd=False), split(b))
    np.testing.assert_array_equal(flat(stuck.value), np.zeros(6))
    assert stuck.steps == 0 and stuck.residual == 1


# Against Martens' code, and a re-implementation of it in scalars.


def martens(A, b, x, precon, max_steps, tolerance=5e-4):
    """`[x_0, x_1, ...]` up to where his rule stops: METHODS of the reference, in loops over numbers."""
    r, q = A * x - b, []
    y = r / precon
    p, iterates, i = -y, [x], 0
    while i < max_steps:
        i += 1
        pAp = p @ (A * p)
        if pAp <= 0:
            break
        alpha = (r @ y) / pAp
        x, r_next = x + alpha * p, r + alpha * A * p
        y_next = r_next / precon
        beta = (r_next @ y_next) / (r @ y)
        p, r, y = -y_next + beta * p, r_next, y_next
        iterates.append(x)
        q.append(0.5 * (r - b) @ x)  # q[i - 1]
        k = max(10, math.ceil(0.1 * i))
        if i > k and q[i - k - 1] < 0 and (q[-1] - q[i - k - 1]) / q[-1] < tolerance * k:
            break
    return iterates


def solved(case):
    """Our `Solution` of a reference case, and its numbers."""
    known = {name.removeprefix(case + "_"): REFERENCE[name] for name in REFERENCE.files if name.startswith(case + "_")}
    if case == "maxiters":
        known = {name: value for name, value in known.items() if not name.startswith("unaligned")}
    A, n = Diagonal([tf.constant(known["diag"])]), int(known["maxiters"])
    solver = ConjugateGradient(max_steps=n, truncate=case == "negative_curvature")
    precon, start = Diagonal([tf.constant(1 / known["precon"])]), [tf.constant(known["x0"])]
    return solver.solve(A, [tf.constant(known["b"])], start, precon), known


@pytest.mark.parametrize("case", CASES)
def test_iterates_and_the_stopping_iteration_are_those_of_martens_code(case):
    solution, known = solved(case)
    # his code stores the last iterate once more where it is on the grid; we do not
    stored = list(dict.fromkeys(int(i) for i in known["stored_iters"]))
    if case == "negative_curvature":  # ours is the iterate before, under its own number; his counts one on
        assert stored[-2:] == [11, 12]
        assert solution.steps == 11
    else:
        assert solution.steps == stored[-1]
    assert solution.count == len(stored)
    rounding = max(1e-9, 100 * float(known["rounding_last"]))
    np.testing.assert_allclose(solution.iterate(0)[0], known["first_stored"], 1e-8, 1e-8)
    last = solution.iterate(solution.count - 1)[0]
    np.testing.assert_array_equal(last, solution.value[0])
    assert np.abs(last - known["last_stored"]).max() < rounding * max(1, np.abs(known["last_stored"]).max())
    for j in range(len(stored) - 1):
        x = solution.iterate(j)[0].numpy()
        q = 0.5 * x @ (known["diag"] * x) - known["b"] @ x
        np.testing.assert_allclose(q, known["stored_q"][j], 1e-7 if rounding < 1e-2 else 1e-3)


@pytest.mark.parametrize("case", CASES)
def test_the_stopping_iteration_is_that_of_the_rule_in_scalars(case):
    solution, known = solved(case)
    iterates = martens(known["diag"], known["b"], known["x0"], known["precon"], int(known["maxiters"]))
    assert solution.steps == len(iterates) - 1
    if float(known["rounding_last"]) < 1e-6:
        np.testing.assert_allclose(solution.value[0], iterates[-1], 1e-6, 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_rule_on_random_systems(seed):
    random = np.random.default_rng(seed)
    A = np.geomspace(random.uniform(0.01, 0.1), 1, 80)  # worse ones are decided by rounding
    b, x0 = random.standard_normal(80), random.standard_normal(80) * (seed % 2)
    tolerance = [5e-4, 5e-3][seed // 4]
    iterates = martens(A, b, x0, np.ones(80), 250, tolerance)
    solution = ConjugateGradient(progress_tolerance=tolerance).solve(
        Diagonal([tf.constant(A)]), [tf.constant(b)], [tf.constant(x0)]
    )
    assert 11 < len(iterates) - 1 <= 250
    assert solution.steps == len(iterates) - 1
    grid = [math.ceil(5 * 1.3**j) for j in range(20)]
    stored = [i for i in grid if i < solution.steps] + [int(solution.steps)]
    assert solution.count == len(stored)
    for j, i in enumerate(stored[:6]):  # later ones amplify rounding
        assert np.linalg.norm(solution.iterate(j)[0] - iterates[i]) < 1e-6 * np.linalg.norm(iterates[i])


def test_the_rule_can_be_switched_off():
    A, b = [Diagonal([tf.constant(np.linspace(1, 2, 40))]), [tf.ones(40, tf.float64)]]
    with_rule, without = ConjugateGradient(max_steps=30), ConjugateGradient(max_steps=30, progress_tolerance=0.0)
    assert 11 <= with_rule.solve(A, b).steps < without.solve(A, b).steps


# The Neumann series.


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_neumann_series_is_its_truncated_sum(spd, steps):
    A, b, _ = spd
    rate, power, total = 0.05, b, 0
    for _ in range(steps + 1):
        total, power = total + rate * power, power - rate * A @ power
    solution = NeumannSeries(steps=steps, rate=rate).solve(matrix(A), split(b))
    np.testing.assert_allclose(flat(solution.value), total, 1e-12)
    assert solution.steps == steps and np.isnan(solution.residual) and solution.count == 0


def test_neumann_series_converges_to_the_inverse_by_the_known_factor(spd):
    A, b, x = spd
    solver = NeumannSeries(steps=1500, rate=0.15)
    np.testing.assert_allclose(flat(solver.solve(matrix(A), split(b)).value), x, 1e-8)
    lowest, vector = (a[..., 0] for a in np.linalg.eigh(A))
    one = NeumannSeries(steps=4, rate=0.1).solve(matrix(A), split(vector))
    np.testing.assert_allclose(flat(one.value), vector / lowest * (1 - (1 - 0.1 * lowest) ** 5), 1e-10)


def test_neumann_series_from_a_start_and_with_a_preconditioner(spd):
    A, b, x = spd
    np.testing.assert_allclose(flat(NeumannSeries(3, 0.1).solve(matrix(A), split(b), split(x)).value), x, 1e-10)
    newton = NeumannSeries(1, 1.0).solve(matrix(A), split(b), preconditioner=matrix(np.linalg.inv(A)))
    np.testing.assert_allclose(flat(newton.value), x, 1e-9)
    start = split(np.ones(12))
    one = NeumannSeries(1, 0.1).solve(matrix(A), split(b), start)
    np.testing.assert_allclose(flat(one.value), np.ones(12) + 0.1 * (b - A @ np.ones(12)), 1e-12)


def test_a_solver_must_solve():
    with pytest.raises(NotImplementedError, match="`Solver` must implement `solve.operator, rhs"):
        Solver().solve(Identity(), [tf.ones([2])])


# The operators that solvers are given.


def test_operators_are_linear_algebra():
    random = np.random.default_rng(0)
    A, B = (lambda M: M @ M.T)(random.standard_normal((6, 6))), np.diag(np.arange(1.0, 7.0))
    like, D = split(np.zeros(6)), Diagonal(split(np.arange(1.0, 7.0)))
    np.testing.assert_allclose(dense(matrix(A), like), A, 1e-12)
    np.testing.assert_allclose(dense(D, like), B)
    np.testing.assert_allclose(dense(D.inverse(), like), np.linalg.inv(B))
    np.testing.assert_allclose(dense(Identity(), like), np.eye(6))
    whole = matrix(A) + 2.0 * D + tf.constant(3.0) * Identity()
    np.testing.assert_allclose(dense(whole, like), A + 2 * B + 3 * np.eye(6), 1e-12)
    u, v = random.standard_normal((2, 6))
    np.testing.assert_allclose(matrix(A).quadratic_form(split(u), split(v)), u @ A @ v, 1e-12)
    assert (matrix(A) + 2.0 * D).psd and not (-2.0 * D).psd and not matrix(A, psd=False).psd


def test_a_sum_with_anything_but_an_operator_is_refused_at_once():
    refused = pytest.raises(TypeError, match=r"A \+ 0.1 \* keras_curvature.Identity\(\)")
    for other in (0.1, np.float32(0.1), tf.constant(0.1), [tf.ones([2])]):
        with refused:
            Identity() + other
    for other in (0.1, np.float32(0.1)):
        with refused:
            other + Identity()


def test_a_multiple_by_anything_but_a_scalar_is_refused_at_once():
    for other in (np.ones(2), tf.ones([2]), Identity(), "2"):
        with pytest.raises(TypeError, match="only by a number or a scalar tensor"):
            Identity() * other


def test_a_multiple_is_positive_only_where_its_scalar_is_known_to_be():
    for scalar in (2, 0.0, np.float64(3), tf.constant(0.5), tf.Variable(1.0)):
        assert (scalar * Identity()).psd and (Identity() * scalar).psd
    for scalar in (-2, np.float32(-1), tf.constant(-1.0), float("nan")):
        assert not (scalar * Identity()).psd

    @tf.function
    def in_a_graph(scalar):
        assert not (scalar * Identity()).psd
        assert Scaled(scalar, Identity(), nonnegative=True).psd
        assert not Scaled(scalar, Function(lambda v: v), nonnegative=True).psd
        return scalar

    in_a_graph(tf.constant(1.0))
