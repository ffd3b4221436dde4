"""K-BFGS: K-FAC's product of two factors, whose inverses are learnt by BFGS."""

from typing import Any

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check_count, check_number, register
from keras_curvature.linearization.estimates.factors import kronecker_means_alone
from keras_curvature.linearization.layers import kronecker
from keras_curvature.linearization.linearization import Linearization
from keras_curvature.operators.kronecker import BlockDiagonal, KroneckerProduct
from keras_curvature.optimizers import by_layer
from keras_curvature.optimizers.by_inputs import ByInputs
from keras_curvature.optimizers.limits import LinearStep, averaged
from keras_curvature.solvers import direct, pairs
from keras_curvature.typing import LearningRate, Variables, Vector

# By how many times its size the loss of the batch may grow in a step, and the factors on the length of later steps
# after a step that was taken and after one that was not. On targets of size 1e5, three networks with ReLU end 120 steps
# at 0.06, 0.0005 and 0.4 of the first loss; where it may grow by 10 times its size, at 150 and 3000 times that loss, or
# not finite.
GROWTH, LONGER, SHORTER = 1.0, 1.05, 0.25


@register
class KBFGS(ByInputs):
    """K-BFGS: momentum between two inverses, learnt by BFGS from the inputs and the slopes of each layer.

        A <- eps A_old + (1 - eps) mean_n sum_t a_nt a_nt'       a: inputs of the layer and a 1, at its positions t
        M <- momentum M + (1 - momentum) dL/dW
        d = H_a M H_g,    w <- w - learning_rate d                                  eps = min(1 - 1/t, beta)
        H_a <- BFGS(s = H_a mean a,  y = (A + sqrt(damping) I) s)
        H_g <- BFGS(s = change of the mean output,  y = change of the mean slope in it), both by this step

    so `H_a` tends to `(A + sqrt(damping) I)^-1`, and `H_g` to the inverse of the mean Hessian in the outputs of the
    layer, before its activation. The slopes after the step are those of the same batch: a step costs two gradients. `s`
    and `y` of `H_g` are running averages, and mended by double damping, so that both factors stay positive definite. No
    matrix is inverted after `warmup_steps`. Weights without Kronecker factors step as weights with an input of 1 do, by
    `M / (1 + sqrt(damping))`, and a warning names them.

    Reference: Goldfarb, Ren and Bahamou, "Practical quasi-Newton methods for training deep neural networks" (2020),
    Algorithm 3, and github.com/renyiryry/kbfgs_neurips2020_public; see `solvers/pairs.py`. Differences from that code:
    (1) in the first `warmup_steps` steps `A` is a running mean and `H_a` its inverse; there `A` begins as a mean over
    the training set, before the first step; (2) convolutions and other layers: `A` sums over the positions of an
    example, `s` and `y` are means over them; (3) embeddings have a diagonal `A` and its inverse; (4) the slopes are of
    the whole loss, with added losses; (5) the outputs in `s` are those of a matrix and its bias alone: the two matrices
    of an `LSTM` or `SimpleRNN` share slopes, and each has a change of its own; a bias of `EinsumDense` on other axes
    than the outputs is left out; (6) a step that would more than double the loss of its own batch, or make it
    non-finite, is not taken, but learnt from. Later steps are then a quarter as long, and 1.05 times longer after each
    step that is taken, up to `d`. Otherwise `H_g = I` diverges at the start, where targets are large: with ReLU and
    targets of size 1e5, the loss was not finite from the third step on.

    Args:
        learning_rate: Defaults to `0.3` (the authors).
        damping: Positive; its root is added to `A`, and is the least curvature that `H_g` learns. Defaults to `0.3`
            (the authors, for losses that sum over the pixels of an image).
        momentum: Factor on the old `M`, in [0, 1). Defaults to `0.9` (the authors).
        beta: Largest weight of the old `A`, in [0, 1). Defaults to `0.9` (the authors).
        beta_pairs: Weight of the old `s` and `y` of `H_g`, in [0, 1). Defaults to `0.9` (the authors; 0 for full
            batches).
        warmup_steps: Number of first steps that invert `A`; the replicas share the work. Defaults to `20`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: `failed_refreshes` (factors and inverses that were not finite; the old ones are kept), `length` (the share
        of `d` that a step is), `step_norm` (0 for a step that is not taken), `skipped_steps`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.KBFGS(), loss="sparse_categorical_crossentropy")
    ```
    """

    later = ("length",)
    reports = {"failed_refreshes": "sum", "length": "mean", "step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 0.3, damping: float = 0.3, momentum: float = 0.9, beta: float = 0.9,
        beta_pairs: float = 0.9, warmup_steps: int = 20, name: str = "kbfgs", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        self.damping, self.momentum, self.beta, self.beta_pairs = damping, momentum, beta, beta_pairs
        self.warmup_steps = warmup_steps
        check_number(self, "damping", damping, low=0, open_low=True)
        for argument in ("momentum", "beta", "beta_pairs"):
            check_number(self, argument, getattr(self, argument), low=0, high=1, open_high=True)
        check_count(self, "warmup_steps", warmup_steps)
        self._root = float(damping) ** 0.5

    def create_state(self, variables: Variables) -> None:
        """The average gradient, the share of a step; `A`, `H_a`, `H_g` and the average pair of each layer."""
        blocks, self._others, _ = kronecker.blocks(self.trained_model())
        by_layer.warn_of(self, self.trained_model(), self._others, "the momentum divided by `1 + sqrt(damping)`")
        self._m = self.add_optimizer_variables(variables, "m")
        self._length = self.add_scalar(1.0, "length")
        self.create_moments_of_inputs(blocks)
        self._of_outputs = [variable for i, block in enumerate(self._blocks) for variable in self._of_block(i, block)]

    def _of_block(self, i, block):
        *groups, _, d = block.shape
        kinds = (("inverse_of_slopes", (*groups, d, d), by_layer.identity), ("s", (*groups, d), "zeros"),
                 ("y", (*groups, d), "zeros"))  # fmt: skip
        return [by_layer.create(self, shape, block.dtype, f"{name}_{i}", begin) for name, shape, begin in kinds]

    def direction(self, lin: Linearization) -> Vector:
        """`-H_a M H_g`, or a share of it."""
        means = lin.kronecker_means(self._blocks) if self._blocks else []
        share = 1.0 - self.momentum
        M = [self.momentum * old + share * g for old, g in zip(trees.values(self._m), lin.gradient)]
        self.remember(self._m, M)
        factors = self.moments_of_inputs(lin, 1, self.beta) if self._blocks else []
        of_inputs = self._current(factors)
        d = self._operator(of_inputs, trees.values(self._of_outputs[::3]), M) @ M
        step = trees.scale(-self._length.value, d)
        if self._blocks:
            self._learn(lin, means, factors, of_inputs, step)
        return step

    def _damping(self, mean):
        return tf.fill(tf.shape(mean), trees.exactly(self._root, mean.dtype))

    def _current(self, factors):
        """`H_a` of each block for this step."""
        if not self._blocks:
            return []
        warms_up, kept = self.iterations < self.warmup_steps, trees.values(self._inverses)
        found = self.anew_if(warms_up, lambda: self.inverted(factors, self._damping), kept)
        return [self._of_indices(A) if block.has_indices else H for block, A, H in zip(self._blocks, factors, found)]

    def _of_indices(self, A):
        return direct.inverse_of_diagonal(A, self._damping(tf.reduce_mean(A, -1)))

    def _judge(self, good):
        """Take the step if it is good, and else make the next ones shorter."""
        length = tf.identity(self._length.value)
        self.reject(tf.logical_not(good))
        self.report(length=length)
        self.remember(self._length, tf.where(good, tf.minimum(length * LONGER, 1.0), length * SHORTER))

    def _learn(self, lin, means, factors, of_inputs, step):
        """The next inverses and pairs, from the means of the inputs and slopes before and after the step."""
        moved = trees.scale(tf.convert_to_tensor(self.learning_rate), step)
        there = lin.again(shift=moved)
        self._judge(there.loss <= lin.loss + GROWTH * tf.abs(lin.loss))
        kept = trees.values(self._of_outputs)

        def compute():
            groups = []
            after, weights = kronecker_means_alone(there, self._blocks), lin.weights
            new_weights = trees.add(weights, moved)
            for i, (block, (a, b), (new_a, new_b)) in enumerate(zip(self._blocks, means, after)):
                H, s, y = kept[3 * i : 3 * i + 3]
                # the outputs are linear in the inputs, so the mean output is that of the mean input
                out, new_out = (
                    tf.linalg.matvec(tf.cast(block.matrix(w), block.dtype), x, transpose_a=True)
                    for w, x in ((weights, a), (new_weights, new_a))
                )
                s = self.beta_pairs * s + (1.0 - self.beta_pairs) * (out - new_out)
                y = self.beta_pairs * y + (1.0 - self.beta_pairs) * (b - new_b)
                H = pairs.updated(H, *pairs.damped(H, s, y, self._root), tf.norm(b, axis=-1, keepdims=True))
                groups.append([self._next_of_inputs(block, factors[i], of_inputs[i], a), H, s, y])
            return by_layer.whole_or_nan(groups)[0]

        triples = zip(*[iter(self._of_outputs)] * 3)
        self.refresh([v for H_a, triple in zip(self._inverses, triples) for v in (H_a, *triple)], 1, compute)

    def _next_of_inputs(self, block, A, H, a):
        if block.has_indices:
            return H
        s = tf.linalg.matvec(H, a)
        return pairs.updated(H, s, tf.linalg.matvec(A, s) + self._root * s, tf.norm(a, axis=-1, keepdims=True))

    def linear_step(self) -> LinearStep:
        """Averaged gradients, times the inverses of the next step."""

        def preconditioner():
            return self._operator(trees.values(self._inverses), trees.values(self._of_outputs[::3]), self.trained)

        note = "Where `length` is below 1, the gauge is an upper bound."
        return LinearStep(averaged(self.momentum), preconditioner, note)

    def _operator(self, of_inputs, of_slopes, like):
        operators = [KroneckerProduct(*pair) for pair in zip(of_inputs, of_slopes)]
        alike = {i: tf.ones(tuple(like[i].shape), trees.wide(like[i].dtype)) for i in self._others}
        others = {i: ones / (1.0 + self._root) for i, ones in alike.items()}
        return BlockDiagonal(self._blocks, operators, others)
