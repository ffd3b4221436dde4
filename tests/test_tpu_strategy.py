"""What `fit`, `evaluate` and `predict` would run on a TPU: traced under the real `TPUStrategy`, over a made-up TPU."""

import math
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_up_tpu import program, read, strategy
from optimizers import FEW_PLAIN_OR_CURVED, OPTIMIZERS, PLAIN, prepare
from own_optimizers import DampedGaussNewton, Lion
from selection import some

import keras_curvature as kc
from keras_curvature import replicas
from keras_curvature.callbacks import Checkpoint
from keras_curvature.linearization.estimates.local_losses import matches
from keras_curvature.linearization.layers import apart, ends, kronecker

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tpu"))

import methods  # noqa: E402
from costs import Method, Model, Work  # noqa: E402
from formulas import FORMULAS, formula  # noqa: E402
from matrices import kernels  # noqa: E402

EVERYONE, SAMPLE = [*OPTIMIZERS, *PLAIN], [*FEW_PLAIN_OR_CURVED, "neumann", "hessian_free", "plain_shampoo"]
every_optimizer = pytest.mark.parametrize("name", some(EVERYONE, SAMPLE))
pytestmark = pytest.mark.filterwarnings("ignore:.*knows no Kronecker factors")

# the guide's
OWN = {
    Lion: lambda optimizer, step: Method({"step": step}, 1, 1),
    DampedGaussNewton: lambda optimizer, step: Method({"step": step, "while": Work(1, vectors=1)}, 0, 1),
}
BATCH = 4  # of a replica
DIGITS = {type(methods.OPTIMIZERS[name][0]()) for name in methods.IN_DOUBLE}  # classes with small matrices of float64


def compiled(name, replicas, micro_batches=1, **kwargs):
    """A small classifier with convolutions, batch statistics and dropout, made under a TPU's strategy."""
    with strategy(replicas).scope():
        layers = [keras.layers.Conv2D(3, 3, strides=2), keras.layers.BatchNormalization(), keras.layers.ReLU()]
        layers += [keras.layers.Flatten(), keras.layers.Dropout(0.1), keras.layers.Dense(4, dtype="float32")]
        model, optimizer = prepare(name, keras.Sequential([keras.Input((8, 8, 2)), *layers]))
        model = kc.curved(model, micro_batches) if micro_batches > 1 else model
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, weighted_metrics=["accuracy"], **kwargs)
    return model


def batches(replicas, count=2, endless=False):
    """Full batches of an even number of examples for each replica."""
    size = BATCH * replicas
    data = tf.data.Dataset.from_tensor_slices(arrays(count * size)).batch(size, drop_remainder=True)
    return data.repeat() if endless else data


def arrays(examples):
    """`(x, y)`."""
    return np.zeros((examples, 8, 8, 2), "float32"), np.zeros(examples, "int32")


def expected(model, name, replicas):
    """Tensors that the program of a step sums, by the formula, each loop and condition once."""
    FORMULAS.update(OWN)
    shapes = tuple(tuple(w.shape) for w in model.trainable_variables)
    blocks, outside, _ = kronecker.blocks(model)
    sizes = [math.prod(shape) for shape in shapes]
    hidden, at_ends = kernels(model.trainable_variables, ends.ends_of_model(model))
    of = Model(
        "", BATCH, sum(sizes), len(sizes), (), shapes=shapes, blocks=tuple(tuple(block.shape) for block in blocks),
        matched=tuple(map(matches, blocks)), outside=tuple(sizes[i] for i in outside), hidden=hidden,
        ends=at_ends, outputs=model.output_shape[-1],
        apart=apart.mixing(model) is None,
    )  # fmt: skip
    return formula(model.optimizer, name not in PLAIN).tensors(of, replicas)


def counts_of_examples(optimizer):
    """How often the replicas tell each other how many examples are theirs: whole slices, chunks of them, and rows.

    The inputs and the slopes of the layers, of which rows are made, are two gathers.
    """
    by_rows = isinstance(optimizer, (kc.GaussNewton, kc.NaturalGradient))
    if by_rows and not isinstance(optimizer.solver, kc.ConjugateGradient):
        return 3 + getattr(optimizer, "order", 1)  # the vectors of a path
    if isinstance(optimizer, kc.LiSSA):
        return 3  # the traces of two loops
    if isinstance(optimizer, (kc.SASSHA, kc.KBFGS)):
        return 2  # at the weights and uphill, or after the step
    if isinstance(optimizer, kc.SKFAC):  # and for the rows of both factors of each layer that has them
        return 1 + 2 * sum(block.sharing == "reduce" for block in optimizer._blocks)
    if isinstance(optimizer, kc.SENG):  # and for each layer, to gather and to sum, with the lengths of both tensors
        return 1 + 4 * len(optimizer._blocks)
    return 2 if getattr(optimizer, "curvature_batch", None) else 1


def doubles(found, name):
    """The tensors of double precision that a method should not have."""
    # the running Fisher matrix, of as many rows as weights, is for small models and in double precision
    averages = name.endswith("natural_gradient_average")
    return [] if averages or OPTIMIZERS[name.removeprefix("plain_")].cls in DIGITS else found.doubles


