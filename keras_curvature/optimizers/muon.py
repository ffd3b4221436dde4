"""Muon: momentum whose matrices are replaced by the nearest orthogonal ones."""

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_component, check_flag, check_number, register
from keras_curvature.optimizers.hidden import SIGN, HiddenMatrices
from keras_curvature.optimizers.limits import NotLinear
from keras_curvature.solvers.matrix_parts import LowRankPart, MatrixPart, RowPart
from keras_curvature.solvers.matrix_sign import MatrixSign
from keras_curvature.solvers.second_moment import Normalization
from keras_curvature.typing import LearningRate, Variables, Vector

# The factor on an orthogonal matrix with `rows` for inputs and `columns` for outputs.
SCALES = {
    "jordan": lambda rows, columns: math.sqrt(max(1.0, columns / rows)),
    "moonlight": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "scion": lambda rows, columns: math.sqrt(columns / rows),
    "nuclear": None,  # of each matrix its own
}


@register
class Muon(HiddenMatrices):
    """Muon: steepest descent in the spectral norm, with momentum, for every matrix of the model.

        M <- momentum M + (1 - momentum) G,    N = momentum M + (1 - momentum) G
        w <- w - learning_rate scale sign(N)                            sign(U S V') = U V'

    Convolutions are matrices of all their inputs by their outputs, and the kernels of `MultiHeadAttention` matrices of
    the model's width by all heads. Adam steps everything else, with `adam_rate` times the learning rate: vectors,
    embeddings and the layers that make the outputs. On a curved model (`keras_curvature.curved`) the embeddings and
    output layers are read from the model. A plain `keras.Model` does not show itself to its optimizer; there the last
    kernel is taken for the output layer, and weights named "embeddings" for embeddings. That is wrong for a model of
    several outputs, and for a language model whose output layer is its embedding in reverse: curve the model, or name
    the layers in `adam_for`.

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale `"moonlight"`:
    Liu et al., "Muon is scalable for LLM training" (2025); `"scion"`: Pethick et al., "Training deep learning models
    with norm-constrained LMOs" (2025). Differences from Jordan's code: (1) the momentum is an average and not a sum,
    which does not change its sign; (2) four quintic Newton-Schulz steps below a sharper bound, which cost less than
    their five and end nearer to 1; `sign=NewtonSchulz()` is theirs; (3) in float32 at least; (4) a convolution has the
    scale of its matrix (there: 1 for a square window); (5) weight decay is Keras', and before the step.

    Args:
        learning_rate: With the scale `"moonlight"`, as for Adam. Defaults to `3e-3` (Keras'
            `Muon`: 1e-3).
        momentum: Decay of the average of gradients. Defaults to `0.95` (Jordan et al.).
        nesterov: Whether `N` averages in the new gradient once more; with `False` `N = M`. Defaults to `True` (Jordan
            et al.).
        scale: `"moonlight"`: entries of 0.2 in the mean, as in steps of Adam; `"jordan"`: `sqrt(max(1, out/in))`,
            for learning rates around 0.02; `"scion"`: `sqrt(out/in)`, a step of norm 1 from the mean square of inputs
            to that of outputs; `"nuclear"`: the sum of the singular values of the momentum, with which steps shrink as
            gradients do. Defaults to `"moonlight"`.
        sign: `NewtonSchulz` or `PolarExpress`. Defaults to `NewtonSchulz("quintic", steps=4, bound="gram")`.
        normalization: A `SecondMoment`, for NorMuon and AdaMuon, a `GradientMoment`, for Muon^2, or `None`. Defaults
            to `None`.
        per_head: Whether kernels of three axes have a matrix for each head. Defaults to `False`.
        adam_for: A list of regular expressions; Adam steps the kernels whose path matches one of them. It replaces the
            search for embeddings and output layers: `[]` gives Muon every matrix. With `None` they are found as
            described. If a curved model has other ends than a plain one would show, a saved file notes them.
            Defaults to `None`.
        adam_rate: Learning rate of Adam's steps, in units of `learning_rate`. Defaults to `1.0` (Keras' `Muon`).
        part: A `LowRankPart` or a `RowPart`: the step is orthogonal in a part of the momentum only, and the rest waits
            in the momentum; see `dion` and `dion2`. It excludes `nesterov` and `normalization`. `None`: the whole
            matrix. Defaults to `None`.
        beta_1: Decay of Adam's first moment. Defaults to `0.9` (Adam).
        beta_2: Decay of Adam's second moment. Defaults to `0.999` (Adam).
        epsilon: Added to the root of Adam's second moment. Defaults to `1e-8` (Adam).
        **kwargs: See `CurvatureOptimizer`.

    Reports: `step_norm`, `skipped_steps`.

    Example:

    ```python
    model.compile(optimizer=keras_curvature.Muon(), loss="mse")
    ```
    """

    reports = {"step_norm": "mean", "skipped_steps": "sum"}

    def __init__(
        self, learning_rate: LearningRate = 3e-3, momentum: float = 0.95, nesterov: bool = True,
        scale: Literal["moonlight", "jordan", "scion", "nuclear"] = "moonlight",
        sign: MatrixSign = SIGN, normalization: Normalization | None = None, per_head: bool = False,
        adam_for: Sequence[str] | None = None, adam_rate: float = 1.0, beta_1: float = 0.9, beta_2: float = 0.999,
        epsilon: float = 1e-8, part: MatrixPart | None = None, name: str = "muon", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, name=name, **kwargs)
        for argument, beta in (("momentum", momentum), ("beta_1", beta_1), ("beta_2", beta_2)):
            check_number(self, argument, beta, low=0, high=1, open_high=True)
        known = isinstance(scale, str) and scale in SCALES
        check(self, "scale", scale, known, '"moonlight", "jordan", "scion" or "nuclear"')
        check_component(self, "sign", sign, "sign", "NewtonSchulz()")
        check_flag(self, "nesterov", nesterov)
        check_flag(self, "per_head", per_head)
        if normalization is not None:
            check_component(self, "normalization", normalization, "after", "SecondMoment()")
        if part is not None:
            check_component(self, "part", part, "factors", "LowRankPart()")
            check(self, "nesterov", nesterov, not nesterov, "False with a `part`, as in `Muon.dion()`")
            check(self, "normalization", normalization, normalization is None, "None with a `part`")
        patterns = isinstance(adam_for, (list, tuple)) and all(isinstance(p, str) for p in adam_for)
        check(self, "adam_for", adam_for, adam_for is None or patterns, "a list of regular expressions, or None")
        check_number(self, "adam_rate", adam_rate, low=0)
        check_number(self, "epsilon", epsilon, low=0, open_low=True)
        self.momentum, self.nesterov, self.scale, self.sign = momentum, nesterov, scale, sign
        self.normalization, self.per_head, self.part = normalization, per_head, part
        self.adam_for, self.adam_rate = adam_for, adam_rate
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    @classmethod
    def spectral_descent(cls, learning_rate: LearningRate = 0.1, **kwargs: Any) -> Self:
        """Stochastic spectral descent: `w <- w - learning_rate |G|_* sign(G)`, without momentum.

        It minimizes `<G, d> + |d|^2 / (2 learning_rate)` over `d`, with the spectral norm. Reference: Carlson, Cevher
        and Carin, "Stochastic spectral descent for restricted Boltzmann machines" (2015).

        Args:
            learning_rate: One over the curvature in the spectral norm. Defaults to `0.1`.
            **kwargs: As of the class.

        Example: `Muon.spectral_descent(0.05, adam_rate=0.02)`
        """
        return cls(learning_rate, **{"momentum": 0.0, "nesterov": False, "scale": "nuclear", **kwargs})

    @classmethod
    def dion(cls, learning_rate: LearningRate = 0.01, **kwargs: Any) -> Self:
        """Dion: an orthogonal step of low rank, `part=LowRankPart()`; what it leaves out stays in the momentum.

        Reference: Ahn et al., "Dion: Distributed orthonormalized updates" (2025); see `LowRankPart`.

        Args:
            learning_rate: In units of the norm from the mean square of inputs to that of outputs. Defaults to `0.01`
                (the authors' code).
            **kwargs: As of the class.

        Example: `Muon.dion(part=LowRankPart(64))`
        """
        return cls(learning_rate, **{"nesterov": False, "scale": "scion", "part": LowRankPart(), **kwargs})

    @classmethod
    def dion2(cls, learning_rate: LearningRate = 0.01, **kwargs: Any) -> Self:
        """Dion2: the sign of a quarter of the rows, `part=RowPart()`; the other rows wait in the momentum.

        Reference: Dion2 of github.com/microsoft/dion; see `RowPart`.

        Args:
            learning_rate: As of `dion`. Defaults to `0.01` (the authors' code).
            **kwargs: As of the class.

        Example: `Muon.dion2(part=RowPart(0.5))`
        """
        return cls(learning_rate, **{"nesterov": False, "scale": "scion", "part": RowPart(), **kwargs})

    def create_state(self, variables: Variables) -> None:
        """The momentum, and for the weights that Adam steps their second moment."""
        self.create_tiles(variables, merge=1, vectors=False)
        self.choose_hidden(variables, self._left_to_adam(variables), self.per_head)
        self._others = [i for i in range(len(self._shapes)) if i not in self._hidden]
        self._m = self.add_moments("m")
        self._v = self.add_moments("v", self._others)
        self._second_moments = [] if self.normalization is None else [
            self.add_variable(self.normalization.shape(u.stacked), dtype=self._dtype, name=f"second_moment_{i}")
            for i, u in zip(self._hidden, self._unfoldings)
        ]  # fmt: skip
        self._parts = [] if self.part is None else self.create_parts(self.part)

    def _left_to_adam(self, variables):
        """The kernels at the two ends of the model, or those that `adam_for` names."""
        if self.adam_for is None:
            return self.ends(variables)
        paths = [getattr(v, "path", v.name) for v in variables]
        unknown = [p for p in self.adam_for if not any(re.search(p, path) for path in paths)]
        if unknown:
            warnings.warn(
                f"`{type(self).__name__}`: `adam_for`: {unknown} are in none of the paths of the weights. Received: "
                f"adam_for={self.adam_for!r}. The paths are {paths}.",
                stacklevel=3,
            )
        return [v for v, path in zip(variables, paths) if any(re.search(p, path) for p in self.adam_for)]

    def precondition(self, gradients: Vector) -> Vector:
        """Adam's negative step, and the negative signs of the momentum."""
        G, steps = self.split(gradients), self.taken() + 1
        old, m, direction = trees.values(self._m), {}, {}
        m |= zip(self._others, self._averages(old, G, self._others, self.beta_1))
        v = self.average(self._v, [G[i] * G[i] for i in self._others], self.beta_2)
        adam = self.adam([m[i] for i in self._others], v, steps)
        direction |= zip(self._others, trees.scale(self.adam_rate, adam))

        own, ahead, signs = (self._whole if self.part is None else self._in_part)(old, G)
        m |= zip(self._hidden, own)
        scales = self._scales(ahead, signs)
        direction |= zip(self._hidden, [u.tensor(-c * U) for u, c, U in zip(self._unfoldings, scales, signs)])
        self.remember([*self._m, *self._v], [*(m[i] for i in range(len(G))), *v])
        return self.join([direction[i] for i in range(len(G))], gradients)

    def _whole(self, old, G):
        """`(momentum, what the sign is taken of, its sign)` of the hidden tiles; the last as matrices."""
        m = dict(zip(self._hidden, self._averages(old, G, self._hidden, self.momentum)))
        ahead = self._averages(m, G, self._hidden, self.momentum) if self.nesterov else list(m.values())
        if self.normalization is None:
            return m.values(), ahead, self.signs(ahead, self.sign)
        v = trees.values(self._second_moments)
        found = [
            self.normalization.before(u.matrix(M), u.matrix(G[i]), a)
            for i, u, M, a in zip(self._hidden, self._unfoldings, ahead, v)
        ]  # fmt: skip
        ahead = [u.tensor(M) for u, (M, _) in zip(self._unfoldings, found)]
        found = [self.normalization.after(U, a) for U, (_, a) in zip(self.signs(ahead, self.sign), found)]
        self.remember(self._second_moments, [a for _, a in found])
        return m.values(), ahead, [U for U, _ in found]

    def _in_part(self, old, G):
        """The same in a part of the momentum, which leaves it."""
        share = 1.0 - self.momentum
        B = [old[i] + share * G[i] for i in self._hidden]
        steps, taken, states = self.parts(B, trees.values(self._parts), self.part, self.sign)
        self.remember(self._parts, states)
        taken = [u.tensor(X) for u, X in zip(self._unfoldings, taken)]
        return [b - share * t for b, t in zip(B, taken)], taken, steps

    def _scales(self, tiles, signs):
        scale = SCALES[self.scale]
        if scale is not None:
            return [scale(*u.size) for u in self._unfoldings]
        matrices = [u.matrix(tile) for u, tile in zip(self._unfoldings, tiles)]
        return [tf.reduce_sum(M * U, [-2, -1], keepdims=True) for M, U in zip(matrices, signs)]

    def _averages(self, old, new, chosen, beta):
        return self.average([old[i] for i in chosen], [new[i] for i in chosen], beta)

    def linear_step(self) -> NotLinear:
        """No known limit."""
        return NotLinear(
            f"The steps of `{type(self).__name__}` have a length of their own: no limit on the curvature is known."
        )
