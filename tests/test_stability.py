"""The edge of stability, without the formulas of the package: steps of the optimizers themselves, as matrices.

With what it multiplies gradients by held at the present values, a step of an optimizer on a quadratic is a matrix on
the weights and their momentum. It is put together here column by column, by real steps on tiny vectors, and its
eigenvalues say whether the step diverges. `stability` has to know, to six digits, the scale of the Hessian at which it
begins to.
"""

import dataclasses
import functools
import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat, put
from optimizers import OPTIMIZERS
from selection import some

import keras_curvature as kc
from keras_curvature import Linearization, curved, keras_internals
from keras_curvature.monitor.keras_steps import OF_KERAS, REASONS
from keras_curvature.monitor.stability import Stability, stability
from keras_curvature.operators.base import dense
from keras_curvature.optimizers import limits

pytestmark = pytest.mark.usefixtures("in_float64")
TINY = 1e-9  # of the vectors that steps are tried on: their squares are nothing to what the state is made of


# The formulas, against the eigenvalues of the recursions that they are about.


def radius(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


RECURSIONS = {  # name: the rule of a momentum, and the matrix of `(w, m)` at a = rate * curvature and d = rate * decay
    "heavy_ball": (limits.heavy_ball, lambda a, b, d: [[1 - d - a, b], [-a, b]]),
    "nesterov": (limits.nesterov, lambda a, b, d: [[1 - d - a - b * a, b * b], [-a, b]]),
    "averaged": (limits.averaged, lambda a, b, d: [[1 - d - a * (1 - b), -a * b], [1 - b, b]]),
    "combined": (
        lambda b: limits.combined(b, 0.7, 0.4),
        lambda a, b, d: [[1 - d - a * (0.7 * (1 - b) + 0.4), -a * 0.7 * b], [1 - b, b]],
    ),
}


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("b", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("name", RECURSIONS)
def test_every_formula_is_where_the_recursion_begins_to_diverge(name, b, decay):
    rule, matrix = RECURSIONS[name]
    limit = rule(b).limit(0.5, decay)
    radii = [radius(np.array(matrix(f * limit, b, 0.5 * decay))) for f in (0.01, 0.5, 0.99, 1.0, 1.001)]
    assert max(radii[:3]) < 1 - 1e-5
    assert radii[3] == pytest.approx(1, abs=1e-12)
    assert radii[4] > 1 + 1e-6


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_momentum_on_the_quadratic_begins_to_diverge_at_its_formula(rho, decay):
    rate, beta, damping = 0.8, 0.1, 0.4
    bound = limits.OnTheQuadratic(rho, beta, damping).limit(rate, decay) / rate

    def matrix(h):
        z = np.array([-beta * h, rho - beta * (h + damping)])
        return np.array([rate * z + [1 - rate * decay, 0], z])

    assert radius(matrix(0.999 * bound)) < 1 < radius(matrix(1.001 * bound))
    assert radius(matrix(bound)) == pytest.approx(1, abs=1e-12)


def test_published_limits():
    # Cohen et al. (2021), equation 1 and below, and (2022), section 2
    assert limits.Rule().limit(1.0, 0.0) == 2
    assert limits.heavy_ball(0.9).limit(1.0, 0.0) == pytest.approx(3.8)
    assert limits.nesterov(0.9).limit(1.0, 0.0) == pytest.approx(2 * 1.9 / 2.8)
    assert limits.averaged(0.9).limit(1.0, 0.0) == pytest.approx(38)


def evaluated(formula):
    """What a formula such as `2(1+0.9)/0.05` comes to."""
    return eval(re.sub(r"(?<=[\d)])\(", "*(", formula.replace("·", "*")))


RULES = [
    limits.Rule(), limits.heavy_ball(0.9), limits.nesterov(0.75), limits.averaged(0.99),
    limits.combined(0.5, 0.75, 0.1), limits.OnTheQuadratic(0.9, 0.5, 0.25),
]  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, 0.04])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_formula_in_words_is_the_limit_over_the_rate(rule, decay):
    assert evaluated(rule.formula(0.05, decay)) == pytest.approx(rule.limit(0.05, decay) / 0.05, rel=1e-12)


def test_formulas_read_as_one_would_write_them():
    assert limits.heavy_ball(0.9).formula(0.05, 0.0) == "2(1+0.9)/0.05"
    assert limits.Rule().formula(np.float32(0.1), 0.0) == "2/0.1"
    assert limits.averaged(0.9).formula(0.001, 0.01) == "(2-0.001·0.01)(1+0.9)/(1-0.9)/0.001"


