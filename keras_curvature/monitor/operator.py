"""The curvature of a model, as one operator that can be asked.

No mathematics of its own: products are of `probes/probes.py`, and what is made of them is the solvers'.
"""

import contextlib
import re
import warnings

import keras

from keras_curvature import trees
from keras_curvature.component import check, check_count, check_number
from keras_curvature.monitor.noise.noise import noise
from keras_curvature.monitor.objective.layers import layers_of
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.spectra import density, traces
from keras_curvature.monitor.spectra.label_traces import is_gauss_newton, layer_traces
from keras_curvature.operators import Function, Identity, LinearOperator, Masked
from keras_curvature.solvers import ConjugateGradient, lanczos

# Fewest products for which XTrace is better than Hutchinson's estimate.
XTRACE_FROM = 12


def curvature(
    model, data, kind="hessian", layers=None, examples=None, batch_size=None, training=False, seed=0, progress=False,
):  # fmt: skip
    """The curvature of a model on some data, an operator that can be asked.

        f(w + d)  ~  f(w) + g'd + 1/2 d'B d

    with `f` the compiled loss (sample weights, regularizers and added losses with it), a mean over the examples, and
    `B` one of

        "hessian"           H = d2f/dw2
        "ggn"               J' H_L J,  the generalized Gauss-Newton matrix, with the L2 weight regularizers
        "fisher"            mean_n J_n' E_y[s_n s_n'] J_n,  s_n the slope of -log p(y | z_n) in what the model says,
                            labels y drawn from the model
        "empirical_fisher"  mean_n J_n' s_n s_n' J_n,  the same with the true labels: the outer products of the
                            gradients of single examples, where each has one label

    at the weights that the model has when it is asked. Nothing of the model moves: not its weights, optimizer, batch
    statistics, seeds, or metrics. Decoupled weight decay is not part of the loss, and not of `B`.

    Args:
        model: A compiled `keras.Model`.
        data: `(x, y)`, `(x, y, sample_weight)` or `x`, arrays or tensors or dicts or lists of them; or a
            `tf.data.Dataset` or `keras.utils.PyDataset` of batches of these. Read once and kept; a `Dataset` that
            shuffles anew in every epoch has one epoch behind it then.
        kind: One of the above. Defaults to `"hessian"`.
        layers: Names of layers, or regular expressions that match whole names; `B` is then that of their weights
            alone, and vectors are lists of these. Defaults to all layers.
        examples: The first that many of the data, an integer; data that are sorted, as by class, should be shuffled
            before. Defaults to all.
        batch_size: How many at a time, an integer. In training mode batch normalization takes its statistics over so
            many. Defaults to the batches of a data set; for arrays to all, or, of more than 1024 (or 16 MB of inputs),
            to at most 512.
        training: Whether the model runs as in training, which says whether a step is stable; or as in inference, which
            says how flat the function is that came out. Defaults to `False`.
        seed: An integer: of dropout masks in training mode, and of the random vectors of the estimates. Defaults to
            `0`.
        progress: Whether to show a bar while products are made. Defaults to `False`.

    Returns:
        A `Curvature`.

    Raises:
        ValueError: An argument is none of these; see `probes/probes.py`. A layer's name matches none: the message
            has those that there are.

    Example:

    ```python
    c = keras_curvature.curvature(model, (x, y), kind="ggn")
    c.top(10).values                        # the largest eigenvalues
    c.trace(by_layer=True)                  # {layer: Estimate(value, stderr, products)}
    c.block("dense_1").sharpness().values   # of one layer
    ```
    """
    check(curvature, "progress", progress, isinstance(progress, bool), "True or False")
    if layers is not None:
        _check_layers(layers)
    objective = Objective(model, data, kind, examples, batch_size, training, seed, asked_by=curvature)
    return Curvature(objective, layers, progress)


