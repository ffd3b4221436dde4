"""The optimizers that may run in a race, and what of a model and its data decides who runs."""

import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_curvature import keras_internals, optimizers, trees
from keras_curvature.linearization.fisher import convexity, of_losses
from keras_curvature.monitor.objective import reading
from keras_curvature.training.models import CurvedMixin, has_own_train_step

WORK = 5e9  # most multiplications of a step that solves with the rows of all examples: about a second
LARGE = 512  # examples of a batch whose gradient differs little from that of all examples


@dataclasses.dataclass(frozen=True)
class Facts:
    """What decides which optimizers run.

    Attributes:
        weights: Number of trainable weights.
        matrices: Number of those in tensors of at least two axes.
        rows: Number of outputs of a batch.
        batch: Examples of a batch.
        examples: Examples of all data; `None` if not known.
        curved: Whether the model is curved.
        own_step: Whether it has its own `train_step`, so that it cannot be curved.
        squares: Whether every compiled loss is a mean squared error.
        convex: Whether every compiled loss is convex in the outputs.
    """

    weights: int
    matrices: int
    rows: int
    batch: int
    examples: int | None
    curved: bool
    own_step: bool
    squares: bool
    convex: bool

    def __str__(self):
        whole = "an unknown number" if self.examples is None else f"{self.examples}"
        return f"{self.weights} weights, batches of {self.batch} of {whole} examples"

    @property
    def work(self):
        """Multiplications to solve with the rows of a batch."""
        return self.rows * self.weights * min(self.rows, self.weights)

    @property
    def is_whole(self):
        """Whether a batch is all of the data."""
        return self.batch == self.examples


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An optimizer that may run: its name as one would type it, how it is made, and what keeps it from running."""

    name: str
    make: Callable[[], keras.optimizers.Optimizer]
    objection: Callable[[Facts], str | None] = lambda facts: None


def _not_curved(facts):
    if facts.curved:
        return None
    own = "the model has its own `train_step`: compute the loss in `compute_loss` instead, and pass `kc.curved(model)`"
    return own if facts.own_step else "the model is not curved: pass `kc.curved(model)`"


def _no_matrices(facts):
    return None if facts.matrices else "no weight is a matrix"


def _not_rows(facts):
    if not facts.convex:
        return "the loss is not convex in the outputs"
    if facts.work > WORK:
        return f"{facts.rows} rows of {facts.weights} weights take seconds to solve with"
    large = facts.is_whole or facts.batch >= LARGE
    return _not_curved(facts) or (None if large else f"batches of less than {LARGE} examples")


def _not_squares(facts):
    return _not_rows(facts) if facts.squares else "the loss is no mean squared error"


def _squares(facts):
    return "the loss is a mean squared error" if facts.squares else _not_rows(facts)


def _not_whole(facts):
    return _not_curved(facts) or (None if facts.is_whole else "a batch is not all of the data")


def _not_layers(facts):
    return _not_curved(facts) or _no_matrices(facts)


# In the order in which they run, while there is time.
CANDIDATES = (
    Candidate("keras.optimizers.Adam()", keras.optimizers.Adam),
    Candidate("kc.GaussNewton.levenberg_marquardt()", optimizers.GaussNewton.levenberg_marquardt, _not_squares),
    Candidate("kc.GaussNewton()", optimizers.GaussNewton, _squares),
    Candidate("kc.LBFGS()", optimizers.LBFGS, _not_whole),
    Candidate("kc.SOAP()", optimizers.SOAP, _no_matrices),
    Candidate("kc.Muon()", optimizers.Muon, _no_matrices),
    Candidate("kc.KFAC()", optimizers.KFAC, _not_layers),
    Candidate("kc.SquareRootFreeAdam()", optimizers.SquareRootFreeAdam),
    Candidate("kc.KLShampoo()", optimizers.KLShampoo, _no_matrices),
)


def facts_of(model, batch, examples):
    """The `Facts` of a built model, a batch `(x, y, sample_weight)`, and the number of all examples or `None`."""
    losses = [keras_internals.function_of(loss) for loss in keras_internals.losses_of(model)]
    own = of_losses.is_of_compute_loss(model)
    with keras.StatelessScope():  # a layer may draw, or count its calls
        outputs = keras.tree.flatten(model(batch[0], training=False))
    return Facts(
        weights=trees.count(model.trainable_variables),
        matrices=trees.count([w for w in model.trainable_variables if len(w.shape) > 1]),
        rows=sum(int(tf.size(output)) for output in outputs),
        batch=reading.count(batch), examples=examples, curved=isinstance(model, CurvedMixin),
        own_step=has_own_train_step(model),
        squares=not own and bool(losses) and all(function is keras.losses.mean_squared_error for function in losses),
        convex=not own and not convexity.not_convex(model),
    )  # fmt: skip
