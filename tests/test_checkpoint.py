"""A run that was stopped or killed, at whatever step, goes on bit for bit."""

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from test_properties import assert_same

import keras_curvature as kc
from keras_curvature.callbacks import Checkpoint, ChiefOnly, Position, SwapNeumannWeights, Terminated

HERE = pathlib.Path(__file__).parent
STEPS = 3  # of an epoch
SLOW = pytest.mark.slow


def data():
    """`x` (24, 4), `y` (24,)."""
    x = np.random.default_rng(0).standard_normal((24, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1).astype("int32")


def quick():
    """The optimizer that is traced soonest."""
    return kc.Neumann(warmup_steps=2)


def compiled(optimizer=quick, curve=True, units=6, **options):
    """A small classifier with batch statistics and random masks; its values are other ones in every process."""
    model = keras.Sequential([
        keras.Input((4,)), keras.layers.Dense(units, activation="tanh"), keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3), keras.layers.Dense(3),
    ])  # fmt: skip
    model = kc.curved(model) if curve else model
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer(), loss, **{"metrics": ["accuracy"], "jit_compile": False, **options})
    return model


def small(**options):
    """A model that needs no tracing, for what does not depend on the model."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="small")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, run_eagerly=True, **options)
    return model


class Note(keras.callbacks.Callback):
    """Notes what each batch showed, and calls `event` after batch number `at`."""

    def __init__(self, at=None, event=None):
        super().__init__()
        self.at, self.event, self.seen = at, event, []

    def on_train_batch_end(self, batch, logs=None):
        """After a batch."""
        self.seen.append((batch, str({name: float(value) for name, value in logs.items()})))  # NaN is not itself
        if len(self.seen) == self.at:
            self.event()


class Killed(Exception):
    """The process is gone, as far as `fit` is concerned."""


def kill():
    """No callback is told."""
    raise Killed


def ask():
    """What a cluster does before it takes a machine away."""
    os.kill(os.getpid(), signal.SIGTERM)


def fit(model, *callbacks, epochs=4, **options):
    """The history of a `fit` in order."""
    x, y = data()
    return model.fit(
        x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks),
        **{"validation_data": (x, y), **options},
    ).history  # fmt: skip


@functools.cache
def whole(**options):
    """`(model, note, history)` of a run that nothing happens to."""
    keras.utils.set_random_seed(0)
    model, note = compiled(**options), Note()
    return model, note, fit(model, note)


def state(model):
    """Everything that has a value."""
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def assert_goes_on(directory, stops, event, expected, every=1, **options):
    """Runs that end after so many steps each, and one to the end, show and leave what `expected` did."""
    model, note, history = expected
    steps = 0
    for at in stops:
        keras.utils.set_random_seed(0 if steps == 0 else 100 + at)
        noted = Note(at, event)
        with pytest.raises((Killed, Terminated)):
            fit(compiled(**options), Checkpoint(directory, every=every), noted)
        begins = Checkpoint(directory).position
        steps = begins.epoch * STEPS + begins.step
    keras.utils.set_random_seed(7 if steps else 0)
    resumed, noted = compiled(**options), Note()
    rest = fit(resumed, Checkpoint(directory, every=every), noted)
    of_epoch = len(note.seen) // 4  # executions, of one step or more
    assert noted.seen == note.seen[begins.epoch * of_epoch + begins.step * of_epoch // STEPS :]
    left = {name: values[begins.epoch :] for name, values in history.items()}
    assert str(rest) == str(left if begins.epoch < 4 else {})
    assert_same(state(resumed), state(model))
    return resumed


def resets():
    """Neumann with a reset in between."""
    return kc.Neumann(warmup_steps=1, reset_every=4)


@pytest.mark.parametrize("optimizer", some([kc.CurveBall, resets], [resets]))
def test_a_killed_run_goes_on_inside_the_epoch(tmp_path, optimizer):
    assert_goes_on(tmp_path, [5, 3], kill, whole(optimizer=optimizer), optimizer=optimizer)  # in epochs 2 and 3


def test_a_run_goes_on_from_the_last_checkpoint(tmp_path):
    expected = whole()
    assert_goes_on(tmp_path / "fours", [2, 6], kill, expected, every=4)  # first before there is any
    assert_goes_on(tmp_path / "epochs", [5], kill, expected, every=None)


@pytest.mark.parametrize("at", some([4, 6, 12], [4]))  # last steps, too
def test_a_signal_saves_and_ends_fit(tmp_path, at):
    before = signal.getsignal(signal.SIGTERM)
    assert_goes_on(tmp_path, [at], ask, whole(), every=None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_end_by_a_signal_is_the_programs(tmp_path):
    with pytest.raises(SystemExit, match="after 4 steps") as raised:
        fit(small(), Checkpoint(tmp_path), Note(4, ask))
    assert raised.value.code == 143
    assert Checkpoint(tmp_path).position == Position(1, 1)


def test_a_second_signal_is_not_caught(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with pytest.raises(Terminated):
            fit(small(), Checkpoint(tmp_path), Note(4, lambda: [ask(), ask()]))
        assert heard == [1]
        fit(small(), Checkpoint(tmp_path / "other", on_signal=False), Note(4, ask), epochs=2)
        assert heard == [1, 1]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_plain_models_and_keras_optimizers_go_on_too(tmp_path):
    for name, make in {"adam": keras.optimizers.Adam, "neumann": lambda: kc.Neumann(warmup_steps=2)}.items():
        options = {"curve": False, "optimizer": make}
        assert_goes_on(tmp_path / name, [5], kill, whole(**options), **options)


@SLOW
def test_swapped_weights_go_on(tmp_path):
    def make():
        return compiled(lambda: kc.Neumann(0.1, warmup_steps=0), curve=False)

    def run(model, *callbacks):
        return fit(model, *callbacks, SwapNeumannWeights())

    keras.utils.set_random_seed(0)
    one = make()
    history = run(one)
    keras.utils.set_random_seed(0)
    with pytest.raises(Killed):
        run(make(), Checkpoint(tmp_path, every=1), Note(5, kill))
    two = make()
    assert run(two, Checkpoint(tmp_path, every=1))["val_loss"] == history["val_loss"][1:]
    assert_same(state(two), state(one))


@pytest.mark.slow
def test_several_steps_per_execution(tmp_path):
    options = {"steps_per_execution": 2}  # of three steps: the last execution of an epoch is a short one
    assert_goes_on(tmp_path, [3], kill, whole(**options), **options)


@SLOW
def test_loss_scales_go_on(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        options = {"optimizer": lambda: kc.Neumann(warmup_steps=2), "auto_scale_loss": True}
        expected = whole(**options)
        assert isinstance(expected[0].optimizer, keras.optimizers.LossScaleOptimizer)
        assert_goes_on(tmp_path, [5], kill, expected, **options)
    finally:
        keras.config.set_dtype_policy("float32")


class Late(keras.Model):
    """Built by its first batch."""

    def __init__(self):
        super().__init__()
        self.drop, self.head = keras.layers.Dropout(0.5), keras.layers.Dense(3)

    def call(self, x, training=False):
        """Logits."""
        return self.head(self.drop(x, training=training))


def test_a_model_that_its_first_batch_builds(tmp_path):
    def late():
        model = kc.curved(Late())
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(quick(), loss, metrics=["accuracy"])
        return model

    keras.utils.set_random_seed(0)
    model, note = late(), Note()
    fit(model, note)
    keras.utils.set_random_seed(0)
    with pytest.raises(Killed):
        fit(late(), Checkpoint(tmp_path, every=1), Note(5, kill))
    resumed, noted = late(), Note()
    fit(resumed, Checkpoint(tmp_path, every=1), noted)
    assert noted.seen == note.seen[5:]
    assert_same(state(resumed), state(model))


def stream(epoch, step):
    """Batches from a position on, a function of the epoch."""

    def batches():
        for number in range(epoch, 4):
            x, y = data()
            order = np.random.default_rng(number).permutation(24)
            for i in range(step if number == epoch else 0, STEPS):
                rows = order[8 * i : 8 * i + 8]
                yield x[rows], y[rows]

    spec = tf.TensorSpec((8, 4)), tf.TensorSpec((8,), tf.int32)
    return tf.data.Dataset.from_generator(batches, output_signature=spec)


@pytest.mark.parametrize("skip", some([True, False], [False]))
def test_streams_go_on_from_the_position(tmp_path, skip):
    def run(directory, note):
        checkpoint = Checkpoint(directory, every=1, skip_batches=skip)
        epoch, step = checkpoint.position
        model = compiled()
        model.fit(
            stream(epoch, 0 if skip else step), steps_per_epoch=STEPS, epochs=4, verbose=0, shuffle=False,
            callbacks=[checkpoint, note],
        )  # fmt: skip
        return model

    keras.utils.set_random_seed(0)
    note = Note()
    model = run(tmp_path / "whole", note)
    keras.utils.set_random_seed(0)
    with pytest.raises(Killed):
        run(tmp_path / "killed", Note(5, kill))
    noted = Note()
    assert_same(state(run(tmp_path / "killed", noted)), state(model))
    assert noted.seen == note.seen[5:]


def test_a_run_that_is_over_stays_as_it_is(tmp_path):
    model, _, _ = whole()
    keras.utils.set_random_seed(0)
    fit(compiled(), Checkpoint(tmp_path))
    again = compiled()
    assert fit(again, Checkpoint(tmp_path)) == {}
    assert_same(state(again), state(model))
    assert fit(again, epochs=1)["loss"]  # and the next `fit` begins where it says


def test_so_many_are_kept(tmp_path):
    fit(small(), Checkpoint(tmp_path, every=1, keep=2))
    assert sorted(path.name for path in tmp_path.glob("*.index")) == ["ckpt-11.index", "ckpt-12.index"]


def test_half_a_checkpoint_is_none(tmp_path):
    with pytest.raises(Killed):
        fit(small(), Checkpoint(tmp_path, every=1), Note(5, kill))
    newest = tf.train.latest_checkpoint(tmp_path)
    (tmp_path / "ckpt-6.data-00000-of-00001").write_bytes(b"cut off")
    (tmp_path / "ckpt-6.index").write_bytes(b"")
    assert tf.train.latest_checkpoint(tmp_path) == newest
    fit(small(), Checkpoint(tmp_path, every=1))
    assert Checkpoint(tmp_path).position == Position(4, 0)


# Refusals.


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The directory of a run that was killed after five steps, to be copied."""
    directory = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        fit(compiled(), Checkpoint(directory, every=1), Note(5, kill))
    return directory


