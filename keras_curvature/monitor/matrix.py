"""`Curvature`: the curvature matrix of a model, as an operator.

This file has no mathematics of its own: an `Objective` makes the products, and the solvers and `spectra` use them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, overload

import tensorflow as tf

from keras_curvature import trees
from keras_curvature.component import check, check_count, check_flag
from keras_curvature.monitor.noise.noise import Noise, noise
from keras_curvature.monitor.objective.checks import check_pairs
from keras_curvature.monitor.objective.layers import chosen, layers_of
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.progress import advancing
from keras_curvature.monitor.solving import solve
from keras_curvature.monitor.spectra import density, exact, traces
from keras_curvature.monitor.spectra.density import Density
from keras_curvature.monitor.spectra.estimate import Estimate
from keras_curvature.monitor.spectra.label_traces import estimates_by_labels
from keras_curvature.operators import Function, LinearOperator, Masked
from keras_curvature.solvers import Solution, lanczos
from keras_curvature.solvers.krylov import Eigenpairs
from keras_curvature.typing import Vector


class Curvature(LinearOperator):
    """A curvature matrix `B`, known by its products. `keras_curvature.curvature` makes it.

    `c @ v` is a product. Vectors are lists of tensors shaped like `variables`; for all layers, these are
    `model.trainable_variables`. Every result carries a residual or a standard error, and its number of products.

    Args:
        objective: An `Objective`.
        layers: As in `curvature`.
        progress: As in `curvature`.

    Attributes:
        objective: As given. It has `loss_at`, and `examples`, `batch_size`, `training` and `kind` for headings.
        variables: The trainable variables that vectors are shaped like, a list.
        layers: `{name: [indices]}`: the places of each layer's weights in a vector.
        psd: Whether `v'Bv >= 0` for every `v`: true for every kind but the Hessian.
    """

    def __init__(self, objective: Objective, layers: Sequence[str] | None = None, progress: bool = False) -> None:
        known = layers_of(objective.model)
        own = known if layers is None else chosen(layers, known)
        self.objective, self._progress = objective, progress
        everything = range(len(objective.variables))
        self._indices = list(everything) if layers is None else sorted(i for places in own.values() for i in places)
        place = {i: k for k, i in enumerate(self._indices)}
        self.layers = {name: [place[i] for i in places] for name, places in own.items()}
        self._masked = Masked(Function(objective.product, objective.psd), self._indices, objective.variables)
        self.variables = self._masked.restrict(objective.variables)

    def __repr__(self) -> str:
        objective = self.objective
        parts = "" if self.is_whole else f" of {', '.join(self.layers)}"
        mode = "training" if objective.training else "inference"
        return (
            f"<Curvature: {objective.kind} of {objective.model.name!r}, {self.size:,} weights{parts}, "
            f"{objective.examples:,} examples in batches of {objective.batch_size}, {mode} mode>"
        )

    @property
    def psd(self) -> bool:  # type: ignore[override]
        """Whether `v'Bv >= 0` for every `v`."""
        return self.objective.psd

    @property
    def size(self) -> int:
        """Number of weights, and so of eigenvalues."""
        return trees.count(self.variables)

    @property
    def is_whole(self) -> bool:
        """Whether this is the curvature of all layers."""
        return len(self.variables) == len(self.objective.variables)

    @property
    def loss(self) -> tf.Tensor:
        """The loss at the model's current weights, a scalar."""
        return self.objective.loss()

    @property
    def gradient(self) -> Vector:
        """The gradient of the loss, a vector."""
        return self._masked.restrict(self.objective.gradient())

    def multiply(self, vector: Vector) -> Vector:
        """`B v`, a vector."""
        return self._masked @ trees.vector("vector", vector, self.variables)

    def extend(self, vector: Vector) -> Vector:
        """The vector over all of the model's weights, with zeros for other layers."""
        return self._masked.extend(vector)

    def block(self, layer: str) -> "Curvature":
        """The `Curvature` of one layer, or of the layers that a regular expression matches, on the same examples."""
        check(Curvature.block, "layer", layer, isinstance(layer, str), "the name of a layer, or a regular expression")
        return Curvature(self.objective, list(chosen([layer], self.layers, "layer")), self._progress)

    def top(
        self, k: int = 10, tolerance: float = 1e-3, most_negative: bool = False, max_products: int | None = None,
        metric: LinearOperator | None = None,
    ) -> Eigenpairs:  # fmt: skip
        """The `k` largest eigenvalues with their eigenvectors, `Eigenpairs`; see `solvers/lanczos.py`.

        A multiple eigenvalue is there as often as it has copies; under the squared error every eigenvalue of the last
        `Dense` layer has as many as the layer has outputs. For `k > 1` further searches among the vectors orthogonal to
        the pairs found look for copies: 10 products or so where nothing is missing, as many more for each time that
        they find some. For `k = 1` there are none.

        Args:
            k: Number of eigenvalues, an integer. Defaults to `10`.
            tolerance: Largest residual `|B u - l u|`, relative to `|l|`, or to 1 % of the largest eigenvalue where that
                is larger. Defaults to `1e-3`.
            most_negative: Whether to find the `k` smallest eigenvalues instead. Defaults to `False`.
            max_products: Stop after so many products, an integer; `Eigenpairs.converged` then tells which pairs are
                within the tolerance, and copies of a multiple eigenvalue may be missing. Defaults to `300 + 20 k`.
            metric: A positive definite `LinearOperator` `M`, such as
                `keras_curvature.stability(optimizer).preconditioner`: the eigenvalues are then those of `M^1/2 B
                M^1/2`. Optional.

        Raises:
            ValueError: The vectors do not fit into memory; the message has the bytes that they need.
        """
        found = lanczos.eigenpairs(
            self._shown(), self._like, k, tolerance=tolerance, most_negative=most_negative, seed=self.objective.seed,
            max_products=max_products, metric=metric, asked_by=Curvature.top,
        )  # fmt: skip
        return dataclasses.replace(found, matrix=self._in_words(metric))

    def sharpness(self, start: Vector | None = None, steps: int = 10) -> Eigenpairs:
        """The largest eigenvalue with its eigenvector, `Eigenpairs` of one.

        Args:
            start: A vector to begin at. With the eigenvector of some training steps ago, 5 steps are enough. Defaults
                to a random vector.
            steps: Number of products, an integer. Defaults to `10`.
        """
        return self._extremes(start, steps, None, Curvature.sharpness)[0]

    def extremes(
        self, start: Vector | None = None, steps: int = 10, metric: LinearOperator | None = None
    ) -> tuple[Eigenpairs, Eigenpairs]:  # fmt: skip
        """The largest and the smallest eigenvalue of one run, two `Eigenpairs` of one; see `sharpness` and `top`."""
        return self._extremes(start, steps, metric, Curvature.extremes)

    def _extremes(self, start, steps, metric, asked_by):
        start = None if start is None else trees.vector("start", start, self.variables)
        ends = lanczos.extremes(
            self._shown(steps), self._like, steps, start, self.objective.seed, metric, asked_by=asked_by
        )
        return tuple(dataclasses.replace(end, matrix=self._in_words(metric)) for end in ends)

    @overload
    def trace(
        self, products: int = ..., by_layer: Literal[False] = ..., pairs: Eigenpairs | None = ..., labels: bool = ...
    ) -> Estimate: ...

    @overload
    def trace(
        self, products: int = ..., *, by_layer: Literal[True], pairs: Eigenpairs | None = ..., labels: bool = ...
    ) -> dict[str, Estimate]: ...

    def trace(
        self, products: int = 30, by_layer: bool = False, pairs: Eigenpairs | None = None, labels: bool = False
    ) -> Estimate | dict[str, Estimate]:  # fmt: skip
        """The sum of the eigenvalues, an `Estimate`; or that of each layer's block, `{name: Estimate}`.

        It is exact, with a standard error of 0, where there are no more weights than `products`. Else XTrace estimates
        it from 12 products on, which is much closer where few eigenvalues are large; by layers or with `pairs` it is
        the mean of `z'Bz` over vectors `z` of random signs; see `spectra/traces.py`. For a Gauss-Newton or Fisher
        matrix, `labels` estimates it from labels drawn from the model, which is by far the closest for each layer: over
        512 examples 10 draws are within 2 %, 10 products within 15 %; see `spectra/label_traces.py`.

        Args:
            products: Number of products, or of draws of labels, an integer. Defaults to `30`.
            by_layer: Whether to return each layer's trace. Defaults to `False`.
            pairs: `Eigenpairs` of `top`, whose part is known and not estimated. Optional.
            labels: Whether to draw labels. A draw costs about as much as a product. Defaults to `False`.

        Raises:
            ValueError: `labels=True`, and the matrix is neither a Fisher matrix nor equal to it (as the Gauss-Newton
                matrix is for cross-entropies of logits and squared errors), or `pairs` are given.
        """
        check_count(Curvature.trace, "products", products, low=2)
        check_flag(Curvature.trace, "by_layer", by_layer)
        check_flag(Curvature.trace, "labels", labels)
        check_pairs(Curvature.trace, pairs, self._in_words(), self.variables)
        if labels:
            check(Curvature.trace, "pairs", pairs, pairs is None, "left out where `labels=True`")
            parts = {name: [self._indices[i] for i in places] for name, places in self.layers.items()}
            parts = parts if by_layer else {"": self._indices}
            found = estimates_by_labels(self.objective, products, parts, asked_by=Curvature.trace)
            return found if by_layer else found[""]
        layers = self.layers if by_layer else None
        operator = self._shown(min(products, self.size))
        found = traces.trace(operator, self._like, products, self.objective.seed, pairs, layers)
        return found[1] if by_layer else found[0]

    @overload
    def diagonal(self, products: int = ..., stderr: Literal[False] = ...) -> Vector: ...

    @overload
    def diagonal(self, products: int = ..., *, stderr: Literal[True]) -> tuple[Vector, Vector]: ...

    def diagonal(self, products: int = 100, stderr: bool = False) -> Vector | tuple[Vector, Vector]:
        """The diagonal, a vector; with `stderr` also the standard errors, `(vector, vector)`.

        It is exact where there are no more weights than `products`, and else an estimate.
        """
        check_count(Curvature.diagonal, "products", products, low=2)
        check_flag(Curvature.diagonal, "stderr", stderr)
        operator = self._shown(min(products, self.size))
        if self.size <= products:
            found = exact.diagonal(operator, self._like)
        else:
            found = traces.diagonal(operator, self._like, products, self.objective.seed)
        return found if stderr else found[0]

    def density(self, vectors: int = 4, steps: int = 60, pairs: Eigenpairs | None = None) -> Density:
        """The spectral density, a `Density`, by `vectors * steps` products, in the memory of three vectors.

        It is exact where there are no more weights than `steps`: as many products as weights, and their matrix.
        `pairs`, `Eigenpairs` of `top`, are taken as known; the products are then for the rest of the spectrum.
        """
        check_count(Curvature.density, "vectors", vectors)
        check_count(Curvature.density, "steps", steps)
        check_pairs(Curvature.density, pairs, self._in_words(), self.variables)
        operator = self._shown(vectors * steps)
        if self.size <= steps:
            return exact.density(operator, self._like)
        return density.density(operator, self._like, vectors, steps, self.objective.seed, pairs=pairs)

    def noise(self, micro_batch: int = 8, parts: int = 16) -> Noise:
        """The noise scale of the gradient, a `Noise`; see `noise/noise.py`.

        Args:
            micro_batch: Number of examples whose gradients are compared, an integer. Defaults to `8`.
            parts: Number of parts of the examples that standard errors are from, an integer; their gradients are kept.
                Defaults to `16`.

        Raises:
            ValueError: This is the curvature of some layers only, there are fewer than two micro-batches, the gradients
                need more than 8 GB, or a gradient or product is not finite.
        """
        if not self.is_whole:
            raise ValueError(
                "`Curvature.noise` is defined for the gradient of all layers. Received: the curvature of "
                f"{', '.join(self.layers)}. Ask `keras_curvature.curvature(model, data)` without `layers`."
            )
        return noise(self.objective, micro_batch, parts)

    def solve(
        self, vector: Vector, damping: float, tolerance: float = 1e-6, max_products: int = 1000, rank: int = 0
    ) -> Solution:  # fmt: skip
        """The solution of `(B + damping I) x = vector`, a `Solution`, by conjugate gradients.

        Lanczos first finds the smallest eigenvalue of a Hessian, to check that the damping makes it positive definite.

        Args:
            vector: A vector, of any length; for zero the solution is zero.
            damping: A number, at least 0.
            tolerance: Largest residual `|vector - (B + damping I) x|`, relative to `|vector|`. Defaults to `1e-6`.
            max_products: An integer. `Solution.residual` has the residual reached; a warning says when it is above the
                tolerance. Defaults to `1000`.
            rank: Number of products to spend on a Nyström preconditioner, which takes as many of the largest
                eigenvalues away; they count towards `max_products`. Defaults to `0`: no preconditioner.

        Raises:
            ValueError: The Hessian is not positive definite with this damping; the message has its most negative
                eigenvalue. `vector`, a product or the solution is not finite.
        """
        vector, operator = trees.vector("vector", vector, self.variables), self._shown()
        return solve(self, operator, vector, damping, tolerance, max_products, rank, asked_by=Curvature.solve)

    @property
    def _like(self):
        return trees.values(self.variables)

    def _shown(self, products=None):
        """This operator; with `progress`, one that advances a progress bar with every product."""
        return advancing(self, products) if self._progress else self

    def _in_words(self, metric=None):
        return f"{self.objective.kind} of {', '.join(self.layers)}{'' if metric is None else ', under a metric'}"