# Steps of the optimizers themselves.


@dataclasses.dataclass
class Frozen:
    """An optimizer after some steps, whose next ones find the state as it is now.

    Args:
        optimizer: Built.
        variables: Keras variables.
        momenta: Names of the attributes that hold momentum, which moves.
        decays: `{attribute: factor}` of state that a step multiplies before it is used: put back as many times larger.
        take: A function of a vector, the gradient, that takes a step.
    """

    optimizer: object
    variables: list
    momenta: tuple
    decays: dict
    take: object

    def __post_init__(self):
        self.kept = [v.numpy() for v in self._state]

    @property
    def _state(self):
        return [*self.optimizer.variables, *self._untracked]

    @property
    def _untracked(self):
        return [self.optimizer._u_product] if isinstance(self.optimizer, keras.optimizers.Nadam) else []

    @functools.cached_property
    def moving(self):
        return [*self.variables, *(v for name in self.momenta for v in getattr(self.optimizer, name))]

    def _put_back(self):
        for variable, value in zip(self._state, self.kept):
            variable.assign(value)
        o = self.optimizer
        for counter in (o.iterations, getattr(o, "_taken", None), getattr(o, "_counts", None)):
            if counter is not None and (counter is o.iterations or not isinstance(o, kc.AdaHessian | kc.ESGD)):
                counter.assign(counter - 1)
        for product in self._untracked:
            product.assign(product / (o.beta_1 * (1 - 0.5 * 0.96 ** (int(o.iterations) + 1))))
        for name, factor in self.decays.items():
            for variable in getattr(o, name):
                variable.assign(variable / factor)

    def after(self, moving, gradient):
        self._put_back()
        put(self.moving, TINY * moving)
        self.take(TINY * gradient)
        return flat(self.moving) / TINY

    def matrices(self):
        """`(A, B)` of a step `A (w, m) + B g`."""
        n, size = len(flat(self.variables)), len(flat(self.moving))
        A = [self.after(e, np.zeros(n)) for e in np.eye(size)]
        B = [self.after(np.zeros(size), e) for e in np.eye(n)]
        return np.array(A).T, np.array(B).T


def check_the_edge(frozen, H):
    """On a quadratic of Hessian `s H`, with `s` just below the edge, at it, and above."""
    found = stability(frozen.optimizer)
    n = len(H)
    M = np.eye(n) if found.preconditioner is None else dense(found.preconditioner, frozen.variables).numpy()
    np.testing.assert_allclose(M, M.T, rtol=0, atol=1e-10 * np.abs(M).max())
    assert np.linalg.eigvalsh(M).min() > 0
    sharpness = np.linalg.eigvals(M @ H).real.max()
    edge = 1 / found.gauge(sharpness)
    assert found.sharpness_limit == pytest.approx(edge * sharpness)
    assert evaluated(found.formula) == pytest.approx(found.sharpness_limit, rel=1e-4)
    A, B = frozen.matrices()

    def at(s):
        return radius(A + s * B @ np.pad(H, ((0, 0), (0, len(A) - n))))

    assert at(edge) == pytest.approx(1, abs=1e-6)
    assert at(0.99 * edge) < 1 < at(1.001 * edge)


def quadratic(n, seed=5):
    """A positive definite matrix."""
    X = np.random.default_rng(seed).standard_normal((2 * n, n))
    return X.T @ X / n


