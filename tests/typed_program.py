"""A program that uses the package as its user would, with types; `test_annotations.py` has mypy read it."""

import keras
import numpy as np
import tensorflow as tf

import keras_curvature as kc
from keras_curvature.callbacks import Checkpoint, CurvatureBoard, SwapNeumannWeights
from keras_curvature.operators import Diagonal, Function
from keras_curvature.steps import Damping
from keras_curvature.typing import LearningRate, Vector


class SignDescent(kc.CurvatureOptimizer):
    """A method of gradients."""

    needs = kc.Needs(only_gradients=True)

    def __init__(self, learning_rate: LearningRate = 1e-4, beta_1: float = 0.9, name: str = "sign_descent") -> None:
        super().__init__(learning_rate, name=name)
        self.beta_1 = beta_1

    def create_state(self, variables: list[keras.Variable]) -> None:
        self._m = self.add_optimizer_variables(variables, "m")

    def precondition(self, gradients: Vector) -> Vector:
        m = [self.beta_1 * tf.convert_to_tensor(a) + (1 - self.beta_1) * g for a, g in zip(self._m, gradients)]
        self.remember(self._m, m)
        return [-tf.sign(a) for a in m]


class DampedGaussNewton(kc.CurvatureOptimizer):
    """A method of curvature."""

    needs = kc.Needs(products=True)
    reports = {"solver_steps": "mean", "skipped_steps": "sum"}

    def direction(self, linearization: kc.Linearization) -> Vector:
        operator = linearization.gauss_newton() + 0.1 * kc.Identity()
        solution = kc.ConjugateGradient(max_steps=5).solve(operator, [-g for g in linearization.gradient])
        self.report(solver_steps=tf.cast(solution.steps, tf.float32))
        return solution.value


def optimizers() -> list[kc.CurvatureOptimizer]:
    """Every optimizer, with arguments of the kinds that it takes."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.9)
    damping: Damping = kc.LevenbergMarquardt.martens(initial=10.0)
    return [
        kc.AdaHessian(schedule, spatial_averaging=False),
        kc.CurveBall(damping=damping),
        kc.CurveBall(damping=0.1, beta=0.5, rho=0.9),
        kc.DiagonalNewton(probes="exact"),
        kc.EKFAC(momentum=None, fisher="exact", sharing="reduce"),
        kc.ESGD(every=10, weight_decay=1e-4),
        kc.Eva(kl_clip=None),
        kc.HessianFree(solver=kc.ConjugateGradient(max_steps=50), line_search=None, curvature="hessian"),
        kc.KFAC.adaptive(damping=kc.ConstantDamping(0.1), curvature_batch=0.25),
        kc.KLShampoo(lambda: 0.1),
        kc.Neumann.from_epochs(400, learning_rate=0.05),
        kc.PSGD(geometry=kc.LowRankGeometry(rank=20), kind="newton", clip=(2.0, 10.0)),
        kc.PSGD(geometry="low_rank", clip=None),
        kc.SOAP(clipnorm=1.0),
        kc.Shampoo(root=kc.CoupledNewton(), grafting=None, max_dimension=1000),
        kc.SophiaG(1e-4),
        kc.SophiaH(gamma=0.02),
        kc.SquareRootFreeAdam(fisher="sampled"),
        kc.TwoLoopNeumann(solver=kc.NeumannSeries(steps=20, rate=0.01)),
        SignDescent(),
        DampedGaussNewton(1.0),
    ]


def train(optimizer: kc.CurvatureOptimizer) -> list[float]:
    """Train a curved model, with callbacks."""
    problem = kc.problems.get("digits_mlp")
    x, y = problem.sample(256, seed=1)
    model = kc.curved(problem.model(seed=1), micro_batches=2)
    model.compile(optimizer=optimizer, loss=problem.loss())
    checkpoint = Checkpoint("run", every=100)
    callbacks = [checkpoint, CurvatureBoard("logs", kind="ggn", report_at=None), SwapNeumannWeights()]
    history = model.fit(x, y, epochs=2, initial_epoch=checkpoint.position.epoch, callbacks=callbacks)
    losses: list[float] = history.history["loss"]
    return losses


def measure(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Ask for everything that is measured."""
    c = kc.curvature(model, (x, y), kind="ggn", layers=["dense"], examples=512)
    top = c.top(5)
    values: list[float] = top.values.tolist()
    traces = c.trace(by_layer=True, labels=True)
    share = traces["dense"].value / c.trace(pairs=top).value  # each an `Estimate`
    entries, errors = c.diagonal(stderr=True)
    assert len(entries) == len(errors) == len(c.diagonal())
    solution = c.solve(c.gradient, damping=0.1)
    found = kc.stability(model.optimizer, model.trainable_variables)
    gauge = 0.0 if found.limit is None else float(found.gauge(values[0]))
    noise = c.block("dense").noise().critical_batch
    kc.report(model, (x, y), path="curvature", batch_size=32)["sharpness"]
    kc.landscape(model, (x, y), directions="random x random", points=21).figure().savefig("plane.png")
    return share + gauge + noise + float(c.density().quantile(0.5)) + float(solution.residual)


def step_by_hand(model: keras.Model, x: tf.Tensor, y: tf.Tensor) -> float:
    """A training step in a loop of one's own."""
    lin = kc.Linearization(model, x, y, needs=kc.Needs(products=True), micro_batches=2)
    preconditioner = Diagonal([tf.ones_like(w) for w in lin.weights]).inverse()
    scaled = 2.0 * Function(lambda v: [2.0 * a for a in v], psd=True) + lin.fisher("empirical")
    solution = kc.ConjugateGradient().solve(lin.gauss_newton() + scaled, lin.gradient, preconditioner=preconditioner)
    for variable, step in zip(lin.variables, solution.value):
        variable.assign_sub(step)
    lin.commit()
    return float(lin.loss_at(solution.value))
