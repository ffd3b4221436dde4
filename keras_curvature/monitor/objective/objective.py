"""The loss of a model on fixed examples: its value, gradient and curvature products, summed over batches.

    f(w) = sum_b s_b f_b(w),      B = sum_b s_b B_b,      s_b = n_b / N

`f_b` is the compiled loss of batch `b`, which has `n_b` of the `N` examples. For losses that are means over examples,
`f` is the mean over all examples, with everything that belongs to the loss (regularizers, added losses). Other losses:

* Means over sample weights (`reduction="mean_with_sample_weight"`) and over unmasked steps (masked losses): in `f_b`
  the batch's sum is divided by the mean weight of all examples times `n_b`. Then `f` is the mean over all examples, for
  each output by its own weights. The mean weights are counted once, before the loss is first measured.
* `reduction="sum"`: the mean of the batches' sums, which is the loss that an optimizer sees at this batch size. All its
  eigenvalues are `n_b` times those of the mean. Batches must be equal.
* Losses that couple examples (contrastive losses, `Circle`, `Dice` and `Tversky` over the batch, the root of a mean):
  the mean of the batches' losses, which is not the loss of all examples in one batch. A warning names the loss.
* A model's own `compute_loss`: the mean of the batches' losses.

In training mode (`training=True`) batch normalization uses the statistics of each batch, so the curvature belongs to a
batch size. In inference mode it uses the moving statistics, and the batch size does not matter.
"""

import copy
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check_flag
from keras_curvature.linearization.fisher import convexity
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.linearization.pure import functional, reductions
from keras_curvature.linearization.pure.precision import without_half_precision
from keras_curvature.monitor.objective import checks, reading, shapes
from keras_curvature.monitor.objective.kinds import KINDS
from keras_curvature.typing import Kind, Vector


