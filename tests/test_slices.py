"""A batch that is cut gives what the whole gives: places, random rows, and two replicas against one device."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.ops import gen_stateless_random_ops_v2 as generators

from keras_curvature.linearization.pure import functional, randomness, slices
from keras_curvature.linearization.pure.differentiable import differentiable_keras

BATCH = 7
DRAWS = {
    "uniform": lambda shape, dtype: keras.random.uniform(shape, dtype=dtype, seed=5),
    "normal": lambda shape, dtype: keras.random.normal(shape, stddev=2.0, dtype=dtype, seed=5),
    "truncated_normal": lambda shape, dtype: keras.random.truncated_normal(shape, dtype=dtype, seed=5),
    "dropout": lambda shape, dtype: keras.random.dropout(tf.ones(shape, dtype), 0.5, seed=5),
}


def drawn_at(start, examples, draw):
    """What `draw()` gives at a place in a batch."""
    with differentiable_keras(), slices.at(slices.Place(start, examples, BATCH)):
        return draw()


# Rows at random.


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", DRAWS)
def test_rows_are_those_of_the_whole_batch(name, dtype):
    for row in ([], [1], [3], [4], [5, 2]):
        whole = DRAWS[name]([BATCH, *row], dtype)
        assert len(np.unique(whole.numpy().astype("float32"))) > 1
        for start, examples in ((0, 3), (3, 2), (5, 2), (1, 6), (6, 1)):
            part = drawn_at(start, examples, lambda row=row, n=examples: DRAWS[name]([n, *row], dtype))
            np.testing.assert_array_equal(part, whole[start : start + examples])


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_too(dtype):
    whole = keras.random.randint([BATCH, 3], 0, 1000, dtype, seed=5)
    part = drawn_at(2, 3, lambda: keras.random.randint([3, 3], 0, 1000, dtype, seed=5))
    np.testing.assert_array_equal(part, whole[2:5])


@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [("uniform", False), ("normal", False), ("dropout", False), ("uniform", True), ("dropout", True)],
)
def test_rows_in_a_graph_at_a_place_that_it_does_not_know(name, jit_compile):
    whole = tf.function(lambda: DRAWS[name]([BATCH, 3], "float32"), jit_compile=jit_compile)()

    @tf.function(jit_compile=jit_compile)
    def part(start):
        return drawn_at(start, 2, lambda: DRAWS[name]([2, 3], "float32"))

    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec([], tf.int32)])
    def part_of_unknown_size(x, start):
        examples = tf.shape(x)[0]
        return drawn_at(start, examples, lambda: DRAWS[name](tf.shape(x), "float32"))

    for start in range(BATCH - 1):
        np.testing.assert_array_equal(part(tf.constant(start)), whole[start : start + 2])
        if not jit_compile:
            np.testing.assert_array_equal(part_of_unknown_size(tf.ones([2, 3]), start), whole[start : start + 2])


@pytest.mark.parametrize("row", [3, 4])
def test_under_xla_it_does_not_matter_to_normal_numbers_how_the_batch_is_cut(row):
    def part(start, examples):
        draw = lambda: DRAWS["normal"]([examples, row], "float32")  # noqa: E731
        return tf.function(lambda: drawn_at(start, examples, draw), jit_compile=True)()

    np.testing.assert_array_equal(tf.concat([part(1, 2), part(3, 4)], 0), part(1, 6))


def test_several_rows_for_each_example_are_its_own():
    whole = keras.random.uniform([BATCH * 3, 5], seed=5)
    part = drawn_at(2, 4, lambda: keras.random.uniform([4 * 3, 5], seed=5))
    np.testing.assert_array_equal(part, whole[6:18])


def test_tensors_of_another_length_are_shared():
    for shape in ([1, 4], [3], []):
        part = drawn_at(2, 4, lambda shape=shape: keras.random.uniform(shape, seed=5))
        np.testing.assert_array_equal(part, keras.random.uniform(shape, seed=5))
    shared = keras.random.dropout(tf.ones([BATCH, 4]), 0.5, noise_shape=(1, 4), seed=5)
    part = drawn_at(2, 4, lambda: keras.random.dropout(tf.ones([4, 4]), 0.5, noise_shape=(1, 4), seed=5))
    np.testing.assert_array_equal(part, shared[2:6])


def test_rows_are_drawn_by_one_generator_and_the_whole_batch_by_the_one_that_tensorflow_chooses():
    @tf.function
    def draw(rows):
        return keras.random.uniform([rows, 3], seed=5)

    def generator(start, examples):
        graph = drawn_at(start, examples, lambda: draw.get_concrete_function(examples)).graph
        (drawn,) = (op for op in graph.get_operations() if op.type == "StatelessRandomUniformV2")
        return tf.get_static_value(drawn.inputs[3])

    assert (generator(0, BATCH), generator(2, 2)) == (3, randomness.PHILOX)


def test_counters_begin_at_zero():
    for seed in ([0, 0], [1, -1], [2**31 - 1, 7]):
        counter = generators.stateless_random_get_key_counter(tf.constant(seed))[1]
        assert counter.shape == (2,) and counter[0] == 0


# Places.


def test_means_count_by_their_share():
    place = slices.Place(2, 3, 6)
    np.testing.assert_allclose(place.weigh(tf.constant(4.0)), 2.0)
    np.testing.assert_allclose(slices.Place(2, tf.constant(3), tf.constant(6)).weigh(tf.constant(4.0)), 2.0)
    assert slices.Place(2, tf.constant(0), tf.constant(6)).weigh(tf.constant(float("nan"))) == 0
    assert not place.is_whole and slices.Place(0, 6, 6).is_whole
    part = place.part(1, 2)
    assert (part.start, part.examples, part.total) == (3, 2, 6)


def test_a_place_holds_while_it_is_open_and_on_its_thread():
    place = slices.Place(2, 3, 6)
    with pytest.raises(ZeroDivisionError), slices.at(place):
        assert slices.here() is place
        with slices.at(slices.Place(0, 6, 6)):
            assert slices.here() is None
        raise ZeroDivisionError
    assert slices.here() is None


@pytest.mark.parametrize("regularizer", [None, "l2"])
def test_a_share_without_examples_is_refused_where_keras_has_no_loss_of_it(regularizer):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_regularizer=regularizer)])
    model.compile("sgd", "mse")
    batch = np.ones([0, 3], "float32"), np.ones([0, 1], "float32"), None
    pure = functional.PureModel(model, batch, slices.Place(1, 0, 1))
    with pytest.raises(ValueError, match="A replica has no examples of this batch of 1, .*drop_remainder=True"):
        pure.evaluate([v.value for v in model.trainable_variables])


def test_examples_of_any_kind_of_array_are_counted():
    dense, ragged = np.ones([4, 3]), tf.ragged.constant([[1.0, 2.0], [3.0], [], [4.0]])
    sparse = tf.sparse.from_dense(dense)
    for x in (dense, [None, {"a": dense}], tf.constant(dense), ragged, sparse):
        assert slices.examples(x) == 4
    specs = [tf.TensorSpec([None, 3]), tf.RaggedTensorSpec([None, None]), tf.SparseTensorSpec([None, 3])]
    for x, spec in zip((tf.ones([4, 3]), ragged, tf.cast(sparse, tf.float32)), specs):
        counted = tf.function(slices.examples, [spec], autograph=False)(x)
        assert counted == 4 and counted.dtype == tf.int32


@pytest.mark.parametrize("size", [0.25, 0.5, 1.0])
def test_pieces_of_equal_slices_make_up_the_piece_of_the_whole(size):
    x = np.arange(16.0)[:, np.newaxis]
    for index in range(5):
        whole = slices.piece(x, size, index)
        parts = [slices.piece(x[i : i + 8], size, index) for i in (0, 8)]
        np.testing.assert_array_equal(tf.concat(parts, 0), whole)
        assert len(whole) == 16 * size


# Two replicas, in a process of its own: two strategies in one collide.

CASES = ["dropout:5:2", "fit:13"]
MORE = ["synchronized:5:1", "noise:8:1", "ragged:7", "probes:5", "plain:1:1", "fit:9", "sparse:7", "report:13"]
KINDS = ["plain", "dropout", "noise", "recurrent_dropout", "attention", "synchronized"]
SIZES = ["8:1", "5:1", "1:1", "8:2", "5:2"]
ALL = [f"{kind}:{size}" for kind in KINDS for size in SIZES if not (kind == "synchronized" and size[-1] == "2")]


def on_replicas(cases):
    """`{case: {quantity: difference}}` between two replicas and one device."""
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, here / "slices_on_replicas.py", *cases],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def differences():
    """Those of `CASES`."""
    return on_replicas(CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_give_what_one_device_gives(case, differences):
    for quantity, difference in differences[case].items():
        assert difference < 1e-10, quantity


@pytest.mark.slow
def test_two_replicas_give_what_one_device_gives_in_more_cases():
    for case, found in on_replicas(MORE).items():
        assert max(found.values()) < 1e-10, (case, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_replicas_give_what_one_device_gives_of_everything(kind):
    for case, found in on_replicas([case for case in ALL if case.startswith(f"{kind}:")]).items():
        assert max(found.values()) < 1e-10, (case, found)
