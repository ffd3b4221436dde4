"""What is wrong is said at once, by the name that the user typed, and changes nothing."""

import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from optimizers import FAMILIES, NEEDS_CURVATURE, ONE_OF_EACH, OPTIMIZERS
from selection import some

import keras_curvature as kc
from keras_curvature.linearization.gradients import Gradients

# factory, what the message must contain
BAD_ARGUMENTS = {
    "gamma": (lambda: kc.Neumann(gamma=1.5), "gamma=1.5"),
    "alpha": (lambda: kc.Neumann(alpha=-1.0), "alpha=-1.0"),
    "neumann_beta": (lambda: kc.Neumann(beta="1e-5"), "beta='1e-5'"),
    "mu_end": (lambda: kc.Neumann(mu_end=1.0), "mu_end=1.0"),
    "mu_start": (lambda: kc.Neumann(mu_start=0.95), "mu_start"),
    "warmup_steps": (lambda: kc.Neumann(warmup_steps=0.5), "warmup_steps=0.5"),
    "reset_every": (lambda: kc.Neumann(reset_every=1), "reset_every=1"),
    "reset_growth": (lambda: kc.Neumann(reset_growth=0), "reset_growth=0"),
    "steps_per_epoch": (lambda: kc.Neumann.from_epochs(0), "steps_per_epoch=0"),
    "warmup_epochs": (lambda: kc.Neumann.from_epochs(10, warmup_epochs=-1), "warmup_epochs=-1"),
    "solver_name": (lambda: kc.HessianFree(solver="cg"), "solver='cg'"),
    "solver_class": (lambda: kc.HessianFree(solver=kc.ConjugateGradient), "already constructed"),
    "solver_of_another": (lambda: kc.HessianFree(solver=kc.NeumannSeries()), "ConjugateGradient"),
    "line_search": (lambda: kc.HessianFree(line_search="armijo"), "line_search='armijo'"),
    "curvature": (lambda: kc.HessianFree(curvature="fisher"), "curvature='fisher'"),
    "curvature_batch": (lambda: kc.HessianFree(curvature_batch=0), "curvature_batch=0"),
    "curvature_batch_share": (lambda: kc.HessianFree(curvature_batch=1.5), "curvature_batch=1.5"),
    "warm_start": (lambda: kc.HessianFree(warm_start=2), "warm_start=2"),
    "preconditioner": (lambda: kc.HessianFree(preconditioner=-0.5), "preconditioner=-0.5"),
    "scales_empty": (lambda: kc.SENG(scales=[]), "mup_scales(...).rates`, or None. Received: scales=[]"),
    "part_rank": (lambda: kc.LowRankPart(0), "a share in (0, 1] or an integer >= 1. Received: rank=0"),
    "clip": (lambda: kc.TNT(kl_clip=0), "a number in (0, inf), or None. Received: kl_clip=0"),
    "step_max": (lambda: kc.AdaHessian(step_max=0), "a number in (0, inf), or None. Received: step_max=0"),
    "factors_dtype": (lambda: kc.Shampoo(factors_dtype=tf.bfloat16), "factors_dtype=tf.bfloat16"),
    "structural_damping": (lambda: kc.HessianFree(structural_damping=-1), "structural_damping=-1"),
    "damping": (lambda: kc.CurveBall(damping=-1.0), "damping=-1.0"),
    "damping_nan": (lambda: kc.HessianFree(damping=float("nan")), "damping=nan"),
    "damping_class": (lambda: kc.CurveBall(damping=kc.LevenbergMarquardt), "already constructed"),
    "beta_without_rho": (lambda: kc.CurveBall(beta=0.1), "given together with `beta`"),
    "rho_without_beta": (lambda: kc.CurveBall(rho=0.9), "rho=0.9"),
    "two_loop_solver": (lambda: kc.TwoLoopNeumann(solver=kc.ConjugateGradient()), "NeumannSeries"),
    "two_loop_mu": (lambda: kc.TwoLoopNeumann(mu=0.0), "mu=0.0"),
    "cg_steps": (lambda: kc.ConjugateGradient(max_steps=0), "max_steps=0"),
    "cg_tolerance": (lambda: kc.ConjugateGradient(residual_tolerance=-1), "residual_tolerance=-1"),
    "series_rate": (lambda: kc.NeumannSeries(rate=0), "rate=0"),
    "constant_damping": (lambda: kc.ConstantDamping(-0.1), "initial=-0.1"),
    "lm_decay": (lambda: kc.LevenbergMarquardt(decay=1.0), "decay=1.0"),
    "lm_order": (lambda: kc.LevenbergMarquardt(low=2.0, high=1.0), "low=2.0"),
    "armijo_shrink": (lambda: kc.ArmijoLineSearch(shrink=1.0), "shrink=1.0"),
    **{f"integer_rate_{name}": (lambda name=name: OPTIMIZERS[name](learning_rate=1), "learning_rate=1")
       for name in ONE_OF_EACH},
    "negative_rate": (lambda: kc.KFAC(-0.1), "learning_rate=-0.1"),
    "rate_nan": (lambda: kc.CurveBall(float("nan")), "learning_rate=nan"),
    "model_as_rate": (lambda: kc.KFAC(keras.Sequential()), "model.compile(optimizer=...)"),
    "negative_decay": (lambda: kc.SOAP(weight_decay=-0.1), "weight_decay=-0.1"),
    "negative_clip": (lambda: kc.SOAP(clipnorm=-1.0), "clipnorm=-1.0"),
    "clip_by_name": (lambda: kc.SOAP(global_clipnorm="1"), "global_clipnorm='1'"),
    "sgn_rho": (lambda: kc.HessianFree.sgn(rho=-1.0), "`rho` must be a number in [0, inf). Received: rho=-1.0"),
    "sgn_steps": (lambda: kc.HessianFree.sgn(cg_steps=0), "cg_steps=0"),
    "choice_of_a_list": (lambda: kc.BFGS(scaling=["broyden"]), 'must be None, "self_scaled" or "broyden"'),
    "needs": (lambda: kc.Needs(hessian="yes"), "`Needs`: `hessian` must be True or False. Received: hessian='yes'"),
    **{f"needs_of_{name}": (lambda name=name: OPTIMIZERS[name](needs=3),
                            f"`{OPTIMIZERS[name].cls.__name__}`: `needs` must be a `Needs`, or None. Received: needs=3")
       for name in ONE_OF_EACH if OPTIMIZERS[name].cls.__module__.startswith("keras_curvature.")},
    "swap": (lambda: kc.callbacks.SwapNeumannWeights(1), "swap_on_epoch=1"),
    "on_signal": (lambda: kc.callbacks.Checkpoint("run", on_signal=None), "on_signal=None"),
    "skip_batches": (lambda: kc.callbacks.Checkpoint("run", skip_batches=0), "skip_batches=0"),
    "unknown": (lambda: kc.CurveBall(momentum=0.9), "momentum"),
    "clips": (lambda: kc.CurveBall(clipnorm=1.0, clipvalue=1.0), "clipnorm"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_fails_at_construction_by_its_name(case):
    make, expected = BAD_ARGUMENTS[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert expected in str(caught.value)


OURS = [name for name in ONE_OF_EACH if OPTIMIZERS[name].cls.__module__.startswith("keras_curvature.")]
OF_KERAS = ["weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum",
            "ema_overwrite_frequency", "loss_scale_factor", "gradient_accumulation_steps", "needs"]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_no_argument_takes_what_it_cannot_be(name):
    cls = OPTIMIZERS[name].cls
    for argument in list(inspect.signature(cls.__init__).parameters)[1:]:
        for value in (object(), np.ones(2)):
            data = argument == "metric_data" and isinstance(value, np.ndarray)
            if not data and argument not in ("name", "kwargs"):
                with pytest.raises(ValueError, match=f"`{argument}`"):
                    cls(**{argument: value})


@pytest.mark.parametrize("argument", OF_KERAS)
def test_what_keras_would_take_without_a_word_is_refused(argument):
    for value in (object(), np.ones(2), "1", -1, float("nan"), float("inf"), [1.0], *([1] * (argument == "use_ema"))):
        with pytest.raises(ValueError, match=f"`SOAP`: `{argument}` must be.*{re.escape(repr(value))}"):
            kc.SOAP(**{argument: value})
    if argument not in ("use_ema", "needs"):
        with pytest.raises(ValueError, match=f"`SOAP`: `{argument}` must be"):
            kc.SOAP(**{argument: True})


@pytest.mark.parametrize("name", NEEDS_CURVATURE)
def test_accumulation_of_gradients_is_refused_where_curvature_is_needed(name):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        OPTIMIZERS[name](gradient_accumulation_steps=2)


def network(outputs=1):
    """Two small layers."""
    return keras.Sequential([
        keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(outputs)
    ])  # fmt: skip


X, Y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")


@pytest.mark.parametrize("name", NEEDS_CURVATURE)
def test_a_plain_model_is_told_to_be_curved_and_keeps_its_weights(name):
    model = network()
    model.compile(OPTIMIZERS[name](), "mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"model = keras_curvature.curved\(model\)") as caught:
        model.fit(X, Y, verbose=0)
    assert type(model.optimizer).__name__ in str(caught.value)
    for a, b in zip(model.get_weights(), before):
        np.testing.assert_array_equal(a, b)


def test_all_that_a_linearization_has_is_known_of_gradients_or_refused_in_words():
    model = kc.curved(network())
    model.compile("sgd", "mse")
    gradients = Gradients("Mine", [], [])
    for name in dir(kc.Linearization(model, X, Y)):
        own = hasattr(Gradients, name) or name in ("gradient", "variables", "reached")
        if not own and not name.startswith("_"):
            with pytest.raises(ValueError, match=r"^`Mine` needs more .* passes its optimizer gradients only"):
                getattr(gradients, name)
    with pytest.raises(AttributeError, match="no attribute 'gradeint'"):
        _ = gradients.gradeint


def test_an_optimizer_serves_one_model():
    optimizer = kc.CurveBall()
    first, second = kc.curved(network()), kc.curved(network())
    first.compile(optimizer, "mse")
    first.train_on_batch(X, Y)
    second.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="cannot serve another model"):
        second.train_on_batch(X, Y)


@pytest.mark.parametrize("make", some([kc.Neumann, kc.CurveBall], [kc.Neumann]))
def test_freezing_a_layer_asks_for_a_new_optimizer(make):
    model = kc.curved(network())
    model.compile(make(), "mse")
    model.train_on_batch(X, Y)
    model.layers[0].trainable = False
    model.compile(model.optimizer, "mse")
    with pytest.raises(ValueError, match="after layers were frozen"):
        model.train_on_batch(X, Y)
    model.compile(make(), "mse")
    model.train_on_batch(X, Y)


@keras.saving.register_keras_serializable(package="test_errors")
class OwnTrainStep(keras.Model):
    """A model that trains itself."""

    def train_step(self, data):
        """Nothing."""
        return {}


@pytest.mark.parametrize(("model", "message"), [
    ("model", "must be a `keras.Model`"),
    (keras.layers.Dense(1), "must be a `keras.Model`"),
    (OwnTrainStep(), "has its own `train_step`"),
])  # fmt: skip
def test_what_cannot_be_curved(model, message):
    with pytest.raises(ValueError, match=message):
        kc.curved(model)


@pytest.mark.parametrize("make", [kc.CurveBall, kc.HessianFree])
def test_a_loss_that_is_not_convex_in_the_outputs_is_named(make):
    model = kc.curved(network(2))
    model.compile(make(), keras.losses.CosineSimilarity())
    with pytest.raises(ValueError, match="convex in the model.s outputs"):
        model.train_on_batch(X, np.ones((4, 2), "float32"))


@keras.saving.register_keras_serializable(package="test_errors")
class OwnLoss(keras.Sequential):
    """A model whose loss calls its layers and not the model."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean squares of the last layer."""
        return keras.ops.mean(keras.ops.square(self.layers[-1](self.layers[0](x)) - y))


class Penalty(keras.layers.Layer):
    """A layer that adds the whole loss."""

    def call(self, x):
        """What came."""
        self.add_loss(keras.ops.mean(keras.ops.square(x - 1.0)))
        return x


def past_its_outputs(kind, optimizer):
    """A curved model whose loss does not pass through its outputs, compiled."""
    layers = [keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    if kind == "compute_loss":
        model = kc.curved(OwnLoss(layers))
        model.compile(optimizer, "mse")
    else:
        model = kc.curved(keras.Sequential([*layers, Penalty()]))
        model.compile(optimizer)
    return model


@pytest.mark.parametrize("kind", ["compute_loss", "add_loss"])
def test_a_loss_that_does_not_pass_through_the_outputs_is_refused_where_that_matters(kind):
    for make in (kc.CurveBall, kc.HessianFree):
        model = past_its_outputs(kind, make())
        before = model.get_weights()
        with pytest.raises(ValueError, match="does not depend on the model.s outputs"):
            model.train_on_batch(X, Y)
        for a, b in zip(model.get_weights(), before):
            np.testing.assert_array_equal(a, b)
    model = past_its_outputs(kind, kc.TwoLoopNeumann(0.01))
    lin = kc.Linearization(model, X, Y)
    with pytest.raises(ValueError, match="does not depend on the model.s outputs"):
        lin.gauss_newton() @ lin.gradient
    assert all(np.isfinite(a).all() for a in lin.hessian() @ lin.gradient)  # has no need of them
    before = model.evaluate(X, Y, verbose=0)
    model.train_on_batch(X, Y)
    assert model.evaluate(X, Y, verbose=0) < before


def test_a_vector_has_one_tensor_for_each_weight():
    model = kc.curved(network())
    model.compile(kc.CurveBall(), "mse")
    lin = kc.Linearization(model, X, Y)
    one = [tf.zeros((3, 4))]
    for wrong in (
        lambda: lin.loss_at(one), lambda: lin.gradient_at(one), lambda: lin.loss_at(one[0]),
        lambda: lin.gauss_newton() @ one, lambda: lin.gauss_newton() @ one[0],
        lambda: lin.hessian() @ one, lambda: lin.hessian() @ one[0],
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\b4\b"):
            wrong()


@pytest.mark.parametrize("name", some(ONE_OF_EACH, FAMILIES))
def test_a_model_of_frozen_layers_has_nothing_to_train(name):
    model = kc.curved(network())
    model.trainable = False
    model.compile(OPTIMIZERS[name](), "mse")
    with pytest.raises(ValueError, match="no trainable weights"):
        model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_alone_want_a_built_optimizer(name):
    with pytest.raises(ValueError, match="must already be built"):
        OPTIMIZERS[name]().apply([tf.zeros((3, 4))])


def test_without_a_loss_keras_says_so():
    model = kc.curved(network())
    model.compile(kc.CurveBall())
    with pytest.raises(ValueError, match="No loss to compute"):
        model.train_on_batch(X, Y)


def test_structural_damping_needs_a_recurrent_layer():
    model = kc.curved(network())
    model.compile(kc.HessianFree(structural_damping=0.1), "mse")
    with pytest.raises(ValueError, match="structural_damping=0.0"):
        model.train_on_batch(X, Y)


def test_swapped_weights_are_those_of_neumann():
    model = network()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="needs the optimizer `Neumann`"):
        model.fit(X, Y, verbose=0, callbacks=[kc.callbacks.SwapNeumannWeights()])


def test_neumann_warns_of_clipping():
    with pytest.warns(UserWarning, match="does not work with clipped gradients. Received: clipnorm"):
        kc.Neumann(clipnorm=1.0)
