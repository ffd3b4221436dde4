"""Numbers that training already computes, read from the metrics of the model."""

import math

from keras_curvature import keras_internals, replicas
from keras_curvature.monitor.board import layout
from keras_curvature.training.reports import reported_of
from keras_curvature.training.step import unwrap


class Live:
    """A model's loss and its optimizer's reports since they were last read.

    Keras' metrics are means over the epoch so far. Their sums and counts give the mean over the steps in between.
    Counts of an optimizer (skipped steps) are summed over epochs.
    """

    def __init__(self, model):
        self.model, self._sums, self._totals, self._before = model, {}, {}, {}

    def epoch(self):
        """Note that the metrics restarted."""
        self._sums, self._before = {}, dict(self._totals)

    def agrees(self, logs):
        """Whether the metrics still have an epoch's logs: an `evaluate` in another callback resets them."""
        tracker = keras_internals.loss_tracker(self.model)
        total, count = replicas.read(tracker.total), replicas.read(tracker.count)
        return count > 0 and math.isclose(total / count, logs.get("loss", math.nan), rel_tol=1e-5)

    def read(self):
        """`{tag: number}`; NaN where no step was in between."""
        tracker = keras_internals.loss_tracker(self.model)
        loss = replicas.read(tracker.total), replicas.read(tracker.count)
        found, reported = {"3_step/loss": self._since("loss", *loss, "mean")}, reported_of(self.model)
        for name, sums in (reported.sums() if reported is not None else {}).items():
            found[layout.tag_of(name)] = self._since(name, *sums)
        return found | {"3_step/learning_rate": learning_rate(self.model)}

    def of_epoch(self, logs):
        """`{tag: number}` of an epoch, from its logs: means over the whole epoch."""
        optimizer, _ = unwrap(self.model.optimizer)
        found = {"3_step/loss": float(logs.get("loss", math.nan)), "3_step/learning_rate": learning_rate(self.model)}
        for name, how in {"skipped_steps": "sum", **getattr(optimizer, "reports", {})}.items():
            if name in logs:
                self._totals[name] = self._before.get(name, 0.0) + float(logs[name])
                found[layout.tag_of(name)] = self._totals[name] if how == "sum" else float(logs[name])
        return found

    def _since(self, name, total, count, how):
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total, count
        if how == "last":
            return total if count else math.nan
        if how == "sum":
            self._totals[name] = self._totals.get(name, 0.0) + total - before[0]
            return self._totals[name]
        return (total - before[0]) / (count - before[1]) if count > before[1] else math.nan


def learning_rate(model):
    """The learning rate of the next step, a float; NaN for several optimizers, or for none."""
    optimizer, _ = unwrap(model.optimizer)
    no_one = optimizer is None or isinstance(optimizer, keras_internals.MULTI_OPTIMIZER)
    return math.nan if no_one else replicas.read(optimizer.learning_rate)


def iterations(model):
    """Number of steps of the optimizer, also before this `fit`; `None` without an optimizer."""
    optimizer, _ = unwrap(model.optimizer)
    return None if optimizer is None else replicas.read(optimizer.iterations)
