"""Traces of the Gauss-Newton (Fisher) matrix, layer by layer, from labels drawn from the model's predictions."""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_count
from keras_curvature.linearization.estimates.diagonals import draw
from keras_curvature.linearization.gauss_newton import l2_of
from keras_curvature.monitor.spectra.estimate import Estimate
from keras_curvature.solvers.flat import ProductNotFinite

SAME = 1e-2  # largest relative difference of two products with one matrix, also on devices that round to TF32


@dataclasses.dataclass(frozen=True)
class LayerTraces:
    """Traces of the blocks of a curvature matrix; see `layer_traces`.

    Attributes:
        samples: An estimate for each draw and trainable variable, `(draws, variables)`, float64.
    """

    samples: np.ndarray

    @property
    def values(self):
        """The trace of each variable's block, `(variables,)`."""
        return self.samples.mean(0)

    @property
    def stderr(self):
        """The standard error of each, `(variables,)`; NaN after a single draw."""
        return np.array([self.of([i])[1] for i in range(self.samples.shape[1])])

    def of(self, indices=None):
        """`(value, stderr)` of the block of some variables, by their indices; `None` for the whole trace.

        The error is not the sum of single errors: one draw of labels gives the traces of all layers, so they are
        correlated.
        """
        sums = self.samples.sum(1) if indices is None else self.samples[:, list(indices)].sum(1)
        draws = len(sums)
        return float(sums.mean()), float(sums.std(ddof=1) / math.sqrt(draws)) if draws > 1 else math.nan


def layer_traces(objective, seed=0, draws=10):
    """The trace of the Gauss-Newton (Fisher) matrix by trainable variable, from labels drawn from the model.

        tr F_vv = E_x E_{y ~ p(y|x)} |d log p(y|x) / dv|^2

    For losses that are minus the logarithm of a likelihood in its natural parameters (cross-entropies, squared error)
    this is the trace of the Gauss-Newton matrix. The estimate is unbiased. In networks of piecewise linear layers
    (ReLU) the Hessian has the same trace. The squared gradient of every example is exact for `Dense` layers; for other
    weights (convolutions, recurrent cells, embeddings) random signs estimate it, unbiased with a larger error; see
    `estimates/diagonals.py`. With batch normalization in training mode every output depends on every example, and the
    trace of each batch is that of

        F_vv = E |sum_n J_nv'c_n|^2,    c_n the gradients of the drawn labels' losses in the outputs

    for all weights, as `Linearization.fisher_diagonal` draws it. Its error is larger, that of a product with random
    signs, and every batch draws anew.

    Cost: a draw is one forward and two backward passes, for any number of layers. Over 512 examples of a dense network
    one draw is within 6 % (ten draws: 1.9 %).

    Args:
        objective: An `Objective` of any kind but the empirical Fisher matrix. All kinds but the Fisher matrix include
            L2 regularizers.
        seed: An integer. Defaults to `0`.
        draws: Number of labels drawn for each example, an integer; a standard error needs 2. Defaults to `10`.

    Returns:
        `LayerTraces`.

    Raises:
        ValueError: The loss is not minus the logarithm of a known likelihood, gradients are not finite, or an argument
            is invalid.

    Example: `layer_traces(Objective(model, (x, y))).of(indices_of_a_layer)`
    """
    check_count(layer_traces, "seed", seed, low=0)
    check_count(layer_traces, "draws", draws)
    expected = "'hessian', 'ggn' or 'fisher': labels of an empirical Fisher matrix are not drawn"
    check(layer_traces, "kind", objective.kind, objective.kind != "empirical_fisher", expected)
    # draws of neighbouring seeds use different numbers
    samples = np.stack([_one_draw(objective, draws * seed + i) for i in range(draws)])
    if not np.isfinite(samples).all():
        raise ProductNotFinite("The squared gradients of the examples are")
    return LayerTraces(samples if objective.kind == "fisher" else samples + _l2_traces(objective))


def estimates_by_labels(objective, draws, parts, asked_by):
    """Traces of diagonal blocks from drawn labels, `{name: Estimate}`.

    Args:
        objective: An `Objective` of the kind "ggn" or "fisher".
        draws: Number of draws of labels, an integer.
        parts: `{name: [indices of trainable variables]}`.
        asked_by: The function to name in messages.

    Raises:
        ValueError: The matrix is neither a Fisher matrix nor equal to it.
    """
    kind = objective.kind
    check(asked_by, "labels", True, kind in ("ggn", "fisher"), f"False for kind={kind!r}")
    if kind == "ggn" and not is_gauss_newton(objective):
        raise ValueError(
            "`Curvature.trace`: `labels=True` gives the trace of the Fisher matrix, but with this loss and these "
            "outputs the Gauss-Newton matrix differs from it. Use kind='fisher', or labels=False."
        )
    found = layer_traces(objective, objective.seed, draws)
    return {name: Estimate(*found.of(indices), draws) for name, indices in parts.items()}


def is_gauss_newton(objective):
    """Whether the Fisher matrix equals the Gauss-Newton matrix but for L2 regularizers, judged by one product of each.

    They are equal for cross-entropies of logits and squared errors. They differ where the outputs are not natural
    parameters: probabilities that do not come from a softmax in the last layer, Poisson rates, absolute errors.
    """
    vector = draw(objective.weights, objective.seed)
    apart, length = objective.on_batch(0, "Fisher and Gauss-Newton", _apart, vector).numpy()
    if not np.isfinite([apart, length]).all():
        raise ProductNotFinite
    return bool(apart <= SAME * length)


def _apart(lin, vector):
    fisher, ggn = lin.fisher() @ vector, lin.gauss_newton() @ vector
    apart = [f + c * v - g for f, g, v, c in zip(fisher, ggn, vector, lin.l2)]
    return tf.stack([tf.cast(trees.norm(a), tf.float64) for a in (apart, fisher)])


def _one_draw(objective, number):
    """The trace of each variable's block by one draw of labels, `(variables,)`."""
    name, fn = ("of coupled", _coupled_traces) if objective.mixes_examples else ("of", _traces)
    # other labels and signs in every batch, so that their errors are independent
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
