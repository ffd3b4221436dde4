"""A model on a fixed set of examples: its loss, its gradient and its curvature, added up over batches.

    f(w) = sum_b s_b f_b(w),      B = sum_b s_b B_b,      s_b = n_b / N

with `f_b` the compiled loss of batch `b`, which has `n_b` of the `N` examples. Losses that are means over the examples
give the mean over all of them, with everything that belongs to the loss (regularizers, added losses). Other losses:

* `reduction="mean_with_sample_weight"` with sample weights: `s_b` is the batch's share of their sum, which is exact.
* `reduction="sum"`: the mean of the batches' sums, which is the loss that an optimizer has at this batch size. All its
  eigenvalues are `n_b` times those of the mean. Batches must be equal.
* Masked losses, means over the steps that a mask leaves: the mean of the batches' means. It is that of the whole where
  batches have the same number of such steps for each example.

In training mode (`training=True`) batch statistics are those of each batch: the curvature belongs to a batch size. In
inference mode they are the moving ones, and it does not matter how the examples are cut.
"""

import copy
import math

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check, check_count
from keras_curvature.linearization.fisher import convexity, likelihoods
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.linearization.pure import functional
from keras_curvature.linearization.pure.precision import without_half_precision
from keras_curvature.monitor.objective import reading

PRODUCTS = {
    "hessian": lambda lin, v: lin.hessian() @ v,
    "ggn": lambda lin, v: lin.gauss_newton() @ v,
    "fisher": lambda lin, v: lin.fisher("exact") @ v,
    "empirical_fisher": lambda lin, v: lin.fisher("empirical") @ v,
}

# Largest difference of two losses of one model, relative and absolute: sums are not in one order on every device.
TOLERANCES = {"float32": (5e-5, 1e-6), "float64": (1e-10, 1e-10)}


