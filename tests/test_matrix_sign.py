"""The matrix sign against singular value decompositions, and on matrices that are no good."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_curvature.solvers import matrix_sign
from keras_curvature.solvers.matrix_sign import NewtonSchulz, PolarExpress

METHODS = {
    "jordan": NewtonSchulz(),
    "jordan_gram": NewtonSchulz(bound="gram"),
    "quintic": NewtonSchulz("quintic"),
    "quintic_short": NewtonSchulz("quintic", steps=4, bound="gram"),
    "cubic": NewtonSchulz("cubic", steps=12),
    "polar_express": PolarExpress(),
    "polar_express_long": PolarExpress(steps=8, bound="gram"),
}
every_method = pytest.mark.parametrize("name", METHODS)
SHAPES = [(5, 5), (4, 7), (6, 60)]  # the last one goes through its Gram matrix


def matrices(shape, decay=1e-3, seed=0):
    """Two matrices whose singular values fall to `decay` of the largest."""
    random = np.random.default_rng(seed)
    A = random.standard_normal((2, *shape))
    U, _, V = np.linalg.svd(A, full_matrices=False)
    return U * np.geomspace(1, decay, min(shape)) @ V


def expected(method, X):
    """The polynomial of the singular values, by the decomposition."""
    if not X.any():
        return X
    U, s, V = np.linalg.svd(X, full_matrices=False)
    bound = (s**2).sum(-1) ** 0.5 if method.bound == "frobenius" else (s**4).sum(-1) ** 0.25
    return U * method.values(s / (method.margin * bound[..., None]))[..., None, :] @ V


@every_method
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_an_odd_polynomial_of_the_singular_values(name, shape):
    X = matrices(shape)
    found = METHODS[name].sign(tf.constant(X)).numpy()
    np.testing.assert_allclose(found, expected(METHODS[name], X), atol=1e-12)
    np.testing.assert_allclose(METHODS[name].sign(tf.constant(-X)), -found, atol=1e-12)


@every_method
def test_where_products_are_rounded_they_are_not_amplified(name, monkeypatch):
    X, seen = tf.constant(matrices((6, 60))), {}
    for rounded in (False, True):
        monkeypatch.setattr(matrix_sign, "rounds_products", lambda rounded=rounded: rounded)
        graph = tf.function(METHODS[name].sign).get_concrete_function(X).graph
        products = [op for op in graph.get_operations() if "MatMul" in op.type]
        with_columns = [op for op in products if 60 in op.inputs[1].shape]
        seen[rounded] = len(with_columns), METHODS[name].sign(X)
    assert seen[False][0] <= 4 and seen[True][0] == 2 * METHODS[name].steps
    np.testing.assert_allclose(seen[True][1], seen[False][1], atol=1e-12)


def test_many_steps_do_not_amplify_rounding():
    random = np.random.default_rng(0)
    X = tf.constant(random.standard_normal((6, 1)) * random.standard_normal((1, 80)), "float32")
    values = np.linalg.svd(PolarExpress(steps=12).sign(X))[1]
    np.testing.assert_allclose(values, np.eye(6)[0], atol=5e-3)


# `(method, the range of singular values of at least 0.01 of the bound, the range from 0.001 on)`, as the docstrings say
RANGES = [
    (NewtonSchulz(), (0.682, 1.134), (0.471, 1.202)),
    (NewtonSchulz("quintic"), (0.978, 1.032), (0.475, 1.145)),
    (NewtonSchulz("quintic", steps=4), (0.918, 1.147), (0.173, 1.147)),
    (NewtonSchulz("cubic"), (0.076, 1.0), (0.008, 1.0)),
    (PolarExpress(), (0.859, 1.141), (0.847, 1.141)),
]


@pytest.mark.parametrize(("method", "of_hundredths", "of_thousandths"), RANGES)
def test_singular_values_end_in_the_documented_range(method, of_hundredths, of_thousandths):
    for smallest, expected_range in ((0.01, of_hundredths), (0.001, of_thousandths)):
        values = method.values(np.geomspace(smallest, 1, 100001) / method.margin)
        np.testing.assert_allclose([values.min(), values.max()], expected_range, atol=6e-4)


@pytest.mark.parametrize("method", [NewtonSchulz("cubic", steps=30), PolarExpress(steps=12), PolarExpress(12, "gram")])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_converges_ends_at_the_orthogonal_factor(method, shape):
    X = matrices(shape)
    U, _, V = np.linalg.svd(X, full_matrices=False)
    np.testing.assert_allclose(method.sign(tf.constant(X)), U @ V, atol=1e-8)


def test_the_gram_bound_is_sharper_and_no_less_a_bound():
    for shape in [(5, 5), (40, 60)]:
        X = np.random.default_rng(1).standard_normal(shape)
        methods = (NewtonSchulz(bound=bound) for bound in ("frobenius", "gram"))
        frobenius, gram = (m._bound_on(tf.constant(X), tf.constant(X @ X.T)).numpy().item() for m in methods)
        assert np.linalg.norm(X, 2) <= gram < frobenius
    assert gram < 0.5 * frobenius


@every_method
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**50, 2.0**100])
def test_the_size_of_a_matrix_has_no_effect(name, dtype, scale):
    X = matrices((4, 7)).astype(dtype)
    scaled = tf.constant(np.asarray(scale, dtype) * X)
    np.testing.assert_array_equal(METHODS[name].sign(scaled), METHODS[name].sign(tf.constant(X)))


def degenerate():
    """Stacks of matrices without full rank, of ordinary size."""
    random = np.random.default_rng(0)
    column, row, full = (random.standard_normal(shape) for shape in ((6, 1), (1, 8), (3, 8)))
    return {
        "zero": np.zeros((6, 8)), "of_one_row": row, "of_one_number": np.array([[-3.0]]), "rank_one": column @ row,
        "duplicated_rows": np.concatenate([full, full]), "one_entry": np.eye(6, 8) * (np.arange(8) == 2),
        "long_and_rank_one": column @ random.standard_normal((1, 80)),
    }  # fmt: skip


@every_method
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", degenerate())
def test_a_degenerate_matrix_keeps_its_null_space(name, dtype, case):
    X = tf.cast(degenerate()[case], dtype)
    X, method = tf.cast(X, tf.float32) if X.dtype.size < 4 else X, METHODS[name]
    found, seen = method.sign(X).numpy(), X.numpy().astype("float64")
    np.testing.assert_allclose(found, expected(method, seen), atol=1e-10 if dtype == "float64" else 5e-3)
    largest = np.linalg.norm(found, 2)
    assert largest < 1.6 and (largest > 0.3 or case == "zero")


@every_method
def test_in_half_precision_it_is_coarse_and_finite(name):
    for dtype in ("bfloat16", "float16"):
        X = matrices((4, 7), decay=0.1)
        found = tf.cast(METHODS[name].sign(tf.cast(X, dtype)), tf.float64).numpy()
        np.testing.assert_allclose(found, expected(METHODS[name], X), atol=0.2)


@pytest.mark.slow
@every_method
def test_xla_computes_the_same(name):
    X = tf.constant(matrices((6, 60)))
    compiled = tf.function(METHODS[name].sign, jit_compile=True)(X)
    np.testing.assert_allclose(compiled, METHODS[name].sign(X), atol=1e-12)


def test_the_bad_are_told():
    for wrong in ({"steps": 0}, {"bound": "spectral"}, {"coefficients": "quartic"}, {"coefficients": None}):
        with pytest.raises(ValueError, match=f"`NewtonSchulz`: `{next(iter(wrong))}`"):
            NewtonSchulz(**wrong)
    with pytest.raises(ValueError, match="`PolarExpress`: `steps` must be an integer >= 1. Received: steps=2.5"):
        PolarExpress(steps=2.5)


@every_method
def test_a_method_is_saved_and_loaded(name):
    method = METHODS[name]
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(method)) == method