@pytest.fixture
def copied(killed, tmp_path):
    """A copy of it, whose checkpoints are found there."""
    return shutil.copytree(killed, tmp_path / "copied")


def contents(folder):
    """Names and bytes of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": 7}, r"another model: variable 0 of 9 is `kernel` \(4, 6\) float32. Received: .* 9 is `kernel`"),
        ({"optimizer": kc.HessianFree}, "optimizer `Neumann`. Received: a model compiled with `HessianFree`"),
        ({"optimizer": lambda: kc.Neumann(use_ema=True)}, "another optimizer: variable 2 of "),
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(copied, options, message):
    before = contents(copied)
    model = compiled(**options)
    weights = model.get_weights()
    with pytest.raises(ValueError, match=message):
        fit(model, Checkpoint(copied, every=1))
    assert contents(copied) == before
    assert_same(model.get_weights(), weights)


def test_an_epoch_of_another_length_is_refused(copied):
    x, y = data()
    before = contents(copied)
    with pytest.raises(ValueError, match="after 2 of the 3 steps of epoch 1. Received: epochs of 6 steps"):
        compiled().fit(x, y, batch_size=4, epochs=4, verbose=0, callbacks=[Checkpoint(copied)])
    assert contents(copied) == before


def test_another_first_epoch_or_other_metrics_are_refused(tmp_path):
    with pytest.raises(Killed):
        fit(small(), Checkpoint(tmp_path, every=1), Note(2, kill))  # in epoch 0, which Keras takes for "not given"
    with pytest.raises(ValueError, match="continues in epoch 0. Received: `fit` begins with epoch 2"):
        fit(small(), Checkpoint(tmp_path), initial_epoch=2)
    model = small(metrics=["accuracy", "sparse_top_k_categorical_accuracy"])
    with pytest.raises(ValueError, match="another metric"):
        fit(model, Checkpoint(tmp_path))
    fit(small(), Checkpoint(tmp_path))  # and a refusal leaves nothing behind


def test_a_fit_that_fails_as_it_begins_leaves_nothing_behind(tmp_path):
    with pytest.raises(Killed):
        fit(small(), Checkpoint(tmp_path / "one", every=1), Note(2, kill))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match="two of these callbacks"):
        fit(small(), Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two"))
    after = Note()
    fit(small(), after, epochs=1)
    assert [batch for batch, _ in after.seen] == [0, 1, 2]
    with pytest.raises(Killed):
        fit(small(), Checkpoint(tmp_path / "one"), keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: kill()))
    after = Note()
    fit(small(), Checkpoint(tmp_path / "two"), after)
    assert after.seen[0][0] == 2


# A `fit` that fails.


def interrupted(directory, steps=2):
    """A checkpoint inside the first epoch."""
    with pytest.raises(Killed):
        fit(small(), Checkpoint(directory, every=1), Note(steps, kill))


def failing(hook):
    """A callback that fails in `hook`."""
    return keras.callbacks.LambdaCallback(**{hook: lambda *_, **__: kill()})


def test_a_resumed_fit_that_fails_leaves_other_models_their_batches(tmp_path):
    interrupted(tmp_path)
    other, (x, y) = small(), data()
    expected = other.evaluate(x, y, batch_size=3, verbose=0)
    with pytest.raises(Killed):
        fit(small(), Checkpoint(tmp_path), failing("on_epoch_begin"))
    batches = Batches()
    assert other.evaluate(x, y, batch_size=3, verbose=0, callbacks=[batches]) == expected
    assert batches.seen == list(range(8))


class Batches(keras.callbacks.Callback):
    """Notes the batches of an evaluation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_test_batch_begin(self, batch, logs=None):
        """Before a batch."""
        self.seen.append(batch)


