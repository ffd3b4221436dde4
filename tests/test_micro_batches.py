"""A batch in micro-batches against the whole batch, in float64; passes, memory in the graph, and refusals."""

import contextlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import BATCH, LOSSES, MODELS, float64, normal
from keras import layers
from selection import some

from keras_curvature import Linearization, keras_internals
from keras_curvature.linearization.pure import slices

CASES = {**MODELS, **{f"loss_{name}": build for name, build in LOSSES.items()}}
# Normalized by the slice, or a mean over what a mask leaves of it: here the slices are the oracle.
OF_SLICES = ["batch_normalization", "batch_normalization_2d", "masked_outputs"]
# Both that and dropout, whose masks are those of the whole.
MIXED = ["nested", "subclassed", "subclassed_passing_training", "frozen"]
SUMMED = [] if keras_internals.ACTIVITY_IS_A_MEAN else ["loss_activity_regularized"]
WHOLE = [name for name in CASES if name not in [*OF_SLICES, *MIXED, *SUMMED]]
USUAL = [
    "conv2d", "spatial_dropout", "simple_rnn", "several_outputs", "loss_sample_weights", "loss_sparse_from_softmax",
    "loss_own_compute_loss", *({"loss_activity_regularized"} - set(SUMMED)),
]  # fmt: skip
TRACED = [("dropout", 3), ("spatial_dropout", 2), ("loss_sparse_from_softmax", 4)]


@pytest.fixture(autouse=True)
def _in_float64():
    with float64():
        yield


def _built(name):
    case = CASES[name]().compile()
    case.model._symbolic_build(data_batch=case.batch)
    return case


def _vectors(model):
    random = np.random.default_rng(1)
    return [[tf.constant(0.1 * random.standard_normal(w.shape)) for w in model.trainable_variables] for _ in range(2)]


def _everything(case, batch=None, **kwargs):
    """All that is summed over slices, and the outputs."""
    u, v = _vectors(case.model)
    lin = Linearization(case.model, *(case.batch if batch is None else batch), **kwargs)
    G, H = lin.gauss_newton(), lin.hessian()
    pushed = G.push(v)
    found = {
        "outputs": tf.nest.flatten(lin.outputs), "loss": lin.loss, "gradient": lin.gradient, "hessian": H @ v,
        "gauss_newton": G @ v, "inner": G.inner(G.push(u), pushed), "pull": G.pull(pushed),
        "pull_with_gradient": G.pull_with_gradient(pushed), "loss_at": lin.loss_at(u),
        "gradient_at": lin.gradient_at(u), "loss_and_gradient_at": lin.loss_and_gradient_at(u),
        "squared_gradients": lin.squared_gradients(3),
    }  # fmt: skip
    if any(isinstance(layer, layers.RNN) for layer in case.model.layers):
        found["hidden_gauss_newton"] = lin.hidden_gauss_newton() @ v
    return found


def _close(ours, theirs, tolerance=1e-10):
    for name, value in theirs.items():
        one, other = (np.concatenate([np.ravel(a) for a in tf.nest.flatten(v)]) for v in (ours[name], value))
        assert np.linalg.norm(one - other) <= tolerance * max(np.linalg.norm(other), 1e-6), name


# of 6 examples: 3 + 3, and 1 + 2 + 1 + 2
@pytest.mark.parametrize("count", some([2, 4], [4]))
@pytest.mark.parametrize("name", some(WHOLE, USUAL))
def test_sums_over_micro_batches_are_those_of_the_whole(name, count):
    case = _built(name)
    _close(_everything(case, micro_batches=count), _everything(case))


@pytest.mark.parametrize("name", some(OF_SLICES, ["batch_normalization"]))
def test_normalization_and_masks_are_of_the_slice(name):
    case = _built(name)
    expected = None
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6)):
        part = [None if a is None else a[rows] for a in case.batch]
        found = _everything(case, part)
        outputs = found.pop("outputs"), found.pop("squared_gradients")
        del outputs, found["inner"]
        share = (rows.stop - rows.start) / BATCH
        found = tf.nest.map_structure(lambda a, share=share: share * a, found)
        expected = found if expected is None else tf.nest.map_structure(tf.add, expected, found)
    _close(_everything(case, micro_batches=4), expected)


