"""The class `Rows`: what `Linearization.rows` returns."""

import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.component import check_number
from keras_curvature.linearization.jacobian import columns, roots
from keras_curvature.linearization.pure import slices
from keras_curvature.typing import Vector

MEMORY = 2**31


class Rows:
    """`A = R J`, with a row for each output of each example, and the residuals `r`; made by `Linearization.rows`.

        A'A = J' H_L J     the Gauss-Newton matrix, without what L2 regularizers add
        A'r                the gradient, where the loss is a sum of squares and nothing is added to it (`is_exact`)

    Rows are in the order of outputs, replicas, examples, entries. Vectors of rows are flat tensors `(N,)`, vectors of
    weights are lists of tensors. For other losses than squares, `R'r` is the part of the slope that is in the range of
    `R'`; `remainder()` is what the gradient has besides.
    """

    def __init__(self, lin, memory=MEMORY):
        check_number(type(lin).rows, "memory", memory, low=0, open_low=True)
        self._lin, self._memory, self._exact = lin, memory, None
        self._known, self._graph = {}, slices.graph()

    @property
    def residual(self) -> tf.Tensor:
        """`r`, `(N,)`."""
        return self._once("residual", lambda: self._gathered(self._residuals(), 1))

    @property
    def is_exact(self) -> bool:
        """Whether `A'r` is the gradient: the loss is a sum of squares, without regularizers or added losses."""
        self._residuals()
        return self._exact

    @property
    def count(self) -> int | None:
        """`N`, the number of rows; `None` if it is not known before the graph runs."""
        return self.residual.shape[0]

    def __matmul__(self, vector: Vector) -> tf.Tensor:
        """`A v`, `(N,)`; one forward-mode pass, or none if the dense array is there."""
        trees.check("vector", vector, self._lin.variables)
        if "dense" in self._known:
            return tf.linalg.matvec(self.dense(), tf.cast(trees.flatten(vector), self.dense().dtype))

        def product(recorded, v):
            return [root.times(t) for root, t in zip(roots.roots(recorded), recorded.jvp(v))]

        return self._gathered(self._lin.passes.rows(product, [list(vector)]), 1)

    def transposed(self, rows: tf.Tensor) -> Vector:
        """`A' u`, a vector; one backward pass, or none if the dense array is there."""
        if "dense" in self._known:
            pulled = tf.linalg.matvec(self.dense(), tf.cast(rows, self.dense().dtype), transpose_a=True)
            return trees.unflatten(pulled, self._lin.weights)

        def product(recorded, rows):
            scale = 1.0 if recorded.loss_scale is None else recorded.loss_scale
            pulled = [root.transposed(u) for root, u in zip(roots.roots(recorded), rows)]
            return recorded.pull([tf.cast(c * tf.cast(scale, c.dtype), leaf.dtype)
                                  for c, leaf in zip(pulled, recorded.leaves)])  # fmt: skip

        return self._lin.passes.total(product, tangents=[self._scattered(rows)])

    def dense(self) -> tf.Tensor:
        """`A`, `(N, n)`, with the weights flattened in their order.

        Raises:
            ValueError: The array needs more than `memory`.
        """
        return self._once("dense", self._dense)

    def gram(self, scale: tf.Tensor | None = None) -> tf.Tensor:
        """`A diag(s) A'`, `(N, N)`; `scale` is flat, `(n,)`, by default ones."""
        A = self.dense()
        return tf.matmul(A if scale is None else A * scale, A, transpose_b=True)

    def column_norms(self) -> Vector:
        """The Euclidean norm of each column of `A`, a vector."""
        return trees.unflatten(tf.sqrt(tf.reduce_sum(tf.square(self.dense()), 0)), self._lin.weights)

    def remainder(self) -> Vector | None:
        """The gradient minus `A'r`, a vector; `None` if that is zero because `is_exact`."""
        if self.is_exact:
            return None
        return trees.subtract(self._lin.gradient, self.transposed(self.residual))

    def bent(self, vector: Vector, h: float = 0.1) -> tf.Tensor:
        """`R` times the second derivative of the outputs along `v`, `(N,)`; two forward passes.

            R (z(w + h v) - 2 z(w) + z(w - h v)) / h^2

        Args:
            vector: `v`, a vector.
            h: Share of `v` to go to either side. Defaults to `0.1`.
        """
        def question(recorded, *sides):
            return [root.times(t) for root, t in zip(roots.roots(recorded), _second_difference(recorded, *sides, h))]

        return self._gathered(self._lin.passes.rows(question, tangents=self._on_both_sides(vector, h)), 1)

    def pulled_bent(self, vector: Vector, h: float = 0.1) -> Vector:
        """`A' bent(v)`, a vector, for which no root is needed: two forward passes and one backward pass."""

        def question(recorded, *sides):
            return recorded.pull(recorded.curve(_second_difference(recorded, *sides, h)))

        return self._lin.passes.total(question, tangents=self._on_both_sides(vector, h))

    def _on_both_sides(self, vector, h):
        """All leaves at `w + h v` and at `w - h v`, on every replica."""
        trees.check("vector", vector, self._lin.variables)
        shifted = self._lin.record(lambda pure, weights: _Shifted(pure, weights, vector, h))
        return list(shifted.rows(lambda shifted: (shifted.after, shifted.before)))

    # On every replica, one tensor for each output that the loss depends on.

    def _residuals(self):
        return self._once("residuals", lambda: self._lin.passes.rows(self._noting(_residuals_of)))

    def _noting(self, question):
        def noted(recorded, *args):
            regularized = any(getattr(v, "regularizer", None) is not None for v in self._lin.variables)
            added = regularized or recorded.evaluation.has_added
            self._exact = roots.are_squares(recorded) and not added
            return question(recorded, *args)

        return noted

    def _once(self, name, compute):
        value = self._known[name] if name in self._known else compute()
        if slices.graph() is self._graph:  # a tensor made inside a loop or condition cannot be used outside
            self._known[name] = value
        return value

    def _dense(self):
        self._ask_for_memory()
        found, residuals = self._lin.passes.rows(self._noting(columns.dense))
        self._once("residuals", lambda: residuals)
        return tf.ensure_shape(self._gathered(found, 2), [None, trees.count(self._lin.weights)])

    def _ask_for_memory(self):
        rows, n = self.count, trees.count(self._lin.weights)
        size = trees.scalar_dtype(self._lin.weights).size
        if rows is not None and rows * n * size > self._memory:
            raise ValueError(
                f"The rows of the Jacobian as an array, {rows} rows of {n} weights, need {rows * n * size:,} bytes. "
                f"Received: memory={self._memory:,}. {self._memory // (n * size):,} rows would fit: use smaller "
                "batches, or more memory by `lin.rows(memory=...)` or `GaussNewton(memory=...)`; or solve without the "
                "array, by `GaussNewton(solver=ConjugateGradient())`."
            )

    def _gathered(self, parts, rank):
        """The rows of all outputs and replicas, from a list for each output on each replica."""

        def flat(parts):
            return [tf.reshape(a, [-1]) if rank == 1 else a for a in parts]

        return tf.concat([replicas.gather(part) for part in replicas.each(flat, parts)], 0)

    def _scattered(self, rows):
        """The inverse: on each replica a list of tensors shaped as the outputs."""
        found, before = [], 0
        for part in self._residuals():
            start, total = replicas.place(_size, part)

            def cut(start, like, before=before):
                own = tf.slice(rows, [before + start], [_size(like)])
                return tf.reshape(own, tf.shape(like) if None in like.shape else like.shape)

            found.append(replicas.each(cut, start, part))
            before += total
        return found


class _Shifted:
    """The leaves of the model at `w + h v` and at `w - h v`, as a record of a forward pass."""

    def __init__(self, pure, weights, vector, h):
        self.before = pure.evaluate(trees.add(weights, vector, -h)).leaves
        self.evaluation = pure.evaluate(trees.add(weights, vector, h))
        self.after = self.evaluation.leaves


def _second_difference(recorded, after, before, h):
    return [(after[i] - 2.0 * leaf + before[i]) / h**2 for i, leaf in zip(recorded.used, recorded.leaves)]


def _residuals_of(recorded):
    return roots.residuals(recorded, roots.roots(recorded))


def _size(tensor):
    """The number of entries, an integer if it is known."""
    return tensor.shape.num_elements() if tensor.shape.is_fully_defined() else tf.size(tensor)