K = keras.optimizers
ADAM = {"beta_1": 0.875, "beta_2": 0.75, "epsilon": 2.0**-6}  # Keras rounds betas to float32: these are exact there
KERAS = {  # name: a factory, what of the state is momentum, what a step multiplies before it uses it
    "sgd": (lambda: K.SGD(0.1), (), {}),
    "sgd_decay": (lambda: K.SGD(0.1, weight_decay=0.5), (), {}),
    "momentum": (lambda: K.SGD(0.1, momentum=0.875), ("momentums",), {}),
    "momentum_decay": (lambda: K.SGD(0.1, momentum=0.5, weight_decay=2.0), ("momentums",), {}),
    "nesterov": (lambda: K.SGD(0.1, momentum=0.875, nesterov=True), ("momentums",), {}),
    "adam": (lambda: K.Adam(0.1, **ADAM), ("_momentums",), {"_velocities": 0.75}),
    "adamw": (lambda: K.AdamW(0.1, weight_decay=0.5, **ADAM), ("_momentums",), {"_velocities": 0.75}),
    "amsgrad": (lambda: K.Adam(0.1, amsgrad=True, **ADAM), ("_momentums",), {"_velocities": 0.75}),
    "nadam": (lambda: K.Nadam(0.1, **ADAM), ("_momentums",), {"_velocities": 0.75}),
    "adamax": (lambda: K.Adamax(0.1, **ADAM), ("_m",), {"_u": 0.75}),
    "rmsprop": (lambda: K.RMSprop(0.1, rho=0.75, epsilon=0.01), (), {"_velocities": 0.75}),
    "rmsprop_momentum": (
        lambda: K.RMSprop(0.1, rho=0.75, momentum=0.8, centered=True), ("_momentums",),
        {"_velocities": 0.75, "_average_gradients": 0.75},
    ),
    "adagrad": (lambda: K.Adagrad(0.1, epsilon=0.01), (), {}),
    "adadelta": (lambda: K.Adadelta(0.1, rho=0.75, epsilon=0.01), (), {"_accumulated_grads": 0.75}),
}  # fmt: skip
BY_GRADIENT = {
    "neumann": (
        lambda: kc.Neumann(0.1, alpha=0.0, beta=0.0, mu_start=0.9, mu_end=0.9, warmup_steps=0), ("_m",), {},
    ),
    "square_root_free_adam": (
        lambda: kc.SquareRootFreeAdam(0.1, beta_1=0.9, beta_2=0.75, epsilon=0.1, step_max=None), ("_m",), {"_D": 0.75}
    ),
    "soap": (lambda: kc.SOAP(0.1, beta_1=0.8, beta_2=0.75, epsilon=0.01), ("_m",), {"_v": 0.75}),
    "soap_one_sided": (lambda: kc.SOAP(0.1, beta_2=0.75, epsilon=0.01, max_dimension=2), ("_m",), {"_v": 0.75}),
    "kl_shampoo": (
        lambda: kc.KLShampoo(0.1, beta_1=0.8, beta_2=0.75, epsilon=0.01), ("_m",), {"_v": 0.75}
    ),
    "shampoo": (
        lambda: kc.Shampoo(0.1, beta_1=0.8, beta_2=0.9, epsilon=0.01, every=2, block_size=2, grafting=None), ("_m",), {}
    ),
    "psgd": (lambda: kc.PSGD(0.1, momentum=0.9, every=3, clip=None), ("_m",), {}),
    "psgd_decay": (lambda: kc.PSGD(0.1, every=3, clip=None, weight_decay=0.5), (), {}),
}  # fmt: skip


def trained(optimizer, shapes=((3, 2), (2,)), steps=5, seed=1):
    """Variables, and the optimizer after some steps with random gradients."""
    random = np.random.default_rng(seed)
    variables = [keras.Variable(random.standard_normal(shape)) for shape in shapes]
    for _ in range(steps):
        optimizer.apply([tf.constant(0.5 + random.standard_normal(shape)) for shape in shapes], variables)
    return variables


@pytest.mark.parametrize("name", some([*KERAS, *BY_GRADIENT], [*KERAS, *BY_GRADIENT][::2]))
def test_steps_begin_to_diverge_where_the_gauge_is_one(name):
    make, momenta, decays = {**KERAS, **BY_GRADIENT}[name]
    optimizer = make()
    variables = trained(optimizer)

    def take(gradient):
        parts = np.split(gradient, np.cumsum([math.prod(v.shape) for v in variables])[:-1])
        optimizer.apply([tf.constant(g.reshape(v.shape)) for g, v in zip(parts, variables)], variables)

    check_the_edge(Frozen(optimizer, variables, momenta, decays, take), quadratic(8))


# Of methods that look at the model: a linear regression, and a batch that claims to have the gradient wanted.


