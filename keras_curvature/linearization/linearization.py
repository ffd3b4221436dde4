"""A model on one batch, seen from the current weights: its loss, its gradient, its curvature.

`Linearization` is the one object that an optimizer of this package talks to. Its results are already summed over the
replicas of a distribution strategy, so a method is written once, for one machine. On a plain `keras.Model`, `Gradients`
takes its place.

One forward pass is recorded for each slice of the batch, a `Pass` (`products.py`). All derivatives at the weights are
questions to that pass. What it records is chosen by the `Needs`, before the first question, so the order of the
questions changes neither the numbers nor the number of passes.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.linearization import arguments, matrices, products
from keras_curvature.linearization.estimates import diagonals, factors, sampled
from keras_curvature.linearization.gauss_newton import l2_of
from keras_curvature.linearization.layers import apart, taps
from keras_curvature.linearization.needs import EVERYTHING, Needs
from keras_curvature.linearization.passes import Passes
from keras_curvature.linearization.pure import slices
from keras_curvature.linearization.pure.differentiable import differentiable_keras
from keras_curvature.linearization.pure.functional import build_for, check_model
from keras_curvature.linearization.pure.on_replicas import OnReplicas
from keras_curvature.typing import Integer, Scalar, Vector


class Linearization:
    """The loss of one batch around the current weights `w`.

        f(w + d)  ~  f(w) + g'd + 1/2 d'B d,        B = H (Hessian) or G (Gauss-Newton)

    The forward pass is a pure function of the weights: batch statistics and dropout masks are the same in every
    evaluation and product, and reach the model once, by `commit()`. Vectors (`gradient`, steps, products) are lists of
    tensors in the order and with the shapes of `model.trainable_variables`; other dtypes are cast. Losses are scalars,
    the compiled loss with everything that belongs to it (sample weights, masks, regularizers, added losses).

    Results do not depend on how the batch is cut (replicas, `micro_batches`), except with batch normalization, and that
    masked losses and `reduction="mean_with_sample_weight"` become means of per-slice means; see `pure/slices.py`.

    Works eagerly, in a `tf.function`, compiled by XLA, and under a distribution strategy. One forward pass serves all
    products; with `micro_batches` each result takes its own.

    Args:
        model: A compiled `keras.Model`.
        x: Inputs of the batch, as the model takes them.
        y: Targets. Optional.
        sample_weight: Weights of the examples. Optional.
        needs: The `Needs`: what may be asked. Defaults to everything.
        shift: A vector: linearize at `w + shift` and not at `w`. Optional.
        loss_scale: Scalar > 0 that multiplies the loss inside derivatives, which are divided by it again, for
            `mixed_float16`. Optional.
        part: `(size, index)` of a piece of the batch to use. Optional; see `chunk`.
        micro_batches: Number of slices that each replica's batch is cut into: passes go over one slice at a time, with
            the memory of one; see `pure/micro_batches.py`. Defaults to `1`.
        training: Whether the model runs as in training (batch statistics, dropout) or as in inference (moving
            statistics, no dropout). Defaults to `True`.
        seeds: Initial seeds of the model's layers, an integer tensor `(seeds, 2)` in the order of
            `functional.seeds(model.non_trainable_variables)`. Defaults to the seeds that the layers have.

    Attributes:
        variables, batch: The model's trainable variables, and `(x, y, sample_weight)`.
        examples: Number of examples in the whole batch, of all replicas, an integer or tensor.
        passes: The recorded forward pass of each slice, `Passes`.

    Raises:
        ValueError: An argument is invalid; the model is not compiled; `micro_batches` is larger than 1 with
            synchronized normalization on several replicas, or, under XLA, not a divisor of a known batch size; what is
            asked is not in `needs`.

    Example:

    ```python
    from keras_curvature import ConjugateGradient, Linearization
    from keras_curvature.operators import Identity

    lin = Linearization(model, x, y)
    newton = ConjugateGradient().solve(lin.gauss_newton() + 1e-2 * Identity(), [-g for g in lin.gradient])
    for variable, step in zip(lin.variables, newton.value):
        variable.assign_add(step)
    lin.commit()
    ```
    """

    def __init__(
        self, model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, *, needs: Needs = EVERYTHING,
        shift: Vector | None = None, loss_scale: Scalar | None = None, part: tuple[float, Integer] | None = None,
        micro_batches: int = 1, training: bool = True, seeds: tf.Tensor | None = None,
    ) -> None:  # fmt: skip
        check_model(Linearization, model)
        arguments.check_plain(Linearization, x, needs, loss_scale, micro_batches, training)
        build_for(model, x, y, sample_weight)
        self.model, self.variables, self.needs = model, list(model.trainable_variables), needs
        self.loss_scale, self._reached, self.batch = loss_scale, None, (x, y, sample_weight)
        self._how = {"shift": shift, "part": part, "micro_batches": micro_batches, "training": training, "seeds": seeds}
        self._on_replicas = OnReplicas(model, self.batch, **self._how)
        # `cached_property` holds a lock while it computes: the threads of replicas would wait for each other
        self.examples, self._known, self._graph = self._on_replicas.examples, {}, slices.graph()

    # At the weights.

    @property
    def weights(self) -> Vector:
        """`w`, plus the shift, a list of tensors."""
        return self._once("weights", self._on_replicas.weights)

    @property
    def loss(self) -> tf.Tensor:
        """`f(w)`, a scalar."""
        return self._evaluated()[0]

    @property
    def outputs(self) -> Any:
        """The model's outputs, in its own structure; under a strategy, one slice per replica."""
        return self._evaluated()[1]

    @property
    def gradient(self) -> Vector:
        """`df/dw`, a vector; one backward pass, however often it is asked for."""
        return self._once("gradient", lambda: self._gradient_and()[0])

    @property
    def reached(self) -> tuple[bool, ...]:
        """Whether the loss depends on each of `variables`, a tuple of bools; Keras skips the others."""
        if self._reached is None:
            _ = self.gradient
        return self._reached  # type: ignore[return-value]

    @property
    def l2(self) -> tuple[float, ...]:
        """Second derivative of the L2 regularizer of each variable, a tuple of floats; 0 where there is none."""
        return l2_of(self.variables)

    def take_gradient(self, gradient: Vector) -> None:
        """Use a gradient that was computed before, at the same weights on the same batch."""
        checked = trees.vector("gradient", gradient, self.variables)
        self._once("gradient", lambda: checked)

    def is_known(self, name: str) -> bool:
        """Whether `"loss"` or `"gradient"` has been computed already."""
        return name in self._known

    # At other weights.

    def loss_at(self, step: Vector) -> tf.Tensor:
        """`f(w + step)`, a scalar; one forward pass with the same masks and seeds, and no weight is assigned."""
        step = trees.vector("step", step, self.variables)
        return self.total(lambda pure, weights, step: pure.evaluate(trees.add(weights, step)).loss, step)

    def gradient_at(self, step: Vector) -> Vector:
        """`df/dw` at `w + step`, a vector; one forward and one backward pass."""
        return self.loss_and_gradient_at(step)[1]

    def loss_and_gradient_at(self, step: Vector) -> tuple[tf.Tensor, Vector]:
        """`(f, df/dw)` at `w + step`."""
        step = trees.vector("step", step, self.variables)

        def both(pure, weights, step):
            evaluation, gradient = products.gradient(pure, trees.add(weights, step), self.loss_scale)
            return evaluation.loss, gradient

        return self.total(both, step)

    def total(self, fn: Callable[..., Any], *vectors: Vector) -> Any:
        """The sum over replicas and micro-batches of a function of the model on a slice of the batch.

        Args:
            fn: `fn(pure, weights, *vectors)` gives a nest of tensors; it runs once for each slice. `pure` is the model
                on that slice, a `PureModel`, with `pure.batch = (x, y, sample_weight)`. `pure.evaluate(weights)` gives
                an `Evaluation` with the `outputs` of the slice, and as its `loss` the slice's share of the loss.
            *vectors: Vectors that all slices get.

        Example:

        ```python
        def squares(pure, weights):
            evaluation = pure.evaluate(weights)
            return tf.reduce_sum(tf.square(evaluation.outputs)), evaluation.loss

        total, loss = lin.total(squares)
        ```
        """
        on_replicas = self._on_replicas

        def here(*vectors):
            return on_replicas.here().sum(lambda pure: fn(pure, on_replicas.weights(), *vectors))

        with self.kernels():
            return replicas.total(here, *vectors)

    # Curvature, and estimates of it: functions of a linearization.

    hessian = matrices.hessian
    gauss_newton = matrices.gauss_newton
    fisher = matrices.fisher
    rows = matrices.rows
    gradients_of_examples = matrices.gradients_of_examples
    fisher_rows = matrices.fisher_rows
    hidden_gauss_newton = matrices.hidden_gauss_newton
    sampled_gradient = sampled.sampled_gradient
    fisher_diagonal = sampled.fisher_diagonal
    squared_gradients, hessian_diagonal = diagonals.squared_gradients, diagonals.hessian_diagonal
    kronecker_factors, kronecker_means = factors.kronecker_factors, factors.kronecker_means
    kronecker_second_moments = factors.kronecker_second_moments

    # The batch and the model.

    def chunk(self, size: float, index: Integer = 0) -> "Linearization":
        """The linearization of a part of the batch: of each replica's slice, the `index`-th piece, taken in turn.

        Args:
            size: A share of the batch in (0, 1], or a number of examples in the whole batch.
            index: Integer number or tensor >= 0; the batch is cut into as many whole pieces as it has.

        A piece is every second, third, ... example of the slice, so replicas with equal slices together take the piece
        that one replica would take. A mean over examples becomes one over the piece. A smaller batch is used whole.
        """
        return self.again(part=slices.check_piece(Linearization.chunk, size, index))

    def again(self, **changes: Any) -> "Linearization":
        """The same with other arguments, or on another `batch=(x, y, sample_weight)`: `lin.again(shift=step)`."""
        now = {"batch": self.batch, "needs": self.needs, "loss_scale": self.loss_scale, **self._how}
        how = arguments.changed(Linearization.again, now, changes)
        return Linearization(self.model, *how.pop("batch"), **how)

    def commit(self) -> None:
        """Write the batch statistics, random seeds and loss counters of this batch into the model, once."""
        passes, pure = self.passes, self._on_replicas
        self._evaluated()
        replicas.each(lambda: pure.here().commit(passes.here().evaluation))

    # One forward pass, recorded on every replica.

    @property
    def passes(self) -> Passes:
        """The recorded forward pass of each slice, `Passes`."""
        return self._once("passes", self._recorded)

    def record(self, make: Callable[..., Any], tapping: Callable[[], Any] = contextlib.nullcontext) -> Passes:
        """`Passes` of `make(pure, weights)` on each slice, while the context `tapping()` is open."""

        @contextlib.contextmanager
        def around():
            with self.kernels(), tapping():
                yield

        on_replicas = self._on_replicas
        return Passes(on_replicas.here, lambda pure: make(pure, on_replicas.weights()), around)

    def kernels(self) -> contextlib.AbstractContextManager[None]:
        """The context in which Keras uses kernels that the `needs` can differentiate."""
        # tapped recurrent layers do not use cuDNN
        in_steps, needs = any(isinstance(layer, keras.layers.RNN) for layer in self._tapped()), self.needs
        return differentiable_keras(twice=needs.hessian, products=needs.hessian or needs.products or in_steps)

    def with_gradient(self, question: Callable[[products.Pass], Any]) -> Any:
        """The sum of `question(pass)`, in the same pass as the `gradient` if that is not known yet."""
        if self.is_known("gradient"):
            return self.passes.total(question)
        gradient, found = self._gradient_and(question)
        self._once("gradient", lambda: gradient)
        return found

    def _gradient_and(self, question=lambda recorded: ()):
        def both(recorded):
            gradient = recorded.gradient()
            # on any slice: run eagerly, a model may branch differently on each
            self._reached = tuple(map(max, self._reached or recorded.reached, recorded.reached))
            return gradient, question(recorded)

        found = self.passes.total(both)
        self._evaluated()  # known by now
        return found

    def _recorded(self):
        noted, needs = {}, self.needs

        def make(pure, weights):
            return products.Pass(pure, weights, self.loss_scale, needs.hessian, noted)

        return self.record(make, lambda: taps.calls(self._tapped(), noted))

    def _tapped(self):
        """The layers whose inputs and outputs are noted."""
        return self._once("tapped", lambda: apart.tapped(self.model, self.needs, self._how["training"]))

    def _evaluated(self):
        """`(loss, outputs)` of the recorded pass."""
        return self._once("loss", self.passes.evaluated)

    def _once(self, name, compute):
        value = self._known[name] if name in self._known else compute()
        if slices.graph() is self._graph:  # a tensor made inside a loop or condition cannot be used outside
            self._known[name] = value
        return value