class Objective:
    """A probe set: a model and the examples that its curvature is measured on.

    The examples are read once and kept in the host's memory; a batch is copied to the accelerator when it is used.
    Whatever is asked, the answer is at the weights that the model has then, and nothing of the model, its optimizer or
    its metrics moves. What layers draw at random is a function of `seed` and of the batch's number alone, so two
    answers at the same weights agree (on a CPU, bit for bit); the loss is computed twice at first, to see that it does.
    Under the strategy that the model was made under, each batch is cut over its replicas.

    Layers whose policy is `mixed_float16` or `mixed_bfloat16` compute in float32 here, and the loss is not scaled.
    Layers with half precision weights stay as they are.

    Args:
        model: A compiled `keras.Model`. One that is not built yet is built by the first batch.
        data: `(x, y)`, `(x, y, sample_weight)` or, for a model whose losses are all added, `x`, each an array or
            tensor or a dict or list of them; or a `tf.data.Dataset` or `keras.utils.PyDataset` of batches of these.
            Read once, in its order: a `Dataset` that shuffles anew in every epoch has one epoch behind it then.
        kind: What `product` multiplies by: `"hessian"`, `"ggn"` (the generalized Gauss-Newton matrix), `"fisher"` or
            `"empirical_fisher"`; see `Linearization`. Defaults to `"hessian"`.
        examples: The first that many of the data, an integer; data that are sorted, as by class, should be shuffled
            before. Defaults to all.
        batch_size: An integer; of a data set, its examples are put together anew. Defaults to the batches of a data
            set, and for arrays to all examples at once, up to 1024 (and 16 MB of inputs), else at most 512 at a time.
        training: Whether the model runs as in training (statistics of the batch, dropout) or as in inference. Defaults
            to `False`.
        seed: An integer, of the random masks in training mode. Defaults to `0`.
        asked_by: Whose arguments these are, for messages, a class or function.

    Attributes:
        model, kind, training, seed: As given.
        variables: The model's trainable variables.
        examples: Number of examples.
        batches: Number of batches.
        batch_size: Number of examples of the largest batch.
        counts: Number of examples of each batch, a list.
        shares: `s_b`, the weight of each batch, a list of floats.
        not_convex: Names of the compiled losses that are known not to be convex in the outputs.

    Raises:
        ValueError: An argument is none of these; the model is not compiled, or made under a strategy of several
            workers; `data` are empty, not of one length, infinite without `examples`, or not of the model's shape;
            the loss is not convex in the outputs and `kind="ggn"`, or of no known likelihood and `kind="fisher"`; the
            loss on these examples is not finite, or is another one when it is computed again; `data` have numbers that
            are not finite, and neither is the gradient; `data` need more than 8 GB.

    Example:

    ```python
    objective = Objective(model, (x, y), kind="ggn", examples=1024)
    direction = objective.product(objective.gradient())
    ```
    """

    def __init__(
        self, model, data, kind="hessian", examples=None, batch_size=None, training=False, seed=0, asked_by=None,
    ):  # fmt: skip
        owner = asked_by or Objective
        _check_arguments(owner, model, kind, examples, batch_size, training, seed)
        self.model, self.kind, self.training, self.seed = model, kind, training, seed
        self._strategy = replicas.strategy_of(model)
        self._dtype = "float64" if any(v.dtype == "float64" for v in model.variables) else keras.config.floatx()
        read = reading.batches(owner, data, examples, batch_size, self._dtype)
        reading.check_inputs(owner, model, read[0][0])
        reading.check_targets(owner, model, read[0][1])
        with self._strategy.scope():
            functional.build_for(model, *read[0])
        self.variables = list(model.trainable_variables)
        self._functions = {}
        self._structure = keras.tree.map_structure(lambda a: a is not None, read[0])
        self.counts, self.shares = [reading.count(batch) for batch in read], _shares(owner, model, read)
        self._batches = [replicas.scatter(self._strategy, _flat(batch)) for batch in read]
        self._seeds = [self._seeds_of(i) for i in range(len(read))]
        self.not_convex = tuple(convexity.not_convex(model))
        _check_kind(owner, kind, model, self.not_convex)
        self._check_loss(owner)
        if not reading.is_finite(read):
            self._check_gradient(owner)

    def in_mode(self, training):
        """The same examples in the same batches, with the model as in training or as in inference, `Objective`."""
        check(Objective.in_mode, "training", training, isinstance(training, bool), "True or False")
        if training == self.training:
            return self
        other = copy.copy(self)
        other.training, other._functions = training, {}
        other._check_loss(Objective.in_mode)
        return other

    @property
    def examples(self):
        """Number of examples."""
        return sum(self.counts)

    @property
    def batches(self):
        """Number of batches."""
        return len(self.counts)

    @property
    def batch_size(self):
        """Number of examples of the largest batch."""
        return max(self.counts)

    @property
    def psd(self):
        """Whether what `product` multiplies by is positive semi-definite: every kind but the Hessian."""
        return self.kind != "hessian"

    @property
    def is_sum(self):
        """Whether a compiled loss adds up the examples of a batch (`reduction="sum"`), and grows with the batch."""
        return "sum" in _reductions(self.model)

    @property
    def mixes_examples(self):
        """Whether what the model says of an example depends on the others of the batch; see `mixes_examples`."""
        return self.training and mixes_examples(self.model)

    @property
    def weights(self):
        """The weights that the model has now, a vector."""
        return trees.values(self.variables)

    def loss(self):
        """`f(w)`, a scalar."""
        return self.total("loss", lambda lin: lin.loss)

    def gradient(self):
        """`df/dw`, a vector."""
        return self.total("gradient", lambda lin: lin.gradient)

    def loss_at(self, step):
        """`f(w + step)`, a scalar; the model's weights stay as they are."""
        trees.check("step", step, self.variables)
        return self.total("loss_at", lambda lin, step: lin.loss_at(step), list(step))

    def product(self, vector):
        """`B v`, a vector; `B` is of the objective' `kind`."""
        trees.check("vector", vector, self.variables)
        return self.total(self.kind, PRODUCTS[self.kind], list(vector))

    def total(self, name, fn, *args):
        """`sum_b s_b fn(lin_b, *args)`, a nest of tensors, with `lin_b` the `Linearization` of batch `b`.

        Args:
            name: A name for `fn`, which is compiled when it is first seen, and again for batches or `args` of other
                shapes. Another function needs another name.
            fn: A function of a `Linearization` that gives a nest of floating tensors.
            *args: Nests of tensors or numbers.
        """
        total = None
        for number, share in enumerate(self.shares):
            found = self.on_batch(number, name, fn, *args)
            found = tf.nest.map_structure(lambda a, share=share: trees.exactly(share, a.dtype) * a, found)
            total = found if total is None else tf.nest.map_structure(tf.add, total, found)
        return total

    def on_batch(self, number, name, fn, *args):
        """`fn(lin_b, *args)` of one batch, the `number`-th; the other arguments are those of `total`."""
        batch, seeds = self._batches[number], self._seeds[number]
        args = tf.nest.map_structure(tf.convert_to_tensor, args)
        with self._strategy.scope():
            return self._compiled(name, fn, batch, seeds, args)(batch, seeds, args)

    def _compiled(self, name, fn, *signature):
        key = (name, *[(t.dtype, *t.shape) for t in tf.nest.flatten(signature, expand_composites=True)])
        if key not in self._functions:

            def on_batch(batch, seeds, args):
                with without_half_precision():
                    needs = Needs(products=True, hessian=self.kind == "hessian")
                    lin = Linearization(
                        self.model, *self._packed(batch), needs=needs, training=self.training, seeds=seeds
                    )
                    return fn(lin, *args)

            self._functions[key] = tf.function(on_batch, autograph=False).get_concrete_function(*signature)
        return self._functions[key]

    def _packed(self, flat):
        """`(x, y, sample_weight)` again."""
        rest = iter(flat)
        return keras.tree.map_structure(lambda given: next(rest) if given else None, self._structure)

    def _seeds_of(self, number):
        """Seeds of the model's layers in a batch, a tensor `(seeds, 2)`."""
        states = functional.seeds(self.model.non_trainable_variables)
        words = np.random.SeedSequence([self.seed, number]).generate_state(2 * len(states)).reshape(-1, 2)
        # of any integer type that the states have
        return tf.constant((words >> 1).astype(states[0].dtype if states else "int64"))

    def _check_loss(self, owner):
        loss = float(self.loss())
        if not math.isfinite(loss):
            raise ValueError(
                f"`{owner.__name__}`: the loss of the probe set is {loss}, and so is whatever is derived from it. Look "
                f"for values that are not finite in `data` and in the weights of the model {self.model.name!r}."
            )
        again = float(self.loss())
        relative, absolute = TOLERANCES["float64" if self._dtype == "float64" else "float32"]
        if abs(again - loss) > relative * abs(loss) + absolute:
            raise ValueError(
                f"`{owner.__name__}`: the model {self.model.name!r} has another loss whenever it is computed, {loss} "
                f"and {again}, at the same weights and examples: a layer draws random numbers that are not a function "
                "of a `keras.random.SeedGenerator` of its own. Give it one, `self.seed = keras.random.SeedGenerator()` "
                "and `keras.random.normal(shape, seed=self.seed)`, or measure with `training=False`."
            )

    def _check_gradient(self, owner):
        # kernels that drop what is not a number (a matrix product and a ReLU in one) leave the loss finite
        if not bool(trees.is_finite(self.gradient())):
            raise ValueError(
                f"`{owner.__name__}`: `data` must hold finite numbers, unless the model {self.model.name!r} itself "
                "fills what is missing. Received: NaN or infinite ones; the loss is finite, but its gradient is not. "
                "Leave these examples out, or fill them."
            )


