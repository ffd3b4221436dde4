"""A model on a fixed set of examples: its loss, its gradient and its curvature, added up over batches.

    f(w) = sum_b (n_b / N) f_b(w),        B = sum_b (n_b / N) B_b

with `f_b` the compiled loss of batch `b`, of `n_b` of the `N` examples. Nothing here moves the model: batch statistics
and seeds are those of the probe set, and are not committed.
"""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.component import check, check_count
from keras_curvature.curvature import convexity, data as probe_data, functional
from keras_curvature.curvature.linearization import Linearization

KINDS = ("hessian", "ggn", "fisher", "empirical_fisher")


class Probes:
    def __init__(
        self, model, data, kind="hessian", examples=None, batch_size=None, training=False, seed=0,
    ):  # fmt: skip
        check(Probes, "model", model, isinstance(model, keras.Model), "a `keras.Model`")
        check(Probes, "kind", kind, kind in KINDS, ", ".join(f'"{k}"' for k in KINDS))
        check(Probes, "training", training, isinstance(training, bool), "True or False")
        check_count(Probes, "seed", seed, low=0)
        for name, value in (("examples", examples), ("batch_size", batch_size)):
            if value is not None:
                check_count(Probes, name, value)
        self.model, self.kind, self.training, self.seed = model, kind, training, seed
        dtype = "float64" if any(v.dtype == "float64" for v in model.variables) else keras.config.floatx()
        read = probe_data.batches(Probes, data, examples, batch_size, dtype)
        self._strategy = replicas.strategy_of(model)
        with self._scope():
            functional.build_for(model, *read[0])
        self.variables = list(model.trainable_variables)
        self._structure = read[0]
        self._counts = [probe_data.count(batch) for batch in read]
        self._batches = [replicas.scatter(self._strategy, _flat(batch)) for batch in read]
        self._seeds = [self._seeds_of(i) for i in range(len(read))]
        self._functions = {}

    @property
    def examples(self):
        """Number of examples."""
        return sum(self._counts)

    @property
    def batches(self):
        """Number of batches."""
        return len(self._counts)

    @property
    def batch_size(self):
        """Number of examples of the largest batch."""
        return max(self._counts)

    @property
    def psd(self):
        """Whether the matrix is known to be positive semi-definite."""
        return self.kind != "hessian"

    @property
    def weights(self):
        """The weights that the model has now, a vector."""
        return trees.values(self.variables)

    def total(self, name, fn, *args):
        """`sum_b (n_b / N) fn(lin_b, *args)`, a nest of tensors, with `lin_b` the `Linearization` of batch `b`.

        `fn` is compiled once for each `name` (and shape); `args` are nests of tensors or numbers.
        """
        args = tf.nest.map_structure(tf.convert_to_tensor, args)
        function, total = self._compiled(name, fn), None
        with self._scope():
            for batch, seeds, count in zip(self._batches, self._seeds, self._counts):
                found = function(batch, seeds, args)
                total = _add(total, found, count / self.examples)
        return total

    def loss(self):
        """`f(w)`, a scalar."""
        return self.total("loss", lambda lin: lin.loss)

    def gradient(self):
        """`df/dw`, a vector."""
        return self.total("gradient", lambda lin: lin.gradient)

    def loss_at(self, step):
        """`f(w + step)`, a scalar."""
        trees.check("step", step, self.variables)
        return self.total("loss_at", lambda lin, step: lin.loss_at(step), list(step))

    def product(self, vector):
        """`B v`, a vector."""
        trees.check("vector", vector, self.variables)
        return self.total(f"product of the {self.kind}", _PRODUCTS[self.kind], list(vector))

    def _compiled(self, name, fn):
        if name not in self._functions:

            def on_batch(batch, seeds, args):
                lin = Linearization(self.model, *self._packed(batch), training=self.training, seeds=seeds)
                return fn(lin, *args)

            self._functions[name] = tf.function(on_batch, autograph=False)
        return self._functions[name]

    def _packed(self, flat):
        rest = iter(flat)
        return keras.tree.map_structure(lambda a: None if a is None else next(rest), self._structure)

    def _seeds_of(self, number):
        """Seeds of the model's layers in a batch, a function of the seed and of the batch's number alone."""
        seeds = functional.seeds(self.model.non_trainable_variables)
        words = np.random.SeedSequence([self.seed, number]).generate_state(2 * len(seeds)).reshape(-1, 2)
        dtype = seeds[0].dtype if seeds else "int64"
        return tf.constant((words >> 1).astype(dtype))

    def _scope(self):
        return contextlib.nullcontext() if self._strategy.num_replicas_in_sync == 1 else self._strategy.scope()


_PRODUCTS = {
    "hessian": lambda lin, v: lin.hessian() @ v,
    "ggn": lambda lin, v: lin.gauss_newton() @ v,
    "fisher": lambda lin, v: lin.fisher("exact") @ v,
    "empirical_fisher": lambda lin, v: lin.fisher("empirical") @ v,
}


def _flat(batch):
    return [a for a in keras.tree.flatten(batch) if a is not None]


def _add(total, found, share):
    found = tf.nest.map_structure(lambda a: trees.exactly(share, a.dtype) * a, found)
    return found if total is None else tf.nest.map_structure(tf.add, total, found)
