"""The ImageNet program of `tpu/`: what it refuses, and what a run is; the whole of it in `-m slow`."""

import json
import signal
import subprocess
import sys
import zipfile

import keras
import made_up_tpu
import numpy as np
import pytest
import tensorflow as tf
from tpu_folder import TPU

import dry_run  # isort: skip
import options  # isort: skip
import progress  # isort: skip
import train  # isort: skip


# Refusals, before anything starts.


def refused(capsys, *argv):
    """What the program says before it gives up."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "resnet18"], "`--model` must be one of resnet50, resnet101, inception_v3, inception_resnet_v2"),
        (["--optimizer", "sophia"], "`--optimizer` must be one of neumann, sgd"),
        (["--preset", "paper/vgg"], "`--preset` must be one of paper/resnet50-b1600"),
        (["--batch_size", "100"], "cannot be cut into whole passes of `--per_replica_batch` 32 on 1 replicas"),
        (["--batch_size", "100"], "`--per_replica_batch 25` divides it"),
        (["--batch_size", "64"], "`--batch_size`: 64 is more than the 48 images"),
        (["--strategy", "cluster"], "`--strategy` must be one of auto, tpu"),
        (["--strategy", "tpu"], "needs the TPU's name"),
        (["--batch_size", "0"], "`--batch_size` must be an integer of at least 1. Received: 0"),
        (["--epochs", "0"], "`--epochs` must be an integer of at least 1. Received: 0"),
        (["--log_every", "0"], "`--log_every` must be an integer of at least 1. Received: 0"),
        (["--learning_rate", "-1"], "`--learning_rate` must be more than 0. Received: -1.0"),
        (["--learning_rate", "nan"], "`--learning_rate` must be more than 0. Received: nan"),
        (["--mu_end", "1"], "`--mu_end` must be at least 0 and less than 1. Received: 1.0"),
        (["--weight_decay", "-0.1"], "`--weight_decay` must be at least 0. Received: -0.1"),
        (["--profile", "9"], "`--profile` must be two steps, such as 100,110. Received: 9"),
        (["--profile", "9,3"], "`--profile` must be two steps"),
        (
            ["--batch_size", "16", "--per_replica_batch", "16", "--steps_per_execution", "2"],
            "`--steps_per_execution` 2 must divide the 3 steps of an epoch. Near it are 1, 3.",
        ),
        (["--model", "resnet50", "--zero_last_gamma", "--batch_size", "32"], "needs `--model resnet50_v1_5`"),
    ],
)
def test_what_cannot_be_is_refused(capsys, tmp_path, monkeypatch, data_dir, given, message):
    monkeypatch.delenv("TPU_NAME", raising=False)
    run_dir = tmp_path / "run"
    assert message in refused(capsys, "--data_dir", data_dir, "--run_dir", str(run_dir), *given)
    assert not run_dir.exists()


def test_a_directory_without_the_dataset_is_refused(capsys, tmp_path):
    said = refused(capsys, "--data_dir", str(tmp_path), "--run_dir", str(tmp_path / "run"), "--batch_size", "32")
    assert f"no imagenet2012 in '{tmp_path}'" in said
    assert "tfds build imagenet2012" in said
    assert list(tmp_path.iterdir()) == []
    assert "`--run_dir` is needed" in refused(capsys, "--data_dir", str(tmp_path))


def test_a_folder_of_something_else_is_left_alone(capsys, tmp_path, data_dir):
    given = ["--data_dir", data_dir, "--run_dir", str(tmp_path), "--batch_size", "32", "--model", "resnet_small"]
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is not empty and no run of this program" in refused(capsys, *given)
    with pytest.raises(SystemExit) as stop:
        train.main(["--dry_run", "--run_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_with_other_settings_is_left_alone(capsys, tmp_path, data_dir):
    run_dir, settings = str(tmp_path / "run"), {"optimizer": "neumann", "batch_size": 32, "seed": 0}
    options.claim(run_dir, settings, chief=False)
    assert not (tmp_path / "run").exists()
    options.claim(run_dir, settings, chief=True)
    options.claim(run_dir, settings, chief=True)
    with pytest.raises(ValueError, match="--optimizer neumann there, sgd here; --seed 0 there, 1 here"):
        options.claim(run_dir, {**settings, "optimizer": "sgd", "seed": 1}, chief=True)
    given = ["--data_dir", data_dir, "--run_dir", run_dir, "--batch_size", "16", "--per_replica_batch", "16"]
    assert "--batch_size 32 there, 16 here" in refused(capsys, *given)
    # an option that an older program did not write is not compared; one that it wrote is
    options.claim(run_dir, {**settings, "shuffle_buffer": 7}, chief=True)
    options.claim(str(tmp_path / "new"), {"shuffle_buffer": 7}, chief=True)
    with pytest.raises(ValueError, match="--shuffle_buffer 7 there, 8 here"):
        options.claim(str(tmp_path / "new"), {"shuffle_buffer": 8}, chief=True)


def test_folders_that_do_not_answer_are_said(capsys, monkeypatch, tmp_path, data_dir):
    def unreachable(path):
        raise tf.errors.UnavailableError(None, None, "Error executing an HTTP request: could not resolve host")

    monkeypatch.setattr(tf.io.gfile, "exists", unreachable)
    given = ["--data_dir", data_dir, "--run_dir", "gs://nowhere/run", "--batch_size", "16", "--per_replica_batch", "16"]
    said = refused(capsys, *given)
    assert "`--run_dir` 'gs://nowhere/run' cannot be read: UnavailableError: Error executing" in said


def test_xla_is_for_one_replica():
    args, _ = options.arguments(["--xla", "--checkpoint_minutes", "5"])
    train.refuse_what_does_not_go_together(args, tf.distribute.get_strategy())
    train.refuse_what_does_not_go_together(args, made_up_tpu.strategy(8))  # which compiles in any case

    class Two:
        num_replicas_in_sync = 2

    with pytest.raises(ValueError, match="`--xla` compiles the step of one replica. Received: 2 replicas of `Two`"):
        train.refuse_what_does_not_go_together(args, Two())


def test_every_option_says_what_it_means():
    _, parser = options.arguments([])
    assert [action.dest for action in parser._actions if not action.help or len(action.help) < 12] == []


# The program.

SMALL = [
    "--model", "resnet_small", "--image_size", "32", "--batch_size", "12", "--per_replica_batch", "12",
    "--warmup_epochs", "0", "--log_every", "1",
]  # fmt: skip


def test_the_program_trains_and_goes_on(capsys, tmp_path, data_dir):
    given = [*SMALL, "--epochs", "1", "--data_dir", data_dir, "--run_dir", str(tmp_path)]
    train.main(given)
    said = capsys.readouterr().out
    train.main([*given, "--epochs", "2", "--steps_per_execution", "2", "--eval_batch", "4"])
    more = capsys.readouterr().out
    assert "batch 12 = 1 replicas x 1 passes x 12 images; 4 steps per epoch, 1 epochs" in said
    assert "no TPU and no GPU was found" in said
    assert "begins at step 0" in said
    assert "final: top-1 error " in said
    assert "resumed at step 4 (step 0 of epoch 2)" in more
    assert [line.split()[1] for line in more.splitlines() if line.startswith("step ")] == ["6", "8"]
    tags = {}
    for file in sorted((tmp_path / "logs" / "train").glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append(event.step)
    assert tags["batch_loss"] == [1, 2, 3, 4, 6, 8]  # iterations, and not executions
    assert tags["epoch_images_per_second"] == tags["epoch_images_per_second_per_replica"] == [0, 1]
    assert tags["epoch_top_1"] == [0, 1]
    # any Keras loads it: no class of this program is in it
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        config = json.loads(file.read("config.json"))
    assert "RampThenStairs" not in json.dumps(config)
    assert keras.models.load_model(tmp_path / "model.keras").output_shape == (None, 1000)


def test_the_program_trains_on_a_tpu_up_to_its_first_step(capsys, tmp_path, data_dir, monkeypatch):
    """All of it that the host does, with passes and several steps per execution; then there is no TPU to run on."""
    monkeypatch.setattr(train.strategies, "make", lambda *args: made_up_tpu.strategy(2))
    given = [*SMALL, "--data_dir", data_dir, "--run_dir", str(tmp_path), "--per_replica_batch", "3", "--epochs", "1"]
    with pytest.raises(tf.errors.InvalidArgumentError, match="No OpKernel was registered to support Op 'TPURepl"):
        train.main([*given, "--steps_per_execution", "4", "--mixed_bfloat16"])
    keras.config.set_dtype_policy("float32")
    said = capsys.readouterr().out
    assert "TPUStrategyV2; batch 12 = 2 replicas x 2 passes x 3 images; 4 steps per epoch" in said
    assert "on 2 TPU" in said


class Interrupted:
    """Sends this process SIGTERM when a callback reaches a place of the run; `train.Progress` with one more duty."""

    def __init__(self, monkeypatch, at):
        class Signalling(progress.Progress):
            def on_test_batch_end(self, batch, logs=None):
                if at == "validation":
                    signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(train, "Progress", Signalling)


@pytest.mark.slow
def test_sigterm_in_a_validation_does_not_wait_for_its_end(capsys, tmp_path, data_dir, monkeypatch):
    given = [*SMALL, "--epochs", "2", "--data_dir", data_dir, "--run_dir", str(tmp_path), "--eval_batch", "2"]
    with monkeypatch.context() as patched, pytest.raises(train.Terminated):
        Interrupted(patched, "validation")
        train.main(given)
    assert "stopped by SIGTERM after 4 steps" in capsys.readouterr().out
    train.main(given)
    said = capsys.readouterr().out
    assert "resumed at step 4 (step 0 of epoch 2)" in said
    assert "epoch    2 of 2" in said and "final: " in said


def test_checkpoints_by_steps_and_minutes(tmp_path):
    """Not after every epoch of four steps; the last state always."""

    def saved(name, **how):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        x, folder = np.zeros((8, 2), "float32"), tmp_path / name
        checkpoint = progress.Checkpoints(folder, **how)
        checkpoint.keep = 100
        model.fit(x, x[:, :1], batch_size=2, epochs=5, verbose=0, callbacks=[checkpoint])
        return sorted(int(path.stem.split("-")[1]) for path in folder.glob("*.index"))

    assert saved("epochs") == [4, 8, 12, 16, 20]
    assert saved("steps", every=6) == [6, 12, 18, 20]
    assert saved("seldom", every=100) == [20]
    assert saved("hours", minutes=60) == [20]
    assert len(saved("always", minutes=1e-9)) == 20


def test_logs_of_a_step_stay_on_the_device():
    """Nobody asks for their numbers but who reads them."""
    kinds = []

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kinds.extend(map(type, logs.values()))

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.zeros((8, 2), "float32")
    callbacks = progress.Lazily([Note()], add_history=True, model=model, epochs=2, steps=4, verbose=0)
    history = model.fit(x, x[:, :1], batch_size=2, epochs=2, verbose=0, callbacks=callbacks)
    assert len(kinds) == 8 and all(issubclass(kind, tf.Tensor) for kind in kinds)
    assert len(history.history["loss"]) == 2 and isinstance(history.history["loss"][0], float)


def state(run_dir):
    """All variables in a run's newest checkpoint."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(run_dir / "checkpoints"))
    names = [name for name in reader.get_variable_to_shape_map() if "VARIABLE_VALUE" in name]
    return {name: reader.get_tensor(name) for name in names}