def mixes_examples(model):
    """Whether a model in training mode has statistics of the batch in it: a `BatchNormalization` that is not frozen."""
    layers = keras_internals.layers_of(model)
    return any(isinstance(layer, keras.layers.BatchNormalization) and layer.trainable for layer in layers)


def _check_arguments(owner, model, kind, examples, batch_size, training, seed):
    functional.check_model(owner, model)
    check(owner, "kind", kind, kind in PRODUCTS, f"one of {', '.join(map(repr, PRODUCTS))}")
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        if value is not None:
            check_count(owner, name, value)
    check(owner, "training", training, isinstance(training, bool), "True or False")
    check_count(owner, "seed", seed, low=0)


def _check_kind(owner, kind, model, not_convex):
    """Refuse a matrix that the compiled loss does not have."""
    if kind == "ggn" and not_convex:
        raise ValueError(
            f"`{owner.__name__}`: `kind='ggn'` needs a loss that is convex in the outputs; `{', '.join(not_convex)}` "
            "is not known to be. Use kind='hessian'."
        )
    if kind == "fisher":
        name = likelihoods.unknown(model)
        if name is not None:
            raise ValueError(
                f"`{owner.__name__}`: `kind='fisher'` needs a loss that is minus the logarithm of a known likelihood; "
                f"`{name}` is not. Use kind='ggn', kind='empirical_fisher' or kind='hessian'."
            )


def _shares(owner, model, read):
    """The weight of each batch: its share of the examples, or of their weights where the loss is a mean over these."""
    reductions = _reductions(model)
    sizes = [float(reading.count(batch)) for batch in read]
    if "sum" in reductions and len(set(sizes)) > 1:
        raise ValueError(
            f"`{owner.__name__}`: a loss with `reduction='sum'` grows with the batch, and `data` must be cut into "
            f"equal batches. Received: batches of {sorted(set(map(int, sizes)))} examples. Pass a `batch_size` that "
            "divides their number, or fewer `examples`."
        )
    if reductions == {"mean_with_sample_weight"} and tf.is_tensor(read[0][2]):
        sizes = [float(tf.reduce_sum(tf.cast(batch[2], tf.float64))) for batch in read]
    return [size / math.fsum(sizes) for size in sizes]


def _reductions(model):
    return {loss.reduction for loss in keras_internals.losses_of(model)}


def _flat(batch):
    return [a for a in keras.tree.flatten(batch) if a is not None]
