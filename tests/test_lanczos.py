"""Lanczos against matrices whose spectrum is known in closed form, and dense eigenvalues in float64."""

import numpy as np
import pytest
import tensorflow as tf
from selection import some

from keras_curvature import trees
from keras_curvature.monitor.spectra import density, traces
from keras_curvature.operators import Function
from keras_curvature.solvers import flat, krylov, lanczos


def pieces(n, dtype=tf.float64):
    """A vector of zeros of `n` entries in two tensors, the first of them a matrix."""
    return [tf.zeros([2, n // 3], dtype), tf.zeros([n - 2 * (n // 3)], dtype)]


def operator(A, dtype=np.float64):
    """The operator of a matrix, or of a diagonal, on vectors shaped as `pieces`."""
    A = np.asarray(A, dtype)
    layout = flat.Layout(pieces(len(A), tf.as_dtype(dtype)))

    def product(vector):
        v = layout.pack(vector)
        return layout.unpack(A @ v if A.ndim == 2 else A * v)

    return Function(product)


def rows(vectors):
    """Vectors as the rows of a float64 matrix."""
    return np.array([np.concatenate([np.ravel(a) for a in v]) for v in vectors], np.float64)


def random(seed, *shape):
    return np.random.RandomState(seed).randn(*shape)


def reflected(values, seed=0):
    """A matrix with these eigenvalues, and no entry zero: two Householder reflections of the diagonal."""
    A = np.diag(np.asarray(values, np.float64))
    for u in random(seed, 2, len(values)):
        u /= np.linalg.norm(u)
        A = A - 2 * np.outer(u, u @ A)
        A = A - 2 * np.outer(A @ u, u)
    return A


def laplacian(n):
    return 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)


def network_like(seed, n=400, outliers=9):
    """A few outliers, a bulk that decays by a power law, and some of it negative: a network after an epoch (Papyan)."""
    draws = np.random.RandomState(seed)
    bulk = 0.5 / np.arange(1, n - outliers + 1) ** 1.2 * np.where(draws.rand(n - outliers) < 0.3, -1, 1)
    return np.concatenate([10 * 0.8 ** np.arange(outliers) * draws.uniform(0.9, 1.1, outliers), bulk])


# the values, and the matrix that has them
KNOWN = {
    "diagonal": (np.arange(1, 61), np.arange(1, 61)),
    "laplacian": (2 - 2 * np.cos(np.arange(1, 61) * np.pi / 61), laplacian(60)),
    "spiked": (spiked := np.concatenate([[50, 30, 20, -15], np.linspace(-1, 1, 76)]), reflected(spiked)),
}


@pytest.mark.parametrize("most_negative", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_ends_of_known_spectra(name, most_negative):
    values, A = KNOWN[name]
    expected = np.sort(values)[:4] if most_negative else np.sort(values)[::-1][:4]
    found = lanczos.eigenpairs(
        operator(A), pieces(len(values)), 4, tolerance=1e-12, most_negative=most_negative, max_products=1000
    )
    np.testing.assert_allclose(found.values, expected, rtol=1e-10, atol=1e-10)
    V, A = rows(found.vectors), np.diag(A) if np.ndim(A) == 1 else A
    np.testing.assert_allclose(V @ V.T, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(V @ A - found.values[:, None] * V, axis=1), found.residuals, atol=1e-10)


@pytest.mark.slow
def test_restarts_and_a_basis_that_holds_everything_find_the_same(monkeypatch):
    A, made = laplacian(150), []
    count = Function(lambda v: made.append(0) or operator(A) @ v)
    restarted = lanczos.eigenpairs(count, pieces(150), 3, tolerance=1e-8, max_products=2000)
    assert restarted.products == len(made) > 3 * 23  # more than three bases full
    monkeypatch.setattr(lanczos, "ROOM", 147)
    whole = lanczos.eigenpairs(operator(A), pieces(150), 3, tolerance=1e-8)
    assert restarted.converged.all() and whole.converged.all()
    np.testing.assert_allclose(restarted.values, whole.values, rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(rows(restarted.vectors) * rows(whole.vectors), 1)), 1, rtol=1e-6)


UNFINISHED = [
    (network_like(1), 3), (network_like(1), 8), (network_like(1), 15),
    (np.linspace(-1, 1, 400), 8), (np.linspace(-1, 1, 400), 40),
]  # fmt: skip


def nearest(values, found):
    """The distance of each value found to the nearest eigenvalue."""
    return np.abs(np.asarray(values)[:, None] - found.values).min(0)


@pytest.mark.parametrize("values, most", UNFINISHED)
def test_an_eigenvalue_lies_within_each_residual(values, most):
    found = lanczos.eigenpairs(operator(values), pieces(400), 12, tolerance=1e-15, max_products=most)
    assert found.products == most and len(found.values) == min(12, most)
    assert not found.converged.all() and np.all(np.diff(found.values) <= 0)
    assert np.all(nearest(values, found) <= found.residuals)
    V = rows(found.vectors)
    exact = np.linalg.norm(V * values - found.values[:, None] * V, axis=1)
    np.testing.assert_allclose(found.residuals, exact, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("values, most", [*UNFINISHED, (network_like(1), 300)])
def test_residuals_in_float32_have_its_rounding_in_them(values, most):
    A, like = reflected(values).astype(np.float32), pieces(400, tf.float32)
    exact = np.linalg.eigvalsh(A.astype(np.float64))
    pairs = lanczos.eigenpairs(operator(A, np.float32), like, 12, tolerance=1e-6, max_products=most)
    for found in (pairs, *lanczos.extremes(operator(A, np.float32), like, min(most, 30))):
        assert np.all(nearest(exact, found) <= found.residuals)
        V = rows(found.vectors)
        true = np.linalg.norm(V @ A - found.values[:, None] * V, axis=1)
        assert np.all(true <= found.residuals) and np.all(found.residuals <= true + 3e-6 * np.abs(exact).max())


@pytest.mark.parametrize("bits", [7, 10])  # of bfloat16, and of float16 and TF32
def test_residuals_have_the_rounding_that_products_have(bits):
    values = network_like(1)
    A = reflected(values)

    def rounded(vector):  # each number of the product, relative to the largest
        w = A @ np.concatenate([np.ravel(a) for a in vector]).astype(np.float64)
        unit = np.abs(w).max() * 2.0**-bits
        return pieces_of(np.round(w / unit) * unit, np.float32)

    largest, smallest = lanczos.extremes(Function(rounded), pieces(400, tf.float32), 25)
    top = lanczos.eigenpairs(Function(rounded), pieces(400, tf.float32), 5, tolerance=1e-6, max_products=60)
    for found in (largest, smallest, top):
        assert np.all(nearest(values, found) <= found.residuals)
    assert np.all(top.residuals <= 40 * 2.0**-bits)  # and they are not much larger


def test_identity_and_rank_one_break_down_at_the_second_step():
    u = random(0, 50)
    found = lanczos.eigenpairs(operator(np.eye(50) + np.outer(u, u)), pieces(50), 5)
    assert found.exhausted and found.products == 2 + 3 + 1  # one for each copy, and one to see that no more is larger
    np.testing.assert_allclose(found.values, [1 + u @ u, 1, 1, 1, 1], rtol=1e-12)
    T = lanczos.tridiagonalize(operator(np.eye(50) + np.outer(u, u)), pieces_of(random(1, 50)), 10)
    assert T.alpha.shape == T.beta.shape == (2,) and len(T.basis) == 2


def pieces_of(array, dtype=np.float64):
    return flat.Layout(pieces(len(array), tf.as_dtype(dtype))).unpack(np.asarray(array, dtype))


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_a_multiple_of_the_identity_has_one_eigenvalue(scale):
    found = lanczos.eigenpairs(operator(np.full(30, scale)), pieces(30), 3)
    assert found.exhausted and found.products == 4 and found.converged.all()
    np.testing.assert_allclose(found.values, [scale] * 3, rtol=1e-14)
    spread = density.density(operator(np.full(30, scale)), pieces(30), 2, 5)
    assert spread.products == 2 and spread.nodes.shape == (2, 1)
    np.testing.assert_allclose([spread.quantile(0.5), spread.mass(scale - 1e-9, scale + 1e-9)], [scale, 1], rtol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
def test_low_rank_breaks_down_soon_after_its_rank(dtype, tolerance):
    A = reflected(np.concatenate([np.arange(1.0, 9.0), np.zeros(42)]))
    found = lanczos.eigenpairs(operator(A, dtype), pieces(50, tf.as_dtype(dtype)), 15)
    assert found.exhausted and len(found.values) == 15 and found.converged.all()
    assert 9 + 6 <= found.products <= 11 + 7  # then one for each zero more, and one to see that no more is larger
    np.testing.assert_allclose(found.values[:8], np.arange(8, 0, -1), rtol=tolerance)
    np.testing.assert_allclose(found.values[8:], 0, atol=tolerance)


def test_more_pairs_than_weights_gives_all_of_them():
    A = reflected([3.0, 1.0, -2.0, 7.0])
    found = lanczos.eigenpairs(operator(A), pieces(4), 10)
    assert found.exhausted
    np.testing.assert_allclose(found.values, [7, 3, 1, -2], rtol=1e-12)


@pytest.fixture(scope="module")
def wishart():
    """Papyan (2020), figure 15a: three spikes in the noise of a square sample."""
    Z = random(0, 2000, 2000)
    A = Z @ Z.T / 2000
    A[np.arange(3), np.arange(3)] += [5, 4, 3]
    return A


def test_spiked_wishart(wishart):
    found = lanczos.eigenpairs(operator(wishart, np.float32), pieces(2000, tf.float32), 4, max_products=60)
    # t + t / (t - 1), and the edge of the bulk, up to what one draw of this size differs by
    np.testing.assert_allclose(found.values, [6.25, 5 + 1 / 3, 4.5, 4.0], atol=0.1)
    sixty = lanczos.extremes(operator(wishart), pieces(2000), 60)[0]
    np.testing.assert_allclose(found.values[0], sixty.values[0], rtol=1e-4)
    for value, residual in zip(found.values[:3], found.residuals):  # Rayleigh quotients in float64
        v = rows(found.vectors)[list(found.values).index(value)]
        np.testing.assert_allclose(v @ wishart @ v / (v @ v), value, rtol=1e-5)
        assert residual < 1e-2


def test_basis_stays_orthonormal_in_float32_over_sixty_steps():
    A = reflected(network_like(0))
    T = lanczos.tridiagonalize(operator(A, np.float32), pieces_of(random(0, 400), np.float32), 60)
    V = rows(T.basis)
    assert len(V) == 60 and np.abs(V @ V.T - np.eye(60)).max() <= 1e-5
    # so no eigenvalue is there twice
    ritz, exact = np.linalg.eigvalsh(T.matrix)[::-1][:9], np.sort(np.linalg.eigvalsh(A))[::-1][:9]
    np.testing.assert_allclose(ritz, exact, rtol=1e-5)


def test_as_many_steps_as_weights_reproduce_the_matrix():
    A = reflected(random(3, 40))  # google/spectral-density's case, to its 1e-7
    T = lanczos.tridiagonalize(operator(A), pieces_of(random(4, 40)), 40)
    V = rows(T.basis)
    np.testing.assert_allclose(V @ V.T, np.eye(40), atol=1e-7)
    np.testing.assert_allclose(V.T @ T.matrix @ V, A, atol=1e-7)
    assert T.beta[-1] < 1e-10


def test_without_a_basis_the_first_steps_are_the_same():
    A, start = reflected(network_like(2)), pieces_of(random(4, 400))
    kept, lost = (lanczos.tridiagonalize(operator(A), start, 8, basis=basis) for basis in (True, False))
    assert lost.basis is None and lost.products == 8
    np.testing.assert_allclose(lost.alpha, kept.alpha, rtol=1e-7)
    np.testing.assert_allclose(lost.beta, kept.beta, rtol=1e-7)


@pytest.mark.parametrize("dtype", some([np.float32, np.float64], [np.float64]))
def test_sharpness_of_network_like_spectra_in_ten_products_cold_and_five_warm(dtype):
    cold, warm, low = [], [], []
    like = pieces(400, tf.as_dtype(dtype))
    for seed in range(12):
        values = network_like(seed)
        largest, _ = lanczos.extremes(operator(values, dtype), like, 10, seed=seed)
        cold.append(abs(largest.values[0] / values.max() - 1))
        smallest = lanczos.eigenpairs(operator(values, dtype), like, 1, most_negative=True, seed=seed)
        # some steps of training later: eigenvalues and directions differ
        A = np.diag(values * (1 + 0.02 * random(seed, 400))) + 0.02 * reflected(network_like(seed + 100), seed)
        start = trees.add(largest.vectors[0], smallest.vectors[0])
        again = lanczos.extremes(operator(A, dtype), like, 5, start=start, seed=seed)
        exact = np.linalg.eigvalsh(A)
        warm.append(abs(again[0].values[0] / exact[-1] - 1))
        low.append(again[1].values[0] / exact[0])
        assert largest.products == 10 and again[0].products == again[1].products == 5
    assert max(cold) < 1e-5 and max(warm) < 1e-5  # asked for: 1e-3
    assert min(low) > 0.99 and max(low) < 1 + 1e-4  # a small one: rounding is that of the largest


def test_warm_and_cold_find_the_same_with_fewer_products():
    A = reflected(network_like(5))
    cold = lanczos.eigenpairs(operator(A), pieces(400), 3, tolerance=1e-9)
    start = [sum(parts) for parts in zip(*cold.vectors)]
    warm = lanczos.eigenpairs(operator(A), pieces(400), 3, tolerance=1e-9, start=start)
    np.testing.assert_allclose(warm.values, cold.values, rtol=1e-12)
    assert warm.products < cold.products


def test_a_start_that_is_an_eigenvector_hides_no_larger_one():
    values = np.arange(1.0, 41.0)
    found = lanczos.extremes(operator(values), pieces(40), 30, start=pieces_of(np.eye(40)[19]))
    np.testing.assert_allclose([found[0].values[0], found[1].values[0]], [40, 1], rtol=1e-3)


@pytest.mark.parametrize("most_negative", [False, True])
def test_metric_gives_generalized_eigenvalues(most_negative):
    A, M = reflected(network_like(0, 90)), reflected(np.linspace(0.1, 5, 90), 7)
    root = np.linalg.cholesky(M)  # M^1/2 A M^1/2 and L'AL have the same eigenvalues
    exact = np.linalg.eigvalsh(root.T @ A @ root)
    found = lanczos.eigenpairs(
        operator(A), pieces(90), 3, tolerance=1e-11, most_negative=most_negative, metric=operator(M), max_products=900
    )
    np.testing.assert_allclose(found.values, exact[:3] if most_negative else exact[::-1][:3], rtol=1e-10)
    V = rows(found.vectors)
    np.testing.assert_allclose(V @ M @ V.T, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(V @ M @ A, found.values[:, None] * V, atol=1e-9)
    early = lanczos.extremes(operator(A), pieces(90), 6, metric=operator(M))
    for pair in early:
        difference = rows(pair.vectors)[0] @ M @ A - pair.values[0] * rows(pair.vectors)[0]
        np.testing.assert_allclose(np.sqrt(difference @ M @ difference), pair.residuals[0], rtol=1e-6, atol=1e-12)
        assert np.abs(exact - pair.values[0]).min() <= pair.residuals[0] * (1 + 1e-9) + 1e-12


def test_eigenthings_wishart_to_its_tolerances():
    G = random(0, 60, 40)
    A = G.T @ G / 60
    exact = np.linalg.eigvalsh(A)[::-1][:5]
    found = lanczos.eigenpairs(operator(A), pieces(40), 5, tolerance=1e-6)
    np.testing.assert_allclose(found.values, exact, rtol=1e-5)
    assert np.all(found.residuals < 1e-4 * np.abs(found.values))
    V = rows(found.vectors)
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-6)


def test_vectors_are_in_float32_at_least():
    like = [tf.zeros([3], tf.bfloat16), tf.zeros([2, 2], tf.float64)]
    found = lanczos.eigenpairs(Function(lambda v: [2 * v[0], 5 * v[1]]), like, 5)
    assert [a.dtype for a in found.vectors[0]] == [tf.float32, tf.float64]
    np.testing.assert_allclose(found.values, [5, 5, 5, 5, 2], rtol=1e-2)


def test_the_seed_decides_and_no_generator_moves():
    A, states = operator(network_like(0)), []
    tf.random.set_seed(1)
    before = np.random.get_state()[1].copy()
    for seed in (0, 0, 1):
        states.append(lanczos.eigenpairs(A, pieces(400), 2, seed=seed, max_products=4).values)
    np.testing.assert_array_equal(states[0], states[1])
    assert np.any(states[0] != states[2])
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    drawn = tf.random.uniform([])
    tf.random.set_seed(1)
    assert drawn == tf.random.uniform([])


class Wide:
    """Looks like a tensor of many weights, and takes no memory."""

    shape, dtype = tf.TensorShape([25_600_000]), tf.float32


def test_memory_is_refused_with_the_bytes_and_what_would_fit():
    message = "120 vectors of 25 600 000 weights need 12.3 GB, more than the limit of 8.0 GB. Remedy: pass k=29, or"
    with pytest.raises(ValueError, match=message):
        lanczos.eigenpairs(Function(lambda v: v), [Wide], 50)
    with pytest.raises(ValueError, match=r"need 4.1 GB, .* Remedy: choose fewer weights with layers="):
        lanczos.eigenpairs(Function(lambda v: v), [Wide], 10, memory_limit=2e9)
    with pytest.raises(ValueError, match=r"102 vectors .* need 10.4 GB, .* Remedy: pass fewer steps, or choose"):
        lanczos.extremes(Function(lambda v: v), [Wide], 100)
    with pytest.raises(ValueError, match=r"100 vectors .* need 10.2 GB, .* Remedy: pass fewer steps, or choose"):
        lanczos.tridiagonalize(Function(lambda v: v), [Wide], 50)
    pairs = krylov.Eigenpairs(np.ones(90), [[Wide]] * 90, np.zeros(90), 0, np.ones(90, bool))
    with pytest.raises(ValueError, match=r"90 vectors .* Remedy: pass fewer pairs"):
        density.density(Function(lambda v: v), [Wide], pairs=pairs)
    with pytest.raises(ValueError, match=r"90 vectors .* Remedy: pass fewer pairs"):
        traces.deflated(Function(lambda v: v), [Wide], pairs)


@pytest.mark.parametrize("change, message", [
    ({"k": 0}, "`k` must be an integer >= 1. Received: k=0"),
    ({"tolerance": 0.0}, "`tolerance` must be a number in"),
    ({"most_negative": 1}, "`most_negative` must be True or False"),
    ({"max_products": 0}, "`max_products` must be"),
    ({"metric": 1.0}, "`metric` must be a `LinearOperator`"),
    ({"metric": operator(np.linspace(-1, 1, 20))}, "`metric` must be positive definite"),
    ({"start": pieces(20)}, "`start` must be a finite vector that is not zero"),
    ({"start": pieces(21)}, "`start` must be a list of 2 tensors"),
])  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {"operator": operator(np.arange(20.0)), "like": pieces(20)} | change
    with pytest.raises(ValueError, match=message):
        lanczos.eigenpairs(**arguments)


def test_a_product_that_is_not_finite_says_so():
    for ask in (lanczos.eigenpairs, lanczos.extremes, density.density):
        with pytest.raises(flat.ProductNotFinite, match="not finite"):
            ask(operator(np.full(20, np.nan)), pieces(20))


# ------------------------------------------------------------------------------------------------ spectral density


def distance(found, values):
    """The Wasserstein-1 distance between a `Density` and eigenvalues, as a share of their range."""
    values = np.sort(values)
    points = np.sort(np.concatenate([found.nodes.ravel(), values]))
    order = np.argsort(found.nodes, axis=None)
    below = np.concatenate([[0], np.cumsum(found.weights.ravel()[order]) / len(found.nodes)])
    ours = below[np.searchsorted(found.nodes.ravel()[order], points, side="right")]
    theirs = np.searchsorted(values, points, side="right") / len(values)
    return np.sum(np.abs(ours - theirs)[:-1] * np.diff(points)) / (values[-1] - values[0])


def quantiles(density, low, high, n=2000):
    """Eigenvalues that stand for a density given as a function: its quantiles `(i + 1/2) / n`."""
    x = np.linspace(low, high, 400_001)
    mass = np.cumsum(density(x))
    return np.interp((np.arange(n) + 0.5) / n, mass / mass[-1], x)


def semicircle(x):
    return np.sqrt(np.maximum(4 - x**2, 0))


def marchenko_pastur(x, ratio=0.5):
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    return np.sqrt(np.maximum((x - low) * (high - x), 0)) / x


# the density without spikes, and how close four random vectors of sixty steps come
SMOOTH = {
    "semicircle": quantiles(semicircle, -2, 2),
    "marchenko-pastur": quantiles(marchenko_pastur, 0.05, 3),
    "uniform": np.linspace(-1, 1, 2000),
    "clusters": np.concatenate([np.linspace(-2.1, -1.9, 1000), np.linspace(1.9, 2.1, 1000)]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SMOOTH)
def test_density_of_known_spectra(name, dtype):
    values = SMOOTH[name]
    found = density.density(operator(values, dtype), pieces(2000, tf.as_dtype(dtype)))
    assert found.nodes.shape == found.weights.shape == (4, 60) and found.products == 240
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-12)
    assert distance(found, values) < (0.015 if name in ("uniform", "clusters") else 0.01)
    np.testing.assert_allclose(found.quantile([0.3, 0.7]), np.quantile(values, [0.3, 0.7]), atol=0.1)


def test_density_of_a_wishart_matrix_is_marchenko_pasturs():
    Z = random(1, 1000, 2000)
    found = density.density(operator(Z @ Z.T / 2000), pieces(1000))
    assert distance(found, SMOOTH["marchenko-pastur"]) < 0.01


def test_density_of_two_clusters_by_eigenthings_criteria():
    found = density.density(operator(SMOOTH["clusters"]), pieces(2000), 10, 80)
    assert abs(found.mass(high=0) - 0.5) < 0.15
    axis = np.linspace(-3, 3, 601)
    curve = found.smooth(axis)
    assert abs(axis[:300][np.argmax(curve[:300])] + 2) < 0.3 and abs(axis[300:][np.argmax(curve[300:])] - 2) < 0.3
    np.testing.assert_allclose(np.trapezoid(found.smooth(wide := found.axis()), found.scale(wide)), 1, atol=1e-3)


def test_density_in_L1_by_googles_criterion():
    values = SMOOTH["semicircle"]
    found = density.density(operator(values), pieces(2000), 5, 60)
    axis = np.linspace(-3, 3, 301)
    ours, exact = (
        np.exp(-0.5 * (axis[:, None] - np.ravel(centres)) ** 2 / 1e-2) @ np.ravel(weights) / np.sqrt(2e-2 * np.pi)
        for centres, weights in [(found.nodes, found.weights / 5), (values, np.full(2000, 1 / 2000))]
    )
    assert np.trapezoid(np.abs(ours - exact), axis) < 5e-2


def test_smooth_is_a_sum_of_gaussians_on_its_axis():
    known = density.Density(np.array([[-3.0, 0.0, 20.0]]), np.array([[0.2, 0.7, 0.1]]), 10)
    axis, a = np.array([-3.0, -0.01, 0.02, 19.0]), 0.02
    shift = np.arcsinh(axis / a)[:, None] - np.arcsinh(known.nodes / a)
    expected = np.exp(-0.5 * (shift / np.log(10) / 0.1) ** 2) @ known.weights[0] / (0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(known.smooth(axis, 0.1), expected, rtol=1e-10)


def test_what_can_be_read_off_a_density():
    values = network_like(3, 1000)
    found = density.density(operator(values), pieces(1000), 20, 40)
    np.testing.assert_allclose(found.count(low=1), 9, rtol=0.3)
    np.testing.assert_allclose(found.moment(1), values.mean(), rtol=0.25)
    np.testing.assert_allclose(found.moment(2), np.mean(values**2), rtol=0.25)
    negative = np.abs(values[values < 0]).sum() / np.abs(values).sum()
    np.testing.assert_allclose(found.negative.value, negative, rtol=0.1)
    np.testing.assert_allclose(found.effective_rank, values.sum() ** 2 / np.sum(values**2), rtol=0.4)
    np.testing.assert_allclose(found.unscale(found.scale([-5, 0, 1e-6, 20])), [-5, 0, 1e-6, 20], atol=1e-13)
    ends = [found.nodes.min(), found.nodes.max()]
    np.testing.assert_allclose(found.quantile([0, 1]), ends, rtol=1e-9)  # copies differ by rounding


@pytest.mark.parametrize("q", [-0.1, 1.5, [0.5, 2.0]])
def test_bad_quantiles(q):
    with pytest.raises(ValueError, match=r"`q` must be in \[0, 1\]"):
        density.density(operator(np.arange(5.0)), pieces(5), 1, 3).quantile(q)


def test_exact_read_outs_of_a_density_that_is_written_down():
    known = density.Density(np.array([[-1.0, 0.0, 2.0], [-1.0, 1.0, 2.0]]), np.array([[0.25, 0.5, 0.25]] * 2), 8)
    assert known.mass(low=0) == 0.75 and known.count(high=0) == 4 and known.mass(5, 6) == 0
    assert known.quantile(0.25) == -1 and known.quantile(0.3) == 0 and known.quantile(0.76) == 2
    assert known.moment(1) == 0.5 and known.moment(2) == 1.5
    assert known.negative.value == 0.25 and known.effective_rank == 8 * 0.25 / 1.5
    shares = [0.25 / 0.75, 0.25 / 1.25]  # of each row alone
    np.testing.assert_allclose(known.negative.stderr, abs(shares[0] - shares[1]) / 2)


def exact_pairs(A, places):
    """`Eigenpairs` of a matrix by a dense computation."""
    values, vectors = np.linalg.eigh(A)
    none = np.zeros(len(places))
    return krylov.Eigenpairs(values[places], [pieces_of(u) for u in vectors.T[places]], none, 0, none == 0)


def test_density_beside_known_pairs_is_that_of_the_others_alone():
    values = np.concatenate([[9.0, 6.0, -4.0], np.linspace(0.5, 2, 17)])
    A = reflected(values)
    found = density.density(operator(A), pieces(20), 3, 17, pairs=exact_pairs(A, [-1, -2, 0]))
    assert found.products == 51
    for nodes, weights in zip(found.nodes, found.weights):  # each of the others once, and no zero
        np.testing.assert_allclose(nodes, [*np.linspace(0.5, 2, 17), 9, 6, -4], atol=1e-6)
        np.testing.assert_allclose([weights.sum(), *weights[-3:]], [1, 1 / 20, 1 / 20, 1 / 20], rtol=1e-12)
    assert found.negative.value == pytest.approx(4 / np.abs(values).sum(), abs=4 * found.negative.stderr)
    many = density.density(operator(A), pieces(20), 200, 10, pairs=exact_pairs(A, [-1, -2, 0]))
    np.testing.assert_allclose([many.moment(1), many.moment(2)], [values.mean(), np.mean(values**2)], rtol=0.01)


def test_known_pairs_need_not_be_exact_nor_orthogonal():
    A = reflected(network_like(1))
    pairs = lanczos.eigenpairs(operator(A), pieces(400), 9, tolerance=3e-2)
    low = lanczos.eigenpairs(operator(A), pieces(400), 1, tolerance=0.3, most_negative=True)
    both = pairs.beside(low)
    assert both.products == pairs.products + low.products and len(both.residuals) == len(both.vectors) == 10
    found = density.density(operator(A), pieces(400), 4, 20, pairs=both)
    bulk = np.sort(network_like(1))[:-9]
    rest = found.nodes[:, :-10]
    assert bulk.min() - 1e-6 < rest.min() and rest.max() < bulk.max() + 0.01  # no outlier comes back
    np.testing.assert_allclose(found.moment(1), network_like(1).mean(), rtol=0.02)


def test_density_where_all_is_known_takes_no_products():
    A = reflected(np.arange(-2.0, 4.0))
    found = density.density(operator(A), pieces(6), 2, 5, pairs=exact_pairs(A, [0, 1, 2, 3, 4, 5]))
    np.testing.assert_allclose(found.nodes, [np.arange(-2, 4)], atol=1e-12)
    assert found.products == 0 and found.mass() == pytest.approx(1)
    np.testing.assert_allclose([found.negative.value, found.negative.stderr], [3 / 9, 0], atol=1e-12)


def test_the_negative_share_of_a_known_spectrum_is_within_its_errors():
    draws = np.random.default_rng(0)
    bulk = np.concatenate([1e-3 * draws.standard_normal(9000), draws.normal(0.02, 0.1, 300)])
    values = np.concatenate([bulk, [5.0, 3.0, -1.0]])
    true = np.maximum(-values, 0).sum() / np.abs(values).sum()
    units = [pieces_of(np.eye(1, len(values), i).ravel()) for i in range(9300, 9303)]
    pairs = krylov.Eigenpairs(values[9300:], units, np.zeros(3), 0, np.ones(3, bool))
    within = []
    for seed in range(20):
        found = density.density(operator(values), pieces(len(values)), 3, 24, seed, pairs).negative
        assert found.value == pytest.approx(true, abs=0.1)
        within.append(abs(found.value - true) / found.stderr)
    assert np.max(within) < 3 and np.mean(np.array(within) < 1) > 0.5


def test_a_negative_share_without_error_where_the_runs_are_exact():
    A = operator(np.array([-1.0, 3.0, 3.0]))
    starts = [[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]]  # as long along each of the two
    runs = [lanczos.tridiagonalize(A, pieces_of(start), 24, basis=False) for start in starts]
    assert all(run.exhausted and len(run.alpha) == 2 for run in runs)
    found = density.Density.of_runs(runs, 4, [-2.0, 5.0]).negative
    assert found.value == pytest.approx((2 + 1) / (7 + 4)) and found.stderr < 1e-12


def test_over_an_orthonormal_basis_of_starts_the_density_is_the_spectrum():
    values = np.array([7.0, 3.0, 1.0, 0.5, -0.25, -2.0])
    A = reflected(values)
    runs = [lanczos.tridiagonalize(operator(A), pieces_of(e), 6) for e in np.eye(6)]
    found = density.Density.of_runs(runs, 6)
    for value in values:
        assert found.mass(value - 1e-6, value + 1e-6) == pytest.approx(1 / 6, rel=1e-9)
    moments = [found.moment(order) for order in range(1, 6)]
    np.testing.assert_allclose(moments, [np.mean(values**order) for order in range(1, 6)], rtol=1e-9)
    assert found.negative.value == pytest.approx(2.25 / 13.75, rel=1e-9)