@pytest.mark.parametrize("name", some(MIXED, ["frozen"]))
def test_slices_of_normalized_models_in_a_graph_are_those_of_eager_execution(name):
    case = _built(name)
    graph = tf.function(lambda: _everything(case, micro_batches=2), autograph=False)()
    _close(graph, _everything(case, micro_batches=2))


@pytest.mark.parametrize(("name", "count"), some(TRACED, [("dropout", 3)]))
def test_in_a_graph_that_does_not_know_the_size(name, count):
    case = _built(name)
    specs = [tf.TensorSpec([None, *np.shape(a)[1:]], tf.as_dtype(a.dtype)) for a in case.batch[:2]]
    traced = tf.function(lambda x, y: _everything(case, (x, y, None), micro_batches=count), specs, autograph=False)
    _close(traced(*case.batch[:2]), _everything(case))


@pytest.mark.parametrize("name", some(["dense", "dropout", "lstm"], ["dense"]))
def test_compiled_by_xla(name):
    case = _built(name)
    compiled = [
        tf.function(lambda k=k: _everything(case, micro_batches=k), jit_compile=True, autograph=False)() for k in (1, 3)
    ]
    _close(compiled[1], compiled[0])


def test_fewer_examples_than_micro_batches():
    case = _built("dropout")
    _close(_everything(case, micro_batches=100), _everything(case))


def test_a_piece_is_cut_into_micro_batches_too():
    case = _built("dropout")
    lin, cut = (Linearization(case.model, *case.batch, micro_batches=k) for k in (1, 2))
    ours, theirs = cut.chunk(0.5, 1), lin.chunk(0.5, 1)
    _close({"gradient": ours.gradient, "loss": ours.loss}, {"gradient": theirs.gradient, "loss": theirs.loss})


def test_a_loss_scale_changes_no_number():
    case = _built("loss_sparse_from_softmax")
    scaled = _everything(case, micro_batches=2, loss_scale=tf.constant(1024.0))
    _close(scaled, _everything(case, micro_batches=2))


def test_mixed_float16_is_near_full_precision():
    found = []
    for policy, scale in (("float32", None), ("mixed_float16", tf.constant(128.0))):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)
        case = _built("dense")
        lin = Linearization(case.model, *case.batch, loss_scale=scale, micro_batches=2)
        v = [tf.cast(a, tf.float32) for a in _vectors(case.model)[0]]
        found.append({"gradient": lin.gradient, "gauss_newton": lin.gauss_newton() @ v, "hessian": lin.hessian() @ v})
    _close(found[1], found[0], 0.03)


# What the batch leaves in the model.


@pytest.mark.parametrize("graph", [False, True])
def test_seeds_and_loss_counters_move_as_in_one_pass(graph):
    left = []
    for k in (1, 2):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        hidden = layers.Dropout(0.5, seed=1)(layers.Dense(5)(inputs))
        model = keras.Model(inputs, [layers.Dense(2)(hidden), layers.Dense(1)(hidden)])
        model.compile("sgd", ["mse", "mae"])
        random = np.random.default_rng(0)
        batch = normal(random, 6, 4), [normal(random, 6, 2), normal(random, 6, 1)], None
        model._symbolic_build(data_batch=batch)

        def step(model=model, batch=batch, k=k):
            Linearization(model, *batch, micro_batches=k).commit()

        (tf.function(step, autograph=False) if graph else step)()
        left.append([v.numpy() for v in [*model.non_trainable_variables, *model.metrics_variables]])
    assert any(np.any(v) for v in left[0][1:])
    for ours, theirs in zip(*left):
        np.testing.assert_allclose(ours, theirs, 1e-12)


@pytest.mark.parametrize("graph", [False, True])
def test_moving_statistics_take_in_one_slice_after_another(graph):
    x = normal(np.random.default_rng(0), 6, 3)
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(momentum=0.8), layers.Dense(1)])
    model.compile("sgd", "mse")

    def step():
        Linearization(model, x, x[:, :1], micro_batches=2).commit()

    (tf.function(step, autograph=False) if graph else step)()
    mean, variance = np.zeros(3), np.ones(3)
    for part in (x[:3], x[3:]):
        mean, variance = 0.8 * mean + 0.2 * part.mean(0), 0.8 * variance + 0.2 * part.var(0)
    np.testing.assert_allclose(model.layers[0].moving_mean, mean, 1e-12)
    np.testing.assert_allclose(model.layers[0].moving_variance, variance, 1e-12)


