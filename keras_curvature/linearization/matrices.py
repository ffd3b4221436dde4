"""The curvature matrices of a `Linearization`, as operators. Each function is a method of that class."""

from typing import Literal

import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.component import check_choice, check_scalar
from keras_curvature.linearization import products
from keras_curvature.linearization.fisher import convexity
from keras_curvature.linearization.gauss_newton import GaussNewton
from keras_curvature.linearization.jacobian import frames
from keras_curvature.linearization.jacobian.matrix import MEMORY, RowMatrix
from keras_curvature.linearization.jacobian.rows import FisherRows, Rows
from keras_curvature.linearization.layers import taps
from keras_curvature.linearization.needs import require
from keras_curvature.operators import Function, LinearOperator
from keras_curvature.typing import Integer


def hessian(lin) -> LinearOperator:
    """The Hessian `H` of the loss, a `LinearOperator`; not positive semi-definite in general.

    One product costs about as much as a gradient. It shares the forward and the backward pass of the loss and the
    gradient.

    Raises:
        ValueError: The `needs` of the linearization have no `hessian`.
    """
    require(lin, "hessian", "hessian")
    passes = lin.passes
    passes.prepare()
    return Function(_product(lin, passes, lambda recorded, v: recorded.hessian_product(v)))


def gauss_newton(lin) -> GaussNewton:
    """The generalized Gauss-Newton matrix `J' H_L J`, a `GaussNewton` operator.

    `J` is the Jacobian of the model's outputs (of its logits, if the loss reads them) and `H_L` the second derivative
    of the loss in them. L2 weight regularizers enter exactly, also if a `compute_loss` of the model's own leaves them
    out; other added losses are treated as linear in the activations and contribute no curvature. Positive semi-definite
    where the compiled loss is convex in the outputs, see `fisher/convexity.py`, and no sample weight is negative.

    Raises:
        ValueError: The `needs` of the linearization have no `products`.
    """
    require(lin, "gauss_newton", "products")
    not_convex = tuple(convexity.not_convex(lin.model))
    return GaussNewton(lin.variables, lin.passes, lin.loss_scale, lin.l2, not_convex)


def fisher(lin, kind: Literal["exact", "empirical"] = "exact") -> LinearOperator:
    """A Fisher matrix of the loss, a `LinearOperator`; always positive semi-definite.

        "exact"      F = sum_n J_n' E_y[s_n s_n'] J_n,    labels y drawn from the model
        "empirical"  F = sum_n J_n' s_n s_n' J_n,         the true labels

    with `s_n` the slope of `-log p(y | z_n)` in the outputs, times the root of the weight that the compiled loss gives
    it (1/N of a mean, sample weights; see `fisher/sampling.py`). For a mean over examples with one label each, the
    empirical matrix is the mean of the outer products of per-example gradients. Regularizers and added losses are not
    likelihoods and do not contribute. One product costs one forward-mode and one backward pass.

    Args:
        kind: `"exact"` or `"empirical"`. Defaults to `"exact"`.

    Raises:
        ValueError: `kind` is invalid; the `needs` of the linearization lack `products`; with `"exact"`, at a product:
            the loss is not the negative logarithm of a known likelihood.
    """
    check_choice(fisher, "kind", kind, ("exact", "empirical"))
    require(lin, "fisher", "products")
    return Function(_product(lin, lin.passes, lambda recorded, v: recorded.fisher_product(v, kind)), psd=True)


def rows(lin, memory: int = MEMORY) -> Rows:
    """The rows of the Jacobian, scaled as the compiled loss is, `Rows`.

    With `J` the Jacobian of the model's outputs and `R` the root of the second derivative of the loss in them, the rows
    are `A = R J`, one for each output of each example. `A'A` is the Gauss-Newton matrix without L2 regularizers, and
    for a loss of squares `A'r` is the gradient. Where the loss is not convex, or a sample weight is negative, negative
    eigenvalues of the second derivative count as 0.

    Args:
        memory: The most bytes that `dense()` may take. Defaults to `2**31`.

    Raises:
        ValueError: `memory` is no positive number; the `needs` of the linearization have no `products`; the loss is not
            convex in the outputs; at a question: the model has a `compute_loss` of its own without a `likelihood`, or a
            loss that returns one number for all examples.
        tf.errors.InvalidArgumentError: The outputs of one example change the slopes of others, as in a contrastive
            loss. Under XLA the rows are NaN in place of this error.

    Example:

    ```python
    A = Linearization(model, x, y).rows()
    step = tf.linalg.lstsq(A.dense(), -A.residual[:, None])
    ```
    """
    require(lin, "rows", "products")
    not_convex = convexity.not_convex(lin.model)
    if not_convex:
        raise ValueError(
            "`Linearization.rows` needs a loss that is convex in the model's outputs: the second derivative of another "
            f"has no root. Received: loss={', '.join(not_convex)}. Choose another loss, or use the Hessian."
        )
    return Rows(lin, memory)


