"""Traces of the Gauss-Newton (Fisher) matrix, layer by layer, from labels drawn from what the model says."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_count
from keras_curvature.linearization.estimates.diagonals import draw
from keras_curvature.linearization.gauss_newton import l2_of

SAME = 1e-2  # relative difference of products by one matrix; devices that round to TF32 included


@dataclasses.dataclass(frozen=True)
class LayerTraces:
    """Traces of the blocks of a curvature matrix; see `layer_traces`.

    Attributes:
        samples: One estimate for each draw and trainable variable, `(draws, variables)`, float64.
    """

    samples: np.ndarray

    @property
    def values(self):
        """The trace of each variable's block, `(variables,)`."""
        return self.samples.mean(0)

    @property
    def stderr(self):
        """The standard error of each, `(variables,)`; not a number after a single draw."""
        return np.array([self.of([i])[1] for i in range(self.samples.shape[1])])

    def of(self, indices=None):
        """`(value, stderr)` of the block of some variables together, by their indices; `None`: the whole trace.

        Not the sum of the single errors: one draw of labels gives the traces of all layers, and they are correlated.
        """
        sums = self.samples.sum(1) if indices is None else self.samples[:, list(indices)].sum(1)
        draws = len(sums)
        return float(sums.mean()), float(sums.std(ddof=1) / math.sqrt(draws)) if draws > 1 else math.nan


def layer_traces(objective, seed=0, draws=10):
    """The trace of the Gauss-Newton (Fisher) matrix by trainable variable, from labels drawn from what the model says.

        tr F_vv = E_x E_{y ~ p(y|x)} |d log p(y|x) / dv|^2

    which is the trace of the Gauss-Newton matrix for the losses that are minus the logarithm of a likelihood in its
    natural parameters (cross-entropies, squared error). Without bias. Networks of piecewise linear layers (ReLU) have
    the same trace of their Hessian. Of `Dense` layers the squared gradient of every example is exact, of other weights
    (convolutions, recurrent cells, embeddings) it is estimated with random signs, which is unbiased with a larger
    error; see `estimates/diagonals.py`. Through batch normalization in training mode a row of a layer is part of what
    the model says of every example, and the trace of each batch is that of

        F_vv = E |sum_n J_nv'c_n|^2,    c_n the slopes of the drawn labels

    as `Linearization.fisher_diagonal` draws it, for all weights: with a larger error, as of a product with random
    signs, and drawn anew in every batch.

    Cost: a draw is one forward and two backward passes, whatever the number of layers. Over 512 examples of a dense
    network one draw is within 6 % (1.9 % after ten).

    Args:
        objective: An `Objective` of any kind but the empirical Fisher matrix; L2 regularizers are in all but
            the Fisher.
        seed: An integer. Defaults to `0`.
        draws: Number of draws of labels for each example, an integer; 2 or more for a standard error. Defaults to `10`.

    Returns:
        `LayerTraces`.

    Raises:
        ValueError: The loss is not minus the logarithm of a likelihood that is known; an argument is none of these.

    Example: `layer_traces(Objective(model, (x, y))).of(indices_of_a_layer)`
    """
    check_count(layer_traces, "seed", seed, low=0)
    check_count(layer_traces, "draws", draws)
    expected = "of the kind 'hessian', 'ggn' or 'fisher': labels of an empirical Fisher matrix are not drawn"
    check(layer_traces, "probes", objective.kind, objective.kind != "empirical_fisher", expected)
    # numbers of the seeds that go into each draw do not meet those of a neighbouring seed
    samples = np.stack([_one_draw(objective, draws * seed + i) for i in range(draws)])
    return LayerTraces(samples if objective.kind == "fisher" else samples + _l2_traces(objective))


def is_gauss_newton(objective):
    """Whether the Fisher matrix is the Gauss-Newton matrix, but for L2 regularizers, as seen from one product of each.

    It is for cross-entropies of logits and squared errors; not for losses of other outputs than natural parameters,
    such as probabilities that no softmax of the last layer gives, rates (Poisson), or absolute errors.
    """
    vector = draw(objective.weights, objective.seed)
    apart, length = objective.on_batch(0, "Fisher and Gauss-Newton", _apart, vector).numpy()
    return bool(apart <= SAME * length)


def _apart(lin, vector):
    fisher, ggn = lin.fisher() @ vector, lin.gauss_newton() @ vector
    apart = [f + c * v - g for f, g, v, c in zip(fisher, ggn, vector, lin.l2)]
    return tf.stack([tf.cast(trees.norm(a), tf.float64) for a in (apart, fisher)])


def _one_draw(objective, number):
    """The trace of each variable's block by one draw of labels, `(variables,)`."""
    name, fn = ("of coupled", _coupled_traces) if objective.mixes_examples else ("of", _traces)
    # other labels and signs in every batch: else what they are off by is alike in all of them
    seeds = range(objective.batches * number, objective.batches * (number + 1))
    found = [objective.on_batch(b, f"traces {name} examples", fn, seed).numpy() for b, seed in enumerate(seeds)]
    return np.tensordot(objective.shares, found, 1)


def _traces(lin, seed):
    return _entry_sums(lin.squared_gradients(seed, "sampled"))


def _coupled_traces(lin, seed):
    return _entry_sums(lin.fisher_diagonal(seed))


def _entry_sums(vector):
    return tf.stack([tf.reduce_sum(tf.cast(s, tf.float64)) for s in vector])


def _l2_traces(objective):
    """`l2` times the number of weights, for each variable."""
    return np.array([c * math.prod(v.shape) for c, v in zip(l2_of(objective.variables), objective.variables)])