def test_outputs_keep_their_masks_and_logits():
    case = _built("masked_outputs")
    outputs = Linearization(case.model, *case.batch, micro_batches=2).outputs
    np.testing.assert_array_equal(outputs._keras_mask, case.x != 0)
    case = _built("loss_sparse_from_softmax")
    outputs = Linearization(case.model, *case.batch, micro_batches=4).outputs
    np.testing.assert_allclose(tf.nn.softmax(outputs._keras_logits), outputs, 1e-12)


def _with_an_idle_head():
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, [layers.Dense(2, name="used")(hidden), layers.Dense(2, name="idle")(hidden)])
    model.compile("sgd", ["mse", None])
    x = normal(np.random.default_rng(0), 6, 3)
    batch = x, [x[:, :2], x[:, :2]], None
    model._symbolic_build(data_batch=batch)
    return model, batch


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("graph", [False, True])
def test_weights_that_the_loss_does_not_reach_are_told_from_those_with_no_gradient(graph, micro_batches):
    model, batch = _with_an_idle_head()
    found = []

    def ask():
        lin = Linearization(model, *batch, micro_batches=micro_batches)
        found.append(lin.reached)
        return lin.gradient

    gradient = (tf.function(ask, autograph=False) if graph else ask)()
    paths = [v.path for v in model.trainable_variables]
    assert found == [tuple("idle" not in path for path in paths)] and found[0].count(False) == 2
    assert [bool(np.any(g)) for g in gradient] == list(found[0])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_is_reached_is_known_from_a_gradient_inside_a_condition(micro_batches):
    model, batch = _with_an_idle_head()

    @tf.function(autograph=False)
    def ask(yes):
        lin = Linearization(model, *batch, micro_batches=micro_batches)
        tf.cond(yes, lambda: lin.gradient[0], lambda: tf.zeros([3, 4], tf.float64))
        return tf.constant(lin.reached)

    np.testing.assert_array_equal(ask(tf.constant(True)), ["idle" not in v.path for v in model.trainable_variables])


# What it costs.


class Counted(layers.Layer):
    """Counts its calls, and how many examples at most one of them had."""

    calls, most = 0, 0

    def call(self, x):
        """`x`, unchanged."""
        Counted.calls, Counted.most = Counted.calls + 1, max(Counted.most, x.shape[0] or 0)
        return x


def test_every_pass_goes_over_the_slices_once_and_the_first_tells_the_loss():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), Counted(), layers.Dense(2)])
    model.compile("sgd", "mse")
    x = normal(np.random.default_rng(0), 6, 3)
    model._symbolic_build(data_batch=(x, x[:, :2], None))
    passes = []

    def counted(ask):
        Counted.calls = Counted.most = 0
        ask()
        passes.append(Counted.calls)
        assert Counted.most <= 2

    lin = Linearization(model, x, x[:, :2], micro_batches=3)
    v = _vectors(model)[0]
    counted(lambda: lin.gradient)
    counted(lambda: (lin.gradient, lin.loss, lin.outputs, lin.commit()))
    G, H = lin.gauss_newton(), lin.hessian()
    for ask in (lambda: G @ v, lambda: G.push(v), lambda: H @ v, lambda: lin.loss_at(v), lambda: lin.gradient_at(v)):
        counted(ask)
    lin = Linearization(model, x, x[:, :2], micro_batches=3)
    counted(lambda: (lin.loss, lin.outputs))
    counted(lambda: (lin.gauss_newton() @ v, lin.loss))
    assert passes == [3, 0, 3, 3, 3, 3, 3, 3, 3]


