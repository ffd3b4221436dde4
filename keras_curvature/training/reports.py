"""The numbers that an optimizer reports, as metrics in the logs of `fit`."""

import keras
import tensorflow as tf

from keras_curvature import replicas


class Report(keras.metrics.Metric):
    """A reported number in the logs: the mean, the last or the sum of the finite values of an epoch.

    If the epoch has no finite value, a sum is 0 and the others are NaN. It is a metric because for other entries in
    the logs Keras shows the value of the last batch.

    Args:
        name: The key in the logs.
        how: `"mean"`, `"last"` or `"sum"`.
    """

    def __init__(self, name, how):
        super().__init__(name=name)
        self.how = how
        self.total = self.add_weight(name="total", initializer="zeros", dtype="float32")
        self.count = self.add_weight(name="count", initializer="zeros", dtype="float32")

    def update_state(self, value):
        """Add the number of one step."""
        finite = tf.math.is_finite(value)
        # every replica reports the same number, and Keras sums the variables over replicas
        share = 1.0 / replicas.count()
        value, one = tf.where(finite, value * share, 0.0), tf.where(finite, share, 0.0)
        if self.how == "last":
            self.total.assign(tf.where(finite, value, self.total.value))
            self.count.assign(tf.maximum(self.count.value, one))
        else:
            self.total.assign_add(value)
            self.count.assign_add(one)

    def result(self):
        """The number for the epoch so far."""
        # on a replica, a variable has the value of that replica
        whole = self.total.value / self.count.value if self.how == "mean" else self.total.value * replicas.here()
        return tf.where((self.count.value > 0) | (self.how == "sum"), whole, float("nan"))


class Reports:
    """The reports of one optimizer.

    A plain object, so that Keras neither adds the reports to the model's metrics nor saves them.

    Attributes:
        optimizer: The `CurvatureOptimizer`; `None` before the first call of `of`.
        metrics: `{name: Report}`.
    """

    def __init__(self):
        self.optimizer, self.metrics = None, {}

    def of(self, optimizer, strategy):
        """`{name: Report}` of an optimizer, created in the scope of `strategy`; created again for another optimizer."""
        if self.optimizer is not optimizer:
            with tf.init_scope(), strategy.scope():
                named = {"skipped_steps": "sum", **optimizer.reports}
                self.metrics = {name: Report(name, how) for name, how in named.items()}
            self.optimizer = optimizer
        return self.metrics

    def update(self, reported):
        """Add the numbers of one step, and return `{name: number for the epoch so far}`."""
        logs = {}
        for name, metric in self.metrics.items():
            metric.update_state(reported.get(name, tf.constant(float("nan"))))
            logs[name] = metric.result()
        return logs

    def reset(self):
        """Start a new epoch."""
        for metric in self.metrics.values():
            metric.reset_state()


def reports_of(model):
    """`{name: Report}` of a model; empty for a plain model, and before the first step of a curved model."""
    reports = getattr(model, "_curved_reports", None)
    return reports.metrics if isinstance(reports, Reports) else {}
