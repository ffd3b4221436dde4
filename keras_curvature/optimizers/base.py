"""The base class of every optimizer: it hands a method's direction to Keras, safely.

A subclass writes exactly one of

* `direction(linearization)`: the step, before the learning rate, from a `Linearization` of the batch. Runs on a curved
  model (`keras_curvature.curved`), or on any model if it uses only the gradient.
* `precondition(gradients)`: the step from the gradient alone, which Keras has clipped and accumulated; or Keras' own
  `update_step(gradient, variable, learning_rate)`, for methods that treat each variable separately. Both run on any
  model and declare `needs = Needs(only_gradients=True)`.

and `create_state(variables)` for its state. Keras still handles learning-rate schedules, weight decay, clipping,
averages of the weights, constraints, gradient accumulation, checkpoints.

Nothing is assigned while a direction is computed. `remember(variable, value)` notes the next state, and the step
assigns all notes or none. If the loss or the direction is not finite, weights and state stay bit-identical and
`skipped_steps` counts one. Under a dynamic loss scale a failed refresh also skips the step, so that the scale is
halved. No step is taken until a first batch has a gradient beyond that of the weight regularizers: state from a batch
without weight would make the next steps explode. Methods whose direction does without the gradient skip this check.
State is kept in float32 at least, also for weights in half precision.
With gradient accumulation Keras takes the step, so weight decay and EMA apply even when it is not finite, and of the
reports only `skipped_steps` is known.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.lifecycle import Lifecycle
from keras_curvature.optimizers.limits import LinearStep, NotLinear
from keras_curvature.typing import Integer, Scalar, Variables, Vector


class CurvatureOptimizer(Lifecycle):
    """Base of the optimizers; see the module for how to write one.

    Args:
        learning_rate: A float, a `LearningRateSchedule` or a callable, as everywhere in Keras.
        cautious: Whether entries of the step that would raise the loss to first order are left out and the others made
            longer (`optimizers/cautious.py`). A method that checks its step on the loss checks it without this mask.
            Defaults to `False`.
        cautious_decay: Whether `weight_decay` shrinks only the weights that the step shrinks too. Defaults to `False`.
        hyperball: Whether each kernel keeps its norm, and its step has `learning_rate` times this norm for a length
            (`optimizers/hyperball.py`); it excludes `weight_decay`. Defaults to `False`.
        scales: Factors on the steps of the single weights, a list of numbers in the order of
            `model.trainable_variables`: a learning rate for each, such as those of `mup_scales`. A method that checks
            its step on the loss checks it without these factors. `weight_decay` uses `learning_rate` alone. Defaults to
            `None`.
        **kwargs: Keras' own: `weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
            ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, name`. On a method with a
            `direction` clipping applies to the step, before `scales`, the decay of `cautious_decay` and `hyperball`.

    Attributes:
        reports: `{name: "mean" | "last" | "sum"}`: the numbers that a curved model logs, and how an epoch reduces them.
        needs: The `Needs` of the method from a train step; the constructor's argument `needs` sets them for one
            instance. Defaults to products and Hessian.
        idle_steps: The number of first steps that fill the state and do not move the weights.
    """

    reports: dict[str, str] = {"skipped_steps": "sum"}
    needs = Needs(products=True, hessian=True)
    idle_steps = 0

    # A method implements these.

    def create_state(self, variables: Variables) -> None:
        """Create the optimizer's variables; called once, by `build`."""

    def direction(self, linearization: Linearization) -> Vector:
        """The step to take before the learning rate, a vector."""
        raise NotImplementedError(
            f"`{type(self).__name__}` must implement `direction(linearization)`; or, if it needs only gradients, "
            "`precondition(gradients)` with `needs = Needs(only_gradients=True)`."
        )

    def precondition(self, gradients: Vector) -> Vector:
        """The step to take before the learning rate, from the gradients of all variables, both vectors."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `precondition(gradients)`.")

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: Scalar) -> None:
        """`variable += learning_rate * direction`; Keras passes the direction as `gradient`."""
        dtype = trees.wide(variable.dtype)
        rate, direction = tf.cast(learning_rate, dtype), tf.cast(gradient, dtype)
        if dtype == variable.dtype:
            # one pass over the memory; the operation subtracts
            tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=-rate, delta=direction)
        else:  # half precision: the sum is rounded once
            variable.assign(tf.cast(tf.cast(variable, dtype) + rate * direction, variable.dtype))

    # A method calls these.

    def remember(self, variable: keras.Variable | Variables, value: tf.Tensor | Vector) -> None:
        """Note the next value of `variable`, or of each of a list of variables; assigned if the step is taken."""
        if isinstance(variable, list):
            self._noted.extend(zip(variable, value))
        else:
            self._noted.append((variable, value))

    def report(self, **numbers: Scalar) -> None:
        """Report scalars by the names in `reports`; NaN means no report in this step."""
        self._reported.update(numbers)

    def reject(self, rejected: tf.Tensor) -> None:
        """Leave the weights bit-identical if the scalar `rejected` is true; noted state is stored.

        Keras counts the step but applies no weight decay or averaging. The report `step_norm` is 0.
        """
        self._rejected = rejected

    def anew_if(self, due: tf.Tensor | bool, compute: Callable[[], Vector], kept: Vector) -> Vector:
        """`compute()` if the scalar `due` is true, else `kept`.

        A non-finite result is discarded and the kept value taken; the report `failed_refreshes` counts these.
        """

        def anew():
            new = [tf.cast(value, old.dtype) for value, old in zip(compute(), kept, strict=True)]
            values, good = trees.finite_or(new, kept)
            return values, tf.reduce_sum(tf.cast(tf.logical_not(good), tf.float32))

        values, failed = anew() if due is True else tf.cond(due, anew, lambda: (kept, tf.constant(0.0)))
        self.report(failed_refreshes=failed + self._reported.get("failed_refreshes", 0.0))
        return values

    def refresh(
        self, variables: Variables, every: int, compute: Callable[[], Vector], phase: Integer = 0
    ) -> Vector:  # fmt: skip
        """The next values of a list of variables: `compute()` at steps `phase`, `phase + every`, ..., else unchanged.

        A value that `compute` could not give stays as it was, see `anew_if`. The values are remembered.
        """
        if not variables:
            return []
        due = True if every == 1 else tf.equal(self.iterations % every, phase)
        values = self.anew_if(due, compute, trees.values(variables))
        self.remember(list(variables), values)
        return values

    def linear_step(self) -> LinearStep | NotLinear:
        """The description of the step for `stability`: a `LinearStep` or a `NotLinear` of `limits.py`."""
        return NotLinear(f"For `{type(self).__name__}` no limit on the curvature is known.")

    def shift(self) -> Vector:
        """The point to linearize at, a vector relative to the stored weights; called if `needs.shifted`."""
        raise NotImplementedError(f"`{type(self).__name__}` has `needs.shifted`, so it must implement `shift()`.")

    @property
    def logged(self) -> dict[str, str]:
        """The `reports` that are known of a batch: `skipped_steps` alone where Keras steps by the mean of several."""
        of_a_mean = self._preconditions and self.gradient_accumulation_steps
        return {"skipped_steps": "sum", **({} if of_a_mean else self.reports)}

    @property
    def _preconditions(self):
        return self.needs.only_gradients and type(self).precondition is not CurvatureOptimizer.precondition

    @property
    def _steps_each_weight(self):
        """Whether each variable steps by itself, in `update_step`, as with Keras' own optimizers."""
        return self.needs.only_gradients and not self._preconditions

    def add_scalar(self, value: float, name: str) -> keras.Variable:
        """A scalar variable of the optimizer's state, with its initial value."""

        def initial(shape, dtype):  # Keras' `Constant` would round to float32
            return tf.constant(value, dtype)

        return self.add_variable((), initializer=initial, name=name, aggregation="none")