def gradients_of_examples(lin, memory: int = MEMORY) -> RowMatrix:
    """The gradients of the single examples as the rows of a matrix, a `RowMatrix`; they sum to the gradient.

    They are scaled as the compiled loss is: of a mean over N examples, each is 1/N of the gradient of its own loss.
    Regularizers and added losses belong to no example.

    Args:
        memory: The most bytes that `dense()` may take. Defaults to `2**31`.

    Raises:
        ValueError: `memory` is no positive number; the `needs` of the linearization have no `products`; at a question:
            the loss is not known to be a sum over the examples, or an output has no row for each example.

    Example:

    ```python
    G = Linearization(model, x, y).gradients_of_examples()
    norms = tf.sqrt(tf.linalg.diag_part(G.gram()))     # of the gradient of each example
    ```
    """
    require(lin, "gradients_of_examples", "products")
    return RowMatrix(lin, frames.of_slopes, memory, gradients_of_examples)


def fisher_rows(
    lin, kind: Literal["exact", "empirical", "sampled"] = "empirical", seed: Integer = 0, memory: int = MEMORY
) -> FisherRows:  # fmt: skip
    """Rows `S` whose squares sum to a Fisher matrix, `F = S'S`, as `FisherRows`; see `fisher` for the definitions.

    Args:
        kind: `"empirical"`: a row for each example, with the true labels; `"sampled"`: a row for each example, with
            labels drawn from the model: `S'S` has the Fisher matrix as its expectation; `"exact"`: a row for each
            example and possible label. Defaults to `"empirical"`.
        seed: Integer tensor or number that determines the draws.
        memory: The most bytes that `dense()` may take. Defaults to `2**31`.

    Raises:
        ValueError: `kind` or `memory` is invalid; the `needs` of the linearization have no `products`; labels are
            needed, and the loss is not the negative logarithm of a known likelihood.
    """
    kinds = ("exact", "empirical", "sampled")
    check_choice(fisher_rows, "kind", kind, kinds)
    check_scalar(fisher_rows, "seed", seed, integer=True)
    return FisherRows(lin, kind, seed, memory)


def hidden_gauss_newton(lin) -> LinearOperator:
    """`J_h' J_h / N`, for `h` the hidden states of the recurrent layers and `N` the number of examples.

    The Gauss-Newton matrix of `1/2 |h(w) - h(w_0)|^2`, summed over units and time, mean over the examples. Structural
    damping (Martens and Sutskever, 2011) uses it to keep a step from changing the memory of a recurrent network. It
    takes a forward pass of its own.

    Raises:
        ValueError: The model has no recurrent layer; the `needs` of the linearization have no `products`.
    """
    require(lin, "hidden_gauss_newton", "products")
    noted = {}

    def make(pure, weights):
        tape = tf.GradientTape(persistent=True)
        with tape:
            tape.watch(weights)
            evaluation = pure.evaluate(weights)
        return products.Jacobian(tape, weights, _states(noted, pure.model), evaluation)

    passes = lin.record(make, lambda: taps.hidden_states(noted))
    product = _product(lin, passes, lambda jacobian, v: jacobian.vjp(jacobian.jvp(v)))
    examples = tf.cast(lin.examples, tf.float64)
    return Function(lambda v: trees.scale(1.0 / examples, product(v)), psd=True)


def _product(lin, passes, question):
    def product(v):
        return passes.total(question, [trees.vector("vector", v, lin.variables)])

    return product


def _states(noted, model):
    states = noted.pop(replicas.identity(), None)
    if not states:
        raise ValueError(
            f"`hidden_gauss_newton` (structural damping) needs a recurrent layer; "
            f"the model {model.name!r} has none. Use `structural_damping=0.0`."
        )
    return states
