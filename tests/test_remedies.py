"""The remedy that a message names is applied, and works: each case provokes the message, and runs what it advises."""

import dataclasses
import typing

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from selection import some

import keras_curvature as kc

X = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(6, 1)).astype("float32")


def network(*stack, cls=keras.Sequential):
    """A small regression network with 16 weights, or with other layers on the inputs."""
    return cls([keras.Input((3,)), *(stack or (layers.Dense(3, activation="tanh"), layers.Dense(1)))])


def fit(optimizer, loss="mse", model=None, x=X, y=Y, curved=True, **options):
    """One step; `model` is a function that builds one."""
    model = (model or network)()
    model = kc.curved(model, **options) if curved else model
    model.compile(optimizer=optimizer, loss=loss)
    assert np.isfinite(np.asarray(model.train_on_batch(x, y))).all()
    return model


def measured(loss="mse", model=None, x=X, y=Y):
    """A compiled model and data, to measure."""
    model = (model or network)()
    model.compile("sgd", loss, jit_compile=False)
    return model, (x, y)


def own_loss(y, z):
    """Squares, by a function without a likelihood."""
    return keras.ops.mean(keras.ops.square(y - z), -1)


def named(likelihood):
    """The same function with a likelihood, as the message advises."""

    def my_loss(y, z):
        return own_loss(y, z)

    my_loss.likelihood = likelihood
    return my_loss


class ComputesLoss(keras.Sequential):
    """A model with a `compute_loss` of its own."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Squares."""
        return keras.ops.mean(keras.ops.square(y - y_pred))


class LossOfEach(keras.Sequential):
    """A model with a `compute_loss` that returns the loss of each example."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Squares."""
        return keras.ops.mean(keras.ops.square(y - y_pred), -1)


class Likely(ComputesLoss):
    """The same with a likelihood, as the message advises."""

    likelihood = kc.likelihoods.Gaussian


class LikelyLogits(keras.Sequential):
    """A model of logits that names its likelihood, as the message advises."""

    likelihood = kc.likelihoods.Bernoulli({}, logits=True)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Cross-entropy."""
        return keras.ops.mean(keras.ops.binary_crossentropy(keras.ops.cast(y > 0, y_pred.dtype), y_pred, True))


class Past(keras.Sequential):
    """A model whose loss calls the layers itself."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Squares."""
        return keras.ops.mean(keras.ops.square(self.layers[-1](self.layers[0](x)) - y))


class TrainsItself(keras.Sequential):
    """A model with a train step of its own."""

    def train_step(self, data):
        """Nothing."""
        return {}


class Looped(keras.layers.Layer):
    """A layer that calls another one in a loop."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def build(self, shape):
        """Build the layer inside."""
        self.inner.build(shape)

    def call(self, x):
        """Twice."""
        return tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, self.inner(x)), (0, x))[1]


class Plain(keras.layers.Dense):
    """What the message says."""

    def call(self, *args, **kwargs):
        """As `Dense`."""
        return super().call(*args, **kwargs)


def looped(inner):
    """A model of a layer in a loop."""
    return lambda: network(Looped(inner(3)), layers.Dense(1))


def with_a_frozen_layer():
    """A model whose first layer assigns its weights, and is frozen."""
    model = network(layers.SpectralNormalization(layers.Dense(3)), layers.Dense(1))
    model.layers[0].trainable = False
    return model


def noise_of_a_layer():
    """The noise of one layer's gradient."""
    model, data = measured()
    return kc.curvature(model, data, layers=model.layers[0].name).noise(2)


def in_a_loop(optimizer, gradients=False):
    """A step in a training loop of one's own, from gradients or, as the message advises, from the batch."""
    model = kc.curved(network())
    model.compile(optimizer, "mse")
    linearization = kc.Linearization(model, X, Y)
    before = float(linearization.loss)
    if gradients:
        optimizer.apply(linearization.gradient, model.trainable_variables)
    optimizer.step(linearization)
    linearization.commit()
    assert float(kc.Linearization(model, X, Y).loss) < before


def accumulated(**options):
    """A step with or without accumulation of gradients."""
    return fit(kc.CurveBall(**options))


