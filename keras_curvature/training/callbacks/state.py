"""The state of a run that a checkpoint holds, and how it describes the state."""

import json
import re

import tensorflow as tf

from keras_curvature.training.reports import reports_of
from keras_curvature.training.step import unwrap


class About(tf.train.experimental.PythonState):
    """The description of a checkpoint, as JSON beside the variables; readable without a model."""

    def __init__(self):
        self.content = {}

    def serialize(self):
        """The JSON."""
        return json.dumps(self.content)

    def deserialize(self, string):
        """Read the JSON."""
        self.content = json.loads(string)

    @staticmethod
    def read(path):
        """The content in the checkpoint at `path`."""
        return json.loads(tf.train.load_checkpoint(path).get_tensor("about/.ATTRIBUTES/py_state"))


def state_of(model, metrics):
    """`{group: [variables]}` of a compiled model; builds the optimizer. `metrics`: with the epoch's metrics so far."""
    optimizer = model.optimizer
    if not optimizer.built:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)
    groups = {"model": model.variables, "optimizer": optimizer.variables}
    if metrics:
        reports = reports_of(model)
        reported = [variable for name in sorted(reports) for variable in reports[name].variables]
        groups["metrics"] = [*model.metrics_variables, *reported]
    return groups


def described(groups, optimizer):
    """What must agree between a checkpoint and a run: kinds, names and shapes, without the counters in the names."""
    rows = {name: [[_plain(v.name), list(v.shape), v.dtype] for v in group] for name, group in groups.items()}
    return {**rows, "optimizer_class": type(unwrap(optimizer)[0]).__name__}


def refuse_another(path, stored, now):
    """Raise a `ValueError` with the first difference between a checkpoint and this run, both as `described`."""
    if stored["optimizer_class"] != now["optimizer_class"]:
        raise ValueError(
            f"`Checkpoint`: '{path}' was saved by `{stored['optimizer_class']}` and the model is compiled with "
            f"`{now['optimizer_class']}`. Compile with the same optimizer, or start a new run in another `directory`."
        )
    for group in (name for name in now if name != "optimizer_class"):
        for i in range(max(len(stored[group]), len(now[group]))):
            there, here = (rows[i] if i < len(rows) else None for rows in (stored[group], now[group]))
            if there != here:
                raise ValueError(
                    f"`Checkpoint`: '{path}' was saved with another {group.rstrip('s')}: variable {i} of its "
                    f"{len(stored[group])} is {_words(there)}, and here, of {len(now[group])}, {_words(here)}. Use "
                    "the one it was saved with, or start a new run in another `directory`."
                )


def _plain(name):
    """A variable's name without the numbers by which Keras counts the layers of a process."""
    return re.sub(r"_\d+", "", name)


def _words(row):
    return "missing" if row is None else f"`{row[0]}` {tuple(row[1])} {row[2]}"
