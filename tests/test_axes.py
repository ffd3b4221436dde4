"""Products along the axes of a tensor against `einsum`, and tensors cut into tiles and put together again."""

import math

import numpy as np
import pytest
import tensorflow as tf

from keras_curvature.operators import axes

LETTERS, OTHERS = "abcd", "ABCD"
every_shape = pytest.mark.parametrize("shape", [(5,), (5, 4), (3, 4, 5), (2, 3, 4, 5)])
with_and_without_batch = pytest.mark.parametrize("batch", [(), (6,), (2, 3)])


def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape)


@every_shape
@with_and_without_batch
def test_multiplies_each_axis_by_its_matrix(shape, batch):
    stack, own = "xy"[: len(batch)], LETTERS[: len(shape)]
    matrices = [normal(*batch, n + 1, n) if k != 1 else None for k, n in enumerate(shape)]  # the second stays
    terms = [f"{stack}{OTHERS[k]}{own[k]}" for k in range(len(shape)) if k != 1]
    result = "".join(OTHERS[k] if k != 1 else own[k] for k in range(len(shape)))
    tensor = normal(*batch, *shape)
    given = [m for m in matrices if m is not None]
    expected = np.einsum(f"{stack}{own},{','.join(terms)}->{stack}{result}", tensor, *given)
    np.testing.assert_allclose(axes.multiply(tf.constant(tensor), matrices, len(batch)), expected, 1e-12, 1e-12)
    turned = [None if m is None else np.swapaxes(m, -1, -2) for m in matrices]
    seen = axes.multiply_transposed(tf.constant(tensor), turned, len(batch))
    np.testing.assert_allclose(seen, expected, 1e-12, 1e-12)


@every_shape
@with_and_without_batch
def test_second_moment_sums_over_all_other_axes(shape, batch):
    stack, own = "xy"[: len(batch)], LETTERS[: len(shape)]
    tensor, other = normal(*batch, *shape), 2.0 - normal(*batch, *shape)
    for k in range(len(shape)):
        formula = f"{stack}{own},{stack}{own.replace(own[k], 'z')}->{stack}{own[k]}z"
        seen = axes.second_moment(tf.constant(tensor), k, len(batch))
        np.testing.assert_allclose(seen, np.einsum(formula, tensor, tensor), 1e-12, 1e-12)
        seen = axes.second_moment(tf.constant(tensor), k, len(batch), tf.constant(other))
        np.testing.assert_allclose(seen, np.einsum(formula, tensor, other), 1e-12, 1e-12)


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((3, 3, 16, 32), 1024, (144, 32)), ((3, 3, 512, 512), 1024, (9, 512, 512)), ((7, 7, 3, 64), 1024, (147, 64)),
        ((1, 1, 8, 8), 1024, (8, 8)), ((4, 5), 1024, (4, 5)), ((1, 6), 1024, (6,)), ((1,), 1024, (1,)), ((), 9, (1,)),
        ((3, 3, 4, 4), 1, (3, 3, 4, 4)), ((2, 2, 2, 2, 2), 4, (4, 4, 2)),
    ],
)  # fmt: skip
def test_small_neighbours_are_merged_and_a_matrix_stays_one(shape, limit, merged):
    assert axes.merged_shape(shape, limit) == merged
    assert math.prod(merged) == math.prod(shape)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_tiles_are_at_most_that_large_and_make_the_tensor_again(size):
    tensor = tf.constant(normal(5, 7, 3))
    tiles = axes.split(tensor, size)
    assert max(max(tile.shape) for tile in tiles) <= size
    assert len(tiles) == math.prod(len(axes.cut(n, size)) for n in tensor.shape)
    np.testing.assert_array_equal(axes.join(tiles, tensor.shape, size), tensor)
