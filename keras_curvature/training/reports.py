"""The numbers that an optimizer reports, as metrics in a model's logs."""

import keras
import tensorflow as tf

from keras_curvature import replicas


class Report(keras.metrics.Metric):
    """One reported number in the logs: the mean, the last or the sum of an epoch's finite values.

    NaN if the epoch had no finite value. It is a metric because Keras shows the metrics of an epoch; of any other
    entry in the logs it shows the value of the last batch.
    """

    def __init__(self, name, how):
        super().__init__(name=name)
        self.how = how
        self.total = self.add_weight(name="total", initializer="zeros", dtype="float32")
        self.count = self.add_weight(name="count", initializer="zeros", dtype="float32")

    def update_state(self, value):
        """Add the number of one step."""
        finite = tf.math.is_finite(value)
        # every replica reports the same number, and Keras adds up what the replicas hold
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
        # on a replica, a variable reads as that replica's share
        whole = self.total.value / self.count.value if self.how == "mean" else self.total.value * replicas.here()
        return tf.where(self.count.value > 0, whole, float("nan"))


class Reports:
    """The reports of one optimizer.

    A plain object, so that Keras does not count the reports among the model's metrics, nor save them.

    Attributes:
        optimizer: The `CurvatureOptimizer` that reports; `None` before there is one.
        metrics: `{name: Report}`.
    """

    def __init__(self):
        self.optimizer, self.metrics = None, {}

    def of(self, optimizer, strategy):
        """`{name: Report}` of `optimizer`, created under `strategy`; created again for another optimizer."""
        if self.optimizer is not optimizer:
            with tf.init_scope(), strategy.scope():
                named = {"skipped_steps": "sum", **optimizer.reports}
                self.metrics = {name: Report(name, how) for name, how in named.items()}
            self.optimizer = optimizer
        return self.metrics

    def update(self, reported):
        """Add the numbers of one step; returns `{name: the epoch's number so far}`."""
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
    """`{name: Report}` of a model; empty for a plain model, and before the first step of a curved one."""
    reports = getattr(model, "_curved_reports", None)
    return reports.metrics if isinstance(reports, Reports) else {}
