"""Callbacks for `fit`."""

from keras_curvature.callbacks.board import CurvatureBoard
from keras_curvature.callbacks.checkpoint import Checkpoint, Position, Terminated
from keras_curvature.callbacks.chief import ChiefOnly
from keras_curvature.callbacks.swap import SwapNeumannWeights

__all__ = ["Checkpoint", "ChiefOnly", "CurvatureBoard", "Position", "SwapNeumannWeights", "Terminated"]