class Objective:
    """The loss of a model on fixed examples.

    The examples are read once and kept in the host's memory; a batch is copied to the accelerator when it is used.
    Every answer is at the weights that the model has at that moment. Nothing of the model, its optimizer or its metrics
    changes. Random masks are a function of `seed` and of the batch's number alone, so two answers at the same weights
    agree (on a CPU, bit for bit); the loss is computed twice at construction to check this. Under the strategy that the
    model was made under, each batch is split over its replicas.

    Of a loss that couples examples, the value in several batches is the mean of theirs, and a warning names the loss.

    Layers with the policy `mixed_float16` or `mixed_bfloat16` compute in float32 here, and the loss is not scaled.
    Layers with half-precision weights stay as they are.

    Args:
        model: A compiled `keras.Model`. The first batch builds a model that is not built yet.
        data: `(x, y)`, `(x, y, sample_weight)` or, for a model whose losses are all added, `x`; each an array, a
            tensor, or a dict or list of them. Or a `tf.data.Dataset` or `keras.utils.PyDataset` of batches of these.
            Data are read once, in their order; a `Dataset` that reshuffles each epoch has one epoch behind it
            afterwards.
        kind: The matrix that `product` multiplies by: `"hessian"`, `"ggn"` (generalized Gauss-Newton), `"fisher"` or
            `"empirical_fisher"`; see `kinds.py`. Defaults to `"hessian"`.
        examples: Use the first so many examples, an integer. Shuffle sorted data first. Defaults to all.
        batch_size: An integer; a data set is cut anew to this size. Defaults to the batches of a data set; for arrays
            to all examples at once up to 1024 (and 16 MB of inputs), else at most 512 at a time.
        training: Whether layers run in training mode (batch statistics, dropout). Defaults to `False`.
        seed: An integer, for the random masks in training mode. Defaults to `0`.
        asked_by: The class or function to name in error messages. Defaults to `Objective`.

    Attributes:
        model, kind, training, seed: As given.
        variables: The model's trainable variables.
        examples: Number of examples.
        batches: Number of batches.
        batch_size: Number of examples in the largest batch.
        counts: Number of examples in each batch, a list.
        shares: `s_b`, the weight of each batch, a list of floats.
        dtype: The dtype of floating data, "float64" where a weight is, else Keras' `floatx`.
        not_convex: Names of the compiled losses that are not known to be convex in the outputs.

    Raises:
        ValueError: An argument is invalid; the model is not compiled, has no loss outside of its own `train_step`, has
            no trainable weights, or was made under a strategy of several workers; `data` are empty, of unequal lengths,
            infinite without `examples`, of shapes that the model does not take, or have labels that are no class of it;
            the loss is not convex in the outputs and `kind="ggn"`, or has no known likelihood and `kind="fisher"`; the
            loss on these examples is not finite, or differs when computed again; `data` and the gradient are not
            finite; `data` need more than 8 GB.

    Example:

    ```python
    objective = Objective(model, (x, y), kind="ggn", examples=1024)
    direction = objective.product(objective.gradient())
    ```
    """

    def __init__(
        self, model: keras.Model, data: Any, kind: Kind = "hessian", examples: int | None = None,
        batch_size: int | None = None, training: bool = False, seed: int = 0, asked_by: Any = None,
    ) -> None:  # fmt: skip
        owner = asked_by or Objective
        checks.check_arguments(owner, model, kind, examples, batch_size, training, seed)
        checks.check_train_step(owner, model)
        self.model, self.kind, self.training, self.seed = model, kind, training, seed
        self._strategy = replicas.strategy_of(model)
        self.dtype = reading.dtype_of(model)
        read = reading.batches(owner, data, examples, batch_size, self.dtype)
        shapes.check_inputs(owner, model, read[0][0])
        shapes.check_targets(owner, model, read[0][1])
        shapes.check_labels(owner, model, [y for _, y, _ in read])
        with self._strategy.scope():
            functional.build_for(model, *read[0])
        self.variables = list(model.trainable_variables)
        checks.check_trainable(owner, model)
        self.not_convex = tuple(convexity.not_convex(model))
        checks.check_kind(owner, kind, model, self.not_convex)
        self._keep(owner, read)
        if self.batches > 1 or self._strategy.num_replicas_in_sync > 1:
            self._divide_by(self._weighed())
        if self.batches > 1:
            checks.warn_of_coupled(owner, self, self._coupled)
        checks.check_loss(owner, self)
        if not reading.is_finite(read):
            checks.check_gradient(owner, self)

    def _keep(self, owner, read):
        """Keep the batches, spread over the replicas."""
        self._functions, self._mean_weights, self._coupled, self._apart = {}, (), [], None
        self._structure = keras.tree.map_structure(lambda a: a is not None, read[0])
        self.counts = [reading.count(batch) for batch in read]
        self.shares = checks.shares(owner, self.model, self.counts)
        self._batches = [reading.scatter(self._strategy, _flat(batch)) for batch in read]
        self._seeds = [self._seeds_of(i) for i in range(len(read))]

    def _weighed(self):
        """The mean weight over all examples of each loss that is a mean over weights or unmasked steps, a tuple."""
        weighs = self.on_batch(0, "loss", self._evaluated)[1]
        return tuple(map(float, self.total("loss", self._evaluated)[1])) if weighs else ()

    def _divide_by(self, mean_weights):
        """Let the losses that are means over weights be over these mean weights, whatever is evaluated."""
        if mean_weights != self._mean_weights:
            self._mean_weights, self._functions = mean_weights, {}

    def _evaluated(self, lin):
        def here(pure, weights):
            found = pure.evaluate(weights)
            self._coupled += found.coupled
            return found.loss, found.mean_weights

        return lin.total(here)

    def in_mode(self, training: bool) -> "Objective":
        """An `Objective` on the same examples in the same batches, in training mode or in inference mode."""
        check_flag(Objective.in_mode, "training", training)
        if training == self.training:
            return self
        other = copy.copy(self)
        other.training, other._functions, other._apart = training, {}, None
        checks.check_loss(Objective.in_mode, other)
        return other

    def in_parts(self) -> "Objective":
        """An `Objective` on the same examples; losses of parts of a batch add up to the loss of the batch.

        A mean over sample weights or unmasked steps divides by those of the whole batch then, not of the part.
        """
        if self._apart is None:
            weights = self._mean_weights or self._weighed()
            self._apart = self if weights == self._mean_weights else copy.copy(self)
            self._apart._divide_by(weights)
        return self._apart

    @property
    def examples(self) -> int:
        """Number of examples."""
        return sum(self.counts)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self.counts)

    @property
    def batch_size(self) -> int:
        """Number of examples of the largest batch."""
        return max(self.counts)

    @property
    def psd(self) -> bool:
        """Whether the matrix is positive semi-definite: every kind but the Hessian."""
        return KINDS[self.kind].psd

    @property
    def is_sum(self) -> bool:
        """Whether a compiled loss sums over the batch (`reduction="sum"`), and so grows with it."""
        return "sum" in checks.reductions(self.model)

    @property
    def mixes_examples(self) -> bool:
        """Whether an output depends on the other examples of the batch; see `mixes_examples`."""
        return self.training and mixes_examples(self.model)

    @property
    def weights(self) -> Vector:
        """The model's current weights, a vector."""
        return trees.values(self.variables)

    def loss(self) -> tf.Tensor:
        """`f(w)`, a scalar."""
        return self.total("loss", self._evaluated)[0]

    def gradient(self) -> Vector:
        """`df/dw`, a vector."""
        return self.total("gradient", lambda lin: lin.gradient)

    def loss_at(self, step: Vector) -> tf.Tensor:
        """`f(w + step)`, a scalar; the model's weights stay as they are."""
        step = trees.vector("step", step, self.variables)
        return self.total("loss_at", lambda lin, step: lin.loss_at(step), step)

    def product(self, vector: Vector) -> Vector:
        """`B v`, a vector, with the matrix `B` of `kind`."""
        return self.total(self.kind, KINDS[self.kind].product, trees.vector("vector", vector, self.variables))

    def total(self, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """`sum_b s_b fn(lin_b, *args)`, a nest of tensors, with `lin_b` the `Linearization` of batch `b`.

        Args:
            name: A name for `fn`. It is compiled on first use, and again for batches or `args` of other shapes. Another
                function needs another name.
            fn: A function of a `Linearization` that gives a nest of floating tensors.
            *args: Nests of tensors or numbers.
        """
        total = None
        for number, share in enumerate(self.shares):
            found = self.on_batch(number, name, fn, *args)
            found = tf.nest.map_structure(lambda a, share=share: trees.exactly(share, a.dtype) * a, found)
            total = found if total is None else tf.nest.map_structure(tf.add, total, found)
        return total

    def on_batch(self, number: int, name: str, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(lin_b, *args)` of batch `number`; the other arguments are those of `total`."""
        batch, seeds = self._batches[number], self._seeds[number]
        args = tf.nest.map_structure(tf.convert_to_tensor, args)
        with self._strategy.scope():
            return self._compiled(name, fn, batch, seeds, args)(batch, seeds, args)

    def _compiled(self, name, fn, *signature):
        key = (name, *[(t.dtype, *t.shape) for t in tf.nest.flatten(signature, expand_composites=True)])
        if key not in self._functions:

            def on_batch(batch, seeds, args):
                with without_half_precision(), reductions.over_all(self._mean_weights):
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
        """Seeds for the model's layers in a batch, a tensor `(seeds, 2)`."""
        states = functional.seeds(self.model.non_trainable_variables)
        words = np.random.SeedSequence([self.seed, number]).generate_state(2 * len(states)).reshape(-1, 2)
        # in the integer type of the states
        return tf.constant((words >> 1).astype(states[0].dtype if states else "int64"))


def mixes_examples(model):
    """Whether training mode uses batch statistics: the model has a `BatchNormalization` that is not frozen."""
    layers = keras_internals.layers_of(model)
    return any(isinstance(layer, keras.layers.BatchNormalization) and layer.trainable for layer in layers)


def _flat(batch):
    return [a for a in keras.tree.flatten(batch) if a is not None]