class Curvature(LinearOperator):
    """A curvature matrix `B` that is known by its products, and what is asked of it. Made by `curvature`.

    `c @ v` is a product. Vectors are lists of tensors shaped as `variables`; of all layers, these are
    `model.trainable_variables`. Every number comes with a residual or a standard error, and the number of products that
    it took.

    Args:
        objective: The `Objective`.
        layers: As of `curvature`.
        progress: As of `curvature`.

    Attributes:
        objective: As given: `loss_at`, and the numbers of a heading (`examples`, `batch_size`, `training`, `kind`).
        variables: The trainable variables that vectors are shaped as, a list.
        layers: `{name: [indices]}`: the places in a vector of each layer's weights.
        psd: Whether `v'Bv >= 0` for every `v`: of every kind but the Hessian.
    """

    def __init__(self, objective, layers=None, progress=False):
        known = layers_of(objective.model)
        chosen = known if layers is None else _chosen(layers, known)
        self.objective, self._progress = objective, progress
        everything = range(len(objective.variables))
        self._indices = list(everything) if layers is None else sorted(i for own in chosen.values() for i in own)
        place = {i: k for k, i in enumerate(self._indices)}
        self.layers = {name: [place[i] for i in own] for name, own in chosen.items()}
        self._masked = Masked(Function(objective.product, objective.psd), self._indices, objective.variables)
        self.variables = self._masked.restrict(objective.variables)

    def __repr__(self):
        whole, p = len(self.variables) == len(self.objective.variables), self.objective
        weights = trees.count(self.variables)
        parts = "" if whole else f" of {', '.join(self.layers)}"
        mode = "training" if p.training else "inference"
        return (
            f"<Curvature: {p.kind} of {p.model.name!r}, {weights:,} weights{parts}, {p.examples:,} examples in batches "
            f"of {p.batch_size}, {mode} mode>"
        )

    @property
    def psd(self):
        """Whether `v'Bv >= 0` for every `v`."""
        return self.objective.psd

    @property
    def loss(self):
        """The loss at the weights that the model has now, a scalar."""
        return self.objective.loss()

    @property
    def gradient(self):
        """Its gradient, a vector."""
        return self._masked.restrict(self.objective.gradient())

    def multiply(self, vector):
        """`B v`, a vector."""
        trees.check("vector", vector, self.variables)
        return self._masked @ list(vector)

    def extend(self, vector):
        """The vector over all of the model's weights that has zeros for those of other layers."""
        return self._masked.extend(vector)

    def block(self, layer):
        """The `Curvature` of one layer, or of those that a regular expression matches, on the same examples.

        Its vectors are lists of these layers' weights.
        """
        check(Curvature.block, "layer", layer, isinstance(layer, str), "the name of a layer, or a regular expression")
        return Curvature(self.objective, list(_chosen([layer], self.layers, "layer")), self._progress)

    def top(self, k=10, tolerance=1e-3, most_negative=False, max_products=None, metric=None):
        """The `k` largest eigenvalues with their vectors, `Eigenpairs`; see `solvers/lanczos.py`.

        Args:
            k: How many, an integer. Defaults to `10`.
            tolerance: Largest residual `|B u - l u|`, relative to `|l|`, or to 1 % of the largest eigenvalue where
                that is more. Defaults to `1e-3`.
            most_negative: Whether to find the `k` smallest instead. Defaults to `False`.
            max_products: An integer; `Eigenpairs.converged` says which are within the tolerance then. Defaults to
                `300 + 20 k`.
            metric: A positive definite `LinearOperator` `M` on such vectors, as an optimizer's in
                `monitor/stability.py`: the eigenvalues are those of `M^1/2 B M^1/2`. Optional.

        Raises:
            ValueError: The vectors would not fit into memory, with the bytes that they need.
        """
        with self._shown() as operator:
            return lanczos.eigenpairs(
                operator, self._like, k, tolerance=tolerance, most_negative=most_negative, seed=self.objective.seed,
                max_products=max_products, metric=metric,
            )  # fmt: skip

    def sharpness(self, start=None, steps=10):
        """The largest eigenvalue with its vector, `Eigenpairs` of one.

        Args:
            start: A vector to begin at, such as that of some training steps ago, of which 5 steps are enough.
                Defaults to a random one.
            steps: How many products, an integer. Defaults to `10`.
        """
        return self.extremes(start, steps)[0]

    def extremes(self, start=None, steps=10, metric=None):
        """The largest and the smallest eigenvalue, two `Eigenpairs` of one, of one run; as `sharpness` and `top`."""
        with self._shown(steps) as operator:
            return lanczos.extremes(operator, self._like, steps, start=start, seed=self.objective.seed, metric=metric)

    def trace(self, products=30, by_layer=False, pairs=None, labels=False):
        """The sum of the eigenvalues, an `Estimate`; or that of each layer's block, `{name: Estimate}`.

        By XTrace, from 12 products on, which is much the closer one where few eigenvalues are large; by layers and
        with `pairs` as the mean of `z'Bz` over vectors `z` of random signs; see `spectra/traces.py`. With `labels`, of
        a Gauss-Newton or Fisher matrix, from labels that are drawn from what the model says, which is much the closest
        for each layer: over 512 examples 10 draws are within 2 %, 10 products within 15 %; see
        `probes/label_traces.py`.

        Args:
            products: How many products, or draws of labels, to estimate by, an integer. Defaults to `30`.
            by_layer: Whether to give each layer's. Defaults to `False`.
            pairs: `Eigenpairs` of `top`, which are taken out of what has to be estimated. Optional.
            labels: Whether to draw labels. A draw costs about as much as a product. Defaults to `False`.

        Raises:
            ValueError: `labels=True`, and the matrix is neither a Fisher matrix nor equal to it (as the Gauss-Newton
                matrix is with cross-entropies of logits and squared errors), or `pairs` are given.
        """
        check_count(Curvature.trace, "products", products, low=2)
        check(Curvature.trace, "by_layer", by_layer, isinstance(by_layer, bool), "True or False")
        check(Curvature.trace, "labels", labels, isinstance(labels, bool), "True or False")
        if labels:
            return self._trace_by_labels(products, by_layer, pairs)
        seed, parts = self.objective.seed, self.layers if by_layer else None
        with self._shown(products) as operator:
            if pairs is not None:
                found = traces.deflated(operator, self._like, pairs, products, seed, parts=parts)
            elif by_layer or products < XTRACE_FROM:
                found = traces.hutchinson(operator, self._like, products, seed, parts=parts)
            else:
                found = traces.xtrace(operator, self._like, products, seed)
        return found[1] if by_layer else found

    def _trace_by_labels(self, draws, by_layer, pairs):
        kind = self.objective.kind
        check(Curvature.trace, "labels", True, kind in ("ggn", "fisher"), f"False for kind={kind!r}")
        check(Curvature.trace, "pairs", pairs, pairs is None, "left out where `labels=True`")
        if kind == "ggn" and not is_gauss_newton(self.objective):
            raise ValueError(
                "`Curvature.trace`: `labels=True` gives the trace of the Fisher matrix, and with this loss and these "
                "outputs the Gauss-Newton matrix is another one. Use kind='fisher', or labels=False."
            )
        found = layer_traces(self.objective, self.objective.seed, draws)

        def estimate(places):
            return traces.Estimate(*found.of([self._indices[i] for i in places]), draws)

        if by_layer:
            return {name: estimate(places) for name, places in self.layers.items()}
        return estimate(range(len(self.variables)))

    def diagonal(self, products=100, stderr=False):
        """An estimate of the diagonal, a vector; with `stderr` also its standard errors, `(vector, vector)`."""
        with self._shown(products) as operator:
            found = traces.diagonal(operator, self._like, products, self.objective.seed)
        return found if stderr else found[0]

    def density(self, vectors=4, steps=60, pairs=None):
        """The spectral density, a `Density`; `vectors * steps` products, and the memory of three vectors.

        With `pairs`, `Eigenpairs` of `top`, these are taken as they are, and the products are of the rest.
        """
        with self._shown(vectors * steps) as operator:
            return density.density(operator, self._like, vectors, steps, self.objective.seed, pairs=pairs)

    def noise(self, micro_batch=8, parts=16):
        """How noisy the gradient is: the noise scale, `Noise`; see `probes/noise.py`.

        Args:
            micro_batch: The number of examples that gradients are compared of, an integer. Defaults to `8`.
            parts: Number of parts of the examples that standard errors are of, and whose gradients are kept at a time,
                an integer. Defaults to `16`.

        Raises:
            ValueError: This is the curvature of some layers only, there are fewer than two micro-batches, or the
                gradients need more than 8 GB.
        """
        if len(self.variables) < len(self.objective.variables):
            raise ValueError(
                f"`Curvature.noise` is of the gradient of all layers. Received: the curvature of "
                f"{', '.join(self.layers)}. Ask `keras_curvature.curvature(model, data)` without `layers`."
            )
        return noise(self.objective, micro_batch, parts)

    def solve(self, vector, damping, tolerance=1e-6, max_products=1000):
        """The solution of `(B + damping I) x = vector`, a `Solution`, by conjugate gradients.

        A Hessian is checked first to be positive with the damping: by its smallest eigenvalue, as Lanczos finds it.

        Args:
            vector: A vector.
            damping: A number, at least 0.
            tolerance: Largest residual `|vector - (B + damping I) x|`, relative to `|vector|`. Defaults to `1e-6`.
            max_products: An integer. `Solution.residual` says how far it came, and a warning that it did not come to
                the tolerance. Defaults to `1000`.

        Raises:
            ValueError: The Hessian is not positive definite with this damping; the message has its most negative
                eigenvalue.
        """
        trees.check("vector", vector, self.variables)
        check_number(Curvature.solve, "damping", damping, low=0)
        check_number(Curvature.solve, "tolerance", tolerance, low=0, open_low=True)
        check_count(Curvature.solve, "max_products", max_products)
        if not self.psd:
            self._check_positive(damping)
        solver = ConjugateGradient(max_products, progress_tolerance=0.0, residual_tolerance=tolerance)
        with self._shown() as operator:
            solution = solver.solve(Function((operator + damping * Identity()).multiply, psd=True), list(vector))
        left, steps = float(solution.residual), int(solution.steps)
        if left > tolerance and steps < max_products and not self.psd:
            raise ValueError(
                f"`Curvature.solve`: the Hessian with damping={damping!r} is not positive definite: conjugate "
                "gradients met a direction of negative curvature. Pass a larger damping, or use kind='ggn'."
            )
        if left > tolerance:
            warnings.warn(
                f"`Curvature.solve`: the residual is {left:.2g} after {steps} products, more than "
                f"tolerance={tolerance:g}. Pass a larger `damping` or `max_products`.", stacklevel=2,
            )  # fmt: skip
        return solution

    def _check_positive(self, damping):
        pairs = self.top(1, tolerance=1e-2, most_negative=True)
        value = float(pairs.values[0])
        # a Ritz value is never below the smallest eigenvalue, and there is an eigenvalue within the residual of it
        lowest = value - float(pairs.residuals[0])
        if value < 0 and lowest + damping <= 0:
            raise ValueError(
                f"`Curvature.solve`: the Hessian is not positive definite with damping={damping!r}, or not to the "
                f"precision of its products: its most negative eigenvalue is {value:.3g}. Pass "
                f"damping > {-1.01 * lowest:.3g}, or use kind='ggn'."
            )

    @property
    def _like(self):
        return trees.values(self.variables)

    @contextlib.contextmanager
    def _shown(self, products=None):
        """This operator; where asked for, with a bar that shows how many of its products are made."""
        if not self._progress:
            yield self
            return
        bar = keras.utils.Progbar(products, unit_name="product")

        def product(vector):
            found = self @ vector
            bar.add(1)
            return found

        yield Function(product, self.psd)


def _check_layers(layers):
    names = [layers] if isinstance(layers, str) else layers
    valid = isinstance(names, (list, tuple)) and len(names) > 0 and all(isinstance(name, str) for name in names)
    check(curvature, "layers", layers, valid, "one or more names of layers, or regular expressions, or None")


def _chosen(layers, known, argument="layers"):
    """Of `{name: indices}` those that names and regular expressions match."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in known):
            raise ValueError(
                f"`{argument}`: {pattern!r} matches no layer with trainable weights. Those that there are: "
                f"{', '.join(map(repr, known))}"
            )
    return {name: own for name, own in known.items() if any(_matches(pattern, name) for pattern in patterns)}


def _matches(pattern, name):
    try:
        return pattern == name or re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # no expression, and so a name that there is not
