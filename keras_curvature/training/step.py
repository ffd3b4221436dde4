"""The train step of a curved model: linearize the batch, let the optimizer step, commit the state once."""

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check_count
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.linearization.pure.functional import build_for
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.lifecycle import overwrites
from keras_curvature.training.reports import Reports


class CurvedStep:
    """The train step that a curved model puts before Keras' own."""

    _curved_micro_batches = 1

    @property
    def micro_batches(self):
        """Number of slices that each replica's share of a batch is computed in, one after the other."""
        return self._curved_micro_batches

    @micro_batches.setter
    def micro_batches(self, value):
        check_count(self, "micro_batches", value)
        if value == self._curved_micro_batches:
            return
        self._curved_micro_batches = value
        if self.train_function is not None:  # traced again with the new number, also while `fit` is running
            self.make_train_function(force=True)

    def _prepare_reports(self):
        """The `Reports`, with metrics for the compiled optimizer; call it before the step is traced."""
        if "_curved_reports" not in self.__dict__:
            self._curved_reports = Reports()
        optimizer, _ = unwrap(self.optimizer)
        if isinstance(optimizer, CurvatureOptimizer):
            self._curved_reports.of(optimizer, self.distribute_strategy)
        return self._curved_reports

    def train_step(self, data):
        """Linearize the batch, step, commit batch statistics once. Keras' own step, if it gives the same result."""
        if not self._steps_by_linearization():
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        loss, outputs, taken, reported = replicas.cross(self._curved_step, x, y, sample_weight)
        first = next(a for a in keras.tree.flatten(x) if a is not None)
        # a skipped batch does not count: its NaN would become the loss of the whole epoch
        keras_internals.loss_tracker(self).update_state(
            tf.where(taken, loss, tf.zeros_like(loss)), sample_weight=tf.where(taken, tf.shape(first)[0], 0)
        )
        logs = dict(self.compute_metrics(x, y, outputs, sample_weight=sample_weight))
        if "loss" in logs:  # before any batch counts, the mean is undefined and not 0
            logs["loss"] = tf.where(keras_internals.loss_tracker(self).count.value > 0, logs["loss"], float("nan"))
        return {**logs, **self._curved_reports.update(reported)} if reported else logs

    def _steps_by_linearization(self):
        """Whether our step must replace Keras'.

        For Keras' own optimizers it need not on one replica and on a TPU. Under a strategy that synchronizes by merge
        calls, Keras' step refuses accumulated gradients, averages that overwrite the weights, and several steps per
        execution. Our step leaves the replicas once, for the whole step, and works with Keras' optimizers too.
        """
        ours = isinstance(unwrap(self.optimizer)[0], CurvatureOptimizer)
        return ours or self.micro_batches > 1 or replicas.uses_merge_calls()

    def _curved_step(self, x, y, sample_weight):
        """`(loss, outputs, whether the step was taken, reported)`, outside the replicas."""
        optimizer, scaler = unwrap(self.optimizer)
        build_for(self, x, y, sample_weight)
        ours = isinstance(optimizer, CurvatureOptimizer)
        needs = optimizer.needs if ours else Needs(only_gradients=True)
        _refuse_overwritten(self.trainable_variables)
        if ours:
            optimizer.require(self.trainable_variables)
            self._prepare_reports()  # inside the replicas nothing can be created
        lin = Linearization(
            self, x, y, sample_weight, micro_batches=self.micro_batches,
            needs=needs, shift=optimizer.shift() if needs.shifted else None,
            loss_scale=optimizer.loss_scale_factor if scaler is None else tf.identity(scaler.dynamic_scale.value),
        )  # fmt: skip
        if ours:
            reported = optimizer.step(lin)
            taken = reported["skipped_steps"] == 0.0
        else:
            reported, taken = {}, _step_of_keras(optimizer, lin, checked=scaler is not None)
        tf.cond(taken, lambda: _nothing(lin.commit()), lambda: _nothing(None))
        if scaler is not None:
            _update_loss_scale(scaler, taken)
        return lin.loss, lin.outputs, taken, reported


def unwrap(optimizer):
    """`(optimizer, scaler)`: the optimizer itself, and the `LossScaleOptimizer` around it or `None`."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer, optimizer
    return optimizer, None


def _refuse_overwritten(variables):
    """Refuse weights whose gradient is their new value: it is no derivative, and does not add up over slices."""
    names = [v.path for v in variables if overwrites(v)]
    if names:
        raise ValueError(
            "A curved model cannot train weights that their gradient overwrites, such as the scales of float8 layers. "
            f"Received: {', '.join(names)}. Train the model without `keras_curvature.curved`, with an optimizer that "
            "needs gradients only (`Neumann`, `SOAP`, `Shampoo`, ...), or in another precision."
        )


def _step_of_keras(optimizer, lin, checked):
    """One step of a Keras optimizer, outside the replicas; returns whether it was taken.

    As in Keras, a step with a gradient that is not finite is skipped under a loss scale, and only there.
    """
    gradient, scale = lin.gradient, optimizer.loss_scale_factor
    handed = gradient if scale is None else trees.scale(scale, gradient)
    handed = [g if reached else None for g, reached in zip(handed, lin.reached)]  # Keras passes over `None`

    def take():
        with replicas.keras_outside():
            optimizer.apply(handed, lin.variables)
        return tf.constant(True)

    return tf.cond(trees.is_finite(gradient), take, lambda: tf.constant(False)) if checked else take()


def _update_loss_scale(scaler, finite):
    """Dynamic loss scaling by Keras' rule: halve after a step that is not finite, double after enough others."""
    due = scaler.step_counter.value >= scaler.dynamic_growth_steps - 1
    scale, counter = scaler.dynamic_scale.value, scaler.step_counter.value
    factor = tf.where(finite, tf.where(due, 2.0, 1.0), 0.5)
    scaler.dynamic_scale.assign(scale * factor)
    scaler.step_counter.assign(tf.where(finite & tf.logical_not(due), counter + 1, tf.zeros_like(counter)))


def _nothing(_):
    """The value of a branch that is run for its effects."""
    return tf.constant(0)