def test_a_callback_may_evaluate_before_a_resumed_epoch_begins(tmp_path):
    interrupted(tmp_path)
    other, batches = small(), Batches()
    x, y = data()

    def evaluate(*_):
        for model in (other, resumed):
            model.evaluate(x, y, batch_size=8, verbose=0, callbacks=[batches])

    resumed, noted = small(), Note()
    fit(resumed, Checkpoint(tmp_path), keras.callbacks.LambdaCallback(on_epoch_begin=evaluate), noted, epochs=1)
    assert batches.seen == [0, 1, 2, 0, 1, 2]
    assert [batch for batch, _ in noted.seen] == [2]


HOOKS = ["on_train_begin", "on_epoch_begin", "on_train_batch_end", "on_epoch_end"]


@pytest.mark.parametrize("hook", some(HOOKS, ["on_epoch_begin", "on_train_batch_end"]))
def test_a_fit_that_fails_leaves_the_handler_and_the_next_fit_as_they_were(tmp_path, hook):
    interrupted(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "later")
    for _ in range(2):  # the second epoch is where the next `fit` of the same model would begin
        with pytest.raises(Killed):
            fit(small(), Checkpoint(tmp_path / "later", every=1), failing("on_epoch_end"))
    before, model, after = signal.getsignal(signal.SIGTERM), small(), Note()
    with pytest.raises(Killed):
        fit(model, Checkpoint(tmp_path / "later"), failing(hook))
    assert signal.getsignal(signal.SIGTERM) is before
    fit(model, after, epochs=1)
    assert [batch for batch, _ in after.seen] == [0, 1, 2]