class Own(keras.layers.Layer):
    """A scale that no method of layers knows."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        """`x` scaled."""
        return x * self.scale


BY_MODEL = {
    "adahessian": (lambda: kc.AdaHessian(0.1, beta_1=0.8, beta_2=0.75, every=3, step_max=None), ("_m",)),
    "adahessian_power": (
        lambda: kc.AdaHessian(0.1, hessian_power=0.5, every=3, step_max=None, weight_decay=0.5), ("_m",)
    ),
    "esgd": (lambda: kc.ESGD(0.1, every=3, step_max=None), ()),
    "psgd_newton": (
        lambda: kc.PSGD(0.1, momentum=0.5, kind="newton", geometry=kc.LowRankGeometry(rank=2), every=3), ("_m",)
    ),
    "kfac": (lambda: kc.KFAC(0.1, factors_every=3, inverses_every=3, kl_clip=None), ("_velocity",)),
    "ekfac": (lambda: kc.EKFAC(0.1, momentum=0.5, factors_every=3, inverses_every=3), ("_velocity",)),
    "eva": (lambda: kc.Eva(0.1), ("_velocity",)),
    "foof": (lambda: kc.FOOF(0.1, damping=0.3, factors_every=3, inverses_every=3, output_clip=None), ("_velocity",)),
    "tnt": (lambda: kc.TNT(0.1, damping=0.5, factors_every=3, inverses_every=3, kl_clip=None), ("_m",)),
    "singd": (lambda: kc.SINGD(0.1, damping=0.1, every=3, kl_clip=None), ("_velocity",)),
    "if_shampoo": (lambda: kc.IFShampoo(0.1, damping=0.1, every=3, kl_clip=None), ("_velocity",)),
    "kbfgs": (lambda: kc.KBFGS(0.1, damping=0.1, warmup_steps=2), ("_m",)),
}  # fmt: skip


class Fed(Linearization):
    """A batch that has the gradient that it is given."""

    fed = None

    @property
    def gradient(self):
        """The given one, or the batch's own."""
        return super().gradient if self.fed is None else self.fed


def regression(seed=0, own=False):
    """`(model, x, y)`: the loss is quadratic, and its Hessian and Gauss-Newton matrix are the same."""
    random = np.random.default_rng(seed)
    inputs = keras.Input((2,))
    outputs = Own()(inputs) if own else keras.layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.05))(inputs)
    model = curved(keras.Model(inputs, outputs))
    model.compile(loss="mse")
    x, y = random.standard_normal((6, 2)), random.standard_normal((6, 2))
    return model, tf.constant(x), tf.constant(y)


ON_A_MODEL = [*BY_MODEL, "kfac_own", "eva_own"]


@pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")
@pytest.mark.parametrize("name", some(ON_A_MODEL, ON_A_MODEL[::2]))
def test_steps_on_a_model_begin_to_diverge_where_the_gauge_is_one(name):
    make, momenta = BY_MODEL[name.removesuffix("_own")]
    model, x, y = regression(own=name.endswith("_own"))
    optimizer, variables = make(), model.trainable_variables
    optimizer.meet(model)
    for _ in range(5):
        optimizer.step(Linearization(model, x, y))
    if name.startswith("eva"):
        optimizer.beta = 1.0  # the next vectors are the last ones

    def take(gradient):
        lin = Fed(model, x, y)
        sizes = np.cumsum([math.prod(v.shape) for v in variables])[:-1]
        lin.fed = [tf.constant(g.reshape(v.shape)) for g, v in zip(np.split(gradient, sizes), variables)]
        optimizer.step(lin)

    H = quadratic(len(flat(variables)))
    check_the_edge(Frozen(optimizer, variables, momenta, {}, take), H)


def test_curveball_with_fixed_numbers_begins_to_diverge_where_the_gauge_is_one():
    model, x, y = regression()
    rho, beta, damping = 0.7, 0.4, 0.2
    optimizer, variables = kc.CurveBall(1.0, damping=damping, beta=beta, rho=rho), model.trainable_variables
    optimizer.step(Linearization(model, x, y))
    H = dense(Linearization(model, x, y).hessian(), variables).numpy()
    sharpness = np.linalg.eigvalsh(H)[-1]
    optimizer.learning_rate = 2 * (1 + rho - beta * damping) / (beta * sharpness) - 2
    assert float(optimizer.learning_rate) > 0.1
    found = stability(optimizer)
    assert found.preconditioner is None
    assert found.gauge(sharpness) == pytest.approx(1)
    assert found.sharpness_limit == pytest.approx(sharpness) == evaluated(found.formula)

    def take(_):  # no target but zero: the gradient is `H w`
        optimizer.step(Linearization(model, x, tf.zeros_like(y)))

    A, _ = Frozen(optimizer, variables, ("_z",), {}, take).matrices()
    assert radius(A) == pytest.approx(1, abs=1e-6)


