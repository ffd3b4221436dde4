"""The train step of a curved model: linearize the batch, take the optimizer's step, update layer states once."""

from typing import Any

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check_count
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.linearization.needs import Needs
from keras_curvature.linearization.pure.functional import build_for
from keras_curvature.optimizers.base import CurvatureOptimizer
from keras_curvature.optimizers.given import overwrites
from keras_curvature.training.reports import Reports


class CurvedStep:
    """A `keras.Model` mixin with the train step of curved models."""

    _curved_micro_batches = 1

    @property
    def micro_batches(self) -> int:
        """Number of slices of each replica's share of a batch, which are computed one after the other."""
        return self._curved_micro_batches

    @micro_batches.setter
    def micro_batches(self, value: int) -> None:
        check_count(self, "micro_batches", value)
        if value == self._curved_micro_batches:
            return
        self._curved_micro_batches = value
        if self.train_function is not None:  # trace again, also while `fit` is running
            self.make_train_function(force=True)

    def _prepare_reports(self):
        """Create the metric of the optimizer's reports and return the `Reports`; call it before the step is traced."""
        if "_curved_reports" not in self.__dict__:
            self._curved_reports = Reports()
        optimizer, _ = unwrap(self.optimizer)
        if isinstance(optimizer, CurvatureOptimizer):
            self._curved_reports.of(optimizer, self.distribute_strategy)
        return self._curved_reports

    def train_step(self, data: Any) -> dict[str, Any]:
        """Linearize the batch, take the step, update layer states; or Keras' own step if its result is the same."""
        if not self._steps_by_linearization():
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        loss, outputs, taken, reported = replicas.cross(self._curved_step, x, y, sample_weight)
        first = next(a for a in keras.tree.flatten(x) if a is not None)
        # a skipped batch does not count, because its NaN would become the loss of the whole epoch
        keras_internals.loss_tracker(self).update_state(
            tf.where(taken, loss, tf.zeros_like(loss)), sample_weight=tf.where(taken, tf.shape(first)[0], 0)
        )
        logs = dict(self.compute_metrics(x, y, outputs, sample_weight=sample_weight))
        if "loss" in logs:  # before any batch counts, the mean is undefined, not 0
            logs["loss"] = tf.where(keras_internals.loss_tracker(self).count.value > 0, logs["loss"], float("nan"))
        if not reported:
            return logs
        reports = self._curved_reports.update(reported)
        _refuse_names_of_reports(self._curved_reports.optimizer, [name for name in reports if name in logs])
        return {**logs, **reports}

    def _steps_by_linearization(self):
        """Whether our step must replace Keras'.

        With a Keras optimizer it need not on one replica and on a TPU. Under a strategy that synchronizes by merge
        calls, Keras' step does not support gradient accumulation, `ema_overwrite_frequency` and `steps_per_execution`.
        Our step leaves the replica context once, for the whole step, and supports all three.
        """
        ours = isinstance(unwrap(self.optimizer)[0], CurvatureOptimizer)
        return ours or self.micro_batches > 1 or replicas.uses_merge_calls()

    def _curved_step(self, x, y, sample_weight):
        """`(loss, outputs, taken, reported)` of a step, outside the replicas; `taken` is false for a skipped step."""
        optimizer, scaler = unwrap(self.optimizer)
        build_for(self, x, y, sample_weight)
        ours = isinstance(optimizer, CurvatureOptimizer)
        needs = optimizer.needs if ours else Needs(only_gradients=True)
        _refuse_overwritten(self.trainable_variables)
        if ours:
            optimizer.require(self.trainable_variables)
            self._prepare_reports()  # variables cannot be created inside the replicas
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
    """Raise a `ValueError` for weights whose "gradient" is their new value, which cannot be summed over slices."""
    names = [v.path for v in variables if overwrites(v)]
    if names:
        raise ValueError(
            "A curved model cannot train weights with `overwrite_with_gradient`, such as the scales of float8 layers. "
            f"Received: {', '.join(names)}. Train in another precision; or without `keras_curvature.curved`, by an "
            "optimizer that needs only gradients, such as `Neumann`, `SOAP` or `Shampoo`."
        )


def _refuse_names_of_reports(optimizer, names):
    """Raise a `ValueError` for metrics of the model with names of reports: the logs have room for one of the two."""
    if names:
        raise ValueError(
            f"`{type(optimizer).__name__}` reports {', '.join(map(repr, sorted(optimizer.logged)))} in the logs of "
            f"`fit`, where a metric of the model has the same name. Received: {', '.join(map(repr, names))} among the "
            "model's metrics. Give the metric another name, such as "
            f"`keras.metrics.Mean(name='my_{names[0]}')`."
        )


def _step_of_keras(optimizer, lin, checked):
    """Take a step of a Keras optimizer, outside the replicas; returns whether it was taken.

    As in Keras, a step with a non-finite gradient is skipped only under loss scaling.
    """
    gradient, scale = lin.gradient, optimizer.loss_scale_factor
    handed = gradient if scale is None else trees.scale(scale, gradient)
    handed = [g if reached else None for g, reached in zip(handed, lin.reached)]  # Keras skips `None`

    def take():
        with replicas.keras_outside():
            optimizer.apply(handed, lin.variables)
        return tf.constant(True)

    return tf.cond(trees.is_finite(gradient), take, lambda: tf.constant(False)) if checked else take()


def _update_loss_scale(scaler, finite):
    """Dynamic loss scaling by Keras' rule: halve after a non-finite step, double after enough finite steps."""
    due = scaler.step_counter.value >= scaler.dynamic_growth_steps - 1
    scale, counter = scaler.dynamic_scale.value, scaler.step_counter.value
    factor = tf.where(finite, tf.where(due, 2.0, 1.0), 0.5)
    scaler.dynamic_scale.assign(scale * factor)
    scaler.step_counter.assign(tf.where(finite & tf.logical_not(due), counter + 1, tf.zeros_like(counter)))


def _nothing(_):
    """The value of a branch that is executed for its side effects."""
    return tf.constant(0)