def test_a_fit_inside_a_fit_gives_the_handler_back_to_the_outer_one(tmp_path):
    before, inside = signal.getsignal(signal.SIGTERM), []

    def nested(*_):
        outer = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Killed):
            fit(small(), Checkpoint(tmp_path / "inner"), failing("on_epoch_begin"))
        inside.append((outer is not before, signal.getsignal(signal.SIGTERM) == outer))

    fit(small(), Checkpoint(tmp_path / "outer"), keras.callbacks.LambdaCallback(on_epoch_begin=nested), epochs=1)
    assert inside == [(True, True)]
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_and_another_handler_are_left_alone(tmp_path):
    before, failed = signal.getsignal(signal.SIGTERM), []

    def run():
        try:
            fit(small(), Checkpoint(tmp_path / "thread"), failing("on_epoch_end"))
        except Killed:
            failed.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failed == [before]

    def own(*_):
        """A handler that a callback sets, and keeps."""

    try:
        note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: signal.signal(signal.SIGTERM, own))
        fit(small(), Checkpoint(tmp_path / "own"), note, epochs=1)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_data_that_end_before_the_position_are_refused(tmp_path):
    interrupted(tmp_path)
    x, y = data()
    known = tf.data.Dataset.from_tensor_slices((x[:8], y[:8])).batch(8)
    unknown = known.filter(lambda *_: True)
    for short in (known, unknown):
        with (
            pytest.warns(UserWarning, match="ran out of data") if short is known else contextlib.nullcontext(),
            pytest.raises(ValueError, match="continues at step 2, but the data end before"),
        ):
            small().fit(short, steps_per_epoch=3, epochs=4, verbose=0, shuffle=False, callbacks=[Checkpoint(tmp_path)])


