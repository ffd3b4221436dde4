"""What every optimizer of the package shares: from a direction to Keras, safely.

A subclass writes exactly one of

* `direction(linearization)`: the step, before the learning rate, from a `Linearization` of the batch. Runs on a
  curved model (`keras_curvature.curved`), or on any model where the gradient is all it asks for.
* `precondition(gradients)`: the same from the gradient alone, which Keras has clipped and accumulated; or Keras' own
  `update_step(gradient, variable, learning_rate)`, where each variable is a matter of its own. Either runs on any
  model, and says `needs = Needs(only_gradients=True)`.

and `create_state(variables)` for what it remembers. Keras keeps everything that Keras does: learning-rate
schedules, weight decay, clipping, averages of the weights, constraints, gradient accumulation, checkpoints.

Nothing is assigned while a direction is computed. `remember(variable, value)` notes what the state shall become,
and the step takes all of it, or, where the loss or the direction is not finite, none of it: then weights and
state stay bit-identical and `skipped_steps` counts one. Under a dynamic loss scale a refresh that
fails skips the step too, for the scale to be halved. Until a first batch has a gradient beyond that of the weight
regularizers, nothing is taken: state made of a batch without weight would make the next steps explode. State is kept in
float32 at least, also that of weights in half precision. (Of accumulated gradients Keras makes a step by itself: where
that alone is not finite, its weight decay and its averages have gone on.)
"""

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.linearization.needs import Needs
from keras_curvature.optimizers.lifecycle import Lifecycle
from keras_curvature.optimizers.limits import NotLinear


class CurvatureOptimizer(Lifecycle):
    """Base of the optimizers; see the module for how to write one.

    Args:
        learning_rate: A float, a `LearningRateSchedule` or a callable, as everywhere in Keras.
        **kwargs: Keras' own: `weight_decay, clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
            ema_overwrite_frequency, loss_scale_factor, gradient_accumulation_steps, name`. On a method with a
            `direction` clipping applies to the step.

    Attributes:
        reports: `{name: "mean" | "last" | "sum"}`: the numbers that a curved model shows in its logs, and how an
            epoch sums them up.
        needs: What the method asks of a train step, a `Needs`; an instance may be given one of its own, as an argument
            of this constructor. Defaults to products and Hessian.
        idle_steps: How many steps at the beginning fill the state and do not move the weights.
    """

    reports = {"skipped_steps": "sum"}
    needs = Needs(products=True, hessian=True)
    idle_steps = 0

    # To be written by a method.

    def create_state(self, variables):
        """Create the optimizer's variables; called once, by `build`."""

    def direction(self, linearization):
        """The step to take before the learning rate, a vector."""
        raise NotImplementedError(
            f"`{type(self).__name__}` must implement `direction(linearization)`; or, if gradients are all it needs, "
            "`precondition(gradients)`, and say `needs = Needs(only_gradients=True)`."
        )

    def precondition(self, gradients):
        """The step to take before the learning rate, from the gradients of all variables, both vectors."""
        raise NotImplementedError(f"`{type(self).__name__}` must implement `precondition(gradients)`.")

    def update_step(self, gradient, variable, learning_rate):
        """`variable += learning_rate * direction`: what Keras carries as the gradient is the direction here."""
        dtype = trees.wide(variable.dtype)
        rate, direction = tf.cast(learning_rate, dtype), tf.cast(gradient, dtype)
        if dtype == variable.dtype:
            # one pass over the memory; the operation subtracts
            tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=-rate, delta=direction)
        else:  # half precision: the sum is rounded once
            variable.assign(tf.cast(tf.cast(variable, dtype) + rate * direction, variable.dtype))

    # To be called by a method.

    def remember(self, variable, value):
        """Note that `variable` (or each of a list of variables) shall become `value`, if the step is taken."""
        if isinstance(variable, list):
            self._noted.extend(zip(variable, value))
        else:
            self._noted.append((variable, value))

    def report(self, **numbers):
        """Report scalars by the names in `reports`; a NaN means that there is nothing to report this time."""
        self._reported.update(numbers)

    def reject(self, rejected):
        """Do not take this step, where the scalar says so: weights stay bit-identical, and what is noted is stored.

        Keras counts the step; its weight decay and averages pass it over. The report `step_norm` is 0.
        """
        self._rejected = rejected

    def refresh(self, variables, every, compute, phase=0):
        """What each of a list of variables becomes: `compute()` at steps `phase`, `phase + every`, ..., else itself.

        Of what is computed, a tensor that is not finite is dropped for the one that was there; the report
        `failed_refreshes` counts them. The values are remembered.
        """
        if not variables:
            return []
        kept = trees.values(variables)

        def anew():
            new = [tf.cast(value, old.dtype) for value, old in zip(compute(), kept, strict=True)]
            good = tf.stack([trees.sums_up(value) for value in new])

            def choose():
                return [tf.where(fine, a, b) for fine, a, b in zip(tf.unstack(good), new, kept)]

            # a choice is a copy, and hardly ever there is one to make
            values = tf.cond(tf.reduce_all(good), lambda: new, choose)
            return values, tf.reduce_sum(tf.cast(tf.logical_not(good), tf.float32))

        if every == 1:
            values, failed = anew()
        else:
            due = tf.equal(self.iterations % every, phase)
            values, failed = tf.cond(due, anew, lambda: (kept, tf.constant(0.0)))
        self.remember(list(variables), values)
        self.report(failed_refreshes=failed + self._reported.get("failed_refreshes", 0.0))
        return values

    def linear_step(self):
        """What `stability` asks: a `LinearStep` of `limits.py`, or a `NotLinear` where there is none."""
        return NotLinear(f"Of `{type(self).__name__}` no limit on the curvature is known.")

    def shift(self):
        """Where to linearize, a vector from the stored weights; asked where `needs.shifted`."""
        raise NotImplementedError(f"`{type(self).__name__}` has `needs.shifted`, and must implement `shift()`.")

    @property
    def _preconditions(self):
        return self.needs.only_gradients and type(self).precondition is not CurvatureOptimizer.precondition

    def add_scalar(self, value, name):
        """A scalar variable of the optimizer's state, with its initial value."""

        def initial(shape, dtype):  # Keras' `Constant` rounds to float32 on the way
            return tf.constant(value, dtype)

        return self.add_variable((), initializer=initial, name=name, aggregation="none")
