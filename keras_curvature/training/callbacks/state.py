"""The state of a run in a checkpoint, and its description."""

import json
import re

import tensorflow as tf

from keras_curvature.training.reports import reported_of
from keras_curvature.training.step import unwrap


class About(tf.train.experimental.PythonState):
    """The description of a checkpoint: JSON that can be read without a model."""

    def __init__(self):
        self.content = {}

    def serialize(self):
        """The JSON."""
        return json.dumps(self.content)

    def deserialize(self, string):
        """Set the content from JSON."""
        self.content = json.loads(string)

    @staticmethod
    def read(path):
        """The content of the checkpoint at `path`, a dict."""
        return json.loads(tf.train.load_checkpoint(path).get_tensor("about/.ATTRIBUTES/py_state"))


def state_of(model, metrics):
    """`{group: [variables]}` of a compiled model, whose optimizer is built; with `metrics`, the epoch's metrics too."""
    optimizer = model.optimizer
    if not optimizer.built:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)
    groups = {"model": model.variables, "optimizer": optimizer.variables}
    if metrics:
        reported = reported_of(model)
        groups["metrics"] = [*model.metrics_variables, *(reported.variables if reported is not None else ())]
    return groups


def described(groups, optimizer):
    """What must agree between a checkpoint and a run: the class of the optimizer, and names, shapes and dtypes."""
    rows = {name: [[_plain(v.name), list(v.shape), v.dtype] for v in group] for name, group in groups.items()}
    return {**rows, "optimizer_class": type(unwrap(optimizer)[0]).__name__}


def refuse_another(path, stored, now):
    """Raise a `ValueError` with the first difference of a checkpoint from this run, both from `described`."""
    if stored["optimizer_class"] != now["optimizer_class"]:
        raise ValueError(
            f"`Checkpoint`: '{path}' was saved with the optimizer `{stored['optimizer_class']}`. Received: a model "
            f"compiled with `{now['optimizer_class']}`. Compile with the same optimizer, or start a new run in another "
            "`directory`."
        )
    for group in (name for name in now if name != "optimizer_class"):
        for i in range(max(len(stored[group]), len(now[group]))):
            there, here = (rows[i] if i < len(rows) else None for rows in (stored[group], now[group]))
            if there != here:
                raise ValueError(
                    f"`Checkpoint`: '{path}' was saved with another {group.rstrip('s')}: variable {i} of "
                    f"{len(stored[group])} is {_words(there)}. Received: variable {i} of {len(now[group])} is "
                    f"{_words(here)}. Use the {group.rstrip('s')} it was saved with, or start a new run in another "
                    "`directory`."
                )


def _plain(name):
    """A variable's name without the numbers with which Keras makes layer names unique in a process."""
    return re.sub(r"_\d+", "", name)


def _words(row):
    return "missing" if row is None else f"`{row[0]}` {tuple(row[1])} {row[2]}"