@pytest.mark.slow
def test_the_dry_run(tmp_path):
    run = subprocess.run(
        [sys.executable, str(TPU / "train.py"), "--dry_run", "--run_dir", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    for line in ("stopped by SIGTERM after", "resumed at step", "final: top-1 error", "passed"):
        assert line in run.stdout
    # and what is left is what a run that nobody stopped leaves, to the last bit
    whole = [*dry_run.OPTIONS, "--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "whole")]
    _, code = dry_run.started(whole, tmp_path)
    assert code == 0
    one, two = state(tmp_path / "run"), state(tmp_path / "whole")
    assert set(one) == set(two)
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


# Programs for a machine without TensorFlow.


def test_exported_programs_that_are_not_there(tmp_path, capsys):
    import run_exported

    for arguments, said in (([str(tmp_path)], "no programs"), ([str(tmp_path / "nowhere")], "no programs")):
        with pytest.raises(SystemExit):
            run_exported.main(arguments)
        assert said in capsys.readouterr().err
    (tmp_path / "cnn-sgd-float32.json").write_text("{}")
    with pytest.raises(ValueError, match="copy the whole folder"):
        run_exported.found_in(str(tmp_path))


def test_an_exported_program_of_another_version_says_so():
    import run_exported

    spec = {"written": {"JAX": "0.9.0", "TensorFlow": "2.20.0"}}
    assert run_exported.other_versions(spec, "0.9.0") == ""
    assert "jax 0.9.0 and TensorFlow 2.20.0, this is jax 0.10.2" in run_exported.other_versions(spec, "0.10.2")
    assert "write it anew" in run_exported.other_versions({}, "0.10.2")