def _graph_of(micro_batches):
    """The graph of a gradient and a few products of a batch of 8 with 37 hidden units."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(37, activation="tanh"), layers.Dense(2)])
    model.compile("sgd", "mse")
    x = tf.constant(normal(np.random.default_rng(0), 8, 3))
    case = type("Case", (), {"model": model, "batch": (x, x[:, :2], None)})
    return tf.function(lambda: _everything(case, micro_batches=micro_batches), autograph=False).get_concrete_function()


def test_no_tensor_has_the_activations_of_the_whole_batch():
    def activations(function):
        shapes = [tuple(t.shape) for op in function.graph.get_operations() for t in op.outputs if t.shape.rank]
        shapes += [
            tuple(d.size for d in shape.dim)
            for f in function.graph.as_graph_def(add_shapes=True).library.function
            for node in f.node_def
            for shape in node.attr["_output_shapes"].list.shape
        ]
        return {shape[0] for shape in shapes if shape[-1:] == (37,) and len(shape) > 1}

    assert 8 in activations(_graph_of(1))
    found = activations(_graph_of(4))
    assert 2 in found and 8 not in found and None not in found and -1 not in found


def test_loops_take_one_slice_at_a_time_and_turns():
    graph = _graph_of(4).graph
    loops = [op for op in graph.get_operations() if op.type in ("While", "StatelessWhile")]
    assert len(loops) > 5
    assert all(op.get_attr("parallel_iterations") == 1 for op in loops)
    for op, before in zip(loops[1:], loops):
        waits, seen = [op], set()
        while waits:
            now = waits.pop()
            if now not in seen:
                seen.add(now)
                waits += [*[t.op for t in now.inputs], *now.control_inputs]
        assert before in seen, f"{op.name} does not wait for {before.name}"


# Refusals.


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True, np.int64(2)])
def test_the_number_is_checked(count):
    case = _built("dense")
    received = re.escape(f"Received: micro_batches={count!r}")
    with pytest.raises(ValueError, match=rf"`Linearization`: `micro_batches` must be an integer.*{received}"):
        Linearization(case.model, *case.batch, micro_batches=count)


def test_xla_wants_equal_slices():
    case = CASES["dense"]().compile()  # whatever the model is compiled for, it is this function that counts

    def loss():
        return Linearization(case.model, *case.batch, micro_batches=4).loss

    def inside_another():
        return tf.function(loss, autograph=False)()

    for function in (loss, inside_another):
        with pytest.raises(ValueError, match="slices of equal and known size. Received: 6 examples"):
            tf.function(function, jit_compile=True, autograph=False)()
    specs = [tf.TensorSpec([None, *np.shape(a)[1:]], tf.as_dtype(a.dtype)) for a in case.batch[:2]]
    traced = tf.function(
        lambda x, y: Linearization(case.model, x, y, micro_batches=3).loss, specs, jit_compile=True, autograph=False
    )
    with pytest.raises(ValueError, match="Received: an unknown number of examples"):
        traced(*case.batch[:2])


def test_slices_may_be_uneven_where_xla_does_not_compile_them():
    case = CASES["dense"]().compile(jit_compile=True)
    uneven = tf.function(lambda: Linearization(case.model, *case.batch, micro_batches=4).loss, autograph=False)()
    np.testing.assert_allclose(uneven, Linearization(case.model, *case.batch).loss, 1e-12)


class Norm(layers.Layer):
    """The length of a batch of vectors, a scalar."""

    def call(self, x):
        """`(batch, units)` to `()`."""
        return tf.norm(x)

    def compute_output_shape(self, input_shape):
        """Of a scalar."""
        return ()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("ask", ["loss", "gradient", "push"])
def test_outputs_without_the_batch_as_first_axis_are_named(ask, graph):
    inputs = keras.Input((3,))
    hidden = layers.Dense(2, name="said")(inputs)
    model = keras.Model(inputs, [hidden, Norm(name="length")(hidden)])
    model.compile("sgd", ["mse", None])
    x = normal(np.random.default_rng(0), 6, 3)
    v = _vectors(model)[0]

    def asked(micro_batches):
        lin = Linearization(model, x, [x[:, :2], x[:, 0]], micro_batches=micro_batches)
        return lin.gauss_newton().push(v).pushed if ask == "push" else getattr(lin, ask)

    function = tf.function(asked, autograph=False) if graph else asked
    function(1)
    with pytest.raises(ValueError, match=r"Received: output 1 \('length'\) of the model .*, of shape \(\)"):
        function(2)


@pytest.mark.parametrize("kind", ["RaggedTensor", "SparseTensor"])
def test_what_is_not_dense_cannot_be_cut(kind):
    x = tf.sparse.from_dense(np.eye(6, 3)) if kind == "SparseTensor" else tf.ragged.constant([[1.0], [2.0, 3.0]] * 3)
    y = np.ones([6, 2])
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    model._symbolic_build(data_batch=(np.ones([6, 3]), y, None))
    for cut in (lambda: Linearization(model, x, y, micro_batches=2).loss, lambda: Linearization(model, x, y).chunk(3)):
        with pytest.raises(ValueError, match=rf"Received: a `{kind}` of shape .*micro_batches=1"):
            cut()


class Outside(keras.Model):
    """A model whose loss does not read its outputs."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """A function of the inputs and weights."""
        return tf.reduce_mean(self.layers[-1](x) ** 2)


def test_a_loss_past_the_outputs_has_a_gradient_and_no_gauss_newton_matrix():
    inputs = keras.Input((3,))
    model = Outside(inputs, layers.Dense(2)(inputs))
    model.compile("sgd")
    x = normal(np.random.default_rng(0), 6, 3)
    whole, cut = (Linearization(model, x, x[:, :2], micro_batches=k) for k in (1, 2))
    _close({"gradient": cut.gradient, "loss": cut.loss}, {"gradient": whole.gradient, "loss": whole.loss})
    with pytest.raises(ValueError, match="does not depend on the model's outputs"):
        cut.gauss_newton() @ cut.gradient


def _mean_of_squares(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred))


def test_a_loss_of_one_number_counts_by_the_share_of_the_slice():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    found = []
    for loss in ("mse", _mean_of_squares):
        model.compile("sgd", loss)
        slices._warned.clear()
        warned = pytest.warns(UserWarning, match="'_mean_of_squares'.*slices")
        with warned if callable(loss) else contextlib.nullcontext():
            lin = Linearization(model, x, y, micro_batches=4)  # of 1 and 2 examples
            found.append([lin.loss, *lin.gradient, *(lin.gauss_newton() @ lin.gradient)])
    for expected, got in zip(*found):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "weighs"), [
    (_mean_of_squares, True), (keras.losses.Dice(), False), (keras.losses.Dice(reduction="sum"), False),
    (keras.losses.Dice(axis=0, name="dice_of_classes"), False),
])  # fmt: skip
def test_losses_that_couple_examples_are_means_of_the_slices_and_warned_of(loss, weighs):
    """Also where sample weights make several numbers of one, and whatever the reduction."""
    rng = np.random.default_rng(0)
    batch = [rng.normal(size=(6, 3)), rng.uniform(size=(6, 2)), *([np.linspace(0.5, 3.0, 6)] if weighs else [])]
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "sigmoid")])
    model.compile("sgd", loss)
    slices._warned.clear()
    with pytest.warns(UserWarning, match="'(_mean_of_squares|dice.*)' does not return .* cut into slices") as caught:
        found = Linearization(model, *batch, micro_batches=2).loss
    assert len(caught) == 1
    rows = [[a[i : i + 3] for a in batch] for i in (0, 3)]
    parts = [float(model.compute_loss(x, y, model(x), *weights)) for x, y, *weights in rows]
    np.testing.assert_allclose(found, np.mean(parts), rtol=1e-5)


def test_an_activity_regularizer_that_keras_adds_up_is_warned_of():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activity_regularizer="l2", name="regularized")])
    model.compile("sgd", "mse")
    x = np.ones((6, 3))
    slices._warned.clear()
    warned = pytest.warns(UserWarning, match="adds the `activity_regularizer` of 'regularized' up.*Use Keras 3.14")
    with contextlib.nullcontext() if keras_internals.ACTIVITY_IS_A_MEAN else warned:
        cut = Linearization(model, x, x[:, :2], micro_batches=2)
        found = [cut.loss, *cut.gradient]
    whole = Linearization(model, x, x[:, :2])
    for a, b in zip(found, [whole.loss, *whole.gradient]):
        assert np.allclose(a, b, rtol=1e-5) == keras_internals.ACTIVITY_IS_A_MEAN
    assert whole.loss > 0
