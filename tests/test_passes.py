"""One pass answers all questions: what is asked, and in which order, changes neither the numbers nor the passes.

Passes are counted as the matrix products that the answers depend on in the graph, which needs no clock.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat
from keras import layers

import keras_curvature as kc
from keras_curvature import Linearization, Needs
from keras_curvature.linearization.layers import kronecker

DENSE = 2  # layers
PRODUCTS = {"MatMul", "BatchMatMulV2", "Einsum"}
QUESTIONS = {
    "loss": lambda lin, v, blocks: lin.loss,
    "gradient": lambda lin, v, blocks: lin.gradient,
    "hessian": lambda lin, v, blocks: lin.hessian() @ v,
    "gauss_newton": lambda lin, v, blocks: lin.gauss_newton() @ v,
    "fisher": lambda lin, v, blocks: lin.fisher("empirical") @ v,
    "sampled_gradient": lambda lin, v, blocks: lin.sampled_gradient(3),
    "squared_gradients": lambda lin, v, blocks: lin.squared_gradients(3),
    "kronecker_factors": lambda lin, v, blocks: lin.kronecker_factors(blocks, fisher="empirical")[0],
    "kronecker_means": lambda lin, v, blocks: lin.kronecker_means(blocks),
}


@pytest.fixture(scope="module")
def problem():
    """`(model, batch, vector, blocks)`: dense layers and a normalization, whose second derivatives need care."""
    model = keras.Sequential([
        keras.Input((4,)), layers.Dense(5, "tanh"), layers.LayerNormalization(), layers.Dense(3),
    ])  # fmt: skip
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(0)
    batch = tf.constant(random.standard_normal((6, 4)), tf.float32), tf.constant(random.integers(0, 3, 6))
    vector = [tf.constant(random.standard_normal(v.shape), tf.float32) for v in model.trainable_variables]
    return model, batch, vector, kronecker.blocks(model)[0]


def asked(problem, names, **options):
    """`(answers, number of matrix products)` of a graph in which these questions are asked in this order."""
    model, batch, vector, blocks = problem

    @tf.function
    def answers():
        lin = Linearization(model, *batch, **options)
        found = {name: QUESTIONS[name](lin, vector, blocks) for name in names}
        return {name: found[name] for name in sorted(found)}

    traced = answers.get_concrete_function()
    return traced(), products(traced.outputs)


def products(outputs):
    """How many matrix products some tensors of a graph depend on."""
    seen, waiting = set(), [t.op for t in outputs]
    while waiting:
        op = waiting.pop()
        if op not in seen:
            seen.add(op)
            waiting += [t.op for t in op.inputs] + list(op.control_inputs)
    return sum(op.type in PRODUCTS for op in seen)


def test_the_hessian_before_or_after_the_gradient_costs_the_same(problem):
    gradient_first, hessian_first = (
        asked(problem, names) for names in (["gradient", "hessian"], ["hessian", "gradient"])
    )
    # forward one for each layer; backward one for each kernel and, but for the first layer, each input; and the
    # derivative of all of these
    assert gradient_first[1] == hessian_first[1] <= 3 * (DENSE + DENSE + DENSE - 1)
    np.testing.assert_allclose(flat(gradient_first[0]["hessian"]), flat(hessian_first[0]["hessian"]), 1e-4, 1e-6)


@pytest.mark.parametrize("needs", [
    pytest.param(None, marks=pytest.mark.slow, id="everything"),
    pytest.param(Needs(products=True, hessian=True), id="products"),
])  # fmt: skip
def test_no_order_of_the_questions_costs_more_than_another(problem, needs):
    options = {} if needs is None else {"needs": needs}
    names = [name for name in QUESTIONS if needs is None or not name.startswith("kronecker")]
    (found, count), (expected, of_reversed) = (asked(problem, order, **options) for order in (names, names[::-1]))
    assert count == of_reversed
    for ours, theirs in zip(tf.nest.flatten(found), tf.nest.flatten(expected)):
        np.testing.assert_allclose(ours, theirs, 1e-4, 1e-6)  # kernels are fused in other ways


@pytest.mark.slow
def test_no_order_of_two_questions_costs_more_than_the_other(problem):
    for pair in itertools.combinations(QUESTIONS, 2):
        assert asked(problem, pair)[1] == asked(problem, pair[::-1])[1], pair


def test_a_question_costs_no_more_where_more_might_be_asked(problem):
    needed = {
        "gradient": Needs(only_gradients=True), "sampled_gradient": Needs(), "gauss_newton": Needs(products=True),
        "hessian": Needs(hessian=True), "kronecker_factors": Needs(layers=True),
    }  # fmt: skip
    for name, needs in needed.items():
        assert asked(problem, [name])[1] == asked(problem, [name], needs=needs)[1], name


def test_needs_say_what_cannot_be():
    for more in ("products", "hessian", "layers"):
        with pytest.raises(ValueError, match=f"`Needs`: .* cannot need `{more}`. Received: .*{more}=True"):
            Needs(only_gradients=True, **{more: True})


def test_an_optimizer_may_have_needs_of_its_own():
    assert kc.PSGD().needs.only_gradients and kc.PSGD(kind="newton").needs == Needs(hessian=True)
    assert kc.KFAC().needs == Needs(layers=True) and kc.KFAC.adaptive().needs == Needs(layers=True, products=True)
    assert kc.HessianFree().needs == Needs(products=True)
    assert kc.HessianFree(curvature="hessian").needs == Needs(hessian=True)
    assert not kc.SquareRootFreeAdam(fisher="sampled").needs.only_gradients


def test_a_direction_that_asks_for_more_than_it_says_is_told_so():
    class Wrong(kc.CurvatureOptimizer):
        needs = Needs(products=True)

        def direction(self, lin):
            return [-p for p in lin.hessian() @ lin.gradient]

    model = kc.curved(keras.Sequential([keras.Input((2,)), layers.Dense(1)]))
    model.compile(Wrong(0.1), loss="mse")
    with pytest.raises(ValueError, match=r"(?s)`Linearization.hessian` is not .*products=True.*Needs\(hessian=True"):
        model.train_on_batch(np.ones((3, 2)), np.ones((3, 1)))


def test_total_sums_a_function_of_the_model_over_micro_batches(problem):
    model, (x, y), vector, _ = problem

    def squares(pure, weights, step):
        evaluation = pure.evaluate([w + s for w, s in zip(weights, step)])
        return tf.reduce_sum(tf.square(evaluation.outputs)), evaluation.loss

    lin = Linearization(model, x, y)
    for micro_batches in (1, 2, 3):
        total, loss = Linearization(model, x, y, micro_batches=micro_batches).total(squares, vector)
        np.testing.assert_allclose(loss, lin.loss_at(vector), rtol=1e-5)
        expected = Linearization(model, x, y, shift=vector).outputs
        np.testing.assert_allclose(total, np.sum(np.square(expected)), rtol=1e-5)