def served_twice(again):
    """Two models with one optimizer, or with one made `again` for the second."""
    optimizer = kc.CurveBall()
    fit(optimizer)
    return fit(again(optimizer))


def applied(*build):
    """Gradients for an optimizer that may be built."""
    optimizer, variable = kc.Neumann(), keras.Variable(np.ones(3, "float32"))
    for name in build:
        getattr(optimizer, name)([variable])
    optimizer.apply([tf.ones(3)])


def asked(question, **options):
    """A question to a linearization."""
    model, data = measured()
    return question(kc.Linearization(model, *data, **options))


def solved(solver, loss="mse"):
    """Conjugate gradients on a Hessian."""
    lin = kc.Linearization(*unpacked(measured(loss)))
    return solver.solve(lin.hessian() + 1e-2 * kc.Identity(), [-g for g in lin.gradient])


def unpacked(found):
    """`(model, x, y)`."""
    model, data = found
    return (model, *data)


def without_examples(fisher):
    """Exact Fisher factors for outputs of unknown or known length."""
    model = lambda: keras.Sequential([keras.Input((None, 3)), layers.Dense(1)])  # noqa: E731
    model = kc.curved(model())
    model.compile(optimizer=kc.KFAC(fisher=fisher), loss="mse")
    unknown = tf.TensorSpec([6, None, 3]), tf.TensorSpec([6, None, 1])
    x = np.ones((6, 2, 3), "float32")
    data = tf.data.Dataset.from_generator(lambda: iter([(x, x[..., :1])]), output_signature=unknown)
    return model.fit(data, steps_per_epoch=1, shuffle=False, verbose=0)


def frozen(trainable):
    """Measure a model with nothing to train, or with its layers set trainable again."""
    model, data = measured()
    model.trainable = trainable
    model.compile("sgd", "mse")
    return kc.curvature(model, data).trace()


HUBER = keras.losses.Huber()
CONVEX = "convex in the model.s outputs.*"
UNLIKELY = "Labels cannot be sampled.*"
NO_OUTPUTS = "does not depend on the model.s outputs.*"
A = kc.Identity()


@dataclasses.dataclass
class Case:
    """A message, how to provoke it, and what it advises."""

    message: str
    provoke: typing.Callable
    remedies: list


