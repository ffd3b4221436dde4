"""The bridge to Keras: a train step that linearizes the batch and hands it to the optimizer. No mathematics."""

import functools

import keras
import tensorflow as tf
from keras.src.models.functional import Functional

from keras_curvature import replicas, trees
from keras_curvature.component import check_count, register
from keras_curvature.curvature.functional import build_for
from keras_curvature.curvature.linearization import Linearization
from keras_curvature.optimizers.base import CurvatureOptimizer


class Report(keras.metrics.Metric):
    """One reported number in the logs: the mean, the last or the sum of an epoch's finite values.

    NaN where an epoch had none. A real metric, because Keras shows an epoch's metrics and, beside them, of anything
    else in the logs only the last batch.
    """

    def __init__(self, name, how):
        super().__init__(name=name)
        self.how = how
        self.total = self.add_weight(name="total", initializer="zeros", dtype="float32")
        self.count = self.add_weight(name="count", initializer="zeros", dtype="float32")

    def update_state(self, value):
        """Take in the number of one step."""
        finite = tf.math.is_finite(value)
        # every replica reports the same number, and Keras adds up what they hold
        share = 1.0 / replicas.count()
        value, one = tf.where(finite, value * share, 0.0), tf.where(finite, share, 0.0)
        if self.how == "last":
            self.total.assign(tf.where(finite, value, self.total.value))
            self.count.assign(tf.maximum(self.count.value, one))
        else:
            self.total.assign_add(value)
            self.count.assign_add(one)

    def result(self):
        """The epoch's number so far."""
        # read on a replica, a variable shows that replica's share
        whole = self.total.value / self.count.value if self.how == "mean" else self.total.value * replicas.here()
        return tf.where(self.count.value > 0, whole, float("nan"))


