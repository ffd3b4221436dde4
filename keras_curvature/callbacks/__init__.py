"""Callbacks for `fit`."""

from keras_curvature.monitor.board.board import CurvatureBoard
from keras_curvature.training.callbacks.checkpoint import Checkpoint, Position
from keras_curvature.training.callbacks.chief import ChiefOnly
from keras_curvature.training.callbacks.converged import Converged
from keras_curvature.training.callbacks.sigterm import Terminated
from keras_curvature.training.callbacks.swap import SwapNeumannWeights

__all__ = ["Checkpoint", "ChiefOnly", "Converged", "CurvatureBoard", "Position", "SwapNeumannWeights", "Terminated"]
