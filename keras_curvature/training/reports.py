"""The numbers that an optimizer reports, in the logs of `fit`."""

import keras
import tensorflow as tf

from keras_curvature import replicas


class Reported(keras.metrics.Metric):
    """Reported numbers in the logs: of each the mean, the last or the sum of the finite values of an epoch.

    If the epoch has no finite value, a sum is 0 and the others are NaN. It is a metric because for other entries in
    the logs Keras shows the value of the last batch; one for all names because every operation of a step costs time,
    most of it when the step is traced.

    Args:
        kinds: `{key in the logs: "mean", "last" or "sum"}`.
    """

    def __init__(self, kinds):
        super().__init__(name="reported")
        self.kinds = dict(kinds)
        self._is_mean, self._is_last, self._is_sum = (
            [kind == k for kind in self.kinds.values()] for k in ("mean", "last", "sum")
        )
        shape = (len(self.kinds),)
        self.total = self.add_weight(shape, name="total", initializer="zeros", dtype="float32")
        self.count = self.add_weight(shape, name="count", initializer="zeros", dtype="float32")

    def update_state(self, reported):
        """Add the numbers of one step, `{key: scalar}`; a key that is missing counts as NaN."""
        nan = tf.constant(float("nan"))
        value = tf.stack([tf.cast(reported.get(name, nan), tf.float32) for name in self.kinds])
        finite = tf.math.is_finite(value)
        # every replica reports the same number, and Keras sums the variables over replicas
        share = 1.0 / replicas.count()
        value, one = tf.where(finite, value * share, 0.0), tf.where(finite, share, 0.0)
        self.total.assign(tf.where(finite & self._is_last, 0.0, self.total.value) + value)
        self.count.assign(tf.where(self._is_last, tf.maximum(self.count.value, one), self.count.value + one))

    def result(self):
        """`{key: the number for the epoch so far}`."""
        # on a replica, a variable has the value of that replica
        total, count = self.total.value, self.count.value
        whole = tf.where(self._is_mean, total / count, total * replicas.here())
        return dict(zip(self.kinds, tf.unstack(tf.where((count > 0) | self._is_sum, whole, float("nan")))))

    def sums(self):
        """`{key: (total, count, kind)}` of the epoch so far, in Python numbers; outside of a step."""
        total, count = (replicas.read(v) for v in (self.total, self.count))
        return {name: (total[i], count[i], kind) for i, (name, kind) in enumerate(self.kinds.items())}


class Reports:
    """The reports of one optimizer.

    A plain object, so that Keras neither adds the metric to the model's metrics nor saves it.

    Attributes:
        optimizer: The `CurvatureOptimizer`; `None` before the first call of `of`.
        metric: Its `Reported`, or `None`.
    """

    def __init__(self):
        self.optimizer, self.metric = None, None

    def of(self, optimizer, strategy):
        """The `Reported` of an optimizer, created in the scope of `strategy`; created again for another optimizer."""
        if self.optimizer is not optimizer:
            with tf.init_scope(), strategy.scope():
                self.metric = Reported(optimizer.logged)
            self.optimizer = optimizer
        return self.metric

    def update(self, reported):
        """Add the numbers of one step, and return `{name: number for the epoch so far}`."""
        self.metric.update_state(reported)
        return self.metric.result()

    def reset(self):
        """Start a new epoch."""
        if self.metric is not None:
            self.metric.reset_state()


def reported_of(model):
    """The `Reported` of the optimizer of a model; `None` for a plain model, and before its first step."""
    reports, optimizer = getattr(model, "_curved_reports", None), getattr(model, "optimizer", None)
    known = isinstance(reports, Reports) and reports.optimizer is getattr(optimizer, "inner_optimizer", optimizer)
    return reports.metric if known else None
