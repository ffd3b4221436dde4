"""EKFAC: K-FAC with measured second moments in the eigenbasis of its factors."""

from typing import Any, Literal

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, register
from keras_curvature.operators.kronecker import InEigenbasis
from keras_curvature.optimizers import adaptive, by_layer
from keras_curvature.optimizers.kfac import KFAC
from keras_curvature.solvers import eigenbases
from keras_curvature.solvers.refresh import Refresh
from keras_curvature.steps import Damping
from keras_curvature.typing import Fisher, LearningRate, Sharing


@register
class EKFAC(KFAC):
    """EKFAC: the gradient of each layer in the eigenbases of K-FAC's factors, divided by its second moments there.

        A = U_A diag U_A',  G = U_G diag U_G'                              every `inverses_every` steps
        S = E[(U_A' g U_G)^2]                                              g: the gradient of one example
        d = U_A ((U_A' dL/dW U_G) / (S + lambda)) U_G'

    then as `KFAC`. Among all matrices with these eigenvectors, the one with eigenvalues `S` is nearest to the Fisher
    matrix; K-FAC uses the products of the factors' eigenvalues. `S` is also newer: it is updated as often as the
    factors. A step takes four products with small matrices for each layer, where K-FAC takes two.

    Reference: George, Laurent, Bouthillier, Ballas and Vincent, "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis" (2018), Algorithm 1 with running averages (EKFAC-ra); Gao et al., "Eigenvalue-
    corrected natural gradient based on a new approximation" (2020), for `factors="tkfac"`. Differences from the paper:
    (1) the differences of `KFAC`; (2) the average of `S`, `eps = min(1 - 1/t, 0.95)`, restarts with every new basis,
    because the old numbers belong to the old basis; (3) a layer keeps its old basis and average if its factors cannot
    be decomposed, or if its new `S` is not finite; (4) layers with a factor of more than 1024 rows do not get their
    bases all in one step, which would take minutes, but one after the other between two inversions. Before its first
    turn such a layer uses the identity: `S` is then the diagonal of its Fisher matrix.

    Args:
        learning_rate: Multiple of `v` that is taken. Defaults to `0.01`; for `momentum=None`, 1 is the minimum.
        damping: `lambda`, a number, or a component. Defaults to `0.03`, for losses about the size of 1.
        momentum: See `KFAC`. Defaults to `0.9`.
        factors_every: Steps between two updates of the factors and of `S`. Defaults to `10`.
        inverses_every: Steps between two eigendecompositions, a multiple of `factors_every`; if they are equal, `S` is
            the last estimate alone. Or a `Refresh`: at each update of the factors, the bases that no longer diagonalize
            them are computed anew; large layers then take no turns. Defaults to `100`.
        fisher, sharing, kl_clip, curvature_batch: See `KFAC`.
        factors: See `KFAC`; with `"tkfac"` the bases are those of its factors (TEKFAC). Defaults to `"kfac"`.
        **kwargs: See `CurvatureOptimizer`.

    Reports: as `KFAC`.

    Example:

    ```python
    model = keras_curvature.curved(model)
    model.compile(optimizer=keras_curvature.EKFAC(), loss="sparse_categorical_crossentropy")
    ```
    """

    def __init__(
        self, learning_rate: LearningRate = 0.01, damping: float | Damping = 0.03, momentum: float | None = 0.9,
        factors_every: int = 10, inverses_every: int | Refresh = 100, fisher: Fisher = "sampled",
        sharing: Sharing = "expand", kl_clip: float | None = 1e-3, curvature_batch: float | None = None,
        factors: Literal["kfac", "tkfac"] = "kfac", name: str = "ekfac", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            learning_rate, damping, momentum, factors_every, inverses_every, fisher, sharing, kl_clip, curvature_batch,
            factors, name, **kwargs,
        )  # fmt: skip
        adapts = isinstance(inverses_every, Refresh)
        valid = inverses_every.check_every == 1 if adapts else inverses_every % factors_every == 0
        expected = f"a multiple of `factors_every` ({factors_every}), or a `Refresh` with `check_every=1`"
        check(self, "inverses_every", inverses_every, valid, expected)

    def _create_inverses(self):
        """Eigenbases of the factors that are matrices, second moments, and how many looks are in these."""
        self._bases = by_layer.create_factors(self, self._blocks, "basis", kinds=("matrix",))
        self._moments = [by_layer.ones(self, block, f"moment_{i}") for i, block in enumerate(self._blocks)]
        self._moment_counts = self.add_variable((len(self._blocks),), name="moment_looks", aggregation="none")

    def _inverse(self, batch, damping):
        """An operator; factors, bases and moments are refreshed together, by one look at the batch."""
        factors = [*self._factors, *self._diagonals, self._counts]
        moments = [*self._bases, *self._moments, self._moment_counts] if self._blocks else []
        old = trees.values(factors)

        def compute():
            seed = self._seed
            new = self._look(batch, seed)
            # what is not finite is handed on, for `refresh` to drop and to count
            kept = trees.finite_or(new, old)[0][: len(self._factors)]
            return [*new, *(self._look_in_bases(batch, kept, seed) if moments else [])]

        values = self.refresh(factors + moments, self.factors_every, compute)
        self._report_refreshes(values[len(factors) :])
        diagonals, found = values[len(self._factors) : len(factors) - 1], values[len(factors) :]
        operators = self._in_bases(found[: len(self._bases)], found[len(self._bases) :], batch.l2, damping)
        return self._side_by_side(operators, diagonals, batch.l2, damping)

    def _report_refreshes(self, found):
        if not (isinstance(self.inverses_every, Refresh) and self._blocks):
            return
        old, new = trees.values(self._bases), found[: len(self._bases)]

        def moved():
            return tf.add_n([tf.cast(m, tf.float32) for m in adaptive.moved(self._blocks, new, old)])

        looked = tf.equal(self.iterations % self.factors_every, 0)
        self.report(refreshes=tf.cond(looked, moved, lambda: tf.constant(0.0)))

    def _kept_operators(self, l2, damping):
        return self._in_bases(trees.values(self._bases), trees.values(self._moments), l2, damping)

    def _in_bases(self, bases, moments, l2, damping):
        return [
            InEigenbasis(*pair, 1.0 / (S + self._damping_of(l2, block.variables, damping, S)))
            for block, pair, S in zip(self._blocks, self._of_blocks(bases), moments)
        ]

    def _look_in_bases(self, batch, factors, seed):
        """`[*bases, *S, looks]`; a block gets a basis and what is seen in it together, or keeps both."""
        old, counts = trees.values(self._bases), tf.identity(self._moment_counts.value)
        if isinstance(self.inverses_every, Refresh):
            decomposed, due = adaptive.bases(self._blocks, factors, old, self.inverses_every)
        else:
            decomposed, due = self._decomposed(factors, old), [self._is_due(turn) for turn in self._turns]
        good = [trees.has_finite_sum(U) for U in decomposed]
        fresh = tf.stack([now & _all(both) for now, both in zip(due, self._of_blocks(good))])
        bases = self._chosen(fresh, decomposed, old)
        seen, _ = batch.kronecker_second_moments(self._blocks, self._of_blocks(bases), fisher=self.fisher, seed=seed)
        since = tf.where(fresh, tf.zeros_like(counts), counts)
        moments, fine = by_layer.averaged(self._moments, seen, since)
        bases = self._chosen(fine, bases, old)
        bases = [tf.where(fine, U, failed) for fine, U, failed in zip(good, bases, decomposed)]
        return [*bases, *moments, tf.where(fine, since + 1.0, counts)]

    @property
    def _turns(self):
        """For each block the look, counted from the last inversion on, at which it gets its bases."""
        return by_layer.turns(self._blocks, self.inverses_every // self.factors_every)

    def _is_due(self, turn):
        return tf.equal(self.iterations % self.inverses_every, turn * self.factors_every)

    def _decomposed(self, factors, old):
        """Eigenvectors of all factors that are matrices, those of the blocks whose turn it is anew."""
        turns, places = self._turns, by_layer.matrices(self._blocks)
        vectors = dict(zip(places, old))
        for turn in sorted(set(turns)):
            mine = [i for i, other in enumerate(turns) if other == turn]
            if any(2 * i in vectors or 2 * i + 1 in vectors for i in mine):
                vectors.update(self._decomposed_at(turn, mine, factors, vectors))
        return [vectors[place] for place in places]

    def _decomposed_at(self, turn, numbers, factors, vectors):
        """Of the blocks of one turn, `{place among all factors: eigenvectors}`; each replica computes some."""
        both = [place for i in numbers for place in (2 * i, 2 * i + 1)]
        kept = [place for place in both if place in vectors]

        def anew():
            blocks = [self._blocks[i] for i in numbers]
            found = dict(zip(both, by_layer.computed(_decomposed, blocks, [factors[place] for place in both])))
            return [found[place] for place in kept]

        always = self.inverses_every == self.factors_every
        found = anew() if always else tf.cond(self._is_due(turn), anew, lambda: [vectors[place] for place in kept])
        return dict(zip(kept, found))

    def _of_blocks(self, values):
        """Of values for the matrices, a pair for each block, with `None` for a factor that is a diagonal."""
        found = dict(zip(by_layer.matrices(self._blocks), values))
        return by_layer.pairs([found.get(i) for i in range(2 * len(self._blocks))])

    def _chosen(self, conditions, new, old):
        """Of bases, those of `new` in the blocks whose condition holds."""
        places = [i // 2 for i in by_layer.matrices(self._blocks)]
        return [tf.where(conditions[i], a, b) for i, a, b in zip(places, new, old)]


def _decomposed(A, G):
    """The eigenvectors of both factors of a block; a diagonal as it is."""
    both = [(A, G), (G, A)]
    return tuple(X if by_layer.is_diagonal(X, other) else eigenbases.decompose(X) for X, other in both)


def _all(conditions):
    """Whether there are any, and all hold."""
    known = [condition for condition in conditions if condition is not None]
    return tf.reduce_all(tf.stack(known)) if known else tf.constant(False)
