"""The largest curvature at which a step is stable: closed forms for steps that are linear in the gradient.

With the state held fixed, a step of such a method on a quadratic of Hessian `H` is, with `M` positive definite,

    m <- b m + (1 - b) H w
    w <- (1 - d) w - learning_rate M (p m + q H w)                      the new m; d = learning_rate * weight_decay

Along each eigenvector of `M H` the state has two numbers. They shrink if these roots are inside the unit circle:

    z^2 - (1 - d + b - a (p (1 - b) + q)) z + b (1 - d - a q) = 0,      a = learning_rate * eigenvalue

As `a` grows, the first root leaves the unit circle at -1: the weights oscillate. There

    a = (2 - d) (1 + b) / (p (1 - b) + q (1 + b))                       the limit

Gradient descent has b = 0; heavy ball, of which Keras writes `m` without the factor `1 - b`, p = 1 / (1 - b) and q = 0;
Nesterov's momentum p = b / (1 - b) and q = 1; Adam's p = 1 and q = 0.
"""

import dataclasses
from collections.abc import Callable

import keras

from keras_curvature import replicas
from keras_curvature.operators import LinearOperator


@dataclasses.dataclass(frozen=True)
class Rule:
    """The limit `(2 - learning_rate * weight_decay) * factor`.

    Args:
        factor: `(1 + b) / (p (1 - b) + q (1 + b))`, a number.
        text: The factor as a formula, such as `"(1+0.9)/(1-0.9)"`; empty if it is 1.
    """

    factor: float = 1.0
    text: str = ""

    def limit(self, rate: float, decay: float) -> float:
        """The limit on `rate` times the largest eigenvalue of `M H`; `decay` is the decoupled weight decay."""
        return (2.0 - rate * decay) * self.factor

    def formula(self, rate: float, decay: float) -> str:
        """The limit over `rate`, the largest stable eigenvalue, as a formula with numbers."""
        two = f"(2-{number(rate)}·{number(decay)})" if decay else "2"
        return f"{two}{self.text}/{number(rate)}"


def heavy_ball(b: float) -> Rule:
    """`m <- b m - learning_rate g,  w <- w + m`; gradient descent if `b` is 0."""
    return Rule(1.0 + b, f"(1+{number(b)})" if b else "")


def nesterov(b: float) -> Rule:
    """`m <- b m - learning_rate g,  w <- w + b m - learning_rate g`, Keras' form of Nesterov's momentum."""
    return Rule((1.0 + b) / (1.0 + 2.0 * b), f"(1+{number(b)})/(1+2·{number(b)})" if b else "")


def averaged(b: float) -> Rule:
    """`m <- b m + (1 - b) g,  w <- w - learning_rate M m`."""
    return Rule((1.0 + b) / (1.0 - b), f"(1+{number(b)})/(1-{number(b)})" if b else "")


def combined(b: float, p: float, q: float) -> Rule:
    """`m <- b m + (1 - b) g,  w <- w - learning_rate M (p m + q g)`."""
    text = f"(1+{number(b)})/({number(p)}(1-{number(b)})+{number(q)}(1+{number(b)}))"
    return Rule((1.0 + b) / (p * (1.0 - b) + q * (1.0 + b)), text)


@dataclasses.dataclass(frozen=True)
class OnTheQuadratic:
    """`z <- rho z - beta ((H + damping I) z + g),  w <- w + learning_rate z`: momentum with curvature in its recursion.

    The largest stable eigenvalue is `2 (1 + rho - beta damping) / (beta (2 + learning_rate))`.
    """

    rho: float
    beta: float
    damping: float

    def limit(self, rate: float, decay: float) -> float:
        """See `Rule`."""
        two = 2.0 - rate * decay
        return rate * two * (1.0 + self.rho - self.beta * self.damping) / (self.beta * (two + rate))

    def formula(self, rate: float, decay: float) -> str:
        """See `Rule`."""
        two = f"(2-{number(rate)}·{number(decay)})" if decay else "2"
        beta = number(self.beta)
        top = f"(1+{number(self.rho)}-{beta}·{number(self.damping)})"
        return f"{two}{top}/({beta}({two}+{number(rate)}))"


@dataclasses.dataclass(frozen=True)
class LinearStep:
    """The description of a step that is a linear map of the gradient while the state is held fixed.

    Args:
        rule: A `Rule`, or another object with its two methods.
        preconditioner: A function that returns `M` at the current state, a positive definite `LinearOperator`; called
            only after the first step. `None`: the identity.
        note: A sentence on when the limit does not hold, or `None`.
    """

    rule: Rule | OnTheQuadratic
    preconditioner: Callable[[], LinearOperator] | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class NotLinear:
    """The description of a step that is not linear in the gradient.

    Args:
        reason: A sentence for the user.
    """

    reason: str


def steps_taken(optimizer: keras.Optimizer) -> int:
    """`iterations + 1` of the last step, a Python integer; Keras counts steps, also those of accumulated gradients."""
    return replicas.read(optimizer.iterations)


def number(value: float) -> str:
    """A number with six significant digits and no trailing zeros."""
    return f"{value:.6g}"