def test_only_fit_continues_a_run(tmp_path):
    interrupted(tmp_path)
    callbacks = keras.callbacks.CallbackList([Checkpoint(tmp_path)], model=small(), epochs=1, steps=3)
    before = signal.getsignal(signal.SIGTERM)
    callbacks.on_train_begin()
    with pytest.raises(ValueError, match="only `fit` can continue"):
        callbacks.on_epoch_begin(0)
    callbacks.on_train_end()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directory": ""}, "`directory` must be a path"),
        ({"every": 0}, r"`every` must be an integer >= 1, or None. Received: every=0"),
        ({"keep": "all"}, r"`keep` must be an integer >= 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(**{"directory": "here", **arguments})
    with pytest.raises(ValueError, match="`callback` must be a"):
        ChiefOnly("tensorboard")


# Strategies and processes.

MIRRORED = """
import os, signal, sys
import keras, numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from test_checkpoint import Checkpoint, Note, compiled, fit, state
directory, seed, at, out = sys.argv[1:]
keras.utils.set_random_seed(int(seed))
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for name in ("whole", "killed") if out == "whole" else ("killed",):
    keras.utils.set_random_seed(int(seed))
    with strategy.scope():
        model = compiled()
    kill = Note(int(at), lambda: os.kill(os.getpid(), signal.SIGKILL))
    callbacks = [] if name == "whole" else [Checkpoint(directory, every=1), kill]
    history = fit(model, *callbacks)
    logs = {name: history[name] for name in ("loss", "val_loss")}
    np.savez(os.path.join(directory, out + ".npz"), *state(model), **logs)
"""


@SLOW
def test_replicas_go_on_after_a_kill(tmp_path):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    for arguments, code in ((("0", "5", "whole"), -signal.SIGKILL), (("1", "99", "killed"), 0)):
        run = subprocess.run(
            [sys.executable, "-c", MIRRORED, str(tmp_path), *arguments],
            env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == code, run.stderr[-2000:]
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "killed"))
    for name in set(one) - {"loss", "val_loss"}:
        np.testing.assert_array_equal(one[name], two[name])
    # each replica evaluates with batch statistics of its own
    np.testing.assert_array_equal(two["val_loss"], one["val_loss"][1:])
    np.testing.assert_allclose(two["loss"], one["loss"][1:], rtol=1e-6)


class Resolver:
    """What a strategy knows of its process."""

    def __init__(self, task_type, task_id, *jobs):
        self.task_type, self.task_id, self.jobs = task_type, task_id, jobs

    def cluster_spec(self):
        """The jobs of the cluster."""
        return self


@pytest.mark.parametrize(
    ("resolver", "writes"),
    [
        (None, True),
        (Resolver("", None), True),
        (Resolver("worker", 0, "worker"), True),
        (Resolver("worker", 1, "worker"), False),
        (Resolver("worker", 0, "worker", "chief"), False),
        (Resolver("chief", 0, "worker", "chief"), True),
    ],
)
def test_only_the_chief_writes(tmp_path, resolver, writes):
    class Strategy:
        cluster_resolver = resolver

    class Model:
        distribute_strategy = Strategy()

    callback = ChiefOnly(keras.callbacks.CSVLogger(str(tmp_path / "log.csv")))
    callback.set_model(Model())
    callback.set_params({"epochs": 1})
    callback.on_train_begin()
    callback.on_epoch_end(0, {"loss": 1.0})
    callback.on_train_end()
    assert (tmp_path / "log.csv").exists() == writes


def test_the_chief_does_what_the_callback_does(tmp_path):
    note = Note()
    fit(compiled(), ChiefOnly(note), ChiefOnly(keras.callbacks.TensorBoard(tmp_path)), epochs=1)
    assert [batch for batch, _ in note.seen] == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"train", "validation"}