def assert_fits_a_tpu(found, sums, name="neumann"):
    """One trace, no call of the host's Python, known shapes, double precision in a few scalars alone, or `DIGITS`."""
    assert (found.traces, found.hosts, found.unknown, doubles(found, name), found.sums) == (1, [], [], [], sums)


# The registry, in full batches.


@every_optimizer
def test_training_evaluation_and_prediction_trace(name):
    model = compiled(name, 2)
    assert_fits_a_tpu(program(model, "fit", batches(2), shuffle=False), expected(model, name, 2), name)
    assert_fits_a_tpu(program(model, "evaluate", batches(2)), 0)
    assert_fits_a_tpu(program(model, "predict", batches(2).map(lambda x, y: x)), 0)


@pytest.mark.parametrize("name", some(EVERYONE, ["kfac"]))
def test_eight_replicas_trace(name):
    model = compiled(name, 8)
    assert_fits_a_tpu(program(model, "fit", batches(8), shuffle=False), expected(model, name, 8), name)


@pytest.mark.parametrize("name", some(EVERYONE, ["kfac"]))
def test_micro_batches_sum_nothing_more(name):
    model = compiled(name, 2, micro_batches=2)
    sums = expected(model, name.removeprefix("plain_"), 2)
    assert_fits_a_tpu(program(model, "fit", batches(2), shuffle=False), sums, name)


@pytest.mark.parametrize("name", some(EVERYONE, ["curveball"]))
def test_several_steps_per_execution_trace(name):
    model = compiled(name, 2, steps_per_execution=2)
    endless = batches(2, endless=True)
    assert_fits_a_tpu(
        program(model, "fit", endless, shuffle=False, steps_per_epoch=2), expected(model, name, 2), name
    )  # fmt: skip
    assert_fits_a_tpu(program(model, "evaluate", endless, steps=2), 0)
    assert_fits_a_tpu(program(model, "predict", batches(2).map(lambda x, y: x)), 0)


@pytest.mark.parametrize("name", some(EVERYONE, ["plain_soap"]))
def test_mixed_precision_traces(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = compiled(name, 2)
        found = program(model, "fit", batches(2), shuffle=False)
    finally:
        keras.config.set_dtype_policy("float32")
    assert_fits_a_tpu(found, expected(model, name, 2), name)


@pytest.mark.parametrize("name", some(EVERYONE, ["curveball"]))
def test_uneven_last_batches_trace_with_one_more_sum(name):
    """TensorFlow then pads the batches of every step; the replicas tell each other how many examples are theirs."""
    model = compiled(name, 2)
    found = program(model, "fit", *arrays(2 * 2 * BATCH + 3), batch_size=2 * BATCH)
    assert (found.traces, found.hosts, doubles(found, name)) == (1, [], [])
    assert found.sums == expected(model, name, 2) + (0 if name in PLAIN else counts_of_examples(model.optimizer))
    assert any("XlaSetDynamicDimensionSize" in op for op in found.operations)


def test_a_checkpoint_is_written_and_read(tmp_path):
    """Weights and state of a model under the strategy; what `fit` does with it before the first step."""
    models = [compiled("curveball", 2), compiled("curveball", 2)]
    for model in models:
        with model.distribute_strategy.scope():
            model.optimizer.build(model.trainable_variables)
    model, again = models
    model.optimizer.variables[-1].assign(tf.ones_like(model.optimizer.variables[-1]))
    file = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "checkpoint")
    tf.train.Checkpoint(model=again, optimizer=again.optimizer).restore(file).assert_consumed()
    for one, other in zip([*model.weights, *model.optimizer.variables], [*again.weights, *again.optimizer.variables]):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    callbacks = [Checkpoint(tmp_path / "run", every=1)]
    found = program(compiled("curveball", 2), "fit", batches(2), shuffle=False, callbacks=callbacks)
    assert_fits_a_tpu(found, expected(model, "curveball", 2))


# The support itself.


def test_what_a_tpu_cannot_do_is_found():
    with strategy(2).scope():
        ones = tf.ones(40)

    def step(x):
        kept = tf.boolean_mask(x, x > 0)
        tf.numpy_function(lambda x: x, [x], tf.float32)
        twice = tf.cast(x, tf.float64) * 2.0
        return replicas.total(lambda: tf.reduce_sum(kept) + tf.cast(tf.reduce_sum(twice), tf.float32))

    tpu = strategy(2)
    with tpu.scope():
        run = tf.function(tpu.run, autograph=False).get_concrete_function(step, args=(ones,))
    found = read(run.graph)
    assert found.sums == 1
    assert found.hosts == ["PyFunc"]
    assert found.unknown != []
    assert found.doubles != []


def test_a_tpu_has_no_merge_calls_though_tensorflow_says_so():
    with strategy(2).scope():
        assert not replicas.uses_merge_calls()
        assert replicas.count() == 2
    assert not replicas.uses_merge_calls()
