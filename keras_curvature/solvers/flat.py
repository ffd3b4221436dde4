"""Flat vectors on the host, for methods that keep many vectors and compute one product at a time.

A list of tensors becomes one NumPy array, in float64 if one of the tensors is, and in float32 otherwise. So the basis
is in the host's memory instead of the accelerator's, inner products are never rounded to TF32 or bfloat16, and nothing
is traced. Only the vector to multiply moves between devices.
"""

import numpy as np
import tensorflow as tf

from keras_curvature import trees

# Inner products sum chunks of this length in the vectors' dtype, then the chunks' sums in float64. Small chunks, and
# `einsum` for matrices, avoid BLAS threads, which would spin on the cores that the next product needs.
CHUNK = 2**13
# Uses of random vectors. Vectors of different streams are independent, also with the same seed.
STREAMS = ("start", "density", "trace", "sketch")


class ProductNotFinite(ValueError):
    """A product of an operator with a vector is not finite, or `what` is not."""

    def __init__(self, what="A product of the curvature with a vector is"):
        super().__init__(
            f"{what} not finite: at these weights the loss or one of its derivatives is NaN or overflows. Check that "
            "the loss on these examples and the weights are finite."
        )


class Layout:
    """The layout of a list of tensors in one flat array.

    Args:
        like: A vector, for its shapes and dtypes.

    Attributes:
        size: Number of entries.
        dtype: The array's dtype.
        bytes: The array's size in bytes.
    """

    def __init__(self, like):
        self._shapes = [tuple(a.shape) for a in like]
        self._dtypes = [trees.wide(a.dtype) for a in like]
        self._sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self._shapes]
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)[:-1]
        self.size = sum(self._sizes)
        self.dtype = np.float64 if tf.float64 in self._dtypes else np.float32
        self.bytes = self.size * np.dtype(self.dtype).itemsize

    def pack(self, vector):
        """The flat array of a list of tensors, a copy."""
        return np.concatenate([a.numpy().astype(self.dtype, copy=False).ravel() for a in vector])

    def unpack(self, array):
        """The list of tensors of a flat array, copies."""
        places = zip(self._starts, self._sizes, self._shapes, self._dtypes)
        tensors = [(array[start : start + size].reshape(shape), dtype) for start, size, shape, dtype in places]
        return [tf.cast(tf.constant(a), d) if a.dtype != d.as_numpy_dtype else tf.constant(a) for a, d in tensors]

    def product(self, operator, array):
        """`A v` for a flat array, a flat array.

        Raises:
            ProductNotFinite: The product is not finite.
        """
        found = self.pack(operator @ self.unpack(array))
        if not np.isfinite(found).all():
            raise ProductNotFinite
        return found

    def dots(self, u, v):
        """The inner product for each tensor of the list, a float64 array."""
        pieces = [slice(start, start + size) for start, size in zip(self._starts, self._sizes)]
        return np.array([dot(u[piece], v[piece]) for piece in pieces])

    def normal(self, seed, stream, number=0):
        """A vector of standard normal numbers, determined by seed, stream and number."""
        return tf.random.stateless_normal([self.size], _seed(seed, stream, number), dtype=self.dtype).numpy()

    def signs(self, seed, stream, number=0):
        """A vector of random signs, `+1` or `-1`, determined by seed, stream and number."""
        shape = [self.size]
        bits = tf.random.stateless_uniform(shape, _seed(seed, stream, number), minval=0, maxval=2, dtype=tf.int32)
        return (2 * bits.numpy() - 1).astype(self.dtype)


def dot(u, v):
    """`u'v`, a Python float."""
    return sum(float(np.dot(u[i : i + CHUNK], v[i : i + CHUNK])) for i in range(0, len(u), CHUNK))


def norm(v):
    """`|v|`, a Python float."""
    return float(np.sqrt(dot(v, v)))


def scaled(name, v, expected="a finite vector that is not zero"):
    """`(v / c, c)`, with `c` the largest |entry|, a Python float: so no inner product under- or overflows.

    Raises:
        ValueError: `v` is zero or not finite; the message has its `name`, and what is `expected`.
    """
    largest = float(np.abs(v).max(initial=0.0))  # NaN if one entry is
    if not 0 < largest < np.inf:
        raise ValueError(f"`{name}` must be {expected}. Received: a vector with the largest entry {largest}")
    return v / v.dtype.type(largest), largest


def coefficients(V, w):
    """`V w` for vectors in the rows of `V`, in float64."""
    found = np.zeros(len(V))
    for i in range(0, len(w), CHUNK):
        found += np.einsum("ij,j->i", V[:, i : i + CHUNK], w[i : i + CHUNK])
    return found


def combination(V, c):
    """`V' c`, in the dtype of `V`."""
    found = np.empty(V.shape[1], V.dtype)
    for i in range(0, len(found), CHUNK):
        np.einsum("i,ij->j", c.astype(V.dtype), V[:, i : i + CHUNK], out=found[i : i + CHUNK])
    return found


def rotate(V, S):
    """Overwrite the first rows of `V` by `S' V`, without a second matrix of the size of `V`."""
    S = S.T.astype(V.dtype)
    for i in range(0, V.shape[1], CHUNK):
        V[: len(S), i : i + CHUNK] = S @ V[:, i : i + CHUNK]


class Complement:
    """The orthogonal complement of some vectors.

    Args:
        U: The vectors, in rows; they need not be orthogonal to each other.
        MU: The vectors times the matrix `M` of the inner product `u'Mv`, in rows. Defaults to `U`.

    Attributes:
        count: Number of vectors.
    """

    def __init__(self, U, MU=None):
        self._U, self._MU, self.count = U, U if MU is None else MU, len(U)
        self._inverse = np.linalg.pinv(np.array([coefficients(self._MU, u) for u in U]), hermitian=True)

    def project(self, w):
        """`w - U'c`, in place, with `c = (U M U')^-1 U M w`; gives `c`."""
        c = self._inverse @ coefficients(self._MU, w)
        w -= combination(self._U, c)
        return c


def check_memory(vectors, layout, limit, remedy):
    """Raise a `ValueError` if the vectors need more bytes than `limit`."""
    needed = vectors * layout.bytes
    if needed > limit:
        weights = f"{layout.size:,}".replace(",", " ")
        raise ValueError(
            f"{vectors} vectors of {weights} weights need {needed / 1e9:.1f} GB, more than the limit of "
            f"{limit / 1e9:.1f} GB. Remedy: {remedy}."
        )


def _seed(seed, stream, number):
    return tf.constant([seed, len(STREAMS) * number + STREAMS.index(stream)], tf.int64)