class CurvedMixin:
    """What a curved model adds to a `keras.Model`: the train step, and the optimizer's reports in the logs."""

    @property
    def micro_batches(self):
        """Number of slices that each replica's share of a batch is computed in, one after the other."""
        return self.__dict__.get("_curved_micro_batches", 1)

    @micro_batches.setter
    def micro_batches(self, value):
        check_count(curved, "micro_batches", value)
        object.__setattr__(self, "_curved_micro_batches", value)
        self.train_function = None  # traced again, with the new number

    def train_step(self, data):
        """Linearize the batch, step, commit batch statistics once; Keras' own step where that does as well."""
        if not self._steps_by_linearization():
            return super().train_step(data)
        optimizer, _ = unwrap(self.optimizer)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        loss, outputs, taken, reported = replicas.cross(self._curved_step, x, y, sample_weight)
        first = next(a for a in keras.tree.flatten(x) if a is not None)
        # a batch that was skipped does not count: one NaN would be the loss of the whole epoch
        self._loss_tracker.update_state(
            tf.where(taken, loss, tf.zeros_like(loss)), sample_weight=tf.where(taken, tf.shape(first)[0], 0)
        )
        logs = dict(self.compute_metrics(x, y, outputs, sample_weight=sample_weight))
        if "loss" in logs:  # where no batch has counted yet, the mean of none is not 0
            logs["loss"] = tf.where(self._loss_tracker.count.value > 0, logs["loss"], float("nan"))
        for name, report in (self._reports(optimizer) if reported else {}).items():
            report.update_state(reported.get(name, tf.constant(float("nan"))))
            logs[name] = report.result()
        return logs

    def _steps_by_linearization(self):
        """Whether Keras' own train step does not do.

        For Keras' own optimizers it does on one replica and on a TPU. Where a strategy synchronizes by merge calls it
        refuses accumulated gradients, averages that overwrite the weights, and several steps per execution; ours
        leaves the replicas once, for the whole step, and takes Keras' optimizers along.
        """
        ours = isinstance(unwrap(self.optimizer)[0], CurvatureOptimizer)
        return ours or self.micro_batches > 1 or (replicas.count() > 1 and replicas.uses_merge_calls())

    def _curved_step(self, x, y, sample_weight):
        """`(loss, outputs, whether the step was taken, reported)`, outside the replicas."""
        optimizer, scaler = unwrap(self.optimizer)
        build_for(self, x, y, sample_weight)
        ours = isinstance(optimizer, CurvatureOptimizer)
        if ours:
            optimizer.require(self.trainable_variables)
        lin = Linearization(
            self, x, y, sample_weight, **({"micro_batches": self.micro_batches} if self.micro_batches > 1 else {}),
            shift=optimizer.shift() if ours else None,
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

    def _reports(self, optimizer):
        """`{name: Report}` of the compiled optimizer; made anew where it is another one."""
        kept = self.__dict__.get("_curved_reports")
        if kept is None or kept[0] is not optimizer:
            with tf.init_scope(), self.distribute_strategy.scope():
                reports = {"skipped_steps": "sum", **optimizer.reports}
                made = {name: Report(name, how) for name, how in reports.items()}
            kept = (optimizer, made)
            # past Keras' attribute tracking, which would count the reports among the metrics of `evaluate`
            object.__setattr__(self, "_curved_reports", kept)
        return kept[1]

    def reset_metrics(self):
        """Keras' metrics and the reports begin again."""
        super().reset_metrics()
        for report in (self.__dict__.get("_curved_reports") or (None, {}))[1].values():
            report.reset_state()

    def make_train_function(self, force=False):
        """Keras' train function; the reports are created before it is traced."""
        optimizer, _ = unwrap(self.optimizer)
        if isinstance(optimizer, CurvatureOptimizer):
            self._reports(optimizer)
        return super().make_train_function(force)

    def _get_metrics_result_or_logs(self, logs):
        # a private name of Keras 3.15: the logs of an epoch, from the metrics where the names agree
        reports = (self.__dict__.get("_curved_reports") or (None, {}))[1]
        shown = {name: report.result() for name, report in reports.items() if isinstance(logs, dict) and name in logs}
        if not shown:
            return super()._get_metrics_result_or_logs(logs)
        rest = super()._get_metrics_result_or_logs({k: v for k, v in logs.items() if k not in shown})
        if float(self._loss_tracker.count.numpy()) == 0.0:
            rest["loss"] = float("nan")  # every batch was skipped
        return {**rest, **shown}


@register
class CurvatureModel(CurvedMixin, keras.Model):
    """A `keras.Model` born curved: everything a `keras.Model` is, with the train step of second-order optimizers.

    Made from inputs and outputs or by subclassing, saved and loaded as itself. A model that exists already is
    curved by `curved(model)`.

    Example:

    ```python
    inputs = keras.Input((784,))
    model = keras_curvature.CurvatureModel(inputs, keras.layers.Dense(10)(inputs))
    model.compile(optimizer=keras_curvature.CurveBall(), loss="mse")
    ```
    """

    def __init__(self, *args, **kwargs):
        if len(args) == 2 or "outputs" in kwargs:
            # left to itself, Keras would make this very class functional, and so every later subclass of it
            object.__setattr__(self, "__class__", _functional_class(type(self)))
            Functional.__init__(self, *args, **kwargs)
        else:
            super().__init__(*args, **kwargs)


@functools.cache
def _functional_class(cls):
    """`cls` made from inputs and outputs."""
    if issubclass(cls, Functional):
        return cls
    # Keras looks at the signature to know that a saved graph can be given back to the constructor
    own = {"__init__": Functional.__init__} if cls.__init__ is CurvatureModel.__init__ else {}
    return type(cls.__name__, (cls, Functional), {"__module__": cls.__module__, "__doc__": cls.__doc__, **own})


keras.saving.register_keras_serializable(package="keras_curvature", name="FunctionalCurvatureModel")(
    _functional_class(CurvatureModel)
)


def curved(model):
    """Give `model` the train step that second-order optimizers need, in place, and return it.

    The model stays what it is: the same layers, weights and compiled state, an instance of its class, saved to a file
    that plain Keras loads. After loading, curve it again before `fit`. Under a Keras optimizer a curved model trains as
    before.

    Args:
        model: A `keras.Model`: functional, sequential or subclassed.

    Returns:
        The same object.

    Raises:
        ValueError: `model` is not a `keras.Model`, or has a `train_step` of its own.

    Example:

    ```python
    model = keras_curvature.curved(keras.Sequential([...]))
    model.compile(optimizer=keras_curvature.HessianFree(), loss="sparse_categorical_crossentropy")
    ```
    """
    if not isinstance(model, keras.Model):
        raise ValueError(f"`curved`: `model` must be a `keras.Model`. Received: model={model!r}")
    if isinstance(model, CurvedMixin):
        return model
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"`curved`: `{type(model).__name__}` has a `train_step` of its own, and a curved model brings another. Put "
            "the loss into `compute_loss(self, x, y, y_pred, sample_weight, training)` instead of `train_step`."
        )
    # object's own setter: Keras' would take the class for an attribute to track
    object.__setattr__(model, "__class__", _curved_class(type(model)))
    model.train_function = None  # traced again, with the new step
    return model


@functools.cache
def _curved_class(cls):
    """`cls` with the train step, under the same name, so that a saved file names the class that Keras knows."""
    return type(cls.__name__, (CurvedMixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def unwrap(optimizer):
    """`(optimizer, scaler)`: the optimizer itself and the `LossScaleOptimizer` of `mixed_float16` around it."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer, optimizer
    return optimizer, None


def _step_of_keras(optimizer, lin, checked):
    """One step of an optimizer of Keras' own, outside the replicas; whether it was taken.

    As Keras does, it is passed over where the gradient is not finite under a loss scale, and only there.
    """
    gradient, scale = lin.gradient, optimizer.loss_scale_factor

    def take():
        with replicas.keras_outside():
            optimizer.apply(gradient if scale is None else trees.scale(scale, gradient), lin.variables)
        return tf.constant(True)

    return tf.cond(trees.is_finite(gradient), take, lambda: tf.constant(False)) if checked else take()


def _update_loss_scale(scaler, finite):
    """Dynamic loss scaling, by Keras' rule: half after a step that was not finite, double after enough others."""
    due = scaler.step_counter.value >= scaler.dynamic_growth_steps - 1
    scale, counter = scaler.dynamic_scale.value, scaler.step_counter.value
    factor = tf.where(finite, tf.where(due, 2.0, 1.0), 0.5)
    scaler.dynamic_scale.assign(scale * factor)
    scaler.step_counter.assign(tf.where(finite & tf.logical_not(due), counter + 1, tf.zeros_like(counter)))


def _nothing(_):
    """The value of a branch that is there for its effects."""
    return tf.constant(0)