# Who has a limit, and who has a reason why not.


def claims(name):
    """Whether the method claims a limit, with the settings of the registry."""
    return not isinstance(OPTIMIZERS[name]().linear_step(), limits.NotLinear)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_limit_or_a_reason(name):
    optimizer = OPTIMIZERS[name]()
    found = stability(optimizer)
    assert found.rate == pytest.approx(float(optimizer.learning_rate))
    if claims(name) and optimizer.linear_step().preconditioner is None:  # no step is needed to know it
        assert found.limit > 0 and found.reason is None
        return
    assert found.limit is found.formula is found.preconditioner is found.sharpness_limit is None
    assert type(optimizer).__name__ in found.reason and found.reason.endswith(".")
    assert ("has not moved the weights yet" in found.reason) == claims(name)
    with pytest.raises(ValueError, match=re.escape(found.reason)):
        found.gauge(1.0)


def test_every_optimizer_that_claims_a_limit_is_tried_above():
    tried = {type(make()) for make, *_ in [*BY_GRADIENT.values(), *BY_MODEL.values()]} | {kc.CurveBall}
    defined = {type(make()) for name, make in OPTIMIZERS.items() if claims(name)}
    assert defined == tried - {kc.Shampoo}  # of which the registry has the grafted form alone


def keras_optimizers():
    found = [value for value in vars(keras.optimizers).values() if isinstance(value, type)]
    special = (K.LossScaleOptimizer, keras_internals.MULTI_OPTIMIZER, K.Optimizer)
    return [cls for cls in found if issubclass(cls, K.Optimizer) and cls not in special]


@pytest.mark.parametrize("cls", keras_optimizers())
def test_every_optimizer_of_keras_is_known(cls):
    optimizer = cls(learning_rate=0.1)
    owner = next(c for c in cls.__mro__ if "update_step" in vars(c))
    assert (owner in OF_KERAS) != (owner in REASONS)
    if owner in OF_KERAS:
        assert cls in {type(make()) for make, *_ in KERAS.values()}
    else:
        found = stability(optimizer)
        assert found.limit is None and found.reason.startswith(f"`{cls.__name__}` ") and found.reason.endswith(".")


def test_a_method_of_ones_own_has_no_limit():
    class Own(K.SGD):
        def update_step(self, gradient, variable, learning_rate):
            """Nothing."""

    class Named(K.SGD):
        """One with Keras' own step."""

    class OfOurs(kc.CurvatureOptimizer):
        """One of a user's."""

    assert "`Own` has its own `update_step`" in stability(Own()).reason
    assert stability(Named(0.1)).sharpness_limit == pytest.approx(20)
    assert "`OfOurs`" in stability(OfOurs(0.1)).reason


# What an optimizer is wrapped in, set up with, and asked about.


def test_the_optimizer_inside_of_a_loss_scale_is_asked():
    inner = K.Adam(0.1, **ADAM)
    variables = trained(inner)
    outer = K.LossScaleOptimizer(inner)
    found, expected = stability(outer, variables), stability(inner)
    assert (found.rate, found.limit, found.formula) == (expected.rate, expected.limit, expected.formula)
    for entries, others in zip(found.preconditioner.entries, expected.preconditioner.entries):
        np.testing.assert_array_equal(entries, others)


@pytest.mark.skipif(not keras_internals.MULTI_OPTIMIZER, reason="this Keras has no `MultiOptimizer`")
def test_several_optimizers_have_no_limit_together():
    several = K.MultiOptimizer(K.OptimizerMap(K.SGD(0.1)))
    found = stability(several)
    assert math.isnan(found.rate) and found.limit is None and "several optimizers" in found.reason


def test_the_rate_is_that_of_the_next_step():
    optimizer = K.SGD(K.schedules.ExponentialDecay(0.5, 1, 0.5), momentum=0.5)
    variables = [keras.Variable(np.ones(2))]
    for rate in (0.5, 0.25, 0.125):
        found = stability(optimizer, variables)
        assert found.rate == pytest.approx(rate) and found.sharpness_limit == pytest.approx(3 / rate)
        assert found.gauge(np.array([1.0, 2.0])) == pytest.approx(np.array([1.0, 2.0]) * rate / 3)
        optimizer.apply([tf.ones(2, tf.float64)], variables)
    optimizer = K.SGD(0.0)
    assert stability(optimizer).sharpness_limit == math.inf and stability(optimizer).gauge(3.0) == 0.0


