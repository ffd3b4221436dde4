"""The class `RowMatrix`: the rows of a Jacobian as an object that multiplies, by layers where that is right."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.component import check, check_number
from keras_curvature.linearization.jacobian import by_layers, columns, frames
from keras_curvature.linearization.jacobian.by_layers import Layer
from keras_curvature.linearization.pure import slices
from keras_curvature.typing import Scalar, Vector

MEMORY = 2**31


class RowMatrix:
    """`A`, with one or several rows `J' c` for each example; made by methods of `Linearization`.

    In models of Keras' own layers, without batch normalization in training mode, rows are read off the layers, as
    `jacobian/by_layers.py` explains: of all weights but a few, and without an array of rows. In others they come from a
    pass through each example alone, or from products where examples may mix; see `jacobian/columns.py`.

    Rows are in the order of parts (the outputs of the model), replicas, examples, entries. Vectors of rows are flat
    tensors `(N,)`, vectors of weights are lists of tensors.

    Args:
        lin: The `Linearization`.
        frame: A function of a `Pass` that gives its frame (`jacobian/frames.py`).
        memory: The most bytes to take.
        owner: What made it, for messages.
    """

    def __init__(self, lin: Any, frame: Callable[..., Any], memory: int, owner: Callable[..., Any]) -> None:
        check_number(owner, "memory", memory, low=0, open_low=True)
        self._lin, self._frame, self._memory = lin, frame, memory
        self._known: dict[str, Any] = {}
        self._graph, self._dtype = slices.graph(), trees.scalar_dtype(lin.weights)

    @property
    def count(self) -> int | None:
        """`N`, the number of rows; `None` if it is not known before the graph runs."""
        return self._flat_parts().shape[0]

    @property
    def bytes_of_gram(self) -> int:
        """Bytes of the Gram matrix and of all that it is made of by layers, as far as shapes are known."""
        layers, rest = self._taken()
        tensors = [t for layer in layers for t in (layer.a, layer.d)] + ([] if rest is None else [rest])
        known = sum(t.shape.num_elements() * t.dtype.size for t in tensors if t.shape.is_fully_defined())
        return known + 2 * (self.count or 0) ** 2 * self._dtype.size

    @property
    def is_by_layers(self) -> bool:
        """Whether rows of some weights are read off layers."""
        return bool(self._taken()[0])

    def __matmul__(self, vector: Vector) -> tf.Tensor:
        """`A v`, `(N,)`; one forward-mode pass, or none if the dense array is there."""
        vector = trees.vector("vector", vector, self._lin.variables)
        if "dense" in self._known:
            return tf.linalg.matvec(self.dense(), tf.cast(trees.flatten(vector), self.dense().dtype))

        def product(recorded, v):
            return self._frame(recorded).times(recorded.jvp(v))

        return self._gathered(self._lin.passes.rows(product, [vector]), 1)

    def transposed(self, rows: tf.Tensor) -> Vector:
        """`A' u`, a vector; one backward pass, or none if the dense array or the layers are there."""
        rows = tf.convert_to_tensor(rows)
        fits = rows.shape.is_compatible_with([self.count])
        check(RowMatrix.transposed, "rows", rows, fits, f"a number for each row, a tensor ({self.count},)")
        if "dense" in self._known:
            pulled = tf.linalg.matvec(self.dense(), tf.cast(rows, self.dense().dtype), transpose_a=True)
            return trees.unflatten(pulled, self._lin.weights)
        if "taken" in self._known and self.is_by_layers:
            return self._transposed_by_layers(rows)

        def product(recorded, rows):
            return frames.pull(recorded, self._frame(recorded).transposed(rows))

        return self._lin.passes.total(product, tangents=[self._scattered(rows)])

    def dense(self) -> tf.Tensor:
        """`A`, `(N, n)`, with the weights flattened in their order.

        Raises:
            ValueError: The array needs more than `memory`.
        """
        return self._once("dense", self._dense)

    def gram(self, scale: tf.Tensor | Sequence[Scalar] | None = None) -> tf.Tensor:
        """`A diag(s) A'`, `(N, N)`.

        Args:
            scale: `s`: flat, `(n,)`, which needs the dense array; or a list of one number for each variable. Defaults
                to ones.
        """
        if isinstance(scale, (list, tuple)):
            count = len(self._lin.variables)
            check(RowMatrix.gram, "scale", scale, len(scale) == count, f"a list of {count} numbers, one per variable")
        if tf.is_tensor(scale) or "dense" in self._known or not self.is_by_layers:
            if isinstance(scale, (list, tuple)):
                scale = trees.flatten([tf.fill(w.shape, tf.cast(s, w.dtype)) for s, w in zip(scale, self._lin.weights)])
            A = self.dense()
            return tf.matmul(A if scale is None else A * scale, A, transpose_b=True)
        _ask_for_memory(self._memory, self.bytes_of_gram, f"The Gram matrix of the {self.count} rows needs")
        layers, rest = self._taken()
        if scale is not None:
            layers = [by_layers.scaled(layer, scale) for layer in layers]
        found = self._in_order(tf.add_n([tf.cast(by_layers.gram(layer), self._dtype) for layer in layers]))
        if rest is None:
            return found
        scaled = rest
        if scale is not None:
            weights = [tf.fill(self._lin.weights[i].shape, tf.cast(scale[i], rest.dtype)) for i in self._others]
            scaled = rest * trees.flatten(weights)
        return found + tf.matmul(scaled, rest, transpose_b=True)

    def squared_columns(self) -> Vector:
        """The squared Euclidean norm of each column of `A`, a vector."""
        if "dense" in self._known or not self.is_by_layers:
            return trees.unflatten(tf.reduce_sum(tf.square(self.dense()), 0), self._lin.weights)
        layers, rest = self._taken()
        of_others = None if rest is None else tf.reduce_sum(tf.square(rest), 0)
        return self._placed([by_layers.squares(layer) for layer in layers], of_others)

    def column_norms(self) -> Vector:
        """The Euclidean norm of each column of `A`, a vector."""
        return [tf.sqrt(a) for a in self.squared_columns()]

    # By layers.

    def _taken(self):
        """`(layers, rest)`: what is read off the layers, and the rows of the other weights, `None` without any."""
        return self._once("taken", self._take)

    def _take(self):
        noted = {}

        def question(recorded):
            frame = self._frame(recorded)
            blocks = by_layers.usable(recorded)
            others = self._not_in(blocks)
            noted.update(blocks=blocks, counts=frame.counts(), others=others)
            total = recorded.pure.place.total
            if blocks and others and isinstance(total, int):
                self._ask_for_array(total * sum(frame.counts()), trees.count([recorded.weights[i] for i in others]))
            seen = by_layers.seen(frame, blocks) if blocks else []
            rest = columns.dense(frame, others) if blocks and others else []
            return frame.parts(), seen, rest

        parts, seen, rest = self._lin.passes.rows(question)
        self._keep("parts", parts)
        self._counts, self._others = noted["counts"], noted["others"]
        pairs = zip(noted["blocks"], seen, strict=True)
        layers = [Layer(block, replicas.gather(a), replicas.gather(d)) for block, (a, d) in pairs]
        return layers, self._gathered(rest, 2) if layers and self._others else None

    def _not_in(self, blocks):
        """The indices of the weights with entries outside of some blocks."""
        taken = {i for block in blocks for i in block.variables}
        return [i for i, w in enumerate(self._lin.weights) if i not in taken and w.shape.num_elements()]

    def _transposed_by_layers(self, rows):
        layers, rest = self._taken()
        parts, begin = [], 0
        examples = _size_of(layers[0].d, 0)
        for count in self._counts:
            parts.append(tf.reshape(rows[begin : begin + count * examples], [examples, count]))
            begin += count * examples
        u = tf.concat(parts, 1)
        found = [by_layers.transposed(layer, tf.cast(u, layer.d.dtype)) for layer in layers]
        others = None if rest is None else tf.linalg.matvec(rest, tf.cast(rows, rest.dtype), transpose_a=True)
        return self._placed(found, others)

    def _placed(self, matrices, others):
        """A vector from a matrix for each layer, and a flat tensor for the other weights."""
        vector = trees.zeros_like(self._lin.weights)
        for layer, matrix in zip(self._taken()[0], matrices):
            layer.block.scatter(tf.cast(matrix, layer.block.dtype), vector)
        if others is not None:
            like = [self._lin.weights[i] for i in self._others]
            for i, part in zip(self._others, trees.unflatten(others, like)):
                vector[i] += part
        return vector

    def _in_order(self, gram):
        """`(examples, rows, examples, rows)` to `(N, N)`, in the order of the rows."""
        if len(self._counts) == 1:
            size = _size_of(gram, 0) * self._counts[0]
            return tf.reshape(gram, [size, size])
        once = self._by_part(gram)  # (N, examples, rows)
        return self._by_part(tf.transpose(once, [1, 2, 0]))

    def _by_part(self, a):
        """`(examples, rows, ...)` to `(N, ...)`."""
        rest = [_size_of(a, i) for i in range(2, a.shape.rank)]
        pieces = tf.split(a, self._counts, 1)
        return tf.concat([tf.reshape(p, [_size_of(p, 0) * p.shape[1], *rest]) for p in pieces], 0)

    # The array.

    def _dense(self):
        n = trees.count(self._lin.weights)
        if self.count is not None:
            self._ask_for_array(self.count, n)
        if self.is_by_layers:
            return self._dense_by_layers(n)

        def question(recorded):
            frame = self._frame(recorded)
            return columns.dense(frame, list(range(len(self._lin.weights)))), frame.parts()

        found, parts = self._lin.passes.rows(question)
        self._keep("parts", parts)
        return tf.ensure_shape(self._gathered(found, 2), [None, n])

    def _dense_by_layers(self, n):
        layers, rest = self._taken()
        found = [0.0] * len(self._lin.weights)
        for layer in layers:
            examples = _size_of(layer.d, 0)
            for i, rows in zip(layer.block.variables, by_layers.dense(layer)):
                by_example = tf.reshape(rows, [examples, sum(self._counts), self._lin.weights[i].shape.num_elements()])
                found[i] += tf.cast(self._by_part(by_example), self._dtype)
        if rest is not None:
            sizes = [self._lin.weights[i].shape.num_elements() for i in self._others]
            for i, part in zip(self._others, tf.split(rest, sizes, 1)):
                found[i] = part
        return tf.ensure_shape(tf.concat([a for a in found if tf.is_tensor(a)], 1), [None, n])

    def _ask_for_array(self, rows, n):
        each = n * self._dtype.size
        what = f"The rows of the Jacobian as an array, {rows} rows of {n} weights, need"
        _ask_for_memory(self._memory, rows * each, what, f"{self._memory // each:,} rows would fit: ")

    # On every replica, one tensor for each part.

    def _parts(self):
        return self._once("parts", lambda: self._lin.passes.rows(lambda recorded: self._frame(recorded).parts()))

    def _flat_parts(self):
        return self._once("flat parts", lambda: self._gathered(self._parts(), 1))

    def _once(self, name, compute):
        value = self._known[name] if name in self._known else compute()
        self._keep(name, value)
        return value

    def _keep(self, name, value):
        if slices.graph() is self._graph:  # a tensor made inside a loop or condition cannot be used outside
            self._known[name] = value

    def _gathered(self, parts, rank):
        """The rows of all parts and replicas, from a list for each part on each replica; layers may differ in dtype."""

        def flat(parts):
            return [tf.cast(tf.reshape(a, [-1]) if rank == 1 else a, self._dtype) for a in parts]

        return tf.concat([replicas.gather(part) for part in replicas.each(flat, parts)], 0)

    def _scattered(self, rows):
        """The inverse: on each replica a list of tensors shaped as the parts."""
        found, before = [], 0
        for part in self._parts():
            start, total = replicas.place(_entries, part)

            def cut(start, like, before=before):
                own = tf.slice(rows, [before + start], [_entries(like)])
                return tf.cast(tf.reshape(own, tf.shape(like) if None in like.shape else like.shape), like.dtype)

            found.append(replicas.each(cut, start, part))
            before += total
        return found


def _ask_for_memory(memory, needed, what, fits=""):
    """Refuse to take more bytes than `memory`."""
    if needed > memory:
        raise ValueError(
            f"{what} {needed:,} bytes. Received: memory={memory:,}. {fits}{'use' if fits else 'Use'} smaller batches, "
            "or more memory by `lin.rows(memory=...)` or `GaussNewton(memory=...)`; or solve without rows, by "
            "`GaussNewton(solver=ConjugateGradient())`."
        )


def _entries(tensor):
    """The number of entries, an integer if it is known."""
    return tensor.shape.num_elements() if tensor.shape.is_fully_defined() else tf.size(tensor)


def _size_of(tensor, axis):
    """The length of an axis, an integer if it is known."""
    return tf.shape(tensor)[axis] if tensor.shape[axis] is None else tensor.shape[axis]
