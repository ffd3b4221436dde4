"""Boards with a clock of their own, and what they have written."""

import glob
import os

import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_curvature.monitor.board.board import CurvatureBoard


class Clock:
    """A clock that goes on by `tick` seconds whenever somebody looks."""

    def __init__(self, tick=1e-3):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def boarded(folder, clock, budget=0.9, **arguments):
    """A board on a clock; by default one that probes at nearly every step."""
    board = CurvatureBoard(str(folder), budget=budget, **arguments)
    board._clock = clock
    return board


def read(folder):
    """The `EventAccumulator` of a run."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    return events.Reload()


def arrays(folder, tag):
    """`[(step, array)]` of a tag of a run."""
    return [(event.step, tf.make_ndarray(event.tensor_proto)) for event in read(folder).Tensors(tag)]


def tags(folder, plugin):
    """The tags of a run that a plugin of TensorBoard shows."""
    if not glob.glob(os.path.join(folder, "events*")):
        return []
    events = read(folder)
    return [t for t in events.Tags()["tensors"] if events.SummaryMetadata(t).plugin_data.plugin_name == plugin]


def numbers(folder):
    """`{tag: [(step, number), ...]}` of a run."""
    return {tag: [(step, float(value)) for step, value in arrays(folder, tag)] for tag in tags(folder, "scalars")}


def texts(folder):
    """`{tag: [(step, Markdown), ...]}` of a run."""
    return {tag: [(step, value[0].decode()) for step, value in arrays(folder, tag)] for tag in tags(folder, "text")}