@pytest.mark.parametrize(("make", "momentum"), [
    (lambda: K.Adam(0.5, gradient_accumulation_steps=2, **ADAM), "_momentums"),
    (lambda: kc.SquareRootFreeAdam(0.5, beta_1=0.875, beta_2=0.75, step_max=None,
                                   gradient_accumulation_steps=2), "_m"),
])  # fmt: skip
def test_of_accumulated_gradients_the_last_step_counts(make, momentum):
    optimizer = make()
    (variable,) = variables = [keras.Variable(np.ones(3))]
    random = np.random.default_rng(0)
    assert "has not moved" in stability(optimizer, variables).reason
    for batch in range(7):
        before = variable.numpy()
        optimizer.apply([tf.constant(random.standard_normal(3))], variables)
        if batch == 0:
            assert "has not moved" in stability(optimizer, variables).reason
        if batch >= 3:  # the second and third step, and batches that only add
            (entries,) = stability(optimizer, variables).preconditioner.entries
        if batch in (3, 5):
            taken, m = variable.numpy() - before, getattr(optimizer, momentum)[0].numpy()
            np.testing.assert_allclose(taken, -0.5 * entries * m, rtol=1e-12)
            kept = entries
        elif batch > 3:
            np.testing.assert_array_equal(entries, kept)


def test_vectors_are_of_the_variables_in_their_order():
    optimizer = K.Adam(0.1, **ADAM)
    variables = trained(optimizer)
    one, other = stability(optimizer).preconditioner.entries
    np.testing.assert_array_equal(stability(optimizer, variables[::-1]).preconditioner.entries[0], other)
    (alone,) = stability(optimizer, variables[:1]).preconditioner.entries
    np.testing.assert_array_equal(alone, one)
    assert "was built for 2 weights; these 1 are other weights" in stability(optimizer, [keras.Variable(1.0)]).reason
    optimizer = kc.SOAP()
    variables = trained(optimizer)
    assert stability(optimizer, variables).limit is not None
    assert "in another order" in stability(optimizer, variables[::-1]).reason


@pytest.mark.parametrize(("optimizer", "words"), [
    (lambda: K.SGD(0.1, clipnorm=1.0), "upper bound"),
    (lambda: K.SGD(0.1, global_clipnorm=1.0), "upper bound"),
    (lambda: K.SGD(0.1, clipvalue=1.0), "upper bound"),
    (lambda: K.SGD(0.1, use_ema=True, ema_overwrite_frequency=5), "overwritten"),
    (lambda: kc.Neumann(), "`alpha` and `beta`"),
    (lambda: kc.CurveBall(beta=0.1, rho=0.9), "Gauss-Newton"),
])  # fmt: skip
def test_what_the_limit_leaves_out_is_said(optimizer, words):
    assert words in stability(optimizer()).note


def test_clips_of_a_method_are_said():
    model, x, y = regression()
    clips = [(kc.KFAC(), "kl_clip"), (kc.Eva(), "kl_clip"), (kc.PSGD(), "`clip`")]
    clips += [(method(), "`step_max`") for method in (kc.AdaHessian, kc.ESGD, kc.SquareRootFreeAdam)]
    for optimizer, words in clips:
        optimizer.meet(model)
        optimizer.step(Linearization(model, x, y))
        assert words in stability(optimizer).note
    assert stability(K.SGD(0.1, use_ema=True)).note is None


def test_an_optimizer_by_name_is_refused():
    with pytest.raises(ValueError, match="`optimizer` must be a Keras optimizer. Received: optimizer='adam'"):
        stability("adam")


def test_asking_changes_nothing_and_what_was_said_stays():
    optimizer = K.Nadam(0.1, **ADAM)
    variables = trained(optimizer)
    before = [v.numpy() for v in [*optimizer.variables, *variables]]
    found = stability(optimizer)
    entries = [e.numpy() for e in found.preconditioner.entries]
    for v, value in zip([*optimizer.variables, *variables], before):
        np.testing.assert_array_equal(v.numpy(), value)
    optimizer.apply([tf.ones(v.shape, v.dtype) for v in variables], variables)
    for kept, value in zip(found.preconditioner.entries, entries):
        np.testing.assert_array_equal(kept, value)
    assert isinstance(found, Stability)