CASES = {
    "curved": Case(r"model = keras_curvature.curved\(model\)", lambda: fit(kc.CurveBall(), curved=False), [
        lambda: fit(kc.CurveBall())]),
    "curved_in_a_loop": Case(
        r"optimizer.step\(linearization\)", lambda: in_a_loop(kc.KFAC(), gradients=True),
        [lambda: in_a_loop(kc.KFAC()), lambda: in_a_loop(kc.CurveBall())]),
    "loss_of_each_example": Case(
        "Leave out `reduction=None`", lambda: fit(kc.CurveBall(), keras.losses.MeanSquaredError(reduction=None)), [
            lambda: fit(kc.CurveBall(), keras.losses.MeanSquaredError()),
            lambda: fit(kc.CurveBall(), keras.losses.MeanSquaredError(reduction="sum"))]),
    "own_loss_of_each_example": Case(
        "return the mean over the examples from a `compute_loss`",
        lambda: fit(kc.CurveBall(), model=lambda: network(cls=LossOfEach)),
        [lambda: fit(kc.CurveBall(), model=lambda: network(cls=ComputesLoss))]),
    "curved_layers": Case(r"model = keras_curvature.curved\(model\)", lambda: fit(kc.Eva(), curved=False), [
        lambda: fit(kc.Eva())]),
    "new_optimizer": Case(r"type\(optimizer\).from_config\(optimizer.get_config\(\)\)", lambda: served_twice(
        lambda optimizer: optimizer), [
        lambda: served_twice(lambda optimizer: type(optimizer).from_config(optimizer.get_config()))]),
    "build": Case(r"optimizer.build\(trainable_variables\)", applied, [lambda: applied("build")]),
    "accumulation": Case("Use a larger batch", lambda: accumulated(gradient_accumulation_steps=2), [accumulated]),
    "identity": Case(r"write `A \+ 0.1 \* keras_curvature.Identity\(\)`", lambda: A + 0.1, [
        lambda: A + 0.1 * kc.Identity()]),
    "vector": Case(r"write `A @ vector`.*`operators.Diagonal\(entries\)`", lambda: A * [tf.ones(2)], [
        lambda: A @ [tf.ones(2)], lambda: kc.operators.Diagonal([tf.ones(2)]) @ [tf.ones(2)]]),
    "likelihood": Case(UNLIKELY + "my_loss.likelihood = keras_curvature.likelihoods.Gaussian", lambda: fit(
        kc.KFAC(), own_loss), [
        lambda: fit(kc.KFAC(), named(kc.likelihoods.Gaussian)), lambda: fit(kc.KFAC(fisher="empirical"), own_loss),
        lambda: fit(kc.EKFAC(fisher="empirical"), own_loss)]),
    "likelihood_of_model": Case(UNLIKELY + "has it in its class", lambda: fit(
        kc.SophiaG(), None, lambda: network(cls=ComputesLoss)), [
        lambda: fit(kc.SophiaG(), None, lambda: network(cls=Likely)),
        lambda: fit(kc.SophiaG(), None, lambda: network(cls=LikelyLogits)),
        lambda: fit(kc.SophiaH(), None, lambda: network(cls=ComputesLoss))]),
    "likelihood_of_adam": Case(UNLIKELY + "SquareRootFreeAdam", lambda: fit(
        kc.SquareRootFreeAdam(fisher="sampled"), own_loss), [
        lambda: fit(kc.SquareRootFreeAdam(fisher="empirical"), own_loss)]),
    "convex": Case(CONVEX + r"HessianFree\(curvature=.hessian.\)", lambda: fit(
        kc.HessianFree(), keras.losses.CosineSimilarity()), [
        lambda: fit(kc.HessianFree(curvature="hessian"), keras.losses.CosineSimilarity())]),
    "convex_curveball": Case(CONVEX + "Choose another loss, or an optimizer", lambda: fit(
        kc.CurveBall(), keras.losses.CosineSimilarity()), [
        lambda: fit(kc.CurveBall()), lambda: fit(kc.AdaHessian(), keras.losses.CosineSimilarity())]),
    "past_outputs": Case(NO_OUTPUTS + r"HessianFree\(curvature=.hessian., preconditioner=0.0\)", lambda: fit(
        kc.HessianFree(), None, lambda: network(cls=Past)), [
        lambda: fit(kc.HessianFree(curvature="hessian", preconditioner=0.0), None, lambda: network(cls=Past)),
        lambda: fit(kc.HessianFree(), None, lambda: network(cls=ComputesLoss))]),
    "structural_damping": Case("Use `structural_damping=0.0`", lambda: fit(kc.HessianFree(structural_damping=0.1)), [
        lambda: fit(kc.HessianFree(structural_damping=0.0))]),
    "train_step": Case("the loss in `compute_loss", lambda: fit(
        kc.CurveBall(), None, lambda: network(cls=TrainsItself)), [
        lambda: fit(kc.CurveBall(), None, lambda: network(cls=ComputesLoss))]),
    "assigned": Case("Replace or freeze that layer, or train with an optimizer that needs only gradients", lambda: fit(
        kc.CurveBall(), model=lambda: network(layers.SpectralNormalization(layers.Dense(3)), layers.Dense(1))), [
        lambda: fit(kc.CurveBall(), model=with_a_frozen_layer),
        lambda: fit(kc.Neumann(), curved=False, model=lambda: network(
            layers.SpectralNormalization(layers.Dense(3)), layers.Dense(1)))]),
    "in_a_loop": Case("Use a subclass with its own `call`", lambda: fit(kc.KFAC(), model=looped(layers.Dense)), [
        lambda: fit(kc.KFAC(), model=looped(Plain))]),
    "needs": Case(r"needs=Needs\(hessian=True\)", lambda: asked(lambda lin: lin.hessian(), needs=kc.Needs()), [
        lambda: asked(lambda lin: lin.hessian(), needs=kc.Needs(hessian=True))]),
    "no_loss": Case(r"Call `model.compile\(loss=...\)` first", lambda: kc.Linearization(network(), X, Y), [
        lambda: kc.Linearization(*unpacked(measured()))]),
    "solver": Case(r"`ConjugateGradient\(truncate=True\)`", lambda: solved(kc.ConjugateGradient()), [
        lambda: solved(kc.ConjugateGradient(truncate=True))]),
    "no_second_derivative": Case("Or train with an optimizer that needs only gradients: `SOAP`", lambda: fit(
        kc.AdaHessian(), no_second_derivative), [
        lambda: fit(kc.SOAP(), no_second_derivative), lambda: fit(kc.Neumann(), no_second_derivative)]),
    "exact": Case('Use `fisher="sampled"`', lambda: without_examples("exact"), [lambda: without_examples("sampled")]),
    "kind_ggn": Case("Use kind='hessian'", lambda: kc.curvature(
        *measured(keras.losses.CosineSimilarity()), kind="ggn"), [
        lambda: kc.curvature(*measured(keras.losses.CosineSimilarity()), kind="hessian")]),
    "kind_fisher": Case("Use kind='ggn', kind='empirical_fisher' or kind='hessian'", lambda: kc.curvature(
        *measured(HUBER), kind="fisher"), [
        lambda kind=kind: kc.curvature(*measured(HUBER), kind=kind).trace(3)
        for kind in ("ggn", "empirical_fisher", "hessian")]),
    "trainable": Case("Set `trainable = True` on the layers", lambda: frozen(False), [lambda: frozen(True)]),
    "labels": Case("Use kind='fisher', or labels=False", lambda: kc.curvature(
        *measured("mae"), kind="ggn").trace(labels=True), [
        lambda: kc.curvature(*measured("mae"), kind="fisher").trace(labels=True),
        lambda: kc.curvature(*measured("mae"), kind="ggn").trace(labels=False)]),
    "noise_of_layers": Case("Ask `keras_curvature.curvature.model, data.` without `layers`", noise_of_a_layer, [
        lambda: kc.curvature(*measured()).noise(2)]),
    "noise_micro_batch": Case("Use a smaller `micro_batch`", lambda: kc.curvature(*measured()).noise(6), [
        lambda: kc.curvature(*measured()).noise(2)]),
    "damping": Case("Pass a larger damping|Pass damping > |use kind='ggn'", lambda: kc.curvature(*measured()).solve(
        [tf.ones(w.shape) for w in measured()[0].trainable_variables], damping=1e-9), [
        lambda: kc.curvature(*measured()).solve(
            [tf.ones(w.shape) for w in measured()[0].trainable_variables], damping=10.0),
        lambda: kc.curvature(*measured(), kind="ggn").solve(
            [tf.ones(w.shape) for w in measured()[0].trainable_variables], damping=0.1)]),
    "sum": Case("Pass a `batch_size` that divides their number, or fewer `examples`", lambda: kc.curvature(
        *measured(keras.losses.MeanSquaredError(reduction="sum")), batch_size=4), [
        lambda: kc.curvature(*measured(keras.losses.MeanSquaredError(reduction="sum")), batch_size=3),
        lambda: kc.curvature(*measured(keras.losses.MeanSquaredError(reduction="sum")), batch_size=4, examples=4)]),
    "landscape": Case("Use directions='sharpest'", lambda: kc.landscape(
        *measured(model=lambda: network(layers.LayerNormalization()), y=X), directions="random", points=3), [
        lambda: kc.landscape(
            *measured(model=lambda: network(layers.LayerNormalization()), y=X), directions="sharpest", points=3)]),
}  # fmt: skip


@tf.custom_gradient
def _once(x):
    def gradient(g):
        return g * tf.raw_ops.PreventGradient(input=2.0 * x, message="no second derivative here")

    return x * x, gradient


def no_second_derivative(y, z):
    """Squares that can be differentiated once."""
    return tf.reduce_mean(_once(z - y), -1)


# the same remedies where the model or the optimizer is another, and two refusals that test_errors.py has too; of the
# others every second runs by default
SLOW = ["likelihood_of_model", "likelihood_of_adam", "convex_curveball", "new_optimizer", "no_second_derivative"]


@pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")
@pytest.mark.parametrize("name", some(CASES, [name for name in CASES if name not in SLOW][::2]))
def test_a_remedy_works(name):
    keras.utils.set_random_seed(0)
    case = CASES[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){case.message}"):
        case.provoke()
    for remedy in case.remedies:
        remedy()
